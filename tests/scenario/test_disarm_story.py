"""What a person disarmed stays disarmed until a person arms: over restarts, kills, SIGHUP and erasure."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_attest.errors import RefusedError
from pointcall_executor import daemon, left, recorder, retention, standing
from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import Exit
from pointcall_executor.daemon import Executor
from pointcall_executor.halt import clear, halt
from pointcall_executor.journal import JournalError, JournalReader
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.pins import Pins
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.serving import _line
from pointcall_executor.sessions import ARMED, Sessions
from pointcall_executor.watch import Amiss
from tests.lab import Lab, now
from tests.scenario.test_loop_story import spec
from tests.scenario.test_real_story import bpffs, pointcall, program_ids, put, real_kernel, running

__all__ = ["bpffs", "real_kernel"]  # fixtures


class Node:
    """Executors of one installation, one after the other; a number for each manifest."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self._numbers = lab, itertools.count(1, 2)

    def life(self) -> contextlib.AbstractContextManager[Executor]:
        return self.lab.executor(RecordedNode())

    def arm(self, executor: Executor, **how: Any) -> None:
        executor.arm(self.lab.sign(self.lab.assemble(spec(self.lab), next(self._numbers))), **how)

    def refused(self, executor: Executor) -> str:
        """Why it does not arm by itself."""
        with pytest.raises(ArmingError) as refusal:
            self.arm(executor, by_itself=True)
        assert executor.admitted is None
        return refusal.value.id


@pytest.fixture
def node(make_lab: Callable[..., Lab]) -> Node:
    return Node(make_lab())


def disarmings(executor: Executor) -> list[dict[str, str]]:
    return [e.body["detail"] for e in executor.journal.entries("config") if e.body["what"] == "disarmed"]


def test_why_it_is_not_ready_is_said_without_a_word_of_a_persons(node: Node) -> None:
    state = node.lab.state
    with node.life() as executor:
        backend = ExecutorBackend(executor)
        assert backend.unready() == "nothing is armed"
        node.arm(executor)
        assert (backend.unready(), backend.ready()) == ("", True)
        executor.disarm("anna looks")
        assert backend.unready() == "disarmed by a person"
        node.arm(executor)
        halt(state, "anna says stop", now())
        deadline = time.monotonic() + 10
        while executor.admitted is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (backend.unready(), backend.ready()) == ("halted", False)
        assert (backend.status().state, backend.status().reason) == ("disarmed", "halted: anna says stop")
        clear(state)
        assert backend.unready() == "nothing is armed"
        executor._loop.failure = JournalError("no room for anna")
        assert backend.unready() == "failed"
        executor._loop.failure = None


def test_a_persons_word_outlives_the_executor_and_a_person_ends_it(node: Node) -> None:
    with node.life() as first:
        node.arm(first, by_itself=True)
        first.disarm("I look myself")
        assert disarmings(first) == [{"reason": "I look myself", "stays": "yes"}]
        assert node.refused(first) == "arm.by-hand"
    for _ in range(2):
        with node.life() as later:
            assert node.refused(later) == "arm.by-hand"
            assert _line(later) == "up, disarmed by a person: I look myself"
            status = ExecutorBackend(later).status()
            assert (status.state, status.reason, status.ready) == (
                "disarmed", "a person disarmed it: I look myself", False
            )  # fmt: skip
    with node.life() as person:
        node.arm(person)
        assert ExecutorBackend(person).status().reason == ""
    with node.life() as last:
        node.arm(last, by_itself=True)


def test_what_the_executor_does_by_itself_does_not_stay(node: Node) -> None:
    with node.life() as stopped:
        node.arm(stopped)
    with node.life() as first:
        assert disarmings(first) == [{"reason": "stopped"}]
        node.arm(first, by_itself=True)
        first._loop.call(lambda: first._disarm_by_itself(Amiss("kernel.changed", "as armed", "otherwise", "")))
        assert ExecutorBackend(first).status().reason == ""
        node.arm(first, by_itself=True)
    with node.life() as last:
        node.arm(last, by_itself=True)


def test_a_person_can_say_so_where_nothing_is_armed(node: Node) -> None:
    with node.life() as first:
        first.disarm("")
        first.disarm("once more")
        assert disarmings(first) == [{"reason": daemon.NO_REASON, "stays": "yes"}]
    with node.life() as later:
        assert later.disarmed_by_hand == daemon.NO_REASON
        assert node.refused(later) == "arm.by-hand"


def test_a_manifest_that_is_refused_ends_nothing(node: Node) -> None:
    with node.life() as first:
        first.disarm("enough")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Sessions, "start_services", _fail)
            with pytest.raises(ArmingError):
                node.arm(first)
        assert node.refused(first) == "arm.by-hand"
    with node.life() as later:
        assert node.refused(later) == "arm.by-hand"


def _fail(*_: Any) -> None:
    raise ArmingError("not now")


def test_a_persons_word_wins_while_it_arms_by_itself(node: Node) -> None:
    with node.life() as executor:
        real = Sessions.start_services

        def meanwhile(self: Any, *how: Any) -> None:
            executor.disarm("not this one")
            real(self, *how)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Sessions, "start_services", meanwhile)
            with pytest.raises(ArmingError):
                node.arm(executor, by_itself=True)
        assert executor.admitted is None
        assert executor.disarmed_by_hand == "not this one"


def test_it_stays_after_its_text_was_erased_until_something_is_armed(node: Node) -> None:
    with node.life() as first:
        node.arm(first)
        first.disarm("because of Anna")
        index = next(e.index for e in first.journal.entries("config") if e.body["what"] == "disarmed")
        retention.erase(first.recorder, (str(index),), None, "asked by a person", now())
    with node.life() as later:
        assert later.disarmed_by_hand == "its reason was erased"
        assert node.refused(later) == "arm.by-hand"
        node.arm(later)
        armed = next(e.index for e in reversed(later.journal.entries("config")) if e.body["what"] == "kernel programs")
        retention.erase(later.recorder, (str(armed),), None, "asked by a person", now())
    with node.life() as last:
        node.arm(last, by_itself=True)


@pytest.mark.parametrize("many", [3, 4, 5, 9])
def test_however_much_was_written_since_it_is_found(node: Node, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with node.life() as first:
        first.disarm("long ago")
        for _ in range(many):
            first.record(entry.Config(what="settings", detail={}))
    monkeypatch.setattr(recorder, "RECONCILED_MAX", 4)
    with node.life() as later:
        assert node.refused(later) == "arm.by-hand"
        node.arm(later)
        for _ in range(many):
            later.record(entry.Config(what="settings", detail={}))
    with node.life() as last:
        node.arm(last, by_itself=True)


def test_it_is_said_once_more_where_its_entry_is_pruned(node: Node) -> None:
    with node.life() as first:
        first.disarm("long ago")
        first.checkpoint_now()
        first.recorder.prune(first.journal.size, "asked by a person", 0)
        assert disarmings(first) == [{"reason": "long ago", "stays": "yes"}]
    with node.life() as later:
        assert later.disarmed_by_hand == "long ago"


def test_what_a_killed_executor_had_pinned_meanwhile_is_taken_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's arming that was killed before its entry: the pins are there, the log says that nothing is armed."""
    with node.life() as first:
        first.disarm("I look myself")
    pinned = [True]
    monkeypatch.setattr(RecordedNode, "unpin", lambda _self: pinned.pop() if pinned else False)
    with node.life() as later:
        assert pinned == []
        assert disarmings(later)[-1] == {"reason": "I look myself", "stays": "yes"}


# ---- the whole program -----------------------------------------------------------------------------------------------


@pytest.fixture
def pins(lab: Lab) -> Iterator[Pins]:
    found = Pins(lab.state)
    yield found
    found.drop()


@pytest.mark.kernel
@pytest.mark.parametrize("pin", [False, True])
def test_neither_a_restart_nor_sighup_arms_what_a_person_disarmed(
    real_kernel: None, bpffs: None, lab: Lab, pins: Pins, pin: bool
) -> None:
    put(lab, 1)
    state = ("--state-dir", str(lab.state))
    with running(lab, pin=pin) as run:
        run.until("armed")
        programs = list(program_ids(lab).values())
        assert pointcall("disarm", "--reason", "I look myself", *state).returncode == Exit.OK
        run.process.kill()
        run.process.wait()
    with running(lab, pin=pin) as run:
        assert "I look myself" in run.until("disarmed by a person")
        deadline = time.monotonic() + 10
        while (ready := pointcall("status", "--ready", *state)).returncode == Exit.ENVIRONMENT:
            assert time.monotonic() < deadline
        assert ready.returncode == Exit.REFUSED
        assert ready.stdout == "not ready: disarmed (a person disarmed it: I look myself)\n"
        put(lab, 3)
        run.process.send_signal(signal.SIGHUP)
        run.until("disarmed by a person")
        assert not any(map(prog_exists, programs))
        assert pointcall("arm", str(lab.state / "manifest"), *state).returncode == Exit.OK
        assert pointcall("status", "--ready", *state).stdout == "ready\n"
        run.process.kill()
        run.process.wait()
    with running(lab, pin=pin) as run:
        assert "sequence=3" in run.until("armed")
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        assert [e.body["what"] for e in journal.entries("config")].count("disarmed") == 1


def without_log(node: Node) -> None:
    """The log is gone, as after somebody moved a damaged one away."""
    for path in node.lab.state.glob("journal.db*"):
        path.unlink()


def gone(executor: Executor) -> list[dict[str, Any]]:
    what = "the log before this one is gone"
    return [e.body["detail"] for e in executor.journal.entries("config") if e.body["what"] == what]


def test_a_log_that_is_begun_anew_knows_that_a_person_has_disarmed(node: Node) -> None:
    with node.life() as first:
        node.arm(first)
        first.disarm("I look myself")
        manifest = first.journal.sequence_digest(ARMED)
    without_log(node)
    with node.life() as second:
        assert gone(second) == [{"sequence": 1, "manifest": manifest}]
        assert node.refused(second) == "arm.by-hand"
        assert _line(second) == "up, disarmed by a person: I look myself"
    with node.life() as third:
        assert len(gone(third)) == len(disarmings(third)) == 1
        assert node.refused(third) == "arm.by-hand"
        node.arm(third)
    without_log(node)
    with node.life() as fourth:
        node.arm(fourth, by_itself=True)


def test_a_log_that_was_begun_anew_and_not_finished_with_that_is_told_at_the_next_start(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between its first entry and what the one before knew."""
    with node.life() as first:
        node.arm(first)
        first.disarm("I look myself")
        manifest = first.journal.sequence_digest(ARMED)
    without_log(node)

    with monkeypatch.context() as patch:
        patch.setattr(left, "recall_standing", lambda *_, **__: None)
        with node.life() as cut:
            assert cut.journal.size > 0
    with node.life():  # as far as that: what is known of the armed manifest comes last
        pass
    with node.life() as second:
        assert node.refused(second) == "arm.by-hand"
        assert gone(second)[-1] == {"sequence": 1, "manifest": manifest}
        assert second.journal.highest_sequence(ARMED) == 1


def test_a_log_that_is_begun_anew_lets_no_older_manifest_be_armed(node: Node) -> None:
    lab = node.lab
    older = lab.sign(lab.assemble(spec(lab), 1))
    armed = lab.sign(lab.assemble(spec(lab), 3))
    with node.life() as first:
        first.arm(armed)
    without_log(node)
    with node.life() as second:
        with pytest.raises(RefusedError) as refusal:
            second.arm(older)
        assert [check.id for check in refusal.value.verdict.failed] == ["manifest.sequence"]
        second.arm(armed, by_itself=True)


@pytest.mark.parametrize("body", ["", "{}x", '{"format": "pointcall-standing/v2"}', '{"disarmed": 1}', "[" * 9000])
def test_how_the_node_stands_is_read_only_where_the_log_does_not_say_it_and_otherwise_a_person_must_look(
    node: Node, body: str
) -> None:
    with node.life() as first:
        node.arm(first)
    path = node.lab.state / standing.FILE
    path.write_text(body)
    with node.life() as second:
        node.arm(second, by_itself=True)
    path.write_text(body)
    without_log(node)
    with node.life() as third:
        assert node.refused(third) == "arm.by-hand"
        assert "standing.json cannot be read" in third.disarmed_by_hand
        node.arm(third)
        assert standing.read(node.lab.state) == standing.Standing(
            sequence=third.journal.highest_sequence(ARMED), manifest=third.journal.sequence_digest(ARMED)
        )


def test_where_it_cannot_be_written_the_log_says_so(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(standing, "write_whole", full)
    with node.life() as executor:
        node.arm(executor)
        executor.disarm("I look myself")
        assert executor.disarmed_by_hand == "I look myself"
        refusals = [e.body["check"] for e in executor.journal.entries("refusal")]
        assert refusals == ["executor.standing"] * 2


def test_of_arming_and_disarming_at_once_the_last_one_stands(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that writes last has looked last."""
    written, real = [], standing.keep

    def slow(state: Path, now_: standing.Standing) -> None:
        written.append(now_.disarmed)
        time.sleep(0.3 if len(written) == 1 else 0)
        real(state, now_)

    monkeypatch.setattr(standing, "keep", slow)
    with node.life() as executor:
        arming = threading.Thread(target=lambda: node.arm(executor))
        arming.start()
        while not written:
            time.sleep(0.005)
        executor.disarm("no")
        arming.join()
    assert written == [None, "no"]
    found = standing.read(node.lab.state)
    assert found is not None
    assert found.disarmed == "no"
