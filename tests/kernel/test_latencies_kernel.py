"""How long storage took, from the kernel to the page that Prometheus reads, at any moment of a session."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointcall_attest.manifest import Sensor
from pointcall_executor.core.event import Kind, decode
from pointcall_executor.core.guard import Rules
from pointcall_executor.core.trigger import Topology
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.storage import BUCKETS, KEY, STARTED, VALUE, StorageSensor
from pointcall_executor.sensors import KernelSensors
from pointcall_executor.session import Session
from pointcall_executor.telemetry.latencies import NODE, Latencies
from pointcall_executor.telemetry.metrics import Metrics
from pointcall_runbook.vocabulary import service
from tests.kernel.lab import member, need_blob
from tests.kernel.slowfs import Op, SlowFs, loop_ext4
from tests.unit.live.night import QUIET

pytestmark = pytest.mark.kernel
API = service("api").number
AS_IS: Any = None


def armed(gate: Cgroup, *names: str) -> Session:
    """A session with these sensors, attached; the service `api` is declared and runs nowhere yet."""
    sensors = [Sensor(name=name, blob=f"{name}.blob", params={}) for name in names]
    files = {f"{name}.blob": need_blob(name).encode() for name in names}
    admitted: Any = SimpleNamespace(manifest=SimpleNamespace(sensors=sensors, services=[]), files=files)
    made = KernelSensors(admitted, Rules(), gate.path)
    topology = Topology(names={API: "api"})
    return Session(AS_IS, AS_IS, AS_IS, AS_IS, 0, AS_IS, {}, made, time.monotonic_ns(), AS_IS, topology)


class Page:
    """What Prometheus sees, whatever session there is."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.now = 0.0
        latencies = Latencies(lambda: self.session, lambda: self.now)
        self._metrics = Metrics(lambda: QUIET, latencies=latencies)

    def read(self) -> dict[tuple[str, str, str, str, str], float]:
        """By sensor, service, device, operation and bound: through the official parser."""
        self.now += 1.0
        families = text_string_to_metric_families(self._metrics.text().decode())
        (family,) = [f for f in families if f.name == "pointcall_storage_seconds"]
        assert {s.name for s in family.samples} <= {"pointcall_storage_seconds_bucket"}
        names = ("sensor", "service", "device", "operation", "le")
        return {tuple(s.labels[n] for n in names): s.value for s in family.samples}  # type: ignore[misc]


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    yield page
    if page.session is not None:
        page.session.sensors.detach()


def write(file: Any, times: int) -> None:
    for _ in range(times):
        os.pwrite(file.fileno(), b"x" * 512, 0)


def test_the_page_says_how_long_fuse_took_and_for_which_service(page: Page, slow_fs: SlowFs, group: Cgroup) -> None:
    page.session = armed(group, "fuse")
    with slow_fs.path.open("r+b", buffering=0) as file:
        device = os.fstat(file.fileno()).st_dev
        where = f"{os.major(device)}:{os.minor(device)}"
        with member("api") as mine:
            page.session.moved(API, mine.id)
            write(file, 5)
            slow_fs.delay(Op.WRITE, 0.02)
            write(file, 3)
            slow_fs.delay(Op.WRITE, 0)
        with member("other"):
            write(file, 2)
    found = page.read()
    api = [found["fuse", "api", where, "write", le] for le in ("0.016777216", "1.073741824", "+Inf")]
    assert api == [5, 8, 8]
    assert found["fuse", NODE, where, "write", "+Inf"] == 2


def test_a_block_device_is_named_as_people_name_it(
    page: Page, slow_fs: SlowFs, group: Cgroup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ext4")
    with loop_ext4(slow_fs, folder) as loop:
        page.session = armed(group, "storage", "fsync")
        device = loop.stat().st_rdev
        where = f"{os.major(device)}:{os.minor(device)}"
        with (folder / "file").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(os.urandom(4096))
                os.fsync(file.fileno())
        found = page.read()
    assert found["storage", NODE, where, "write", "+Inf"] >= 4
    assert found["fsync", NODE, where, "fsync", "+Inf"] == 4


def test_sessions_come_and_go_and_nothing_falls_and_nobody_waits(page: Page, slow_fs: SlowFs, group: Cgroup) -> None:
    """Readers and writers all the time, while sensors are made, replaced and let go."""
    ending, failed, seen = threading.Event(), [], [0.0]

    def look() -> None:
        try:
            while not ending.is_set():
                total = sum(v for k, v in page.read().items() if k[0] == "fuse" and k[-1] == "+Inf")
                assert total >= seen[0]
                seen[0] = total
                if (session := page.session) is not None:
                    session.sensors.programs()
                    session.sensors.states()
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        with slow_fs.path.open("r+b", buffering=0) as file:
            for _ in range(6):
                session = armed(group, "fuse")
                before, page.session = page.session, session
                if before is not None:
                    before.sensors.stop(leave=True)
                    before.sensors.leave()
                write(file, 200)
            time.sleep(0.1)
            assert page.session is not None
            page.session.sensors.detach()
            assert page.session.sensors.histograms() == {}
    finally:
        ending.set()
        reader.join(timeout=60)
    assert failed == []
    assert seen[0] > 0


def test_a_full_map_is_read_whole_also_when_its_sensor_is_closed_meanwhile() -> None:
    with StorageSensor(need_blob("fuse")) as sensor:
        table = sensor._maps["latencies"]
        for number in range(3072):  # room is made before the last entry is used
            table.set(KEY.pack(number, 8 << 20, 1), VALUE.pack(*[0] * 6, 3, 1, *[0] * (BUCKETS - 2), 2))
        kept = sensor.latencies()
    with kept:
        found = list(kept.histograms())
    assert {h.cgroup for h in found} == set(range(3072))
    assert {(h.total, h.buckets[0], h.buckets[-1]) for h in found} == {(3, 1, 2)}


def test_what_is_slow_is_reported_however_many_cgroups_were_there_before(slow_fs: SlowFs) -> None:
    with StorageSensor(need_blob("fuse"), constants={"stall_ns": 20_000_000}) as sensor:
        sensor.attach()
        for number in range(2 * sensor._maps["latencies"].info.max_entries):
            sensor._maps["latencies"].set(
                KEY.pack(number, 8 << 20, 1), VALUE.pack(*[0] * 6, 1, 1, *[0] * (BUCKETS - 1))
            )
        for number in range(2 * sensor._maps["in_flight"].info.max_entries):  # their ends were never told
            sensor._maps["in_flight"].set(struct.pack("<Q", 2**63 + number), bytes(STARTED.size))
        with slow_fs.path.open("r+b", buffering=0) as file:
            slow_fs.delay(Op.WRITE, 0.05)
            write(file, 1)
            slow_fs.delay(Op.WRITE, 0)
        events = [decode(raw) for raw in sensor.ring.drain()]
    assert [event.kind for event in events] == [Kind.STORAGE_SLOW]
