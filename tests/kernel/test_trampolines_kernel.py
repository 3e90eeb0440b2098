"""What only some kernels grant: trampolines on files, the LSM guard of links, a delaying disk, block cgroups in v2.

Where they are refused the tests skip by name; `make test-kernels` runs them on kernels that grant them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.event import Source, StorageEvent, decode
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.kernel.storage import StorageSensor
from pointcall_executor.kernel.tamper import TamperGuard
from pointcall_executor.sensors import KernelSensors
from pointcall_runbook.vocabulary import Operation
from tests.kernel.lab import member, need_blob
from tests.kernel.slowfs import Op, mounted, private_mounts, run

pytestmark = pytest.mark.kernel
SLOW = {"slow_ns": 10_000_000, "stall_ns": 15_000_000, "window_ns": 10**9}


def events(sensor: StorageSensor) -> list[StorageEvent]:
    return [e for e in map(decode, sensor.ring.drain()) if isinstance(e, StorageEvent)]


def test_a_slow_read_of_any_file_system_is_seen_and_a_pipe_is_not(tmp_path: Path) -> None:
    blob = need_blob("vfs")
    with (
        private_mounts(), mounted(tmp_path) as fs, StorageSensor(blob, constants=SLOW) as sensor,
        member("vfs") as group, fs.path.open("rb", buffering=0) as file,
    ):  # fmt: skip
        sensor.attach()
        fs.delay(Op.READ, 0.02)
        os.pread(file.fileno(), 512, 0)
        reader, writer = os.pipe()
        with subprocess.Popen(["sh", "-c", "sleep 0.05; echo x"], stdout=writer):
            os.read(reader, 1)
        os.close(reader)
        os.close(writer)
        device = os.fstat(file.fileno()).st_dev
        found = events(sensor)
        assert {(e.cgroup, e.operation, e.source) for e in found} == {(group.id, Operation.READ, Source.VFS)}
        assert {e.device for e in found} == {os.major(device) << 20 | os.minor(device)}


SWAP = """
import ctypes, struct, sys
from pointcall_executor.kernel import bpf
what, link, program = map(int, sys.argv[1:])
attr = struct.pack("<IIII", link, program, 0, 0) if what == 29 else struct.pack("<I", link)
try:
    bpf.bpf(type("Raw", (int,), {"name": "raw"})(what), attr)
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.mark.parametrize("command", [29, 34], ids=["update", "detach"])
def test_nobody_else_can_swap_or_take_off_a_link(command: int) -> None:
    guard, breaker = need_blob("tamper"), need_blob("breaker")
    if "bpf" not in Path("/sys/kernel/security/lsm").read_text().split(","):
        pytest.skip("`bpf` is not in the kernel's lsm=")
    with member("tamper") as group, BreakerSensor(breaker, cgroup=group.path) as sensor:
        sensor.attach()
        recorded = sensor.identity()
        link, program = sensor._links["pc_connect4"], sensor._alive.programs["pc_connect4"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        words = [sys.executable, "-c", SWAP, str(command), str(link), str(program)]

        def attack() -> int:
            return subprocess.run(words, pass_fds=(link, program), env=environment).returncode

        with TamperGuard(guard) as tamper:
            tamper.attach()
            tamper.attach()
            assert attack() == 1  # EPERM
            assert tamper.denied() == 1
            sensors = KernelSensors.__new__(KernelSensors)
            sensors._objects, sensors._denied = {"tamper": tamper}, 0
            assert (sensors.denied(), sensors.denied()) == (1, 0)  # what the executor logs
            assert sensor.recheck(recorded) == []
            sensor.detach()  # the executor itself is free
            sensor.attach()
        link = sensor._links["pc_connect4"]
        words[-2] = str(link)
        assert attack() == 0  # without the guard it works, and only comparing shows it


@contextlib.contextmanager
def delaying_disk(folder: Path, delay_ms: int) -> Iterator[Path]:
    """A loop device behind dm-delay: every write takes so long. Yields the device."""
    if shutil.which("dmsetup") is None:
        pytest.skip("no dmsetup: apt-get install dmsetup")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    try:
        loop = run("losetup", "-f", "--show", str(image))
    except subprocess.CalledProcessError:
        pytest.skip("no loop device")
    name = f"pctest-{os.getpid()}"
    try:
        sectors = (32 << 20) // 512
        table = f"0 {sectors} delay {loop} 0 0 {loop} 0 {delay_ms}"
        made = subprocess.run(
            ["dmsetup", "create", name, "--noudevrules", "--noudevsync", "--table", table],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no dm-delay in this kernel: {made.stderr.strip().splitlines()[-1:]}")
        try:
            run("dmsetup", "mknodes")
            yield Path(f"/dev/mapper/{name}")
        finally:
            run("dmsetup", "remove", "--noudevsync", name)
    finally:
        run("losetup", "-d", loop)


def test_a_delaying_disk_is_slow_whoever_looks(tmp_path: Path) -> None:
    """The block requests of the disk above are those of the mapped device; files on it are slow in fsync."""
    blob = need_blob("vfs")
    mount = tmp_path / "mnt"
    mount.mkdir()
    with delaying_disk(tmp_path, 30) as disk, private_mounts(), StorageSensor(blob, constants=SLOW) as sensor:
        run("mkfs.ext4", "-q", str(disk))
        run("mount", "-t", "ext4", str(disk), str(mount))
        try:
            sensor.attach()
            with (mount / "file").open("wb", buffering=0) as file:
                file.write(b"x" * 4096)
                start = time.monotonic()
                os.fsync(file.fileno())
                assert time.monotonic() - start > 0.025
            device = mount.stat().st_dev
            number = os.major(device) << 20 | os.minor(device)
            found = [e for e in events(sensor) if (e.device, e.operation) == (number, Operation.FSYNC)]
        finally:
            run("umount", str(mount))
    assert found
    assert found[0].longest_ns > 25_000_000


def test_block_requests_name_their_cgroup_where_the_controller_is_in_v2(tmp_path: Path) -> None:
    controllers = (find_root() / "cgroup.controllers").read_text().split()
    if "io" not in controllers:
        pytest.skip("the io controller is not in the v2 tree: a hybrid host")
    blob = need_blob("storage")
    (find_root() / "cgroup.subtree_control").write_text("+io")
    try:
        loop_image = tmp_path / "disk.img"
        with loop_image.open("wb") as file:
            file.truncate(32 << 20)
        loop = run("losetup", "-f", "--show", str(loop_image))
        try:
            with member("blkcg") as group, StorageSensor(blob, constants=SLOW) as sensor:
                sensor.attach()
                with Path(loop).open("rb", buffering=0) as raw:
                    os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    os.pread(raw.fileno(), 4096, 16 << 20)
                number = Path(loop).stat().st_rdev
                device = os.major(number) << 20 | os.minor(number)
                assert group.id in {h.cgroup for h in sensor.histograms() if h.device == device}
        finally:
            run("losetup", "-d", loop)
    finally:
        (find_root() / "cgroup.subtree_control").write_text("-io")


def test_an_fexit_program_runs(tmp_path: Path) -> None:
    """Loading is not enough: the histogram has what was read."""
    blob = need_blob("vfs")
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    with StorageSensor(blob) as sensor:
        sensor.attach()
        for _ in range(10):
            path.read_bytes()
        reads = sum(h.total for h in sensor.histograms() if h.operation is Operation.READ)
    assert reads >= 10
