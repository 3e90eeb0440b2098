"""Drills through the executor: what the signed manifest allows, written down, ended by itself, reported."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import cli
from pointcall_executor.api.backend import DrillRequest
from pointcall_executor.api.client import Client
from pointcall_executor.api.roles import Role
from pointcall_executor.api.server import serve
from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import Exit
from pointcall_executor.drills import DrillError
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.recorded import RecordedNode
from pointcall_runbook.errors import PointcallError
from tests.kernel.lab import OK, connects, listen
from tests.kernel.slowfs import private_mounts
from tests.lab import Lab
from tests.scenario.test_detectors_story import DEAD_PORT, Story, Tell, Worker, tell
from tests.scenario.test_loop_story import PORT as LOOP_PORT
from tests.scenario.test_loop_story import spec as loop_spec

__all__ = ["tell"]  # a fixture
ALL = {"refuse": 1, "lose": 1, "delay": 1, "kill": 1, "slow_file": 1, "seconds_max": 30}
LOSE_ONLY = {"name": "drill", "params": {"lose": 1}}
DRILL = {"name": "drill", "params": ALL}


def request(**over: Any) -> DrillRequest:
    plain: dict[str, Any] = {
        "service": "", "address": "127.0.0.1", "port": DEAD_PORT, "protocol": "tcp", "first": 0, "refuse_ppm": 0,
        "refuse_errno": 0, "lose_ppm": 0, "delay_us": 0, "seed": 0, "seconds": 20, "kill": False, "slow_file": "",
        "slow_ms": 0, "reason": "game day",
    }  # fmt: skip
    return DrillRequest(**plain | over)


def entries(story: Story, what: str) -> list[dict[str, Any]]:
    return [e.body["detail"] for e in story.executor.journal.entries(kind="config") if e.body["what"] == what]


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


@pytest.mark.kernel
def test_refused_connects_are_those_that_were_drawn_and_the_log_has_it(tell: Tell) -> None:
    with tell(DRILL) as story, listen(DEAD_PORT):
        begun = story.executor.drills.begin(request(first=3, refuse_errno=111))
        assert connects(5, DEAD_PORT) == ["ECONNREFUSED"] * 3 + [OK] * 2
        report = story.executor.drills.end(begun.id)
        assert (report.state, report.as_expected, report.ended_by) == ("ended", True, "asked for")
        assert report.expected["refused"] == report.observed["refused"] == 3
        assert story.executor.drills.end(begun.id) == report
        assert connects(1, DEAD_PORT) == [OK]
        (begins,), (ended,) = entries(story, "drill begins"), entries(story, "drill ended")
        assert (begins["reason"], begins["first"], begins["service"]) == ("game day", "3", "the gate")
        assert (ended["seen refused"], ended["as expected"]) == ("3", "true")
        assert story.executor.session is not None
        assert story.executor.session.sensors.changed() == []


@pytest.mark.kernel
def test_a_drill_makes_the_breaker_open_and_the_report_names_the_run(tell: Tell) -> None:
    breaker = {"name": "breaker", "params": {"threshold": 2, "stuck_ms": 300, "cooldown_us": 10**8}}
    with tell(DRILL, breaker) as story:
        begun = story.executor.drills.begin(request(lose_ppm=0, first=1))
        connects(4, DEAD_PORT)  # one refused by the drill, two by the dead server, one by the breaker
        told = [story.receipt(event).run.id for event in ("CircuitOpened", "CircuitStuck")]
        report = story.executor.drills.end(begun.id)
        assert [r.run for r in report.runs][:2] == told
        assert report.runs[0].event == "CircuitOpened"


@pytest.mark.kernel
def test_it_ends_by_itself_and_one_runs_at_a_time(tell: Tell) -> None:
    with tell(DRILL) as story, listen(DEAD_PORT):
        begun = story.executor.drills.begin(request(refuse_ppm=1_000_000, seconds=1))
        with pytest.raises(DrillError) as refused:
            story.executor.drills.begin(request(first=1))
        assert refused.value.id == "drill.busy"
        assert connects(1, DEAD_PORT) == ["EPERM"]
        time.sleep(1.1)
        assert connects(1, DEAD_PORT) == [OK]
        deadline = time.monotonic() + 5
        while not entries(story, "drill ended"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert story.executor.drills.end(begun.id).ended_by == "its time is over"


@pytest.mark.kernel
def test_a_pause_ends_it_and_none_begins_meanwhile(tell: Tell) -> None:
    with tell(DRILL) as story, listen(DEAD_PORT):
        begun = story.executor.drills.begin(request(refuse_ppm=1_000_000, seconds=30))
        assert connects(1, DEAD_PORT) == ["EPERM"]
        story.executor.pause("looking", 60)
        deadline = time.monotonic() + 5
        while not entries(story, "drill ended"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert connects(1, DEAD_PORT) == [OK]
        assert story.executor.drills.end(begun.id).ended_by == "the executor is paused"
        with pytest.raises(ArmingError) as refused:
            story.executor.drills.begin(request(first=1))
        assert refused.value.id == "executor.paused"
        story.executor.resume("seen")
        story.executor.drills.end(story.executor.drills.begin(request(first=1)).id)


@pytest.mark.kernel
def test_disarming_ends_it(tell: Tell) -> None:
    with tell(DRILL) as story, listen(DEAD_PORT):
        begun = story.executor.drills.begin(request(refuse_ppm=1_000_000))
        assert connects(1, DEAD_PORT) == ["EPERM"]
        story.executor.disarm("enough")
        assert connects(1, DEAD_PORT) == [OK]
        assert story.executor.drills.end(begun.id).state == "ended"
        with pytest.raises(DrillError) as refused:
            story.executor.drills.begin(request(first=1))
        assert refused.value.id == "drill.undeclared"


@pytest.mark.kernel
def test_a_service_is_killed_and_a_runbook_sees_it(tell: Tell) -> None:
    with tell(DRILL, {"name": "lifecycle"}) as story:
        before = story.executor.running_services()["worker"]
        report = story.executor.drills.begin(request(service="worker", address="", port=0, kill=True))
        assert before
        deadline = time.monotonic() + 5
        while state_of(before) not in ("Z", "gone"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert story.executor.drills.end(report.id).observed["killed"] == 1


@pytest.mark.kernel
def test_a_file_of_the_service_is_slow_and_only_such_a_one(tell: Tell, tmp_path: Path) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    (other := tmp_path / "other").write_text("not declared")
    with private_mounts(), tell(DRILL) as story, contextlib.closing(Worker()) as worker:
        script = tmp_path / "worker.py"  # a declared file of the service
        wanted = request(service="worker", address="", port=0, slow_file=str(script), slow_ms=150)
        begun = story.executor.drills.begin(wanted)
        timed = f"(lambda t: (open({str(script)!r}, 'rb').read(), time.monotonic() - t)[1])(time.monotonic())"
        assert float(worker.do(timed)) > 0.15
        ended = story.executor.drills.end(begun.id)
        assert ended.as_expected
        assert ended.observed["slowed"] == ended.expected["slowed"] >= 1
        assert float(worker.do(timed)) < 0.15
        with pytest.raises(DrillError) as refused:
            story.executor.drills.begin(request(service="worker", slow_file=str(other), slow_ms=1))
        assert refused.value.id == "drill.target"
        (tmp_path / "folder").symlink_to("/etc")
        for way_out in (tmp_path / "folder" / "passwd", f"{tmp_path}/folder/../hostname", f"{tmp_path}/./worker.py"):
            with pytest.raises(DrillError) as refused:
                story.executor.drills.begin(request(service="worker", slow_file=str(way_out), slow_ms=1))
            assert refused.value.id == "drill.target"
        story.executor.drills.begin(wanted)
        story.executor.disarm("enough")
        deadline = time.monotonic() + 10
        # Its threads too: with them this one could not go back to its mount namespace.
        while str(script) in Path("/proc/self/mountinfo").read_text() or any(
            t.name == "drill" or isinstance(t, threading.Timer) for t in threading.enumerate()
        ):
            assert time.monotonic() < deadline, "a drill ends when it is disarmed"
            time.sleep(0.01)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("over", "check"),
    [
        ({"port": 1, "first": 1}, "drill.target"),
        ({"address": "10.0.0.1", "first": 1}, "drill.target"),
        ({"address": "nowhere", "first": 1}, "drill.target"),
        ({"protocol": "udp", "first": 1}, "drill.target"),
        ({"service": "nobody", "first": 1}, "drill.target"),
        ({"kill": True}, "drill.target"),
        ({}, "drill.denied"),
        ({"first": 1, "seconds": 31}, "drill.denied"),
        ({"first": 1, "seconds": 0}, "drill.denied"),
        ({"refuse_ppm": 1_000_001}, "drill.denied"),
        ({"delay_us": 1000}, "kernel.drill.delay"),
    ],
)
def test_what_is_refused(tell: Tell, over: dict[str, Any], check: str) -> None:
    with tell(DRILL) as story:
        with pytest.raises((DrillError, KernelError)) as refused:
            story.executor.drills.begin(request(**over))
        assert refused.value.id == check
        story.executor.drills.begin(request(first=1))  # nothing is left of the refused one


@pytest.mark.parametrize(
    ("sensors", "check"),
    [
        ([], "drill.undeclared"),
        ([{"name": "drill"}], "drill.denied"),
        ([DRILL | {"params": {"lose": 1}}], "drill.denied"),
    ],
)
def test_without_a_signed_permission_there_is_no_drill(lab: Lab, sensors: list[dict[str, Any]], check: str) -> None:
    blobs = lab.blobs()
    (blobs / "drill.blob").write_bytes(b"recorded drill")
    with lab.executor(RecordedNode()) as executor:
        with pytest.raises(DrillError) as refused:
            executor.drills.begin(request(first=1))
        assert refused.value.id == "drill.undeclared"
        names = [{"name": "breaker"}, {"name": "lifecycle"}, *sensors]
        executor.arm(lab.sign(lab.assemble(loop_spec(lab, sensors=names), blobs=blobs)))
        with pytest.raises(DrillError) as refused:
            executor.drills.begin(request(port=LOOP_PORT, first=1))
        assert refused.value.id == check
        with pytest.raises(DrillError) as refused:
            executor.drills.end("d-7")
        assert refused.value.id == "drill.unknown"
        assert executor.journal.entries(kind="config")[-1].body["what"] != "drill begins"


@pytest.mark.kernel
def test_the_verb_talks_to_the_running_executor(tell: Tell, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["drill", "--state-dir", str(lab.state), "--to", f"127.0.0.1:{DEAD_PORT}", "--seconds", "1", "--json"]
    with tell(DRILL) as story, listen(DEAD_PORT), contextlib.ExitStack() as stack:
        stack.callback(serve(ExecutorBackend(story.executor), lab.state / "run").stop)
        client = threading.Timer(0.4, connects, (5, DEAD_PORT))
        client.start()
        assert cli.main([*words, "--first", "3"]) == Exit.OK
        client.join()
        told = json.loads(capsys.readouterr().out)
        assert (told["ok"], told["expected"]["refused"], told["observed"]["connects"]) == (True, 3, 5)
        assert cli.main([*words, "--first", "1", "--seconds", "31"]) == Exit.REFUSED
        assert json.loads(capsys.readouterr().out)["error"]["id"] == "drill.denied"
        with Client(lab.state / "run" / f"{Role.OPERATOR.value}.sock") as operator:
            probe = {"name": "opens.c", "sha256": "ab" * 32, "what": "begins", "reason": "slow opens"}
            operator.call("Control/RecordProbe", **probe)
            assert [b["sha256"] for b in entries(story, "unmeasured probe begins")] == ["ab" * 32]
            with pytest.raises(PointcallError) as denied:
                operator.call("Control/RecordProbe", **probe | {"sha256": "x"})
            assert denied.value.id == "api.probe"
        with Client(lab.state / "run" / f"{Role.AGENT.value}.sock") as agent, pytest.raises(PointcallError) as denied:
            agent.call("Control/BeginDrill", reason="curious")
        assert denied.value.id == "api.denied"
