"""What the kernel, or this machine, does not give: each refusal has its id and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import platform
import signal
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel import bpf, btf, cgroup
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.pressure import PressureTrigger, check_window
from pointcall_executor.kernel.ring import Ring
from pointcall_runbook.vocabulary import Address, Resource
from tests.unit.services.world import needs_cgroups

SECOND_NS = 1_000_000_000


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x9f\xeb\x01", bytes(24), b"\x7fELF" + bytes(60), struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 40, 40, 1)],
)
def test_what_is_no_btf(raw: bytes) -> None:
    with pytest.raises(KernelError) as refused:
        btf.find(raw, [(btf.Kind.STRUCT, "task_struct")])
    assert refused.value.id == "kernel.btf.malformed"


def test_a_machine_whose_ring_python_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without acquire loads a record could be read before it is whole."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(KernelError) as refused:
        Ring(-1)
    assert (refused.value.id, refused.value.got) == ("kernel.ring.machine", "riscv64")


def test_a_cgroup_without_a_pressure_file(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KernelError) as refused:
        PressureTrigger(tmp_path, Resource.CPU, stalled_ns=SECOND_NS, window_ns=2 * SECOND_NS)
    assert refused.value.id == "kernel.pressure"
    (tmp_path / "cpu.pressure").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=x\n")
    (tmp_path / "cpu.pressure").chmod(0o400)
    (tmp_path / "memory.pressure").mkdir()
    with pytest.raises(KernelError) as refused:
        PressureTrigger(tmp_path, Resource.MEMORY, stalled_ns=SECOND_NS, window_ns=2 * SECOND_NS)
    assert refused.value.id == "kernel.pressure"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(("stalled", "window"), [(0, 2), (3, 2), (1, 11)])
def test_a_window_outside_the_kernels_bounds(stalled: int, window: int) -> None:
    with pytest.raises(ValueError, match="in a window of"):
        check_window(stalled * SECOND_NS, window * SECOND_NS)


@needs_cgroups
def test_a_cgroup_that_does_not_become_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task in uninterruptible sleep looks like: it is killed, and stays."""
    monkeypatch.setattr(cgroup, "_REMOVE_TRIES", 3)
    group = Cgroup.create(f"pointcall-busy-{os.getpid()}")
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        (group.path / "cgroup.procs").write_text(str(pid))
        with monkeypatch.context() as patched:
            patched.setattr(Cgroup, "kill", lambda _group: None)
            with pytest.raises(KernelError) as refused:
                group.remove()
        assert refused.value.id == "kernel.cgroup.busy"
        assert str(pid) in refused.value.got
        assert group.path.is_dir()
    finally:
        group.kill()
        os.waitpid(pid, 0)
        group.remove()
    assert not group.path.exists()


def test_a_circuit_that_others_change_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program gives up after some lost exchanges; the caller is told, and may ask again."""
    here, asked = Destination(Address.parse("127.0.0.1"), 80), []

    def lost(program: int, context: bytes) -> tuple[int, bytes]:
        asked.append(program)
        return -errno.EAGAIN, context

    monkeypatch.setattr(bpf, "prog_run", lost)
    monkeypatch.setattr(BreakerSensor, "_alive", property(lambda _: SimpleNamespace(programs={"pc_command": 7})))
    sensor: Any = object.__new__(BreakerSensor)
    with pytest.raises(KernelError) as refused:
        sensor.close_circuit(here)
    assert (refused.value.id, refused.value.got, asked) == ("kernel.circuit.busy", "EAGAIN", [7])
