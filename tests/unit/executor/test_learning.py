"""What a service has learned to call goes with it: to its next cgroup, to the next session, beyond a restart, not to
another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor import learning as module
from pointcall_executor.kernel.syscalls import Habits
from pointcall_executor.learning import KEYS_MAX, STALE_NS, Kept, Learned, Learning

API, OTHER = ("api", "aa" * 32), ("api", "bb" * 32)
LEARN_NS = 1000


class Sensor:
    """Remembers like the map in the kernel."""

    def __init__(self) -> None:
        self.watched: dict[int, Habits] = {}

    def learn(self, cgroup_id: int, known: frozenset[int] = frozenset(), *, until_ns: int = 0) -> None:
        self.watched[cgroup_id] = Habits(0, until_ns, 0, known)

    def habits(self, cgroup_id: int) -> Habits:
        return self.watched[cgroup_id]

    def forget(self, cgroup_id: int) -> None:
        self.watched.pop(cgroup_id, None)

    def calls(self, cgroup_id: int, *numbers: int) -> None:
        habits = self.watched[cgroup_id]
        self.watched[cgroup_id] = Habits(0, habits.armed_ns, 0, habits.calls | set(numbers))


def test_a_recreated_service_goes_on_where_it_was() -> None:
    sensor, learned = Sensor(), Learned()
    learning = Learning(sensor, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0, 257)
    learning.unwatch(1)
    learning.unwatch(1)
    assert sensor.watched == {}
    learning.watch(2, API, 900)
    assert sensor.watched[2] == Habits(0, 1100, 0, frozenset({0, 257}))  # the time it took counts, too


def test_another_program_under_the_same_name_is_learned_anew() -> None:
    sensor, learned = Sensor(), Learned()
    learning = Learning(sensor, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0)
    learning.unwatch(1)
    learning.watch(2, OTHER, 900)
    assert sensor.watched[2] == Habits(0, 1900, 0, frozenset())


def test_the_next_session_takes_it_over() -> None:
    sensor, after, learned = Sensor(), Sensor(), Learned()
    learning, following = Learning(sensor, learned, LEARN_NS), Learning(after, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0, 1)
    following.watch(1, API, 500)
    after.calls(1, 2)
    learning.keep()
    following.refresh()
    assert after.watched[1] == Habits(0, 1100, 0, frozenset({0, 1, 2}))


def test_the_time_that_a_newer_manifest_gives_is_the_longest() -> None:
    sensor, learned = Sensor(), Learned()
    Learning(sensor, learned, 10 * LEARN_NS).watch(1, API, 100)  # type: ignore[arg-type]
    Learning(sensor, learned, LEARN_NS).watch(1, API, 200)  # type: ignore[arg-type]
    assert sensor.watched[1].armed_ns == 200 + LEARN_NS


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learned.json"


def test_after_a_restart_only_what_is_left_of_the_time_is_learned(path: Path) -> None:
    sensor, kept = Sensor(), Kept(path, 0)
    learning = Learning(sensor, kept.learned, 10 * STALE_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0, 257)
    learning.keep()
    kept.save(100 + 4 * STALE_NS)
    after, again = Sensor(), Kept(path, 5000)  # the clock of another boot
    Learning(after, again.learned, 10 * STALE_NS).watch(7, API, 5000)  # type: ignore[arg-type]
    assert after.watched[7] == Habits(0, 5000 + 6 * STALE_NS, 0, frozenset({0, 257}))


def test_whose_learning_had_ended_is_armed_at_once(path: Path) -> None:
    sensor, kept = Sensor(), Kept(path, 0)
    learning = Learning(sensor, kept.learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 39)
    learning.keep()
    kept.save(100 + LEARN_NS)
    Learning(sensor, Kept(path, 9).learned, LEARN_NS).watch(2, API, 10)  # type: ignore[arg-type]
    assert sensor.watched[2] == Habits(0, 9, 0, frozenset({39}))


def test_it_is_written_only_where_that_says_something_new(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[Path] = []
    write = module.write_whole
    monkeypatch.setattr(module, "write_whole", lambda place, body: (writes.append(place), write(place, body)))
    sensor, kept = Sensor(), Kept(path, 0)
    kept.save(0)
    assert not path.exists()
    learning = Learning(sensor, kept.learned, 2 * STALE_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 0)
    for now_ns in (1, 2, STALE_NS - 1, STALE_NS, 2 * STALE_NS - 1, 2 * STALE_NS, 9 * STALE_NS):
        kept.save(now_ns)
    assert len(writes) == 3  # it began, a minute has passed, it has ended
    assert json.loads(path.read_bytes())["services"][0]["left_ns"] == 0
    Kept(path, 5).save(6)
    assert len(writes) == 3


def test_a_disk_that_refuses_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    kept = Kept(path, 0)
    kept.learned.until_ns[API] = 50
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", full)
        kept.save(1)
    assert not path.exists()
    kept.save(1)
    assert Learned.load(path, 0).until_ns == {API: 49}


def test_of_too_many_services_the_one_learned_last_is_kept(path: Path) -> None:
    learned = Learned()
    for number in range(KEYS_MAX + 1):
        learned.until_ns[f"service-{number}", "aa" * 32] = 9
    path.write_bytes(learned.encode(0))
    found = Learned.load(path, 0)
    assert len(found.until_ns) == KEYS_MAX
    assert ("service-0", "aa" * 32) not in found.until_ns
    assert (f"service-{KEYS_MAX}", "aa" * 32) in found.until_ns


ROW: dict[str, Any] = {"name": "api", "declaration": "aa" * 32, "calls": [1], "left_ns": 0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{\xff}",
        json.dumps({"services": [ROW | {"calls": [512]}]}).encode(),
        json.dumps({"services": [ROW | {"calls": [-1]}]}).encode(),
        json.dumps({"services": [ROW | {"calls": [True]}]}).encode(),
        json.dumps({"services": [ROW | {"left_ns": -1}]}).encode(),
        json.dumps({"services": [ROW | {"left_ns": 2**62}]}).encode(),
        json.dumps({"services": [ROW | {"left_ns": "0"}]}).encode(),
        json.dumps({"services": [ROW | {"more": 0}]}).encode(),
        json.dumps({"services": [ROW], "more": 0}).encode(),
        json.dumps({"services": [ROW] * (KEYS_MAX + 1)}).encode(),
    ],
)
def test_what_is_not_such_a_file_counts_as_none(path: Path, body: bytes) -> None:
    path.write_bytes(json.dumps({"services": [ROW]}).encode())
    assert Learned.load(path, 7).calls == {API: frozenset({1})}
    path.write_bytes(body)
    assert Learned.load(path, 7) == Learned()


def test_a_file_that_is_too_long_counts_as_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"services": [ROW]}).encode()
    path.write_bytes(body)
    monkeypatch.setattr(module, "MAX_BYTES", len(body))
    assert Learned.load(path, 7).calls == {API: frozenset({1})}
    monkeypatch.setattr(module, "MAX_BYTES", len(body) - 1)
    assert Learned.load(path, 7) == Learned()


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_no_bytes_stop_a_start(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "learned.json"
    path.write_bytes(body)
    assert Learned.load(path, 0).calls == {}


@given(
    st.dictionaries(
        st.tuples(st.text(max_size=20), st.text(max_size=64)),
        st.tuples(st.frozensets(st.integers(0, 511)), st.integers(0, 2**60)),
        max_size=20,
    ),
    st.integers(1, 2**60),
)
def test_what_is_kept_comes_back(
    tmp_path_factory: pytest.TempPathFactory, services: dict[tuple[str, str], tuple[frozenset[int], int]], now_ns: int
) -> None:
    learned = Learned(
        {k: calls for k, (calls, _) in services.items()}, {k: until for k, (_, until) in services.items()}
    )
    path = tmp_path_factory.getbasetemp() / "kept.json"
    path.write_bytes(learned.encode(now_ns))
    found = Learned.load(path, 1000)
    assert found.calls == learned.calls
    assert found.until_ns == {k: 1000 + max(0, until - now_ns) for k, until in learned.until_ns.items()}
