"""The loop on this very kernel: the demo as a user runs it, and `pointcall run` with its signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import cli
from pointcall_executor.api.client import Client
from pointcall_executor.api.roles import Role
from pointcall_executor.cli.output import Exit
from pointcall_executor.demo import story
from pointcall_executor.journal import JournalReader
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.probe import BLOBS, Feature
from pointcall_executor.pins import Pins
from pointcall_executor.services.groups import remove_empty
from tests.lab import Lab
from tests.scenario.test_loop_story import spec

COMMAND = [sys.executable, "-m", "pointcall_executor.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
STEPS = ("preflight", "build", "sign", "attest", "refuse", "arm", "rollback")
PROOF = ("record", "verify", "replay", "tamper", "agent", "report", "clean")


@pytest.fixture(scope="module")
def real_kernel() -> None:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))


def pointcall(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def told(real_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    state = tmp_path_factory.mktemp("d") / "s"
    done = pointcall("demo", "--json", "--require-kernel", "--state-dir", str(state))
    assert done.returncode == 0, done.stdout + done.stderr
    yield state, {row["step"]: row for row in map(json.loads, done.stdout.splitlines())}
    shutil.rmtree(state)


@pytest.mark.kernel
def test_the_demo_tells_every_step_for_real(told: tuple[Path, dict[str, Any]]) -> None:
    _, steps = told
    assert tuple(steps) == (*STEPS, "serve", "fail", "decide", "recover", "oom", *PROOF)
    assert all(row["ok"] for row in steps.values())
    assert steps["preflight"]["figures"]["mode"] == "kernel"
    assert steps["fail"]["figures"]["leaked_connects"] == 0
    assert steps["recover"]["figures"]["probes"] == 1
    assert steps["tamper"]["figures"]["found"] == steps["tamper"]["figures"]["flipped"] > 20
    assert "EMULATED" in steps["attest"]["marks"]
    assert all("RECORDED" not in row.get("marks", ()) for row in steps.values())


@pytest.mark.kernel
def test_nothing_of_the_demo_is_left(told: tuple[Path, dict[str, Any]]) -> None:
    assert list(find_root().glob("pointcall-demo-*")) == []
    assert told[1]["clean"]["figures"] == {"left": 0}


@pytest.mark.kernel
def test_every_verb_works_on_the_state_that_the_demo_left(told: tuple[Path, dict[str, Any]]) -> None:
    state = ["--state-dir", str(told[0])]
    rows = [json.loads(line) for line in pointcall("log", "list", "--json", *state).stdout.splitlines()]
    run = next(row["run"] for row in rows if row.get("run"))
    assert pointcall("verify", run, *state).returncode == Exit.EMULATED
    verified = pointcall("verify", run, "--allow-emulated", "--json", *state)
    assert verified.returncode == Exit.OK
    assert json.loads(verified.stdout)["tier"] == "emulated"
    replayed = pointcall("replay", "--all", "--json", *state)
    assert replayed.returncode == Exit.OK, replayed.stdout
    assert pointcall("report", "--json", *state).returncode == Exit.OK
    assert pointcall("log", "check", *state).returncode == Exit.OK
    assert pointcall("verify", "no-such-run", *state).returncode not in (Exit.OK, Exit.BUG)


def test_the_demo_leaves_the_folder_of_an_installation_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trust").mkdir()
    policy = tmp_path / "trust" / "policy.json"
    policy.write_text("{}")
    assert cli.main(["demo", "--json", "--state-dir", str(tmp_path)]) == 5
    assert '"demo.state"' in capsys.readouterr().out
    assert policy.read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["trust"]


def test_without_a_kernel_the_demo_runs_on_recorded_events_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Feature("tp_btf.example", False, "not root", "the breaker")
    monkeypatch.setattr(story, "missing_features", lambda: [absent])
    monkeypatch.setattr(story, "BLOBS", tmp_path / "nothing was built")
    assert cli.main(["demo", "--json", "--state-dir", str(tmp_path / "s")]) == 0
    steps = {row["step"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert tuple(steps) == (*STEPS, "decide", *PROOF)
    assert steps["preflight"]["figures"] == {"mode": "recorded", "missing": ["tp_btf.example"]}
    assert all("RECORDED" in row["marks"] for row in steps.values())
    assert cli.main(["demo", "--require-kernel", "--state-dir", str(tmp_path / "t")]) == Exit.ENVIRONMENT
    assert "tp_btf.example" in capsys.readouterr().err


# ---- pointcall run ---------------------------------------------------------------------------------------------------


class Running:
    """A `pointcall run` and what it says. Nothing is waited for without an end."""

    def __init__(self, lab: Lab, group: str, **settings: Any) -> None:
        config: dict[str, Any] = {"node": "node-1", "tee": "emulated", "cgroup": f"{group}/services"}
        config |= {"gate": f"{group}/clients"} | settings
        path = lab.state / "pointcall.toml"
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items()))
        words = ["run", "--config", str(path), "--state-dir", str(lab.state)]
        # A file: what outlives the executor would hold the other end of a pipe.
        self._log = lab.state / "run.err"
        with self._log.open("a") as log:
            self._at = log.tell()
            self.process = subprocess.Popen([*COMMAND, *words], stderr=log, env=ENVIRONMENT)
        self.said: list[str] = []

    def _line(self) -> str:
        """The next whole line, or nothing yet."""
        with self._log.open() as log:
            log.seek(self._at)
            line = log.readline()
            if not line.endswith("\n"):
                return ""
            self._at = log.tell()
            return line

    def until(self, words: str) -> str:
        """The next line with these words in it."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            line = self._line()
            if not line:
                time.sleep(0.01)
                continue
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"not said: {words!r}; it said {self.said}")


@contextlib.contextmanager
def running(lab: Lab, **settings: Any) -> Iterator[Running]:
    group = f"pointcall-run-{os.getpid()}"
    Cgroup.create(f"{group}/clients/keep")  # the gate must not go while something is attached to it
    started = Running(lab, group, **settings)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        remove_empty(f"{group}/services")
        if not settings.get("pin"):
            remove_empty(f"{group}/clients/keep")


def put(lab: Lab, sequence: int, declared: Sequence[Mapping[str, Any]] = (), **over: Any) -> None:
    """Sign a manifest, without services where none are given, and lay it where `pointcall run` looks."""
    body = spec(lab, services=list(declared), **over)
    body["runbooks"][0]["grants"] = {"actions": ["recreate", "notify"], "channels": ["ops"]}
    assembled = lab.assemble(body, sequence, blobs=BLOBS)
    bundle = lab.sign(assembled)
    folder = lab.state / "manifest"
    shutil.rmtree(folder, ignore_errors=True)
    assembled.write(folder)
    (folder / "manifest.sigstore.json").write_bytes(bundle.signatures[0])


@pytest.mark.kernel
def test_run_arms_serves_reads_again_and_ends_cleanly(real_kernel: None, lab: Lab) -> None:
    put(lab, 1)
    with running(lab) as run:
        assert "sequence=1" in run.until("armed")
        with Client(lab.state / "run" / f"{Role.OPERATOR.value}.sock") as client:
            status = client.call("Status/GetStatus")
            assert (status.state, status.sequence, status.tier) == ("armed", 1, "emulated")
            put(lab, 3)
            run.process.send_signal(signal.SIGHUP)
            assert "sequence=3" in run.until("armed")
            assert client.call("Status/GetStatus").sequence == 3
        run.process.send_signal(signal.SIGTERM)
        assert "by=SIGTERM" in run.until("stopped")
        assert run.process.wait(timeout=10) == Exit.OK
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        assert journal.entries()[-1].kind == "epoch-close"


@pytest.mark.kernel
def test_a_refused_manifest_leaves_run_up_and_disarmed(real_kernel: None, lab: Lab) -> None:
    put(lab, 1, referenceValues={"snp": ["cd" * 48]})
    with running(lab) as run:
        assert "check=tee.measurement" in run.until("refused")
        with Client(lab.state / "run" / f"{Role.AUDITOR.value}.sock") as client:
            assert client.call("Status/GetStatus").state == "disarmed"
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=10) == Exit.OK


def program_ids(lab: Lab) -> dict[str, int]:
    """Kernel ids of the programs that were recorded at the last arming, by name."""
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        found = [e.body["detail"] for e in journal.entries(kind="config") if e.body["what"] == "kernel programs"]
    return {name: int(str(detail).split()[0]) for name, detail in found[-1].items()}


@pytest.fixture
def bpffs() -> None:
    if not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no bpf file system is mounted on /sys/fs/bpf")


@pytest.mark.kernel
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_pinned_breaker_stays_and_is_taken_up_again(
    real_kernel: None, bpffs: None, lab: Lab, how: signal.Signals
) -> None:
    put(lab, 1)
    pins = Pins(lab.state)
    try:
        with running(lab, pin=True) as run:
            run.until("armed")
            first = program_ids(lab)
            run.process.send_signal(how)
            run.process.wait(timeout=10)
            names = {p.name.removeprefix("prog_") for p in pins.folder.glob("prog_*")}
            breaker = {name: number for name, number in first.items() if name in names}
            assert breaker
            assert all(map(prog_exists, breaker.values())), "the breaker left with its executor"
        with running(lab, pin=True) as run:
            run.until("armed")
            assert breaker.items() <= program_ids(lab).items()
            with Client(lab.state / "run" / f"{Role.OPERATOR.value}.sock") as client:
                client.call("Control/Disarm", reason="enough")
            assert not pins.folder.exists()
    finally:
        pins.drop()
        remove_empty(f"pointcall-run-{os.getpid()}/clients/keep")


@pytest.mark.kernel
def test_programs_are_gone_when_the_executor_was_killed(real_kernel: None, lab: Lab) -> None:
    put(lab, 1)
    with running(lab) as run:
        run.until("armed")
        numbers = list(program_ids(lab).values())
        assert numbers
        run.process.kill()
        run.process.wait()
        deadline = time.monotonic() + 5
        while any(map(prog_exists, numbers)):
            assert time.monotonic() < deadline, "a program outlived its executor"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "exit_code"), [("tee = 'sev-snp'", Exit.ENVIRONMENT), ("speed = 11", Exit.USAGE), ("= ", Exit.USAGE)]
)
def test_settings_that_cannot_be_met_say_what_is_wrong(
    real_kernel: None, lab: Lab, text: str, exit_code: Exit, make_config: Callable[[str], Path]
) -> None:
    done = pointcall("run", "--config", str(make_config(text)), "--state-dir", str(lab.state))
    assert done.returncode == exit_code, done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        path = tmp_path / "pointcall.toml"
        path.write_text(text + "\n")
        return path

    return make
