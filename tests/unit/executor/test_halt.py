"""The kill switch's last resort: the process that announced itself is killed, and no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor import halt

ROOT = Path(__file__).resolve().parents[3]
EXECUTOR = """
import sys, signal
from pathlib import Path
from pointcall_executor.halt import announce
signal.signal(signal.SIGTERM, signal.SIG_IGN)
announce(Path(sys.argv[1]))
print("announced", flush=True)
signal.pause()
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that announced itself as the executor of the folder, and then hears nothing."""
    child = subprocess.Popen(
        [sys.executable, "-c", EXECUTOR, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "announced\n"
        yield child
        child.kill()


def announced(state: Path) -> dict[str, object]:
    body: dict[str, object] = json.loads((state / "run" / halt.RUNNING).read_bytes())
    return body


def test_the_announced_process_is_killed(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    stuck.terminate()  # it does not hear that
    assert announced(tmp_path)["pid"] == stuck.pid
    assert halt.kill_executor(tmp_path, within=10) == f"executor {stuck.pid} was killed"
    assert stuck.returncode is None  # nobody has waited for it: it has ended all the same
    assert halt.kill_executor(tmp_path, within=10) == "no executor runs"
    assert stuck.wait(10) == -signal.SIGKILL
    assert halt.kill_executor(tmp_path, within=10) == "no executor runs"


def test_a_second_executor_does_not_take_the_first_out_of_reach(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    """A start by hand, beside the unit's, must not make a stuck executor one that nobody can end."""
    with pytest.raises(halt.RunningError, match=f"process {stuck.pid}"):
        halt.announce(tmp_path)
    assert announced(tmp_path)["pid"] == stuck.pid
    assert halt.kill_executor(tmp_path, within=10) == f"executor {stuck.pid} was killed"
    halt.announce(tmp_path)  # it has ended, though nobody has waited for it
    halt.announce(tmp_path)
    assert announced(tmp_path)["pid"] == os.getpid()


def test_a_process_that_was_born_later_is_not_killed(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    """The pid of an executor that ended may be another's by now."""
    body = announced(tmp_path)
    (tmp_path / "run" / halt.RUNNING).write_text(json.dumps(body | {"started": str(int(str(body["started"])) - 1)}))
    assert halt.kill_executor(tmp_path, within=1) == "no executor runs"
    assert stuck.poll() is None
    assert Path(f"/proc/{stuck.pid}").exists()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"pid": 1}',
        b'{"pid": "x", "started": "1"}',
        b'{"pid": -1, "started": "1"}',
        b'{"pid": 99999999999999999999, "started": "1"}',
        b'{"pid": 1e999, "started": "1"}',
        b"[" * 100_000,
    ],
)
def test_without_an_announcement_nobody_is_killed(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / halt.RUNNING).write_bytes(content)
    assert halt.kill_executor(tmp_path, within=1) == "no executor runs"


@pytest.mark.parametrize("kind", ["pipe", "link", "endless", "folder"])
def test_what_is_no_file_of_ours_neither_kills_nor_holds_up_the_kill_switch(
    stuck: subprocess.Popen[str], tmp_path: Path, kind: str
) -> None:
    """The folder belongs to the executor's account, and the kill switch is root's."""
    path = tmp_path / "run" / halt.RUNNING
    path.rename(tmp_path / "other.json")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(tmp_path / "other.json")
        case "endless":
            path.symlink_to("/dev/zero")
        case _:
            path.mkdir()
    assert halt.kill_executor(tmp_path, within=1) == "no executor runs"
    assert stuck.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another account, which takes root")
def test_the_word_of_an_account_is_taken_for_its_own_processes_only(
    stuck: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Who was the executor could otherwise have the kill switch end any process of the node."""
    os.chown(tmp_path / "run" / halt.RUNNING, 65534, 65534)
    assert halt.kill_executor(tmp_path, within=1) == "no executor runs"
    assert stuck.poll() is None
    halt.announce(tmp_path)
    assert announced(tmp_path)["pid"] == os.getpid()


def test_one_that_does_not_end_in_time_is_named(
    stuck: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    said = halt.kill_executor(tmp_path, within=0.05)
    assert said == f"executor {stuck.pid} was killed and has not ended yet"


def test_the_verb_kills_one_that_does_not_let_go(
    stuck: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pointcall_executor import cli

    assert cli.main(["halt", "--state-dir", str(tmp_path), "--reason", "stop", "--json"]) == 0
    assert f"executor {stuck.pid} was killed" in json.loads(capsys.readouterr().out)["detail"]
    assert halt.halted(tmp_path) is not None
