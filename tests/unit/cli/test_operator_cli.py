"""Verbs of the person on call, over real sockets and a backend that remembers; and `top` on a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.verdict import Check, Verdict
from pointcall_executor import cli, daemon
from pointcall_executor.api import backend
from pointcall_executor.api.server import Server, serve
from pointcall_executor.cli import arm, connection, events, status
from pointcall_executor.cli.output import Exit, UsageRefusal
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_runbook.vocabulary import Address
from tests.unit.api.fake_backend import STATUS, FakeBackend
from tests.unit.report.sample_log import BOOT_NS


class Node:
    """An installation whose executor is a fake."""

    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="pc-"))
        self.backend = FakeBackend(self.state)
        self.server: Server = serve(self.backend, self.state / "run")

    def restart(self) -> None:
        self.server.stop(0)
        self.server = serve(self.backend, self.state / "run")

    def run(self, *words: str) -> int:
        return cli.main([*words, "--state-dir", str(self.state)])


@pytest.fixture
def node() -> Iterator[Node]:
    found = Node()
    yield found
    found.server.stop(0)
    shutil.rmtree(found.state)


# ---- control ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("pause", "--for", "1h30m", "--reason", "look"), ("pause", "look", 5400)),
        (("pause", "--reason", "look"), ("pause", "look", 600)),
        (("resume", "--reason", "done"), ("resume", "done")),
        (("trip", "10.0.0.7:5432", "--for", "90", "--reason", "bad"), ("trip", "10.0.0.7", 5432, 90, "bad")),
        (("trip", "[::1]:53", "--reason", "bad"), ("trip", "::1", 53, 60, "bad")),
        (("release", "10.0.0.7:5432", "--reason", "good"), ("release", "10.0.0.7", 5432, "good")),
        (("disarm", "--reason", "enough"), ("disarm", "enough")),
    ],
)
def test_each_verb_is_one_call(node: Node, words: tuple[str, ...], asked: tuple[Any, ...]) -> None:
    assert node.run(*words) == Exit.OK
    assert node.backend.asked == [asked]


def test_without_a_reason_the_log_says_who_gave_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setenv("SUDO_USER", "bob")
    assert node.run("pause") == Exit.OK
    assert node.backend.asked[0][1] == "no reason given by alice for bob"


def test_the_answer_is_printed_for_people_and_for_programs(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.run("resume")
    assert capsys.readouterr().out == "armed: resume done\n"
    node.run("resume", "--json")
    assert json.loads(capsys.readouterr().out) == {"ok": True, "state": "armed", "detail": "resume done"}


@pytest.mark.parametrize(
    "words",
    [("pause", "--for", "soon"), ("pause", "--for", "0s"), ("trip", "10.0.0.7"), ("trip", "x:y"), ("release", ":")],
)
def test_words_that_make_no_sense_never_reach_the_executor(node: Node, words: tuple[str, ...]) -> None:
    assert node.run(*words) == Exit.USAGE
    assert node.backend.asked == []


@pytest.mark.parametrize(
    "words", [("pause", "--for", "25h"), ("trip", "10.0.0.7:1", "--for", "2h"), ("trip", "host:1")]
)
def test_what_the_executor_refuses_is_refused_with_its_id(
    node: Node, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert node.run(*words) == Exit.REFUSED
    assert re.search(r"\[api\.(seconds|address)\]", capsys.readouterr().err)
    assert node.backend.asked == []


@pytest.mark.parametrize(
    "words",
    [
        ("pause",), ("resume",), ("status",), ("events",), ("trip", "10.0.0.7:1"),
        ("drill", "--to", "10.0.0.7:1", "--first", "1"),
    ],
)  # fmt: skip
def test_without_an_executor_every_verb_says_so(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--state-dir", str(tmp_path)]) == Exit.ENVIRONMENT
    assert "[api.unreachable]" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("45", 45), ("45s", 45), ("10m", 600), ("1h", 3600), ("1h1m1s", 3661)])
def test_durations(text: str, seconds: int) -> None:
    assert connection.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "1d", "-5m", "1m1h", "1.5h", " 5m", "9999999s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageRefusal):
        connection.seconds_of(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (570, "9 min 30 s"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert connection.duration(seconds) == text


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_shows_everything_that_a_person_asks_for(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tests.unit.api import fake_backend

    told = replace(
        STATUS, state="paused", reason="I look", paused_left_ms=570_000, storm_left_ms=61_000,
        in_flight=("service db",), epoch_age_ms=125_000, journal_bytes=2_500_000,
        signed_size=7, programs=9, checked_age_ms=4_000,
        uptime_ms=7_500_000,
        runbooks=(replace(STATUS.runbooks[0], state="quarantined"),),
        services=(backend.ServiceState("db", "process", "running", 2, 4711, "accepting"),),
        circuits=(
            backend.CircuitState("10.0.0.7", 5432, "forced", 17, "db", 65_000, 5, 3),
            backend.CircuitState("::1", 53, "closed", 0, "dns", protocol="udp"),
        ),
    )  # fmt: skip
    monkeypatch.setattr(fake_backend, "STATUS", told)
    monkeypatch.setenv("COLUMNS", "200")
    node.backend.log.recover(refused_by="guard.rate")
    assert node.run("status") == Exit.OK
    text = re.sub(r" +", " ", capsys.readouterr().out)
    for words in (
        "PAUSED I look; ends by itself in 9 min 30 s", "STORM no action for 1 min 1 s", "working on service db",
        "QUARANTINE refusing-dependency", "edge-recovery, sequence 3", "expires 2026-12-01T00:00:00Z", "mode 1 enforce",
        "snp, emulated, 2 min 5 s old", "opened 2 min 5 s ago", "9 programs as armed, compared 4 s ago",
        "mirror 2 entries behind for 1 min 1 s: no route",
        "9 entries (2 after the last checkpoint)", "2.5 MB", "0 events", "up 2 h 5 min",
        "db process running 4711 accepting 2", "10.0.0.7:5432 db forced ends in 1 min 5 s 3 17",
        "[::1]:53 udp dns closed - 0 0",
        "recreate service/db: held back by guard.rate", "EMULATED",
    ):  # fmt: skip
        assert words in text, words


def test_status_never_cuts_what_is_pasted_into_the_next_command(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    node.backend.log.recover()
    assert node.run("status") == Exit.OK
    text = capsys.readouterr().out
    assert re.search(r"^[0-9A-Z]{26} +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", text, re.MULTILINE), text
    assert "…" not in text


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("halted: look", "halted: look: pointcall halt --clear; then pointcall arm DIR"),
        ("", "nothing was admitted: pointcall events --kind refusal says why"),
        ("a person disarmed it: x", "a person disarmed it: x: pointcall arm DIR"),
    ],
)
def test_status_says_how_it_is_armed_again(
    node: Node, reason: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tests.unit.api import fake_backend

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(fake_backend, "STATUS", replace(STATUS, state="disarmed", reason=reason))
    assert node.run("status") == Exit.OK
    assert words in capsys.readouterr().out


def test_status_begins_with_who_waits_for_a_person(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tests.unit.api import fake_backend

    waiting = node.backend.waiting()
    told = replace(
        STATUS, mode="monitor", held_back=waiting.held_back, called=waiting.called * 7,
        circuits=(backend.CircuitState("10.0.0.7", 5432, "open", 17, "db", watch_only=True),),
    )  # fmt: skip
    monkeypatch.setattr(fake_backend, "STATUS", told)
    monkeypatch.setenv("COLUMNS", "250")
    assert node.run("status") == Exit.OK
    lines = [re.sub(r" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("CALLED"))
    assert first <= 2
    assert lines[first].endswith("nobody has answered: pointcall log show r; then pointcall acknowledge r --reason ...")
    assert lines[first + 5] == "CALLED 2 more: pointcall approve --list"
    assert lines[first + 6] == (
        "APPROVE fix wants recreate db, after OomKilled 3 s ago: it waits for an approval: pointcall approve r"
    )
    assert lines[first + 7] == "MONITOR only watching: no action is done, no connect refused"
    assert any(line.endswith("0 (17 would be)") for line in lines)
    assert node.run("status", "--json") == Exit.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["mode"], body["called"][0], body["held_back"][0]["action"]) == (
        "monitor", {"run": "r", "code": 7}, "recreate"
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [("--kill",), ("--slow-file", "/var/lib/db/wal"), ("--service", "db"), ("--kill", "--first", "1")]
)
def test_a_drill_in_a_lab_refuses_what_it_cannot_do(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lab = ("--to", "127.0.0.1:9", "--cgroup", str(tmp_path), "--seconds", "1")
    assert cli.main(["drill", *lab, *words, "--state-dir", str(tmp_path)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert words[0] in said
    assert "lab" in said


def test_ready_is_an_exit_code(node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tests.unit.api import fake_backend

    assert node.run("status", "--ready") == Exit.OK
    monkeypatch.setattr(fake_backend, "STATUS", replace(STATUS, ready=False, state="disarmed"))
    assert node.run("status", "--ready") == Exit.REFUSED
    assert capsys.readouterr().out == "ready\nnot ready: disarmed\n"
    assert node.run("status", "--ready", "--json") == Exit.REFUSED
    assert json.loads(capsys.readouterr().out) == {"ready": False, "state": "disarmed", "reason": ""}


# ---- events ----------------------------------------------------------------------------------------------------------


def test_events_are_lines_with_what_would_have_allowed_it(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.backend.log.recover()
    node.backend.log.refuse()
    assert node.run("events", "--last", "2") == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ   run +refusing-dependency on .*: applied \(3\.9 ms\) \w{26}", lines[0]
    )
    assert re.fullmatch(r"[\dT:Z-]+ ! refusal +manifest edge-recovery: .* \[manifest\.expired\]", lines[1])
    assert lines[2].strip() == "allowed by: sign a newer manifest"


def test_only_the_kinds_that_were_asked_for(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.backend.log.recover()
    node.backend.log.refuse()
    assert node.run("events", "--json", "--kind", "refusal") == Exit.OK
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()] == ["refusal"]


def test_a_kind_that_is_rare_is_found_behind_many_others(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """What a person is told to look for must not be hidden by what happened since."""
    node.backend.log.refuse()
    for _ in range(30):
        node.backend.log.recover()
    assert node.run("events", "--kind", "refusal", "--last", "1") == Exit.OK
    assert "[manifest.expired]" in capsys.readouterr().out
    assert node.run("events", "--kind", "proposal") == Exit.OK
    assert "none of this kind among the last 100" in capsys.readouterr().err
    assert node.run("events", "--last", "101") == Exit.USAGE


def opened(n: int) -> CircuitEvent:
    return CircuitEvent(Kind.CIRCUIT_OPENED, BOOT_NS + n, Destination(Address.parse("10.0.0.7"), n + 1), 5, 111, 0, 0)


def test_following_tells_each_item_once_across_restarts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(events, "RETRY_SECONDS", 0.01)
    told: list[dict[str, Any]] = []
    ended = threading.Event()

    def sleep(seconds: float) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        time.sleep(seconds)

    def follow() -> None:
        socket = node.state / "run" / "auditor.sock"
        try:
            told.extend(events.items(lambda: socket, 0, follow=True, sleep=sleep))
        except KeyboardInterrupt:
            return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()

    def until(words: str) -> None:
        deadline = time.monotonic() + 20
        while not any(words in i["text"] or words == i["kind"] for i in list(told)):
            assert time.monotonic() < deadline, (words, told)
            time.sleep(0.01)

    time.sleep(0.3)
    node.backend.changes.noted(opened(0))
    until("opened after 5 failures")
    node.backend.log.recover()
    until("run")
    node.server.stop(0)
    until("no executor answers")
    node.backend.log.refuse("guard.storm")  # while nobody listened
    node.server = serve(node.backend, node.state / "run")
    until("the executor answers again")
    until("refusal")
    ended.set()
    follower.join(timeout=20)
    recorded = [i["index"] for i in told if i["recorded"]]
    assert recorded == sorted(set(recorded))
    assert [i["kind"] for i in told if i["kind"] != "connection"] == ["circuit", "run", "refusal"]


# ---- top on a terminal -----------------------------------------------------------------------------------------------


def test_top_on_a_real_terminal_shows_the_node_and_leaves_it_as_it_was(node: Node) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TERM": "xterm-256color"}
    words = [sys.executable, "-m", "pointcall_executor.cli", "top", "--state-dir", str(node.state)]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    os.close(slave)
    try:
        shown = read_until(master, "nothing is held back")
        assert "node-7" in shown
        os.write(master, b"q")
        drain(master)
        assert process.wait(timeout=20) == Exit.OK
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert node.backend.asked == []


def read_until(master: int, words: str, seconds: float = 30) -> str:
    text, deadline = "", time.monotonic() + seconds
    while words not in text:
        assert time.monotonic() < deadline, text[-3000:]
        if select.select([master], [], [], 0.2)[0]:
            text += os.read(master, 65536).decode(errors="replace")
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return text


def drain(master: int) -> None:
    """Take what the program still writes, so that it can end."""

    def read() -> None:
        try:
            while os.read(master, 65536):
                pass
        except OSError:
            return

    threading.Thread(target=read, daemon=True).start()


def test_one_that_does_not_answer_in_time_is_not_said_to_be_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped has a socket that accepts, and says nothing."""
    monkeypatch.setattr(status, "ANSWER_SECONDS", 0.3)
    folder = tmp_path / "run"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(folder / "operator.sock"))
        mute.listen()
        begin = time.monotonic()
        assert cli.main(["status", "--state-dir", str(tmp_path), "--json"]) == Exit.ENVIRONMENT
    assert time.monotonic() - begin < 10
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["id"], error["want"]) == ("api.deadline", "an answer within 0.3 s")
    assert "pointcall halt" in error["hint"]  # asking again would wait again


@pytest.mark.parametrize("words", [("status",), ("pause",), ("events", "-f"), ("approve", "--list")])
def test_who_may_not_is_not_told_that_nobody_answers(node: Node, words: tuple[str, ...]) -> None:
    """Who believes that nobody answers restarts an executor that runs."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to somebody else")
    for path in (node.state / "run").glob("*.sock"):
        os.chown(path, 65534, 65534)
    confined = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # nobody special, whoever it is
    done = subprocess.run(
        [*confined, sys.executable, "-m", "pointcall_executor.cli", *words, "--state-dir", str(node.state)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == Exit.ENVIRONMENT, done.stderr
    assert "[api.permission]" in done.stderr
    assert "sudo" in done.stderr


def test_a_folder_where_nothing_ran_is_said_to_be_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--state-dir", str(tmp_path)]) == Exit.ENVIRONMENT
    said = capsys.readouterr().err
    assert "no executor has run with this state folder" in said
    assert "--state-dir" in said
    (tmp_path / "run").mkdir()
    assert cli.main(["status", "--state-dir", str(tmp_path)]) == Exit.ENVIRONMENT
    assert f"pointcall log tail --state-dir {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("top",), ("top", "--json")])
def test_top_without_a_terminal_says_so_and_ends(node: Node, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pointcall_executor.cli", *words, "--state-dir", str(node.state)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == Exit.ENVIRONMENT
    assert "top.terminal" in done.stdout + done.stderr


def test_an_empty_reason_does_not_disarm(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert node.run("disarm", "--reason", "") == Exit.USAGE
    assert node.backend.asked == []


def test_a_manifest_that_is_refused_is_told_with_what_to_do(
    node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.sigstore.json").write_text("{}")
    failed = Check.of("tee.measurement", False, expected="a", observed="b", hint="look")
    answer = backend.ArmAnswer(armed=False, manifest_sha256="", verdict=Verdict((failed,)))
    monkeypatch.setattr(node.backend, "arm", lambda *_: answer)
    assert node.run("arm", str(tmp_path)) == Exit.REFUSED
    assert capsys.readouterr().out == "refused: tee.measurement\n  want a\n  got  b\n  hint: look\n"


def test_arming_waits_longer_than_runs_in_flight_may_take() -> None:
    assert arm.ARM_SECONDS > 2 * daemon.QUIET_SECONDS
