"""OOM victims and bad exits of watched cgroups, in the running kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.event import Kind, ProcessEvent
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from tests.kernel.lab import events, member

pytestmark = pytest.mark.kernel
V1_MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def sensor(lifecycle_blob: Blob) -> Iterator[LifecycleSensor]:
    with LifecycleSensor(lifecycle_blob) as lifecycle:
        lifecycle.attach()
        yield lifecycle


@pytest.fixture
def watched(sensor: LifecycleSensor) -> Iterator[Cgroup]:
    with member("lifecycle") as group:
        sensor.watch(group.id)
        yield group


def shell(text: str) -> int:
    return subprocess.run(["sh", "-c", text], check=False).returncode


def process_events(sensor: LifecycleSensor) -> list[ProcessEvent]:
    return [e for e in events(sensor) if isinstance(e, ProcessEvent)]


@pytest.mark.parametrize(("text", "signal_", "status"), [("exit 3", 0, 3), ("kill -9 $$", 9, 0), ("kill -6 $$", 6, 0)])
def test_a_bad_exit_is_reported(sensor: LifecycleSensor, watched: Cgroup, text: str, signal_: int, status: int) -> None:
    shell(text)
    (event,) = process_events(sensor)
    assert (event.kind, event.signal, event.status, event.comm) == (Kind.PROCESS_EXIT, signal_, status, "sh")
    assert event.cgroup == watched.id
    assert 0 < event.life_ns < 10**10


def test_a_good_exit_is_silent(sensor: LifecycleSensor, watched: Cgroup) -> None:
    shell("exit 0")
    assert events(sensor) == []


def test_another_cgroup_is_silent(sensor: LifecycleSensor, watched: Cgroup) -> None:
    sensor.unwatch(watched.id)
    shell("exit 3")
    assert events(sensor) == []
    assert sensor.sent() == 0


def test_a_thread_that_ends_is_no_process(sensor: LifecycleSensor, watched: Cgroup) -> None:
    code = "import threading; t = threading.Thread(target=lambda: None); t.start(); t.join(); raise SystemExit(4)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (event,) = process_events(sensor)
    assert event.status == 4


def test_the_name_of_a_process_is_only_text(sensor: LifecycleSensor, watched: Cgroup) -> None:
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\x1b[31m\\n\\xff'); raise SystemExit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (event,) = process_events(sensor)
    assert event.comm == "\\x1b[31m\\n\\xff"


def test_cgroup_kill_is_seen_as_sigkill(sensor: LifecycleSensor, watched: Cgroup) -> None:
    below = Cgroup.create("service", watched.path)
    sensor.watch(below.id)
    child = subprocess.Popen(["sleep", "60"])
    below.add(child.pid)
    time.sleep(0.05)
    below.kill()
    assert child.wait() == -signal.SIGKILL
    (event,) = process_events(sensor)
    assert (event.pid, event.signal, event.cgroup) == (child.pid, 9, below.id)
    below.remove()
    below.remove()


def test_an_oom_kill_names_victim_service_and_memory_cgroup(sensor: LifecycleSensor, watched: Cgroup) -> None:
    memory, limit = _limited_memory()
    sensor.watch(memory.stat().st_ino)
    hog = (
        f"open({str(memory / 'cgroup.procs')!r}, 'w').write('0')\n"
        "held = []\nwhile True: held.append(bytearray(b'x' * (4 << 20)))\n"
    )
    try:
        limit.write_text(str(48 << 20))
        child = subprocess.Popen([sys.executable, "-c", hog], stderr=subprocess.DEVNULL)
        assert child.wait(30) == -signal.SIGKILL
        found = {e.kind: e for e in process_events(sensor) if e.pid == child.pid}
        inode = memory.stat().st_ino
    finally:
        memory.rmdir()
    assert set(found) == {Kind.OOM_VICTIM, Kind.PROCESS_EXIT}
    assert found[Kind.OOM_VICTIM].memory_cgroup == inode
    assert found[Kind.PROCESS_EXIT].signal == signal.SIGKILL


def _limited_memory() -> tuple[Path, Path]:
    """A cgroup of the memory controller, in its v1 tree or in v2: (folder, limit file)."""
    name = f"pctest-oom-{os.getpid()}"
    if V1_MEMORY.is_dir():
        folder, limit = V1_MEMORY / name, "memory.limit_in_bytes"
    else:
        (find_root() / "cgroup.subtree_control").write_text("+memory")
        folder, limit = find_root() / name, "memory.max"
    folder.mkdir()
    if (folder / "memory.swap.max").exists():
        (folder / "memory.swap.max").write_text("0")
    return folder, folder / limit
