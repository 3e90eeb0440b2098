"""How long storage took: exact bounds, whose it was, and series that never fall, through parsers that are not ours."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from pointcall_executor.core.trigger import Topology
from pointcall_executor.kernel.storage import BUCKETS, Histogram
from pointcall_executor.session import LEFT_MAX, Session
from pointcall_executor.telemetry import latencies as module
from pointcall_executor.telemetry.latencies import BOUNDS_NS, NODE, OTHER, Labels, Latencies
from pointcall_executor.telemetry.metrics import Metrics
from pointcall_runbook.vocabulary import Operation, service
from tests.unit.live.night import QUIET

SDA = 8 << 20
MS = 1_000_000
NAME = "pointcall_storage_seconds"
API, DB = service("api").number, service("db").number
AS_IS: Any = None


def kernel_bucket(took_ns: int) -> int:
    """What bpf/latency.h does."""
    units = took_ns >> 10
    return min(units.bit_length() - 1 if units else 0, BUCKETS - 1)


class Kernel:
    """The sensors of one session: what is told to them stays until they are let go."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[tuple[int, int, Operation], Counter[int]]] = {}
        self.looks = 0

    def took(
        self,
        *ns: int,
        cgroup: int = 0,
        device: int = SDA,
        operation: Operation = Operation.READ,
        sensor: str = "storage",
    ) -> None:
        rows = self._counts.setdefault(sensor, {})
        rows.setdefault((cgroup, device, operation), Counter()).update(kernel_bucket(each) for each in ns)

    def histograms(self) -> dict[str, Sequence[Histogram]]:
        self.looks += 1
        return {
            sensor: [
                Histogram(*key, counts.total(), tuple(counts[n] for n in range(BUCKETS)))
                for key, counts in rows.items()
            ]
            for sensor, rows in self._counts.items()
        }

    def watch(self, cgroup_id: int, name: str) -> None:
        """Nothing to watch here."""

    def unwatch(self, cgroup_id: int) -> None:
        """Nothing to watch here."""

    def leave(self) -> None:
        self._counts = {}


def session(attached_ns: int = 1) -> Any:
    """A real session of which only sensors and topology are there."""
    topology = Topology(names={API: "api", DB: "db"})
    return Session(AS_IS, AS_IS, AS_IS, AS_IS, 0, AS_IS, {}, Kernel(), attached_ns, AS_IS, topology)  # type: ignore[arg-type]


@dataclass
class Node:
    session: Any = field(default_factory=session)
    now: float = 0.0
    latencies: Latencies = field(init=False)

    def __post_init__(self) -> None:
        self.latencies = Latencies(lambda: self.session, lambda: self.now)

    @property
    def kernel(self) -> Kernel:
        kernel: Kernel = self.session.sensors
        return kernel

    def totals(self) -> dict[tuple[str, ...], int]:
        self.now += 1.0
        return {tuple(labels): below[-1] for labels, below in self.latencies.below().items()}


@pytest.fixture
def node() -> Node:
    return Node()


@given(
    st.lists(
        st.one_of(st.integers(0, 2**45), st.sampled_from(BOUNDS_NS), st.sampled_from(BOUNDS_NS).map(lambda b: b - 1))
    )
)
def test_each_bound_counts_exactly_what_took_less(took: Sequence[int]) -> None:
    node = Node()
    node.kernel.took(*took)
    (below,) = node.latencies.below().values() if took else ((0,) * (len(BOUNDS_NS) + 1),)
    assert below == (*(sum(ns < bound for ns in took) for bound in BOUNDS_NS), len(took))


def test_bounds_are_those_of_the_kernel_in_its_own_unit() -> None:
    assert len(BOUNDS_NS) == 21
    assert (BOUNDS_NS[0], BOUNDS_NS[6], BOUNDS_NS[-1]) == (16 * 1024, 1024 * 1024, 2**24 * 1024)
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(BOUNDS_NS))


def test_what_no_declared_service_did_is_one_series(node: Node) -> None:
    node.session.moved(API, 70)
    node.kernel.took(MS, MS, cgroup=70)
    for cgroup in (0, 1, 99, 100):
        node.kernel.took(MS, cgroup=cgroup)
    node.kernel.took(MS, cgroup=70, operation=Operation.FSYNC, sensor="fsync", device=259 << 20 | 3)
    assert node.totals() == {
        ("storage", "api", "8:0", "read"): 2,
        ("storage", NODE, "8:0", "read"): 4,
        ("fsync", "api", "259:3", "fsync"): 1,
    }


def test_a_recreated_service_keeps_what_it_had(node: Node) -> None:
    node.session.moved(API, 70)
    node.kernel.took(MS, cgroup=70)
    assert node.totals() == {("storage", "api", "8:0", "read"): 1}
    node.kernel.took(MS, cgroup=70)
    node.session.moved(API, 71)  # nobody looked in between
    node.kernel.took(MS, cgroup=71)
    node.session.moved(API, 72)
    node.kernel.took(MS, cgroup=72)
    assert node.totals() == {("storage", "api", "8:0", "read"): 4}


def test_whoever_is_declared_later_owns_what_comes_then(node: Node) -> None:
    node.kernel.took(MS, cgroup=70)
    node.totals()
    node.session.moved(DB, 70)
    node.kernel.took(MS, MS, cgroup=70)
    assert node.totals() == {("storage", NODE, "8:0", "read"): 1, ("storage", "db", "8:0", "read"): 2}


def test_old_cgroups_are_remembered_up_to_a_number(node: Node) -> None:
    node.session.moved(DB, 7)
    for cgroup in range(100, 102 + LEFT_MAX):
        node.session.moved(API, cgroup)
    assert node.session.owner(100) == ""
    assert node.session.owner(101) == node.session.owner(101 + LEFT_MAX) == "api"
    assert node.session.owner(7) == "db"
    node.session.moved(API, 0)
    assert node.session.owner(101 + LEFT_MAX) == "api"


def test_nothing_falls_when_sessions_follow_each_other(node: Node) -> None:
    key = ("storage", NODE, "8:0", "read")
    node.kernel.took(MS, MS)
    assert node.totals() == {key: 2}
    before, node.session = node.session, session(2)
    before.sensors.leave()
    assert node.totals() == {key: 2}
    node.kernel.took(MS, MS, MS)
    assert node.totals() == {key: 5}
    node.kernel.leave()  # let go, and not replaced yet
    assert node.totals() == {key: 5}
    node.session = None
    assert node.totals() == {key: 5}


def test_an_entry_that_the_kernel_forgot_and_began_again_adds_up(node: Node) -> None:
    key = ("storage", NODE, "8:0", "read")
    node.kernel.took(MS, MS, 8 * MS)
    assert node.totals() == {key: 3}
    node.kernel.leave()  # it made room for others
    node.kernel.took(MS)
    assert node.totals() == {key: 4}
    node.kernel.took(MS)
    assert node.totals() == {key: 5}


def test_the_number_of_series_has_an_end(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERIES_MAX", 3)
    for minor in range(5):
        node.kernel.took(MS, device=SDA | minor)
    totals = node.totals()
    assert totals == {("storage", NODE, f"8:{n}", "read"): 1 for n in range(3)} | {("storage", NODE, OTHER, "read"): 2}
    node.kernel.took(MS, device=SDA | 1)
    node.kernel.took(MS, device=SDA | 4)
    assert node.totals() == totals | {("storage", NODE, "8:1", "read"): 2, ("storage", NODE, OTHER, "read"): 3}


def test_one_look_serves_many_readers_also_at_once(node: Node) -> None:
    node.kernel.took(MS)
    readers = [threading.Thread(target=node.latencies.below) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert node.kernel.looks == 1
    assert list(node.latencies.below()) == [Labels("storage", NODE, "8:0", "read")]


def samples(families: Iterable[Any]) -> dict[tuple[str, str], float]:
    (family,) = [f for f in families if f.name == NAME]
    assert family.type == "histogram"
    assert {tuple(sorted(set(s.labels) - {"le"})) for s in family.samples} <= {
        ("device", "operation", "sensor", "service")
    }
    return {(s.name.removeprefix(NAME), s.labels["le"]): s.value for s in family.samples}


def test_both_official_parsers_take_it_without_a_sum(node: Node) -> None:
    node.kernel.took(1_000, 3 * MS, 3 * MS, 20 * 10**9, cgroup=5)
    metrics = Metrics(lambda: QUIET, latencies=node.latencies)
    found = samples(text_string_to_metric_families(metrics.text().decode()))
    assert found == samples(open_metrics(generate_latest(metrics.registry).decode()))
    assert {name for name, _ in found} == {"_bucket"}
    assert found["_bucket", "1.6384e-05"] == found["_bucket", "0.002097152"] == 1
    assert found["_bucket", "0.004194304"] == found["_bucket", "17.179869184"] == 3
    assert found["_bucket", "+Inf"] == 4
    assert [float(le) for _, le in found] == [*(ns / 1e9 for ns in BOUNDS_NS), float("inf")]


def test_before_anything_is_armed_there_are_no_series() -> None:
    assert samples(text_string_to_metric_families(Metrics(lambda: QUIET).text().decode())) == {}
