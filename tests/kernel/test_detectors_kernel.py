"""The detectors: slow and failing storage, transport trouble, system-call anomalies, pressure stalls."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.event import (
    KernelEvent,
    Kind,
    StorageEvent,
    SyscallEvent,
    TransportEvent,
    decode,
)
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.kernel.pressure import Pressure, PressureTrigger
from pointcall_executor.kernel.sensor import Sensor
from pointcall_executor.kernel.storage import StorageSensor
from pointcall_executor.kernel.syscalls import SyscallSensor
from pointcall_executor.kernel.transport import TransportSensor
from pointcall_runbook.vocabulary import Operation, Resource
from tests.kernel.lab import black_hole, deaf, here, listen, member, need_blob, private_network
from tests.kernel.slowfs import Op, SlowFs, kernel_device, loop_ext4

pytestmark = pytest.mark.kernel
PORT = 30501
SLOW = {"slow_ns": 10_000_000, "stall_ns": 10**12, "window_ns": 10**9, "slow_min": 3, "slow_percent": 50}


def detections(sensor: Sensor) -> list[KernelEvent]:
    return [decode(record) for record in sensor.ring.drain()]


def storage(sensor: StorageSensor, device: int, operation: Operation) -> list[StorageEvent]:
    found = [e for e in detections(sensor) if isinstance(e, StorageEvent)]
    return [e for e in found if (e.device, e.operation) == (device, operation)]


@pytest.fixture
def fuse() -> Iterator[StorageSensor]:
    blob = need_blob("fuse")
    with StorageSensor(blob, constants=SLOW) as sensor:
        sensor.attach()
        yield sensor


def test_a_slow_fuse_file_is_reported_once_a_window_with_its_cgroup(fuse: StorageSensor, slow_fs: SlowFs) -> None:
    with member("fuse") as group, slow_fs.path.open("r+b", buffering=0) as file:
        device = kernel_device(os.fstat(file.fileno()).st_dev)
        for _ in range(4):
            os.pwrite(file.fileno(), b"x" * 512, 0)
        assert storage(fuse, device, Operation.WRITE) == []
        time.sleep(1.05)
        slow_fs.delay(Op.WRITE, 0.02)
        for _ in range(6):
            os.pwrite(file.fileno(), b"x" * 512, 0)
        (event,) = storage(fuse, device, Operation.WRITE)
        assert (event.kind, event.cgroup, event.operations, event.slow) == (Kind.STORAGE_SLOW, group.id, 3, 3)
        assert event.longest_ns >= 20_000_000
        (histogram,) = [h for h in fuse.histograms() if (h.device, h.operation) == (device, Operation.WRITE)]
        assert histogram.total == sum(histogram.buckets) == 10
        assert histogram.below_us(0.1) <= histogram.below_us(1.0)
        assert histogram.below_us(1.0) > 10_000


def test_a_few_slow_ones_among_many_fast_ones_are_silent(fuse: StorageSensor, slow_fs: SlowFs) -> None:
    with slow_fs.path.open("r+b", buffering=0) as file:
        device = kernel_device(os.fstat(file.fileno()).st_dev)
        for _ in range(20):
            os.pread(file.fileno(), 512, 0)
        slow_fs.delay(Op.READ, 0.015)
        for _ in range(4):
            os.pread(file.fileno(), 512, 0)
        assert storage(fuse, device, Operation.READ) == []


def test_one_very_long_operation_is_enough(slow_fs: SlowFs) -> None:
    blob = need_blob("fuse")
    with StorageSensor(blob, constants=SLOW | {"stall_ns": 100_000_000}) as sensor:
        sensor.attach()
        with slow_fs.path.open("r+b", buffering=0) as file:
            device = kernel_device(os.fstat(file.fileno()).st_dev)
            slow_fs.delay(Op.FSYNC, 0.12)
            os.fsync(file.fileno())
            (event,) = storage(sensor, device, Operation.FSYNC)
        assert (event.slow, event.operations) == (1, 1)


def test_a_slow_block_device_and_its_fsync(slow_fs: SlowFs, tmp_path_factory: pytest.TempPathFactory) -> None:
    block = need_blob("storage")
    folder = tmp_path_factory.mktemp("ext4")
    with loop_ext4(slow_fs, folder) as loop, StorageSensor(block, constants=SLOW) as sensor:
        sensor.attach()
        device = kernel_device(loop.stat().st_rdev)
        slow_fs.delay(Op.WRITE, 0.02)
        with (folder / "file").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(os.urandom(4096))
                os.fsync(file.fileno())
        slow_fs.delay(Op.WRITE, 0)
        events = storage(sensor, device, Operation.WRITE)
    assert events
    assert events[0].kind is Kind.STORAGE_SLOW


def test_ext4_fsync_names_the_cgroup_that_waits(slow_fs: SlowFs, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = need_blob("fsync")
    folder = tmp_path_factory.mktemp("ext4")
    with loop_ext4(slow_fs, folder) as loop, StorageSensor(blob, constants=SLOW) as sensor, member("fsync") as group:
        sensor.attach()
        slow_fs.delay(Op.WRITE, 0.02)
        with (folder / "file").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(os.urandom(4096))
                os.fsync(file.fileno())
        slow_fs.delay(Op.WRITE, 0)
        events = storage(sensor, kernel_device(loop.stat().st_rdev), Operation.FSYNC)
        assert {e.cgroup for e in events} == {group.id}


def test_failing_requests_are_a_disk_error(slow_fs: SlowFs, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = need_blob("storage")
    folder = tmp_path_factory.mktemp("ext4")
    with loop_ext4(slow_fs, folder) as loop, StorageSensor(blob, constants=SLOW) as sensor:
        sensor.attach()
        slow_fs.fail(Op.READ)
        with loop.open("rb", buffering=0) as raw, pytest.raises(OSError, match="Input/output error"):
            os.pread(raw.fileno(), 4096, 60 << 20)
        slow_fs.delay(Op.READ, 0)
        (event,) = [e for e in detections(sensor) if e.kind is Kind.DISK_ERROR]
    assert isinstance(event, StorageEvent)
    assert (event.operation, event.errors) == (Operation.READ, 1)


@pytest.fixture
def transport() -> Iterator[TransportSensor]:
    blob = need_blob("transport")
    constants = {"resets_min": 3, "retransmits_min": 2, "timeouts_min": 2, "window_ns": 10**10}
    with private_network(), TransportSensor(blob, constants=constants) as sensor:
        sensor.attach()
        yield sensor


def test_resets_of_established_connections(transport: TransportSensor) -> None:
    transport.watch(here(PORT))
    with listen(PORT) as server, listen(PORT + 1) as other:
        for port, listener in [(PORT, server)] * 5 + [(PORT + 1, other)] * 5:
            with socket.create_connection(("127.0.0.1", port)):
                peer, _ = listener.accept()
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.close()
    (event,) = detections(transport)
    assert isinstance(event, TransportEvent)
    assert (event.kind, event.destination, event.count) == (Kind.RESETS, here(PORT), 3)
    assert event.attempts == 3


def test_a_full_table_of_destinations_says_so_and_evicts_nothing(transport: TransportSensor) -> None:
    for port in range(4096):
        transport.watch(here(port))
    transport.watch(here(0))  # it is there
    with pytest.raises(CircuitError) as refused:
        transport.watch(here(5000))
    assert refused.value.id == "kernel.circuit.full"


def test_a_refused_connect_is_no_reset(transport: TransportSensor) -> None:
    transport.watch(here(PORT))
    for _ in range(6):
        with socket.socket() as sock:
            sock.connect_ex(("127.0.0.1", PORT))
    assert detections(transport) == []


def test_syns_sent_again_are_a_slow_connect(transport: TransportSensor) -> None:
    transport.watch(here(PORT))
    with black_hole(PORT):
        clients = [socket.socket() for _ in range(2)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", PORT))
        time.sleep(1.3)
        events = detections(transport)
        for client in clients:
            client.close()
    assert [(e.kind, e.count, e.attempts) for e in events if isinstance(e, TransportEvent)] == [
        (Kind.CONNECT_SLOW, 2, 2)
    ]


def test_segments_sent_again_are_a_storm(transport: TransportSensor) -> None:
    """The peer of an established connection falls silent; another connection goes on, and is not reported."""
    transport.watch(here(PORT))
    with listen(PORT) as server, listen(PORT + 1) as other, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in (PORT, PORT + 1)]
        peers = [stack.enter_context(listener.accept()[0]) for listener in (server, other)]
        for peer in peers:
            deaf(peer)
        for client in clients:
            client.sendall(b"x")
        deadline, found = time.monotonic() + 10, list[KernelEvent]()
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            found = detections(transport)
    assert [(e.kind, e.destination, e.count, e.attempts) for e in found if isinstance(e, TransportEvent)] == [
        (Kind.RETRANSMITS, here(PORT), 2, 1)
    ]


MISBEHAVE = """
import ctypes, os
ctypes.CDLL(None).ptrace(0, 0, 0, 0)
for i in range(300):
    try: os.open('/nope%d' % i, 0)
    except OSError: pass
"""
LEARN = "import ctypes, os; ctypes.CDLL(None); os.open('/', 0)"
PTRACE, OPENAT = 101, 257


def test_a_novel_call_and_a_burst_of_errors() -> None:
    blob = need_blob("syscalls")
    with SyscallSensor(blob) as sensor, member("syscalls") as group:
        number = group.id
        sensor.learn(number)
        sensor.attach()
        for _ in range(2):
            subprocess.run([sys.executable, "-c", LEARN], check=True)
        assert detections(sensor) == []
        sensor.arm(group.id)
        assert len(sensor.habits(group.id).calls) > 10
        subprocess.run([sys.executable, "-c", MISBEHAVE], check=True)
        events = [e for e in detections(sensor) if isinstance(e, SyscallEvent)]
        habits = sensor.habits(group.id)
        sensor.forget(group.id)
        sensor.forget(group.id)
    seen = {(e.kind, e.number) for e in events}
    assert {(Kind.SYSCALL_NOVEL, PTRACE), (Kind.SYSCALL_ERRORS, OPENAT)} <= seen
    assert {e.cgroup for e in events} == {number}
    assert habits.novel == sum(e.kind is Kind.SYSCALL_NOVEL for e in events)
    assert PTRACE in habits.unknown
    assert PTRACE not in habits.calls


def test_what_was_learned_survives_as_a_value() -> None:
    blob = need_blob("syscalls")
    with SyscallSensor(blob) as sensor:
        sensor.learn(7, frozenset({0, 63, 64, 511}))
        sensor.arm(7)
        assert sensor.habits(7).calls == {0, 63, 64, 511}
        assert sensor.habits(7).armed_ns == 1
        with pytest.raises(KernelError) as refused:
            sensor.habits(8)
        assert refused.value.id == "kernel.syscalls.absent"


def test_a_cpu_pressure_trigger_fires_for_its_cgroup() -> None:
    need_blob("breaker")
    with member("pressure") as group:
        try:
            trigger = PressureTrigger(group.path, Resource.CPU, stalled_ns=50_000_000)
        except KernelError as error:
            pytest.skip(f"no pressure triggers here: {error.got}")
        assert trigger.wait(0) is None
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
        try:
            fired = trigger.wait(8)
        finally:
            for process in busy:
                process.kill()
                process.wait()
            trigger.close()
    assert fired is not None
    assert (fired.cgroup, fired.resource) == (trigger.what.cgroup, Resource.CPU)


# Joins the cgroups whose `cgroup.procs` are its last arguments, then reads a file again and again.
READ = """
import os, pathlib, sys
for procs in sys.argv[2:]:
    pathlib.Path(procs).write_text("0")
file = os.open(sys.argv[1], os.O_RDONLY)
while True:
    at, got = 0, True
    while got:
        got = os.pread(file, 1 << 20, at)
        at += len(got)
"""
CROWDED = 16 << 20
V1_MEMORY = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def crowded(group: Cgroup) -> Iterator[list[Path]]:
    """What a process has to join to be in this cgroup and to have 16 MiB of memory, its files included."""
    own = [group.path / "cgroup.procs"]
    if (group.path / "memory.max").exists():
        (group.path / "memory.max").write_text(str(CROWDED))
        yield own
        return
    if not (V1_MEMORY / "memory.limit_in_bytes").exists():
        pytest.skip("no memory controller, in neither tree")
    folder = V1_MEMORY / group.path.name
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(CROWDED))
        yield [folder / "cgroup.procs", *own]
    finally:
        folder.rmdir()


def shared_memory() -> int:
    """Bytes of tmpfs files and the like."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def trigger_on(name: str, resource: Resource) -> Iterator[tuple[Cgroup, PressureTrigger]]:
    """A cgroup that nobody is in yet, and a trigger for 50 ms of stall there; or a skip that says what is missing."""
    need_blob("breaker")
    group = Cgroup.create(f"pctest-{name}-{os.getpid()}")
    try:
        trigger = PressureTrigger(group.path, resource, stalled_ns=50_000_000)
    except KernelError as error:
        group.remove()
        pytest.skip(f"no pressure triggers here: {error.got}")
    try:
        yield group, trigger
    finally:
        trigger.close()
        group.remove()


@contextlib.contextmanager
def reading(path: Path, procs: list[Path]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", READ, str(path), *map(str, procs)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def fired_within(trigger: PressureTrigger, seconds: float, process: subprocess.Popen[bytes]) -> Pressure:
    fired = trigger.wait(seconds)
    assert process.poll() is None, "it ended before it could stall"
    assert fired is not None
    return fired


def test_a_memory_pressure_trigger_fires_for_its_cgroup(tmp_path: Path) -> None:
    """A file four times as large as the memory that its reader may have: each page pushes out another."""
    path, before = tmp_path / "file", shared_memory()
    with path.open("wb") as file:
        for _ in range(4 * CROWDED >> 20):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else its pages stay, charged to us
    if shared_memory() - before > CROWDED:
        pytest.skip("no disk behind temporary files: they lie in memory and cannot be read again")
    with trigger_on("memory", Resource.MEMORY) as (group, trigger), crowded(group) as procs:
        assert trigger.wait(0) is None
        with reading(path, procs) as process:
            fired = fired_within(trigger, 20, process)
        assert (fired.cgroup, fired.resource) == (group.id, Resource.MEMORY)
        assert fired.stalled_ns >= 50_000_000


def test_an_io_pressure_trigger_fires_for_its_cgroup(slow_fs: SlowFs, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ext4")
    with trigger_on("io", Resource.IO) as (group, trigger), loop_ext4(slow_fs, folder) as loop:
        assert trigger.wait(0) is None
        slow_fs.delay(Op.READ, 0.05)
        with reading(loop, [group.path / "cgroup.procs"]) as process:
            fired = fired_within(trigger, 20, process)
            slow_fs.delay(Op.READ, 0)
        assert (fired.cgroup, fired.resource) == (group.id, Resource.IO)
        assert fired.stalled_ns >= 50_000_000


@pytest.mark.parametrize(("stalled", "window"), [(0, 2 * 10**9), (3 * 10**9, 2 * 10**9), (10**6, 10**8), (1, 10**11)])
def test_a_trigger_outside_the_kernels_bounds_is_our_mistake(stalled: int, window: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stall"):
        PressureTrigger(tmp_path, Resource.IO, stalled_ns=stalled, window_ns=window)
