"""`pointcall run` as a node runs it: privileges given up, watched by a service manager, and driven by its verbs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import demo
from pointcall_executor.cli.output import Exit
from pointcall_executor.demo import story
from pointcall_executor.journal import JournalReader
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.privileges import CAPABILITIES, NEEDED
from pointcall_executor.services.groups import remove_empty, trees
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.lab import Lab
from tests.scenario import test_real_story
from tests.scenario.test_loop_story import spec
from tests.scenario.test_real_story import COMMAND, ENVIRONMENT, Running, pointcall, put, running
from tests.unit.services.world import process

KEPT = {CAPABILITIES[name] for name in NEEDED}


@pytest.fixture(scope="module", autouse=True)
def real_kernel() -> None:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))


@pytest.fixture
def open_lab(sigstore: PrivateSigstore, tee_folder: Path) -> Iterator[Lab]:
    """An installation in a folder that every user may pass through, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="pc-"))
    folder.chmod(0o755)
    yield Lab(folder / "s", sigstore, tee_folder)
    group = f"pointcall-run-{os.getpid()}/services"
    Cgroup(find_root() / group).remove()  # services outlive their executor
    remove_empty(str(Path(group).parent))
    shutil.rmtree(folder)


def for_everybody(path: str) -> bool:
    """Whether any user may read this file."""
    real = Path(path).resolve()
    return real.exists() and all(p.stat().st_mode & 0o001 for p in real.parents)


PYTHON = next((p for p in (sys.executable, "/usr/bin/python3") if for_everybody(p)), "")


@pytest.fixture
def shared_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the executor with an interpreter that another user may read, of the version that the libraries are for."""
    asked = "import sys; print(sys.version_info[:2])"
    version = PYTHON and subprocess.run([PYTHON, "-I", "-c", asked], capture_output=True, text=True).stdout.strip()
    if version != str(sys.version_info[:2]):
        pytest.skip(f"no Python {sys.version_info[:2]} that every user may read")
    monkeypatch.setattr(test_real_story, "COMMAND", [PYTHON, *COMMAND[1:]])
    path = [p for p in sys.path if p and not Path(p).is_relative_to(sys.base_prefix)]
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join(path))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def put_service(lab: Lab, port: int, sequence: int = 1, account: str = "", **over: Any) -> None:
    """A manifest with one real service, recreated when its circuit opens, where `pointcall run` looks."""
    program, script = Path(PYTHON or sys.executable).resolve(), Path(demo.__file__).with_name("service.py").resolve()
    files = [{"path": str(p), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in (program, script)]
    process = {
        "argv": [str(program), "-I", "-S", str(script), str(port)], "files": files,
        "ready": {"tcp": f"127.0.0.1:{port}", "timeout_ms": 10_000},
    } | ({"user": account} if account else {})  # fmt: skip
    body = spec(lab)  # declares a service of the same name, which ours replaces
    declaration = lab.declare("api", process)
    service = {"name": "api", "declaration": declaration, "listen": [{"address": "127.0.0.1", "port": port}]}
    sensors = [{"name": "breaker", "params": {"threshold": 3}}, {"name": "lifecycle"}]
    assembled = lab.assemble(body | {"services": [service], "sensors": sensors} | over, sequence, blobs=BLOBS)
    folder = lab.state / "manifest"
    shutil.rmtree(folder, ignore_errors=True)
    assembled.write(folder)
    (folder / "manifest.sigstore.json").write_bytes(lab.sign(assembled).signatures[0])


def ask(lab: Lab, *words: str) -> Any:
    """A verb's JSON answer."""
    done = pointcall(*words, "--json", "--state-dir", str(lab.state))
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    return json.loads(done.stdout)


def events(lab: Lab) -> list[dict[str, Any]]:
    done = pointcall("events", "--last", "100", "--json", "--state-dir", str(lab.state))
    assert done.returncode == Exit.OK, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def accepts(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def eventually(what: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return found


def client_in(group: Path, port: int) -> subprocess.Popen[bytes]:
    """A client below the gate that connects all the time."""
    script = Path(demo.__file__).with_name("client.py")
    return subprocess.Popen(
        [sys.executable, "-I", str(script), str(port), str(group / "cgroup.procs")], stdout=subprocess.DEVNULL
    )


def tasks(pid: int) -> dict[str, str]:
    """The status of every thread."""
    return {t.name: (t / "status").read_text() for t in Path(f"/proc/{pid}/task").iterdir()}


def child_of(pid: int, word: str) -> str:
    """The status of a child process with this word in its command; empty where there is none."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                return Path(f"/proc/{child}/status").read_text()
    return ""


def recovers(lab: Lab, run: Running, port: int) -> None:
    """Kill the service; a client sees refusals, the circuit opens, the runbook recreates, the client is served."""
    first = ask(lab, "status")["services"][0]
    assert (first["state"], first["health"]) == ("running", "accepting")
    group = find_root() / f"pointcall-run-{os.getpid()}" / "clients" / "keep"
    client = client_in(group, port)
    try:
        os.kill(first["pid"], signal.SIGKILL)
        second = eventually(lambda: next((s for s in ask(lab, "status")["services"] if s["pid"] != first["pid"]), None))
        eventually(lambda: accepts(port))
        assert second["restarts"] == 1
        status = eventually(lambda: (s := ask(lab, "status"))["circuits"][0]["state"] == "closed" and s)
        assert int(status["circuits"][0]["opened"]) >= 1
        assert status["circuits"][0]["service"] == "api"
    finally:
        client.kill()
        client.wait()
    assert run.process.poll() is None
    told = events(lab)
    assert any(i["kind"] == "circuit" and "opened after 3 failures" in i["text"] for i in told)
    assert any(i["kind"] == "run" and "recreate api: applied" in i["text"] for i in told)


@pytest.mark.kernel
def test_the_first_start_on_a_node_makes_its_cgroups_in_the_root_of_each_tree(lab: Lab) -> None:
    """Who gave up CAP_DAC_OVERRIDE can make no folder there: arming would have none for the service."""
    name, port = f"pointcall-first-{os.getpid()}", free_port()
    places = [root / f"{name}-services" for root in trees()]
    put_service(lab, port)
    try:
        with running(lab, cgroup=f"{name}-services", gate=f"{name}-gate") as run:
            assert "sequence=1" in run.until("armed")
            assert accepts(port)
            assert all(place.is_dir() for place in places)
    finally:
        for place in (*places, *find_root().glob(f"{name}-*")):
            Cgroup(place).remove()


@pytest.mark.kernel
def test_without_its_privileges_it_rehearses_a_slow_file(open_lab: Lab) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    port = free_port()
    sensors = [{"name": "breaker"}, {"name": "drill", "params": {"slow_file": 1, "seconds_max": 30}}]
    put_service(open_lab, port, sensors=sensors)
    script = Path(demo.__file__).with_name("service.py").resolve()
    with running(open_lab) as run:
        run.until("privileges dropped")
        run.until("armed")
        words = (
            "drill",
            "--service",
            "api",
            "--slow-file",
            str(script),
            "--slow-ms",
            "40",
            "--seconds",
            "2",
        )
        drill = subprocess.Popen(
            [*COMMAND, *words, "--json", "--state-dir", str(open_lab.state)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> float:
            began = time.monotonic()
            script.read_bytes()
            return time.monotonic() - began

        eventually(lambda: read() >= 0.04 or drill.poll() is not None)
        said, _ = drill.communicate(timeout=20)
        assert drill.returncode == Exit.OK, said
        report = json.loads(said.splitlines()[-1])
        assert int(report["observed"]["slowed"]) == int(report["expected"]["slowed"]) >= 1
        assert read() < 0.04


@pytest.mark.kernel
@pytest.mark.parametrize("after_ms", [None, 0, 30, 60, 120, 240])
def test_stopped_before_it_serves_it_leaves_nothing(open_lab: Lab, after_ms: int | None) -> None:
    """At some moment of its start; None: before it has done anything that it would say."""
    with running(open_lab) as run:
        place = find_root() / f"pointcall-run-{os.getpid()}" / "services"
        if after_ms is not None:
            run.until("privileges dropped")
            time.sleep(after_ms / 1000)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=10) in ((0,) if after_ms is not None else (0, -signal.SIGTERM))
        eventually(lambda: not place.exists())
        assert "Traceback" not in (open_lab.state / "run.err").read_text()


SLOW = """
import pathlib, sys, time
time.sleep(1)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


def put_slow_services(lab: Lab, sequence: int) -> None:
    """A manifest with three services that are ready a second after they started, one after the other."""
    rows = []
    for name in ("a", "b", "c"):
        file = str(lab.state.parent / f"{name}.ready")
        declared = process(lab.state.parent, SLOW, file, name=name, ready={"file": file, "timeout_ms": 10_000})
        rows.append({"name": name, "declaration": lab.declare(name, declared.process.model_dump(mode="json"))})
    put(lab, sequence, declared=rows)


@pytest.mark.kernel
@pytest.mark.parametrize("again", [False, True])
def test_a_stop_while_services_start_lets_no_other_one_start(open_lab: Lab, again: bool) -> None:
    def started() -> list[str]:
        with contextlib.closing(JournalReader.open(open_lab.state / "journal.db")) as journal:
            return [e.body["target"] for e in journal.entries("intent")]

    if again:
        put(open_lab, 1)
    else:
        put_slow_services(open_lab, 1)
    with running(open_lab) as run:
        if again:
            run.until("armed")
            put_slow_services(open_lab, 3)
            run.process.send_signal(signal.SIGHUP)
        else:
            run.until("privileges dropped")
            eventually(lambda: (open_lab.state / "run" / "operator.sock").exists())  # the journal is begun by then
        eventually(started)
        run.process.send_signal(signal.SIGTERM)
        assert "check=arm.interrupted" in run.until("refused")
        assert "by=SIGTERM" in run.until("stopped")
        assert run.process.wait(timeout=10) == Exit.OK
        assert "Traceback" not in (open_lab.state / "run.err").read_text()
    assert len(started()) == 1
    with contextlib.closing(JournalReader.open(open_lab.state / "journal.db")) as journal:
        assert journal.entries()[-1].kind == "epoch-close"


@pytest.mark.kernel
@pytest.mark.parametrize("user", ["", "nobody"])
def test_without_its_privileges_it_arms_opens_circuits_and_recreates(
    open_lab: Lab, user: str, request: pytest.FixtureRequest
) -> None:
    if user:
        request.getfixturevalue("shared_python")
    port = free_port()
    put_service(open_lab, port)
    with running(open_lab, user=user) as run:
        said = run.until("privileges dropped")
        assert "filter_rules=" in said
        assert not said.rstrip().endswith("filter_rules=0")
        verifying = eventually(lambda: child_of(run.process.pid, "pointcall_attest.signature_child"))
        assert "NoNewPrivs:\t1" in verifying
        assert "Seccomp:\t2" in verifying
        assert int(verifying.split("Uid:")[1].split()[1]) == (pwd.getpwnam(user).pw_uid if user else os.getuid())
        bounding = int(verifying.split("CapBnd:")[1].split()[0], 16)
        assert {n for n in range(64) if bounding >> n & 1} == KEPT
        run.until("armed")
        for status in tasks(run.process.pid).values():
            bits = int(status.split("CapEff:")[1].split()[0], 16)
            assert {n for n in range(64) if bits >> n & 1} == KEPT
            assert int(status.split("CapBnd:")[1].split()[0], 16) == bits
            assert "NoNewPrivs:\t1" in status
            assert "Seccomp:\t2" in status
            assert int(status.split("Uid:")[1].split()[1]) == (pwd.getpwnam(user).pw_uid if user else os.getuid())
        limits = Path(f"/proc/{run.process.pid}/limits").read_text()
        assert "Max core file size        0" in limits
        recovers(open_lab, run, port)
        if not user:  # a child that examines and a child that verifies run under the filter too
            source = Path(__file__).resolve().parents[2] / "runbooks/library/refusing-dependency/runbook.py"
            words = ("propose", str(source), "--name", "again", "--rationale", "why", "--author", "me")
            assert ask(open_lab, *words)["state"] == "open"
        ask(open_lab, "pause", "--for", "90s", "--reason", "I look myself")
        paused = ask(open_lab, "status")
        assert (paused["state"], paused["reason"]) == ("paused", "I look myself")
        assert 80_000 < int(paused["paused_left_ms"]) <= 90_000
        ask(open_lab, "resume")
        ask(open_lab, "trip", f"127.0.0.1:{port}", "--for", "30s")
        forced = ask(open_lab, "status")["circuits"][0]
        assert forced["state"] == "forced"
        assert 25_000 < int(forced["left_ms"]) <= 30_000
        ask(open_lab, "release", f"127.0.0.1:{port}")
        assert ask(open_lab, "status")["circuits"][0]["state"] == "closed"
        assert pointcall("status", "--ready", "--state-dir", str(open_lab.state)).returncode == Exit.OK
        ask(open_lab, "disarm", "--reason", "enough")
        assert pointcall("status", "--ready", "--state-dir", str(open_lab.state)).returncode == Exit.REFUSED
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=20) == Exit.OK, (open_lab.state / "run.err").read_text()
    with contextlib.closing(JournalReader.open(open_lab.state / "journal.db")) as journal:
        assert journal.entries()[-1].kind == "epoch-close"
    if user:
        state = open_lab.state.stat()
        assert (state.st_uid, oct(state.st_mode & 0o7777)) == (0, oct(0o1771))
        assert (open_lab.state / "trust").stat().st_uid == 0


@pytest.mark.kernel
def test_following_survives_a_restart_and_tells_every_item_once(open_lab: Lab) -> None:
    put_service(open_lab, free_port())
    words = [*COMMAND, "events", "-f", "--last", "0", "--json", "--state-dir", str(open_lab.state)]
    told: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        with running(open_lab) as run:
            run.until("armed")
            follower = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
            assert follower.stdout is not None
            stream = follower.stdout
            reader = threading.Thread(target=lambda: told.extend(map(json.loads, stream)), daemon=True)
            reader.start()
            for ending in (stream.close, reader.join, follower.wait, follower.kill):
                stack.callback(ending)
            time.sleep(2)
            ask(open_lab, "pause", "--for", "90s", "--reason", "before")
            eventually(lambda: any("before" in i["text"] for i in told))
            run.process.kill()
            run.process.wait()
            eventually(lambda: any(i["kind"] == "connection" and i["level"] == "alarm" for i in told))
        with running(open_lab) as run:
            run.until("armed")
            ask(open_lab, "pause", "--for", "90s", "--reason", "after")
            eventually(lambda: any("after" in i["text"] for i in told))
    recorded = [i["index"] for i in told if i["recorded"]]
    assert recorded == sorted(set(recorded))
    assert any(i["text"] == "the executor was restarted" for i in told)


@pytest.mark.kernel
def test_a_service_manager_hears_the_whole_life(open_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    put_service(open_lab, free_port())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = open_lab.state.parent / "notify"
        manager.bind(str(path))
        path.chmod(0o777)
        manager.settimeout(20)
        monkeypatch.setitem(ENVIRONMENT, "NOTIFY_SOCKET", str(path))
        monkeypatch.setitem(ENVIRONMENT, "WATCHDOG_USEC", "900000")
        heard: list[str] = []

        def until(word: str) -> None:
            while not any(word in line for line in heard[-1:]):
                heard.append(manager.recv(4096).decode())

        port = free_port()
        with running(open_lab, http=f"127.0.0.1:{port}") as run:
            until("READY=1")
            assert "STATUS=armed: lab, sequence 1, emulated" in heard[-1]
            until("WATCHDOG=1")
            url = f"http://127.0.0.1:{port}"
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                assert answer.status == 200
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
                assert b"pointcall_ready 1.0" in answer.read()
            children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
            for child in children:
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_bytes()
            run.process.send_signal(signal.SIGHUP)
            until("RELOADING=1")
            until("READY=1")
            run.process.send_signal(signal.SIGTERM)
            until("STOPPING=1")
            assert run.process.wait(timeout=20) == Exit.OK
