"""Operations of storage that never end are reported while they hang; what has ended unseen is not."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.manifest import Sensor
from pointcall_executor.core.event import Source, StorageEvent, decode
from pointcall_executor.core.guard import Rules
from pointcall_executor.core.hung import InFlight
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.storage import BLOBS, KEY, STARTED, VALUE, StorageSensor
from pointcall_executor.sensors import KernelSensors
from pointcall_runbook.vocabulary import Operation
from tests.kernel.lab import member, need_blob, read_blob
from tests.kernel.slowfs import Op, SlowFs, kernel_device, loop_ext4

pytestmark = pytest.mark.kernel
NEVER = 3600.0
QUIET = {"slow_ns": 10**15, "stall_ns": 10**15, "error_min": 10**6}  # ends are no event: all that comes is from looking
HUNG_MS = 1000


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@contextlib.contextmanager
def hanging(fs: SlowFs, op: Op, call: Callable[[], object]) -> Iterator[None]:
    """`call` on another thread, which waits for this operation; at the end it is answered."""
    fs.delay(op, NEVER)
    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        fs.delay(op, 0)
        thread.join(timeout=60)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def device_of(file: Any) -> int:
    """Of the file system of an open file. Others use this kernel as well: only ours is looked at."""
    return kernel_device(os.fstat(file.fileno()).st_dev)


def ids(sensor: StorageSensor, device: int) -> set[int]:
    """What the kernel believes to be in flight there, by its own numbers."""
    entries = sensor._maps["in_flight"].batch()
    return {int.from_bytes(key, "little") for key, value in entries if STARTED.unpack(value)[2] == device}


def asked(sensor: StorageSensor, device: int) -> list[InFlight]:
    """What is in flight there; the kernel was asked about each."""
    return [each for each in sensor.in_flight(now_ns()) if each.what.device == device]


def put(sensor: StorageSensor, number: int, at_ns: int, value: bytes = bytes(16)) -> None:
    sensor._maps["in_flight"].set(struct.pack("<Q", number), struct.pack("<Q", at_ns) + value)


class Armed:
    """A session's sensors, and what they tell."""

    def __init__(self, gate: Cgroup, name: str, **params: int) -> None:
        sensors = [Sensor(name=name, blob=f"{name}.blob", params=QUIET | params)]
        files = {f"{name}.blob": need_blob(name).encode()}
        admitted: Any = SimpleNamespace(manifest=SimpleNamespace(sensors=sensors, services=[]), files=files)
        self.sensors = KernelSensors(admitted, Rules(), gate.path)

    def told(self, seconds: float) -> list[StorageEvent]:
        """What comes first, or nothing in this time."""
        if not select.select(self.sensors.fds(), [], [], seconds)[0]:
            return []
        return [event for event in map(decode, self.sensors.drain()) if isinstance(event, StorageEvent)]

    def __enter__(self) -> Armed:
        return self

    def __exit__(self, *_: object) -> None:
        self.sensors.detach()


def reported_twice(armed: Armed, device: int, operation: Operation) -> StorageEvent:
    """While it hangs; returns the first report. Others may use the device as well, and hang behind it."""
    seen: dict[int, list[StorageEvent]] = {}  # by cgroup
    deadline = time.monotonic() + 60
    while not (twice := [events for events in seen.values() if len(events) > 1]) and time.monotonic() < deadline:
        for event in armed.told(1):
            if (event.device, event.operation) == (device, operation):
                seen.setdefault(event.cgroup, []).append(event)
    first, second, *_ = twice[0]
    assert all(e.errors == 0 and e.operations >= e.slow >= 1 for e in (first, second))
    assert HUNG_MS * 10**6 <= first.longest_ns < second.longest_ns
    assert second.at_ns - first.at_ns >= HUNG_MS * 10**6
    return first


def assert_quiet(armed: Armed, device: int) -> None:
    """Nothing hangs any more. What was told before, also of those that hung behind it, nobody may have read yet."""
    armed.sensors.drain()
    assert [event for event in armed.told(1.5) if event.device == device] == []


def test_a_fuse_server_that_never_answers(slow_fs: SlowFs, group: Cgroup) -> None:
    with slow_fs.path.open("r+b", buffering=0) as file, Armed(group, "fuse", hung_ms=HUNG_MS) as armed:
        device = device_of(file)
        with member("hangs") as mine, hanging(slow_fs, Op.WRITE, lambda: os.pwrite(file.fileno(), b"x", 0)):
            event = reported_twice(armed, device, Operation.WRITE)
            assert (event.source, event.cgroup, event.operations, event.slow) == (Source.FUSE, mine.id, 1, 1)
        assert_quiet(armed, device)


def test_a_block_request_that_never_ends(
    slow_fs: SlowFs, group: Cgroup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        loop_ext4(slow_fs, tmp_path_factory.mktemp("ext4")) as loop, loop.open("rb", buffering=0) as raw,
        Armed(group, "storage", hung_ms=HUNG_MS) as armed,
    ):  # fmt: skip
        device = kernel_device(loop.stat().st_rdev)
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # one request, nothing ahead
        with hanging(slow_fs, Op.READ, lambda: os.pread(raw.fileno(), 512, 40 << 20)):
            assert reported_twice(armed, device, Operation.READ).source is Source.STORAGE
        assert_quiet(armed, device)


def test_a_sync_that_never_ends(slow_fs: SlowFs, group: Cgroup, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ext4")
    with (
        loop_ext4(slow_fs, folder), (folder / "file").open("wb", buffering=0) as file,
        Armed(group, "fsync", hung_ms=HUNG_MS) as armed,
    ):  # fmt: skip
        device = device_of(file)
        file.write(b"x" * 4096)
        with member("syncs") as mine, hanging(slow_fs, Op.WRITE, lambda: os.fsync(file.fileno())):
            event = reported_twice(armed, device, Operation.FSYNC)
            assert (event.source, event.cgroup) == (Source.FSYNC, mine.id)
        assert_quiet(armed, device)


def test_a_read_of_any_file_system_that_never_ends(slow_fs: SlowFs, group: Cgroup) -> None:
    with slow_fs.path.open("rb", buffering=0) as file, Armed(group, "vfs", hung_ms=HUNG_MS) as armed:
        device = device_of(file)
        with member("reads") as mine, hanging(slow_fs, Op.READ, lambda: os.pread(file.fileno(), 512, 0)):
            event = reported_twice(armed, device, Operation.READ)
            assert (event.source, event.cgroup) == (Source.VFS, mine.id)
        assert_quiet(armed, device)


def test_a_file_that_waits_by_design_is_no_storage(group: Cgroup) -> None:
    """The pipe of a trace, which is a regular file, and an eventfd, which is one since 6.16."""
    traces = Path("/sys/kernel/tracing/instances")
    need_blob("vfs")
    if not traces.is_dir():
        pytest.skip("no tracefs at /sys/kernel/tracing")
    folder, event = traces / f"pctest-{os.getpid()}", os.eventfd(0)
    folder.mkdir()
    try:
        with (folder / "trace_pipe").open("rb", buffering=0) as pipe, Armed(group, "vfs", hung_ms=HUNG_MS) as armed:
            trace_device = device_of(pipe)
            waits = [
                threading.Thread(target=lambda: pipe.read(64)),
                threading.Thread(target=os.eventfd_read, args=[event]),
            ]
            for wait in waits:
                wait.start()
            time.sleep(0.2)
            sensor = armed.sensors._objects["vfs"]
            assert isinstance(sensor, StorageSensor)
            devices = {e.what.device for e in sensor.in_flight(0)}
            assert not devices & {trace_device, kernel_device(os.fstat(event).st_dev)}
            assert [e for e in armed.told(2) if e.device == trace_device] == []
            assert all(wait.is_alive() for wait in waits)
            (folder / "trace_marker").write_text("enough\n")
            os.eventfd_write(event, 1)
            for wait in waits:
                wait.join(timeout=60)
                assert not wait.is_alive()
    finally:
        os.close(event)
        folder.rmdir()


def test_a_wait_for_a_lock_is_no_slow_storage(slow_fs: SlowFs) -> None:
    """The server keeps the second one waiting for what the first one holds."""
    with (
        slow_fs.path.open("r+b", buffering=0) as one, slow_fs.path.open("r+b", buffering=0) as other,
        StorageSensor(need_blob("fuse")) as sensor,
    ):  # fmt: skip
        sensor.attach()
        with hanging(slow_fs, Op.SETLKW, lambda: fcntl.lockf(one, fcntl.LOCK_EX)):
            until(lambda: slow_fs.waits(Op.SETLKW))
            assert ids(sensor, device_of(one)) == set()
        with hanging(slow_fs, Op.FSYNC, lambda: os.fsync(other.fileno())):
            until(lambda: ids(sensor, device_of(one)))


def test_zero_is_never_and_nobody_looks(slow_fs: SlowFs, group: Cgroup) -> None:
    with slow_fs.path.open("r+b", buffering=0) as file, Armed(group, "fuse", hung_ms=0) as armed:
        assert armed.sensors._lookout is None
        with hanging(slow_fs, Op.WRITE, lambda: os.pwrite(file.fileno(), b"x", 0)):
            assert [e for e in armed.told(1.5) if e.device == device_of(file)] == []


@pytest.mark.parametrize("name", BLOBS)
def test_a_stale_entry_is_not_reported_and_goes_away(name: str) -> None:
    """An address that is nothing, one that is free, and one that is in use for something else."""
    with StorageSensor(need_blob(name)) as sensor:
        sensor.attach()
        addresses = {0, 8, 2**63 + 1, 0xFFFF888000000000, 0xFFFF888000100000, 2**64 - 8}
        for number in addresses:
            put(sensor, number, 1)
            assert number in ids(sensor, 0)
        found = [each for each in sensor.in_flight(now_ns() - 10**9) if each.since_ns == 1]
        assert found == []
        assert not addresses & ids(sensor, 0)


def test_a_request_whose_caller_was_killed_before_the_server_read_it_is_forgotten(slow_fs: SlowFs) -> None:
    """No tracepoint tells its end. The server is busy with another one, which is not forgotten."""
    with slow_fs.path.open("r+b", buffering=0) as file, StorageSensor(need_blob("fuse")) as sensor:
        sensor.attach()
        device = device_of(file)
        with hanging(slow_fs, Op.READ, lambda: os.pread(file.fileno(), 512, 0)):
            until(lambda: len(ids(sensor, device)) == 1)
            (read,) = ids(sensor, device)
            pid = os.fork()
            if pid == 0:
                try:
                    os.pwrite(file.fileno(), b"x", 0)
                finally:
                    os._exit(0)

            def operations() -> set[Operation]:
                return {each.what.operation for each in asked(sensor, device)}

            try:
                until(lambda: operations() == {Operation.READ, Operation.WRITE})
            finally:
                os.kill(pid, signal.SIGKILL)  # it then closes the file, which waits for the server as well
            until(lambda: Operation.WRITE not in operations())
            assert Operation.READ in operations()
            assert read in ids(sensor, device)
            assert Operation.WRITE not in {h.operation for h in sensor.histograms() if h.device == device}
        os.waitpid(pid, 0)


@contextlib.contextmanager
def synced(fs: SlowFs, sensor: StorageSensor, file: Any) -> Iterator[tuple[int, InFlight]]:
    """A thread that has synced the file and lives until the end: its number in the kernel, and what was in flight."""
    device, end = device_of(file), threading.Event()

    def run() -> None:
        os.fsync(file.fileno())
        end.wait(60)

    os.pwrite(file.fileno(), os.urandom(4096), 0)
    fs.delay(Op.WRITE, NEVER)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: ids(sensor, device))
        (number,), (seen,) = ids(sensor, device), asked(sensor, device)
        fs.delay(Op.WRITE, 0)
        until(lambda: not ids(sensor, device))
        yield number, seen
    finally:
        fs.delay(Op.WRITE, 0)
        end.set()
        thread.join(timeout=60)


def test_a_thread_that_lives_is_believed_until_the_kernel_says_that_it_skipped_an_end(
    slow_fs: SlowFs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ext4")
    with (
        loop_ext4(slow_fs, folder), (folder / "file").open("wb", buffering=0) as file,
        StorageSensor(need_blob("fsync")) as sensor,
    ):  # fmt: skip
        sensor.attach()
        device = device_of(file)
        with synced(slow_fs, sensor, file) as (number, seen):
            value, began = KEY.pack(seen.what.cgroup, device, seen.what.operation), now_ns()
            put(sensor, number, began, value)  # as if its end had been skipped
            assert asked(sensor, device) == [InFlight(seen.what, began)]
            sensor._missed -= 1  # as if the kernel had counted that since the last look
            assert asked(sensor, device) == []
            assert asked(sensor, device) == []
            assert ids(sensor, device) == {number}  # it is only doubtful
            later = now_ns()
            put(sensor, number, later, value)
            assert asked(sensor, device) == [InFlight(seen.what, later)]
        until(lambda: asked(sensor, device) == [])  # the thread is gone
        assert ids(sensor, device) == set()


def test_nothing_is_in_flight_for_one_that_sees_no_ends(slow_fs: SlowFs) -> None:
    with slow_fs.path.open("r+b", buffering=0) as file, StorageSensor(need_blob("fuse")) as sensor:
        sensor.attach()
        device = device_of(file)
        with hanging(slow_fs, Op.WRITE, lambda: os.pwrite(file.fileno(), b"x", 0)):
            until(lambda: asked(sensor, device))
            sensor.detach()
            assert sensor.in_flight(0) == []
        sensor.attach()
        assert asked(sensor, device) == []  # it ended meanwhile, and nobody was told


def test_what_hangs_is_reported_however_many_ends_were_never_told(slow_fs: SlowFs, group: Cgroup) -> None:
    with slow_fs.path.open("r+b", buffering=0) as file, Armed(group, "fuse", hung_ms=HUNG_MS) as armed:
        sensor, device = armed.sensors._objects["fuse"], device_of(file)
        assert isinstance(sensor, StorageSensor)
        for number in range(2 * sensor._maps["in_flight"].info.max_entries):
            put(sensor, 2**63 + 8 * number, now_ns())
        with hanging(slow_fs, Op.WRITE, lambda: os.pwrite(file.fileno(), b"x", 0)):
            assert reported_twice(armed, device, Operation.WRITE).operations == 1
            until(lambda: ids(sensor, 0) == set())  # those that we put there
            assert len(ids(sensor, device)) == 1


def test_a_map_is_read_whole_while_others_come_and_go() -> None:
    """Not so by its keys, one after the other: where one is gone meanwhile that begins anew."""
    with StorageSensor(need_blob("fuse")) as sensor:
        table, ending = sensor._maps["latencies"], threading.Event()
        value = VALUE.pack(*range(VALUE.size // 8))
        lasting = {KEY.pack(number, 8 << 20, 1) for number in range(1500)}
        for key in lasting:
            table.set(key, value)

        def churn() -> None:
            number = 0
            while not ending.is_set():
                table.set(KEY.pack(1 << 32 | number % 500, 0, 0), value)
                table.delete(KEY.pack(1 << 32 | (number + 250) % 500, 0, 0))
                number += 1

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(20):
                found = table.batch()
                assert lasting <= {key for key, _ in found}
                assert {content for _, content in found} == {value}
        finally:
            ending.set()
            thread.join(timeout=60)


def test_an_empty_map_is_empty() -> None:
    with StorageSensor(need_blob("fuse")) as sensor:
        assert sensor._maps["in_flight"].batch() == []  # it is not attached


@pytest.mark.parametrize("name", BLOBS)
def test_ends_are_attached_before_begins(name: str) -> None:
    """So no operation is left over that began when its end was not seen yet."""
    programs = [p.name for p in read_blob(name).programs if p.section != "syscall"]
    ends = [n for n in programs if n.endswith(("_exit", "_end", "_complete"))]
    assert programs[: len(ends)] == ends
    assert len(programs) == 2 * len(ends)
