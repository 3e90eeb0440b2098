"""The embedded supervisor with real processes and real cgroups."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.services import process as processes
from pointcall_executor.services import spawning
from pointcall_executor.services.chores import CHORES
from pointcall_executor.services.files import opened_verified
from pointcall_executor.services.groups import LIMITED, ServiceGroups, limit_place, remove_empty, v1_mount
from pointcall_executor.services.listening import listening
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.services.output import MAX_OUTPUT_BYTES
from pointcall_executor.services.process import Process
from pointcall_executor.services.spawning import Spawner
from pointcall_runbook.vocabulary import Address
from tests.unit.services.world import remove_spawners

PARENT = f"pointcall-test-{os.getpid()}"
LOOPBACK = Address.parse("127.0.0.1")
SERVE = """
import os, socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if "fork" in sys.argv: os.fork()
print("serving", flush=True)
while True: listener.accept()[0].close()
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(find_root(), os.W_OK), reason="needs root and a writable cgroup v2 tree"
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    made = Spawner(PARENT).watch()
    yield made
    made.close()
    remove_empty(PARENT)
    remove_spawners(PARENT)


@pytest.fixture
def make(tmp_path: Path, spawner: Spawner) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def build(source: str, *words: str, **over: Any) -> Process:
        script, program = tmp_path / "main.py", Path(sys.executable).resolve()
        script.write_text(source)
        process: dict[str, Any] = {
            "argv": [str(program), "-I", "-S", str(script), *words],
            "files": [{"path": str(p), "sha256": sha256(p)} for p in (program, script)],
            "directory": str(tmp_path),
        }
        body = {"format": "pointcall-service/v1", "name": "svc", "kind": "process", "process": process | over}
        declaration = ServiceDeclaration.parse(json.dumps(body).encode())
        made.append(Process(declaration, PARENT, tmp_path / "services", spawner))
        return made[-1]

    yield build
    for process in made:
        process.destroy(0)
        process.release()


def serving(make: Callable[..., Process], port: int, *words: str, **over: Any) -> Process:
    return make(SERVE, str(port), *words, ready={"tcp": f"127.0.0.1:{port}", "timeout_ms": 5000}, **over)


def folders() -> list[Path]:
    return list((find_root() / PARENT).glob("svc.*"))


def swept() -> list[Path]:
    """What is left once the removal that nobody waits for is done."""
    assert CHORES.finish()
    return folders()


def test_a_started_service_listens_runs_in_its_own_cgroup_and_its_output_is_kept(
    make: Callable[..., Process], port: int, tmp_path: Path
) -> None:
    process = serving(make, port)
    started = process.start()
    assert process.running
    assert listening(LOOPBACK, port)
    (folder,) = folders()
    assert folder.stat().st_ino == started.cgroup_id
    assert str(process.pid) in (folder / "cgroup.procs").read_text().split()
    assert started.ready_for == f"accepts on 127.0.0.1:{port}"
    assert started.files == 2
    assert min(started.verified_ns, started.spawned_ns, started.ready_ns) > 0
    deadline = time.monotonic() + 5
    while "serving" not in (tmp_path / "services/svc/output.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_destroy_leaves_no_process_and_no_cgroup_and_may_be_called_twice(
    make: Callable[..., Process], port: int
) -> None:
    process = serving(make, port, "fork")
    process.start()
    process.destroy(0)
    assert not process.running
    assert swept() == []
    assert not listening(LOOPBACK, port)
    process.destroy(0)


def test_a_service_that_cannot_be_ended_is_not_forgotten_and_no_second_one_is_started(
    make: Callable[..., Process], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_self: ServiceGroups) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "cgroup.kill")

    process = serving(make, port)
    first = process.start()
    with monkeypatch.context() as patch:
        patch.setattr(ServiceGroups, "destroy", refused)
        for attempt in (lambda: process.destroy(0), process.start, process.start):
            with pytest.raises(ServiceError) as refusal:
                attempt()
            assert refusal.value.id == "service.destroy"
            assert (process.running, process.pid, process.cgroup_id) == (True, first.pid, first.cgroup_id)
    assert process.start().pid != first.pid
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)


def test_a_polite_service_ends_by_its_stop_signal_within_the_grace(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    took_ns = process.destroy(5_000_000_000)
    assert took_ns < 5_000_000_000


def test_a_killed_service_starts_again_in_a_new_cgroup(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    first = process.start()
    os.kill(process.pid, signal.SIGKILL)
    process.destroy(0)
    seen: list[int] = []
    second = process.start(on_cgroup=seen.append)
    assert second.pid != first.pid
    assert seen == [second.cgroup_id]
    assert listening(LOOPBACK, port)


def test_a_changed_file_is_never_executed(make: Callable[..., Process], port: int, tmp_path: Path) -> None:
    process = serving(make, port)
    (tmp_path / "main.py").write_text("raise SystemExit('changed')")
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert refusal.value.id == "service.digest"
    assert swept() == []


def test_a_missing_file_is_named(make: Callable[..., Process], port: int, tmp_path: Path) -> None:
    process = serving(make, port)
    (tmp_path / "main.py").unlink()
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert refusal.value.id == "service.file"
    assert "main.py" in refusal.value.message


@pytest.mark.parametrize(
    ("source", "timeout_ms", "id"),
    [("raise SystemExit(1)", 5000, "service.ended"), ("import time; time.sleep(60)", 50, "service.not-ready")],
)
def test_a_service_that_does_not_come_up_is_an_error_and_leaves_nothing(
    make: Callable[..., Process], port: int, source: str, timeout_ms: int, id: str
) -> None:
    process = make(source, ready={"tcp": f"127.0.0.1:{port}", "timeout_ms": timeout_ms})
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert refusal.value.id == id
    assert swept() == []


def test_a_program_that_cannot_be_executed_names_the_step(make: Callable[..., Process], tmp_path: Path) -> None:
    script = tmp_path / "plain"
    script.write_text("not a program")
    process = make("", argv=[str(script)], files=[{"path": str(script), "sha256": sha256(script)}])
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert refusal.value.id == "service.spawn"
    assert refusal.value.got.startswith("exec:")


def test_an_unknown_account_is_named(make: Callable[..., Process]) -> None:
    with pytest.raises(ServiceError) as refusal:
        make("", user="nobody-here").start()
    assert refusal.value.id == "service.account"


def test_a_service_runs_as_the_declared_user_without_new_privileges_in_its_namespaces(
    make: Callable[..., Process],
) -> None:
    program = Path("/bin/sleep").resolve()  # a program that every user can enter, unlike a test's folder
    process = make(
        "",
        argv=[str(program), "60"],
        files=[{"path": str(program), "sha256": sha256(program)}],
        directory="/",
        user="nobody",
        namespaces=["uts", "ipc"],
    )
    process.start()
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    uid = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1]
    assert uid == str(pwd.getpwnam("nobody").pw_uid)
    for name in ("uts", "ipc"):
        assert Path(f"/proc/{process.pid}/ns/{name}").readlink() != Path(f"/proc/self/ns/{name}").readlink()


def test_a_service_of_roots_cannot_trace_other_accounts(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    status = Path(f"/proc/{process.pid}/status").read_text()
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert not int(status.split(f"{name}:")[1].split()[0], 16) >> 19 & 1, name


def test_the_memory_limit_holds(make: Callable[..., Process]) -> None:
    source = "held = []\nwhile True: held.append(bytearray(b'1') * (4 << 20))"
    process = make(source, limits={"memory_bytes": 48 << 20})
    process.start()
    deadline = time.monotonic() + 10
    while process.running:
        assert time.monotonic() < deadline, "the kernel did not end it"
        time.sleep(0.01)


FORKS = """
n=0
while [ $n -lt 40 ]; do /bin/sleep 600 & n=$((n+1)); echo "$n"; done
echo "no end"
"""


def forks(make: Callable[..., Process], tmp_path: Path, **over: Any) -> int:
    """How many children a service with room for eight processes gets before the kernel says no."""
    shell = Path("/bin/sh").resolve()
    files = [{"path": str(shell), "sha256": sha256(shell)}]
    limits = {"processes": 8}
    make("", argv=[str(shell), "-c", FORKS], files=files, directory="/", limits=limits, **over).start()
    log = tmp_path / "services/svc/output.log"
    wait_for(lambda: "fork" in log.read_text() or "no end" in log.read_text())  # "Cannot fork"
    assert "no end" not in log.read_text()
    return len(re.findall(r"^[0-9]+$", log.read_text(), re.MULTILINE))


def test_a_service_of_roots_that_forks_beyond_its_limit_is_held_and_the_rest_of_the_machine_is_not(
    make: Callable[..., Process], tmp_path: Path
) -> None:
    if not limit_place("pids"):
        pytest.skip("cgroups have no pids controller")
    assert forks(make, tmp_path) == 7
    assert subprocess.run(["/bin/true"], check=False, timeout=60).returncode == 0


def test_the_limit_of_processes_counts_no_others_of_the_account(make: Callable[..., Process], tmp_path: Path) -> None:
    if not limit_place("pids"):
        pytest.skip("cgroups have no pids controller")
    nobody = pwd.getpwnam("nobody").pw_uid
    others = [subprocess.Popen(["/bin/sleep", "600"], user=nobody) for _ in range(9)]
    try:
        assert forks(make, tmp_path, user="nobody") == 7
    finally:
        for other in others:
            other.kill()
            other.wait()


def v1_groups(pid: int) -> dict[str, str]:
    """The v1 cgroups of a process that hold what can be limited, by controller."""
    rows = [row.split(":", 2) for row in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return {name: path for _, names, path in rows for name in names.split(",") if name in LIMITED}


def test_on_a_hybrid_host_a_service_leaves_the_executors_groups_only_for_what_it_limits(
    make: Callable[..., Process], spawner: Spawner
) -> None:
    if not all(map(v1_mount, LIMITED)):
        pytest.skip("memory and pids are no controllers of cgroup v1 here")
    limits: list[dict[str, int]] = [{}, {"memory_bytes": 64 << 20}, {"memory_bytes": 64 << 20, "processes": 8}]
    executors, left = v1_groups(spawner.pid), []
    for limit in limits:
        process = make("import time; time.sleep(60)", limits=limit)
        own = v1_groups(process.start().pid)
        left.append({name for name in LIMITED if own[name] != executors[name]})
        process.destroy(0)
    assert left == [set(), {"memory"}, {"memory", "pids"}]


def no_pids(patch: pytest.MonkeyPatch) -> None:
    def limit_tasks(_self: ServiceGroups, _limit: int) -> None:
        raise OSError(errno.ENOENT, "no such controller")

    patch.setattr(ServiceGroups, "limit_tasks", limit_tasks)


def test_without_the_controller_an_account_is_held_and_a_service_of_roots_is_not_started(
    make: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pids(monkeypatch)
    assert forks(make, tmp_path, user="nobody") < 8, "less where the account runs something else"
    process = make("", limits={"processes": 8})
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert (refusal.value.id, refusal.value.want) == ("service.limit", "the pids controller of cgroups")
    assert not process.running


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL])
def test_a_limit_that_fails_otherwise_is_no_reason_to_count_the_account_instead(
    make: Callable[..., Process], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def limit_tasks(_self: ServiceGroups, _limit: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ServiceGroups, "limit_tasks", limit_tasks)
    with pytest.raises(ServiceError) as refusal:
        make("", user="nobody", limits={"processes": 8}).start()
    assert (refusal.value.id, os.strerror(number) in refusal.value.got) == ("service.spawn", True)
    assert swept() == []


def test_nobody_listens_on_a_free_port_and_any_address_counts_as_every_address(port: int) -> None:
    assert not listening(LOOPBACK, port)
    with socket.create_server(("0.0.0.0", port)):
        assert listening(LOOPBACK, port)
        assert listening(Address.parse("192.0.2.1"), port)
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert listening(Address.parse("::1"), port)
        assert not listening(LOOPBACK, port)


def test_services_that_are_started_at_once_get_their_own_process(make: Callable[..., Process], tmp_path: Path) -> None:
    """Answers of the spawner are not mixed up, and each pidfd is that of its own process."""
    made = []
    for _ in range(6):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            made.append(serving(make, int(probe.getsockname()[1])))
    with ThreadPoolExecutor(6) as pool:
        started = list(pool.map(Process.start, made))
    assert len({s.pid for s in started}) == 6
    for process, one in zip(made, started, strict=True):
        info = Path(f"/proc/self/fdinfo/{process.pidfd}").read_text()
        assert f"Pid:\t{one.pid}" in info
        assert Path(f"/proc/{one.pid}/cgroup").read_text().count(process._groups.relative)
    made[0].destroy(0)
    assert [p.running for p in made] == [False] + [True] * 5


def test_a_spawner_that_died_is_replaced(make: Callable[..., Process], port: int, spawner: Spawner) -> None:
    process = serving(make, port)
    os.kill(spawner.pid, signal.SIGKILL)
    assert process.start().pid
    assert process.running


def test_a_ready_file_of_an_earlier_instance_says_nothing(make: Callable[..., Process], tmp_path: Path) -> None:
    flag = tmp_path / "ready"
    flag.touch()
    process = make("import time; time.sleep(60)", ready={"file": str(flag), "timeout_ms": 300})
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert refusal.value.id == "service.not-ready"


def frozen(process: Process) -> bool:
    return "frozen 1" in (process._groups.folder / "cgroup.events").read_text()


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_freeze_ends_at_its_time(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    process.freeze(time.monotonic_ns() + 300_000_000)
    wait_for(lambda: frozen(process))
    assert process.healthy() == "it is frozen"
    wait_for(lambda: not frozen(process))
    assert process.healthy() == ""


def test_whether_everything_is_stopped_is_asked_of_the_kernel(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    now_ns = time.monotonic_ns()
    assert not process.frozen(now_ns + 60_000_000_000)
    process.freeze(now_ns + 60_000_000_000)
    assert process.frozen(now_ns + 60_000_000_000)
    process.thaw()
    assert not process.frozen(now_ns + 60_000_000_000)
    assert process.frozen(now_ns)  # the freeze would have ended: nobody can say


def test_a_freeze_ends_by_thaw_and_both_may_be_called_twice(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    for _ in range(2):
        process.freeze(time.monotonic_ns() + 60_000_000_000)
    wait_for(lambda: frozen(process))
    for _ in range(2):
        process.thaw()
    wait_for(lambda: not frozen(process))


def test_a_frozen_service_ends_politely_too(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    process.freeze(time.monotonic_ns() + 60_000_000_000)
    assert process.destroy(10_000_000_000) < 10_000_000_000
    assert swept() == []


def test_a_freeze_ends_when_the_executor_is_gone(make: Callable[..., Process], port: int, spawner: Spawner) -> None:
    process = serving(make, port)
    process.spawner = Spawner(PARENT).watch()
    process.start()
    process.freeze(time.monotonic_ns() + 60_000_000_000)
    wait_for(lambda: frozen(process))
    process.spawner.close()  # its socket ends, as it does at kill -9
    wait_for(lambda: not frozen(process))
    process.spawner = spawner


def test_a_signal_reaches_the_main_process(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    process.signal(signal.SIGKILL)
    wait_for(lambda: not process.running)
    assert process.healthy() == "its main process does not run"
    for ask in (lambda: process.signal(15), lambda: process.freeze(time.monotonic_ns())):
        with pytest.raises(ServiceError) as refusal:
            ask()
        assert refusal.value.id == "service.not-running"


def test_the_pid_and_mount_namespaces_are_the_services_own(make: Callable[..., Process], tmp_path: Path) -> None:
    source = """
import os, pathlib, sys
found = sorted(int(p.name) for p in pathlib.Path("/proc").iterdir() if p.name.isdecimal())
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {found}")
import time; time.sleep(600)
"""
    told = tmp_path / "told"
    process = make(source, str(told), namespaces=["pid", "mount", "cgroup"], ready={"file": str(told)})
    process.start()
    wait_for(lambda: told.read_text() == "1 [1]")
    assert Path("/proc/self").exists()
    assert Path(f"/proc/{process.pid}/stat").exists()


def test_a_service_in_its_own_network_has_a_loopback_that_works(make: Callable[..., Process], tmp_path: Path) -> None:
    source = """
import pathlib, socket, sys
with socket.create_server(("127.0.0.1", 0)) as one, socket.create_connection(one.getsockname()):
    pathlib.Path(sys.argv[1]).touch()
import time; time.sleep(600)
"""
    told = tmp_path / "told"
    process = make(source, str(told), namespaces=["network"], ready={"file": str(told)})
    assert process.start().ready_for == f"{told} exists"
    assert Path(f"/proc/{process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def test_output_is_bounded_while_the_service_runs(make: Callable[..., Process], tmp_path: Path) -> None:
    process = make(
        "import sys\nfor n in range(60000): print(n, 'x' * 90)\nsys.stdout.flush()\nimport time; time.sleep(600)"
    )
    process.start()
    log = tmp_path / "services/svc/output.log"

    def written() -> bytes:
        with contextlib.suppress(FileNotFoundError):  # not yet begun, or just moved aside
            return log.read_bytes()
        return b""

    wait_for(lambda: b"\n59999 " in written())
    assert sum(p.stat().st_size for p in log.parent.glob("output.log*")) <= MAX_OUTPUT_BYTES
    assert process.healthy() == ""


def test_a_service_that_answers_http_is_ready_and_one_that_answers_otherwise_is_not(
    make: Callable[..., Process], port: int
) -> None:
    source = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    with listener.accept()[0] as channel:
        channel.recv(4096); channel.sendall(b"HTTP/1.1 " + sys.argv[2].encode() + b" x\\r\\n\\r\\n")
"""
    ready = {"tcp": f"127.0.0.1:{port}", "http": {"path": "/live", "status": 204}, "timeout_ms": 3000}
    process = make(source, str(port), "204", ready=ready)
    assert process.start().ready_for == f"accepts on 127.0.0.1:{port} and answers GET /live with 204"
    assert process.healthy() == ""
    process.destroy(0)
    process = make(source, str(port), "500", ready=ready | {"timeout_ms": 300})
    with pytest.raises(ServiceError) as refusal:
        process.start()
    assert (refusal.value.id, refusal.value.got) == ("service.not-ready", "GET /live was answered with 500")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracer_of(pid: int) -> int:
    """0: nobody traces it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid:"))


def test_the_next_instance_waits_and_is_used(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    assert process._next is not None
    waiting = process._next.unborn.pid
    assert waiting != process.pid
    process.destroy(0)
    assert process.start().pid == waiting
    assert Path(f"/proc/{waiting}/cgroup").read_text().count(f"{process._groups.relative}\n")
    assert str(waiting) in (find_root() / process._groups.relative / "cgroup.procs").read_text().split()


def test_an_instance_that_waits_with_a_file_that_was_replaced_is_not_used(
    make: Callable[..., Process], port: int, tmp_path: Path
) -> None:
    program = tmp_path / "copy"
    shutil.copy(Path(sys.executable).resolve(), program)
    script = tmp_path / "main.py"
    script.write_text(SERVE)
    files = [{"path": str(p), "sha256": sha256(p)} for p in (program, script)]
    process = serving(make, port, argv=[str(program), "-I", "-S", str(script), str(port)], files=files)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    shutil.copy(program, tmp_path / "new")
    (tmp_path / "new").replace(program)  # the same content in another file
    assert process.start().pid != waiting
    wait_for(lambda: not Path(f"/proc/{waiting}").exists())


def test_an_instance_that_was_killed_while_it_waited_is_not_used(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    os.kill(waiting, signal.SIGKILL)
    assert process.start().pid != waiting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSTOP, signal.SIGUSR1])
def test_a_signal_to_what_is_held_never_meets_the_service(make: Callable[..., Process], number: int) -> None:
    process = make("import time; time.sleep(600)")
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    os.kill(waiting, number)
    assert process.start().pid != waiting
    wait_for(lambda: state_of(process.pid) == "S")
    time.sleep(0.1)
    assert process.running
    assert not Path(f"/proc/{waiting}").exists()


def test_what_waits_has_executed_its_program_and_is_held(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    assert Path(f"/proc/{waiting}/exe").samefile(f"/proc/{process.pid}/exe")
    assert state_of(waiting) == "t"
    process.destroy(0)
    assert process.start().pid == waiting
    assert tracer_of(waiting) == 0


def test_a_spawner_that_does_not_let_go_what_it_holds_is_replaced(
    make: Callable[..., Process], port: int, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting, stopped = process._next.unborn.pid, spawner.pid
    monkeypatch.setattr(spawning, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(spawning, "_stopped", lambda _pid: False)  # stuck in another way
    with stopping(stopped):
        assert process.start().pid != waiting
    assert spawner.pid != stopped
    assert process.healthy() == ""
    wait_for(lambda: not Path(f"/proc/{waiting}").exists())


def test_a_spawner_that_somebody_has_stopped_goes_on_with_all_that_it_has(
    make: Callable[..., Process], port: int, spawner: Spawner
) -> None:
    process = serving(make, port)
    process.start()
    before = spawner.pid
    spawner._process.channel.settimeout(spawning.ANSWER_SECONDS)  # other tests make some that wait for less
    with stopping(before):
        process.destroy(0)
        process.start()
        assert state_of(before) != "T"
    with stopping(before):
        os.close(spawner.program(process.pid))
    assert spawner.pid == before
    process.freeze(time.monotonic_ns() + 200_000_000)
    with stopping(before):
        wait_for(lambda: not process._groups.freezer.frozen)  # its lease ends all the same


def test_what_waits_by_itself_and_does_not_answer_costs_no_spawner(
    make: Callable[..., Process], port: int, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = serving(make, port)
    request = process._request()
    monkeypatch.setattr(process, "_request", lambda: request | {"no_new_privileges": False})
    process.start()
    assert CHORES.finish()
    waiting, before = process._next.unborn.pid, spawner.pid
    monkeypatch.setattr(spawning, "ANSWER_SECONDS", 0.3)
    with stopping(waiting):
        assert process.start().pid != waiting
    assert spawner.pid == before
    wait_for(lambda: not Path(f"/proc/{waiting}").exists())


@contextlib.contextmanager
def stopping(pid: int) -> Iterator[None]:
    """It stands still, and does not for ever if the test fails."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)


@pytest.fixture
def loader() -> Iterator[Path]:
    """A copy of the node's ELF interpreter, at a path that is short enough to be put in the place of the usual one."""
    with tempfile.TemporaryDirectory(prefix="pc.", dir="/tmp") as folder:
        path = Path(folder, "ld")
        shutil.copy(_interpreter(Path("/bin/sleep").read_bytes())[1], path)
        yield path


def _interpreter(elf: bytes) -> tuple[slice, str]:
    """Where a 64-bit ELF program names its interpreter (elf(5): PT_INTERP), and the name."""
    (at,), (size, count) = struct.unpack_from("=Q", elf, 32), struct.unpack_from("=HH", elf, 54)
    heads = [at + n * size for n in range(count)]
    head = next(h for h in heads if struct.unpack_from("=I", elf, h) == (3,))
    (offset,), (length,) = struct.unpack_from("=Q", elf, head + 8), struct.unpack_from("=Q", elf, head + 32)
    place = slice(offset, offset + length)
    return place, elf[place].rstrip(b"\0").decode()


def _removed(loader: Path) -> None:
    new = loader.with_name("new")
    shutil.copy(loader, new)
    new.replace(loader)


def _moved_away(loader: Path) -> None:
    shutil.move(loader, loader.with_name("old"))
    shutil.copy(loader.with_name("old"), loader)


def _written_to(loader: Path) -> None:
    with loader.open("r+b") as file:
        magic = file.read(4)
        file.seek(0)
        file.write(magic)


@pytest.mark.parametrize("change", [None, _removed, _moved_away, _written_to])
@pytest.mark.parametrize("namespaces", [[], ["mount", "pid"]])
def test_what_is_held_with_a_loader_that_was_replaced_is_not_used(
    make: Callable[..., Process], tmp_path: Path, loader: Path, change: Callable[[Path], None] | None,
    namespaces: list[str],
) -> None:  # fmt: skip
    program, elf = tmp_path / "sleep", bytearray(Path("/bin/sleep").read_bytes())
    place, _ = _interpreter(bytes(elf))
    elf[place] = os.fsencode(loader).ljust(place.stop - place.start, b"\0")
    program.write_bytes(elf)
    program.chmod(0o755)
    files = [{"path": str(program), "sha256": sha256(program)}]
    process = make("", argv=[str(program), "600"], files=files, namespaces=namespaces)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    if change is not None:
        change(loader)
    assert (process.start().pid == waiting) is (change is None)
    wait_for(lambda: str(loader) in Path(f"/proc/{process.pid}/maps").read_text())
    assert process.running


def test_what_is_held_ends_with_the_spawner(make: Callable[..., Process], port: int, spawner: Spawner) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    assert tracer_of(waiting) == spawner.pid
    os.kill(spawner.pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{waiting}").exists())
    assert process.start().pid != waiting


def test_a_program_that_could_gain_privileges_would_not_be_traced(
    make: Callable[..., Process], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = serving(make, port)
    request = process._request()
    monkeypatch.setattr(process, "_request", lambda: request | {"no_new_privileges": False})
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    assert (state_of(waiting), tracer_of(waiting)) == ("S", 0)
    process.destroy(0)
    assert process.start().pid == waiting


def test_no_instance_waits_with_a_file_that_is_not_as_declared(
    make: Callable[..., Process], port: int, tmp_path: Path
) -> None:
    script = tmp_path / "main.py"
    script.write_text(SERVE)
    program = Path(sys.executable).resolve()
    files = [{"path": str(p), "sha256": sha256(p)} for p in (program, script)]
    process = serving(make, port, argv=[str(program), "-I", "-S", str(script), str(port)], files=files)
    process.start()
    script.write_text("raise SystemExit\n")
    assert CHORES.finish()
    assert process._next is None


@contextlib.contextmanager
def slowly_read(monkeypatch: pytest.MonkeyPatch, done: Callable[[], object]) -> Iterator[list[object]]:
    """What `done` answers, which is called while the declared files are read for the next instance."""
    answers: list[object] = []

    @contextlib.contextmanager
    def slow(*words: Any) -> Iterator[int]:
        with opened_verified(*words) as program, ThreadPoolExecutor(1) as other:
            answers.append(other.submit(done).result(5))
            yield program

    with monkeypatch.context() as patch:
        patch.setattr(processes, "opened_verified", slow)
        yield answers


def test_nothing_waits_for_the_files_of_the_next_instance_to_be_read(
    make: Callable[..., Process], port: int, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = serving(make, port)
    process.start()
    with slowly_read(monkeypatch, lambda: process.freeze(time.monotonic_ns() + 60_000_000_000)) as answers:
        process._prepare_next()
    assert answers == [None]
    wait_for(lambda: frozen(process))
    assert process._next is not None


def test_what_ended_while_its_files_were_read_gets_no_next_instance(
    make: Callable[..., Process], port: int, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = serving(make, port)
    monkeypatch.setattr(spawner, "seats", threading.BoundedSemaphore(1))
    process.start()
    with slowly_read(monkeypatch, lambda: process.destroy(0)) as answers:
        process._prepare_next()
    assert len(answers) == 1
    assert process._next is None
    assert spawner.seats.acquire(blocking=False)
    spawner.seats.release()
    assert swept() == []


def test_what_waits_ends_when_it_is_released(make: Callable[..., Process], port: int) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    process.destroy(0)
    process.release()
    wait_for(lambda: not Path(f"/proc/{waiting}").exists())
    assert swept() == []


def test_a_lease_is_kept_when_the_spawner_dies(make: Callable[..., Process], port: int, spawner: Spawner) -> None:
    process = serving(make, port)
    process.start()
    process.freeze(time.monotonic_ns() + 1_500_000_000)
    wait_for(lambda: frozen(process))
    os.kill(spawner.pid, signal.SIGKILL)
    wait_for(lambda: not frozen(process))
    assert process.healthy() == ""


def test_what_waits_holds_nothing_of_the_spawner_open(
    make: Callable[..., Process], port: int, spawner: Spawner
) -> None:
    process = serving(make, port)
    process.start()
    assert CHORES.finish()
    waiting = process._next.unborn.pid
    sockets = {p.readlink().name for p in Path(f"/proc/{spawner.pid}/fd").iterdir() if "socket" in p.readlink().name}
    held = {p.readlink().name for p in Path(f"/proc/{waiting}/fd").iterdir()}
    assert sockets
    assert not sockets & held
    assert len(held) <= 7  # its program, the pipes of its birth, and 0 to 2


def test_no_more_instances_wait_than_there_are_seats(
    make: Callable[..., Process], port: int, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawner, "seats", threading.BoundedSemaphore(1))
    first, second = serving(make, port), make(SERVE, str(port + 1))
    for process in (first, second):
        process.start()
        assert CHORES.finish()
    assert (first._next is None, second._next is None) == (False, True)
    first.release()
    second.start()
    assert CHORES.finish()
    assert second._next is not None
    second.release()
    assert spawner.seats.acquire(blocking=False)
    spawner.seats.release()


def test_a_program_that_ends_at_once_was_executed_once(make: Callable[..., Process], tmp_path: Path) -> None:
    count = tmp_path / "count"
    source = """
import pathlib, sys, time
count = pathlib.Path(sys.argv[1])
with count.open("a") as file: file.write("x")
time.sleep(600 if count.read_text() == "x" else 0)
"""
    process = make(source, str(count))
    process.start()
    wait_for(lambda: count.exists() and count.read_text() == "x")
    assert CHORES.finish()
    process.start()
    wait_for(lambda: not process.running)
    assert count.read_text() == "xx"


def test_the_cgroup_of_a_spawner_that_was_killed_is_removed_by_a_later_one() -> None:
    old, new = (find_root() / f"{PARENT}-x-spawner.{n}" for n in (1, time.monotonic_ns()))
    for folder in (old, new):
        folder.mkdir()
    made = Spawner(f"{PARENT}-x").watch()
    assert (old.exists(), new.exists()) == (False, True)
    made.close()
    remove_spawners(f"{PARENT}-x")
    assert list(find_root().glob(f"{PARENT}-x-spawner.*")) == []
