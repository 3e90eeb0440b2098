"""What needs a person: approvals, escalations, pauses, the kill switch. And actions that do not hold."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.approval import ApprovalBody, approval_statement
from pointcall_attest.errors import VerifyError
from pointcall_attest.receipt import Receipt
from pointcall_executor import daemon, halt, messenger, recorder, retention, waiting
from pointcall_executor.api.services import DAY_S
from pointcall_executor.arming import ArmingError
from pointcall_executor.channels import ChannelError, DeclaredChannels
from pointcall_executor.daemon import StoppedError
from pointcall_executor.recorded import RecordedNode, RecordedSensors, RecordedServices
from pointcall_keys.signer import sign_statement
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Level, channel, service
from tests.lab import IDENTITY, Lab, now
from tests.scenario.test_loop_story import HERE, Watched, opened, spec

SECOND_PERSON = "anna@acme.example"
EVERYTHING = '''"""Every action that holds something, once."""
from pointcall_runbook import (
    CircuitOpened, Decision, Escalate, Freeze, Isolate, Kill, KillConnections, OpenCircuit, Thaw, channel, runbook
)

SECOND = 1_000_000_000

@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.failures == 1:
        return [OpenCircuit(address=e.address, port=e.port, hold=5 * SECOND)]
    if e.failures == 2:
        return [KillConnections(address=e.address, port=e.port)]
    if e.failures == 3:
        return [Isolate(service=e.service, hold=5 * SECOND)]
    if e.failures == 4:
        return [Freeze(service=e.service, hold=5 * SECOND)]
    if e.failures == 5:
        return [Thaw(service=e.service)]
    if e.failures == 6:
        return [Kill(service=e.service, signal=15)]
    return [Escalate(channel=channel("ops"), code=e.failures)]
'''
GRANTED = ["open_circuit", "kill_connections", "isolate", "freeze", "thaw", "kill", "escalate"]


def broad(lab: Lab, **over: Any) -> dict[str, Any]:
    lab.runbook("all", EVERYTHING)
    grants = {"actions": GRANTED, "services": ["api"], "channels": ["ops"], "networks": ["127.0.0.0/8"]}
    sensors = [{"name": name} for name in ("breaker", "lifecycle", "connections", "isolate")]
    limits = {"perMinute": 600, "burst": 100}
    return (
        spec(lab)
        | {
            "runbooks": [{"name": "all", "source": "all", "grants": grants, "limits": limits}],
            "sensors": sensors,
        }
        | over
    )


def careful(lab: Lab, **over: Any) -> dict[str, Any]:
    """Recreating needs a second person."""
    body = spec(lab)
    body["runbooks"][0]["limits"] = {"approval": ["recreate"]}
    return body | over


def failures(n: int) -> Any:
    return opened().__class__(opened().kind, time.monotonic_ns(), HERE, n, 111, 0, 0)


@pytest.fixture
def watched(make_lab: Callable[..., Lab]) -> Iterator[Watched]:
    lab, node = make_lab(), RecordedNode()
    lab.set_policy(approvers=[{"issuer": lab.sigstore.issuer, "identity": SECOND_PERSON}])
    with lab.executor(node) as executor:
        yield Watched(lab, executor, node)


def body_of(receipt: Receipt, **over: Any) -> ApprovalBody:
    call = receipt.decision.calls[0]
    start = now().replace(microsecond=0)
    fields: dict[str, Any] = {
        "node": "lab",
        "run": receipt.run.id,
        "index": 0,
        "runbook": "fix",
        "action": call.action,
        "args": tuple(map(str, call.args)),
        "issued": start,
        "expires": start + daemon.timedelta(minutes=5),
    }
    return ApprovalBody(**(fields | over))


def signed(watched: Watched, receipt: Receipt, who: str = SECOND_PERSON, manifest: str = "", **over: Any) -> bytes:
    statement = approval_statement(body_of(receipt, **over), manifest=manifest or receipt.runbook.manifest)
    sigstore = watched.lab.sigstore
    return sign_statement(statement, trust_config=sigstore.trust_config(), token=sigstore.token(who))


# ---- approvals ------------------------------------------------------------------------------------------------------


def test_an_approved_action_happens_once_in_a_run_of_its_own(watched: Watched) -> None:
    watched.arm(careful(watched.lab))
    held = watched.happen(opened())
    assert (held.actions[0].outcome, held.actions[0].guard.check) == ("refused", "guard.approval")
    assert [(a.run.id, a.index) for a in watched.executor.asked()] == [(held.run.id, 0)]
    bundle = signed(watched, held)
    watched.executor.approve(bundle)
    done = watched.next_receipt()
    assert (done.trigger.sensor, done.actions[0].outcome) == ("approval", "applied")
    assert done.inputs.values == held.inputs.values
    (approved,) = [e for e in watched.executor.journal.entries(kind="config") if e.body["what"] == "approved"]
    assert SECOND_PERSON in approved.body["detail"]["by"]
    with pytest.raises(StoppedError) as refused:
        watched.executor.approve(bundle)
    assert refused.value.id == "approval.unknown"
    assert watched.happen(opened()).actions[0].guard.check == "guard.approval"


@pytest.mark.parametrize(
    ("over", "check"),
    [
        ({"who": IDENTITY}, "manifest.signer"),
        ({"who": "anna@acme.example.evil.example"}, "manifest.signer"),
        ({"manifest": "0" * 64}, "approval.other"),
        ({"node": "another"}, "approval.other"),
        ({"run": "01JAAAAAAAAAAAAAAAAAAAAAAA"}, "approval.unknown"),
        ({"index": 1}, "approval.unknown"),
        ({"action": "kill"}, "approval.unknown"),
        ({"args": ("1", "0")}, "approval.unknown"),
        ({"issued": now() - daemon.timedelta(hours=2), "expires": now() - daemon.timedelta(hours=1)}, "approval.time"),
    ],
)
def test_an_approval_of_anything_else_lets_nothing_through(watched: Watched, over: dict[str, Any], check: str) -> None:
    watched.arm(careful(watched.lab))
    held = watched.happen(opened())
    with pytest.raises((VerifyError, StoppedError)) as refused:
        watched.executor.approve(signed(watched, held, **over))
    assert refused.value.id == check
    assert [s for s in watched.executor.journal.entries(kind="receipt") if s.run != held.run.id] == []
    assert watched.refusals() == ["guard.approval", check]  # somebody tried: that is in the log


def test_an_approval_that_another_rule_held_back_is_over(watched: Watched) -> None:
    watched.arm(careful(watched.lab))
    held = watched.happen(opened())
    watched.executor.pause("look first", 60)
    watched.executor.approve(signed(watched, held))
    assert watched.next_receipt().actions[0].guard.check == "guard.paused"
    watched.executor.resume("looked")
    assert watched.happen(opened()).actions[0].guard.check == "guard.approval"


def test_an_approval_waits_while_another_manifest_takes_over(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began meanwhile would be of the old manifest and recorded under the epoch of the new one."""
    watched.arm(careful(watched.lab))
    bundle = signed(watched, watched.happen(opened()))
    make, told = watched.node.services, []
    approving = threading.Thread(target=lambda: told.append(_refused(lambda: watched.executor.approve(bundle))))

    def slow(*given: Any) -> RecordedServices:
        approving.start()
        time.sleep(1)
        return make(*given)

    monkeypatch.setattr(watched.node, "services", slow)
    watched.arm(careful(watched.lab), 3)
    approving.join(10)
    assert told == ["approval.unknown"]
    assert len(watched.executor.journal.entries(kind="receipt")) == 1


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except PointcallError as error:
        return error.id
    return ""


def test_the_signer_of_the_manifest_is_no_second_person(watched: Watched) -> None:
    lab = watched.lab
    lab.set_policy(approvers=[{"issuer": lab.sigstore.issuer, "identity": IDENTITY}])
    watched.executor.reload(watched.executor.config)
    watched.arm(careful(lab))
    with pytest.raises(VerifyError) as refused:
        watched.executor.approve(signed(watched, watched.happen(opened()), IDENTITY))
    assert refused.value.id == "approval.second-person"


def test_what_nobody_can_approve_is_not_armed(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    with lab.executor() as executor:
        watched = Watched(lab, executor, RecordedNode())
        with pytest.raises(ArmingError) as refused:
            watched.arm(careful(lab))
        assert refused.value.id == "arm.approval"


def test_what_was_held_back_is_forgotten_with_its_manifest(watched: Watched) -> None:
    watched.arm(careful(watched.lab))
    held = watched.happen(opened())
    bundle = signed(watched, held)
    watched.arm(careful(watched.lab), 3)
    assert watched.executor.asked() == ()
    with pytest.raises(VerifyError) as refused:
        watched.executor.approve(bundle)
    assert refused.value.id == "approval.other"


def test_an_approval_does_not_begin_a_run_while_a_manifest_takes_over(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm(careful(watched.lab))
    bundle = signed(watched, watched.happen(opened()))
    refused: list[StoppedError] = []

    def approve() -> None:
        try:
            watched.executor.approve(bundle)
        except StoppedError as error:
            refused.append(error)

    person, adopt = threading.Thread(target=approve), RecordedServices.adopt

    def approved_meanwhile(self: RecordedServices) -> list[int]:
        person.start()
        person.join(0.5)
        assert person.is_alive()
        return adopt(self)

    monkeypatch.setattr(RecordedServices, "adopt", approved_meanwhile)
    watched.arm(careful(watched.lab), 3)
    person.join(10)
    assert [error.id for error in refused] == ["approval.unknown"]
    assert watched.executor.journal.count("receipt") == 1


def test_an_approval_that_was_not_used_ends_with_its_manifest(watched: Watched) -> None:
    watched.arm(careful(watched.lab))
    bundle = signed(watched, watched.happen(opened()))
    watched.executor.pause("not now", 3600)
    watched.executor.approve(bundle)
    assert watched.next_receipt().actions[0].guard.check == "guard.paused"
    watched.arm(careful(watched.lab), 3)
    watched.executor.resume("go on")
    assert watched.happen(opened()).actions[0].guard.check == "guard.approval"


# ---- actions that hold something ------------------------------------------------------------------------------------


def test_every_action_is_done_recorded_and_checked(watched: Watched) -> None:
    watched.arm(broad(watched.lab))
    node = watched.node
    assert node.current_sensors is not None
    seen = {}
    for n in range(1, 8):
        (acted,) = watched.happen(failures(n)).actions
        seen[acted.action] = (acted.outcome, acted.undo)
    assert seen == {
        "open_circuit": ("applied", "close_circuit"),
        "kill_connections": ("applied", None),
        "isolate": ("applied", "end_isolation"),
        "freeze": ("applied", "thaw"),
        "thaw": ("applied", None),
        "kill": ("applied", None),
        "escalate": ("applied", None),
    }
    assert list(node.current_sensors.isolated) != []
    intents = [e.body["action"] for e in watched.executor.journal.entries(kind="intent") if e.run]
    assert sorted(intents) == sorted(set(GRANTED) - {"escalate"})
    outcomes = [e for e in watched.executor.journal.entries(kind="outcome") if e.run]
    assert {e.body["action"] for e in outcomes if e.body["postcondition"]} == set(GRANTED)


OWN = '''"""What the core does itself, and what takes back."""
from pointcall_runbook import (
    Again, CircuitOpened, CloseCircuit, Decision, Level, Notify, Remember, Timer, channel, remembered, runbook
)

SECOND = 1_000_000_000

SEEN = remembered(0, hi=9)

@runbook
def opened(e: CircuitOpened) -> Decision:
    return [
        CloseCircuit(address=e.address, port=e.port),
        Remember(slot=SEEN.slot, value=1),
        Again(after=3600 * SECOND, tag=1),
        Notify(channel=channel("ops"), level=Level.INFO, code=1),
    ]

@runbook
def later(e: Timer) -> Decision:
    return []
'''


def own(lab: Lab) -> dict[str, Any]:
    lab.runbook("own", OWN)
    actions = ["close_circuit", "remember", "again", "notify"]
    grants = {"actions": actions, "channels": ["ops"], "networks": ["127.0.0.0/8"]}
    return spec(lab) | {"runbooks": [{"name": "own", "source": "own", "grants": grants}]}


def test_what_the_core_does_itself_has_a_postcondition_in_the_log_too(watched: Watched) -> None:
    watched.arm(own(watched.lab))
    receipt = watched.happen(opened())
    wanted = {"close_circuit", "remember", "again", "notify"}
    assert {a.action for a in receipt.actions if a.outcome == "applied"} == wanted
    outcomes = [e for e in watched.executor.journal.entries(kind="outcome") if e.run]
    assert {e.body["action"] for e in outcomes if e.body["postcondition"]} == wanted


@pytest.mark.parametrize(
    ("n", "action", "patched", "back"),
    [
        (2, "kill_connections", (RecordedSensors, "kill_connections", lambda *_: 3), "it cannot be taken back"),
        (4, "freeze", (RecordedServices, "frozen", lambda *_: False), "yes"),
        (5, "thaw", (RecordedServices, "healthy", lambda *_: "it is not ready"), "it cannot be taken back"),
        (0, "close_circuit", (RecordedSensors, "close_circuit", lambda *_: None), "it cannot be taken back"),
    ],
)
def test_what_is_looked_at_after_each_action(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, n: int, action: str, patched: Any, back: str
) -> None:
    """Where it does not hold, the action is not called applied, and a person is called."""
    watched.arm(broad(watched.lab) if n else own(watched.lab))
    monkeypatch.setattr(RecordedSensors, "forced_until", lambda *_: time.monotonic_ns() + 10**10)
    monkeypatch.setattr(*patched)
    receipt = watched.happen(failures(n))
    acted = receipt.actions[0]
    assert (acted.action, acted.outcome, acted.detail["rolled_back"]) == (action, "unconfirmed", back)
    assert acted.detail["amiss"]
    assert [e.run for e in watched.executor.escalations()] == [receipt.run.id]
    if action == "freeze":
        assert watched.node.current_services is not None
        assert watched.node.current_services.asked[-1] == ("thaw", "api")


@pytest.mark.parametrize(("n", "undone"), [(1, "close"), (3, "end_isolation")])
def test_what_does_not_hold_is_taken_back_and_a_person_is_called(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, n: int, undone: str
) -> None:
    watched.arm(broad(watched.lab))
    monkeypatch.setattr(RecordedSensors, "forced_until", lambda *_: 0)
    monkeypatch.setattr(RecordedSensors, "isolated_until", lambda *_: 0)
    receipt = watched.happen(failures(n))
    (acted,) = receipt.actions
    assert acted.outcome == "unconfirmed"
    assert acted.detail["rolled_back"] == "yes"
    assert watched.node.current_sensors is not None
    assert watched.node.current_sensors.commands[-1][0] == undone
    assert [e.run for e in watched.executor.escalations()] == [receipt.run.id]
    assert watched.executor.state.guard.leases == {}


def test_a_recreated_service_that_is_not_well_is_unconfirmed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    monkeypatch.setattr(RecordedServices, "healthy", lambda *_: "it is not ready")
    (acted,) = watched.happen(opened()).actions
    assert (acted.outcome, acted.detail["amiss"]) == ("unconfirmed", "it is not ready")
    assert acted.detail["rolled_back"] == "it cannot be taken back"
    assert len(watched.executor.escalations()) == 1


def test_a_module_that_needs_what_is_not_declared_is_not_armed(watched: Watched) -> None:
    with pytest.raises(ArmingError) as refused:
        watched.arm(broad(watched.lab, sensors=[{"name": "breaker"}, {"name": "isolate"}]))
    assert refused.value.id == "arm.needs"


# ---- escalations ----------------------------------------------------------------------------------------------------


def eventually(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


def test_a_person_is_called_again_until_somebody_answers(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "TELL_AGAIN_NS", 300_000_000)
    watched.arm(broad(watched.lab))
    receipt = watched.happen(failures(9))
    eventually(lambda: len(watched.node.said) >= 3)
    assert set(watched.node.said) == {"notify channel=ops level=critical code=9"}
    watched.executor.acknowledge(receipt.run.id, "on my way")
    assert watched.executor.escalations() == ()
    with pytest.raises(StoppedError) as refused:
        watched.executor.acknowledge(receipt.run.id, "again")
    assert refused.value.id == "escalation.unknown"


def test_who_was_called_is_called_again_after_a_restart(make_lab: Callable[..., Lab]) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        first = Watched(lab, executor, node)
        first.arm(broad(lab))
        runs = [first.happen(failures(n)).run.id for n in (8, 9)]
        executor.acknowledge(runs[0], "seen")
    with lab.executor(RecordedNode()) as executor:
        assert [(e.run, e.code) for e in executor.escalations()] == [(runs[1], 9)]


def test_a_slow_channel_does_not_break_the_end_of_the_executor(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm(broad(lab))
        watched.happen(failures(9))
        monkeypatch.setattr(waiting.Waiting, "due", lambda self, _now: tuple(self.escalations.values()))
        monkeypatch.setattr(DeclaredChannels, "send", lambda *_: time.sleep(1))
    assert executor.failure is None
    with lab.executor(RecordedNode()) as later:
        assert later.journal.count("epoch-close") == later.journal.count("epoch-open") - 1


def test_nothing_is_armed_once_the_executor_closes(watched: Watched) -> None:
    watched.executor.close()
    with pytest.raises(StoppedError) as refused:
        watched.arm(careful(watched.lab))
    assert refused.value.id == "executor.stopped"


# ---- pauses and the kill switch -------------------------------------------------------------------------------------


def test_a_pause_outlives_the_executor_and_ends_in_time(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    with lab.executor(RecordedNode()) as executor:
        executor.pause("deployment", 3600)
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        assert watched.happen(opened()).actions[0].guard.check == "guard.paused"
        left_s = (executor.paused_until_ns - time.monotonic_ns()) / 1e9
        assert 3500 < left_s <= 3600
        executor.resume("done")
    with lab.executor(RecordedNode()) as executor:
        assert executor.state.guard.paused == ""


def test_what_was_recreated_before_a_restart_still_counts(make_lab: Callable[..., Lab]) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        assert watched.happen(opened()).actions[0].outcome == "applied"
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm(sequence=3)
        assert executor.state.guard.recreated[service("api").number][0] == 1
        assert watched.happen(opened()).inputs.fields["restarts"] == "1"


@pytest.mark.parametrize("adopted", [True, False])
def test_a_recreation_that_failed_before_a_restart_proves_no_health_and_a_start_that_did_not_fail_does(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, adopted: bool
) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor, monkeypatch.context() as ill:
        watched = Watched(lab, executor, node)
        watched.arm()
        ill.setattr(RecordedServices, "healthy", lambda *_: "it is not ready")
        assert watched.happen(opened()).actions[0].outcome == "unconfirmed"
        assert executor.state.guard.unwell == {service("api").number}
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        with monkeypatch.context() as left:
            if adopted:
                left.setattr(RecordedServices, "adopt", lambda _self: [])
            watched.arm(sequence=3)
        assert executor.state.guard.unwell == ({service("api").number} if adopted else frozenset())
        time.sleep(1)  # the first hold-off
        assert watched.happen(opened()).actions[0].outcome == "applied"
        assert executor.state.guard.unwell == frozenset()
        assert executor.state.guard.recreated[service("api").number][0] == 2


def test_a_halted_node_lets_go_and_arms_nothing_until_a_person_clears_it(make_lab: Callable[..., Lab]) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        halt.halt(lab.state, "it is wrong", now())
        eventually(lambda: executor.admitted is None)
        assert "executor.halted" in watched.refusals()
        with pytest.raises(ArmingError) as refused:
            watched.arm()
        assert (refused.value.id, refused.value.got) == ("executor.halted", "it is wrong")
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        with pytest.raises(ArmingError):
            watched.arm()
        assert halt.clear(lab.state)
        assert not halt.clear(lab.state)
        watched.arm(sequence=3)
        assert executor.admitted is not None


def test_a_halt_wins_over_the_arming_that_it_meets(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = RecordedServices.adopt

    def halted_meanwhile(self: RecordedServices) -> list[int]:
        halt.halt(watched.lab.state, "stop", now())
        return adopt(self)

    monkeypatch.setattr(RecordedServices, "adopt", halted_meanwhile)
    with pytest.raises(ArmingError) as refused:
        watched.arm()
    assert refused.value.id == "executor.halted"
    assert watched.executor.admitted is None


def test_a_halt_while_arming_starts_no_service_and_arms_nothing(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, node = make_lab(), RecordedNode()
    make = node.services

    def halting(*given: Any) -> RecordedServices:
        halt.halt(lab.state, "stop", now())
        return make(*given)

    monkeypatch.setattr(node, "services", halting)
    with lab.executor(node) as executor:
        with pytest.raises(ArmingError) as refused:
            Watched(lab, executor, node).arm()
        assert refused.value.id == "executor.halted"
        assert executor.admitted is None
        assert node.current_services is not None
        assert node.current_services.starts == []


def test_nothing_begins_once_the_kill_switch_is_on(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even before the loop has looked."""
    watched.arm(careful(watched.lab))
    bundle = signed(watched, watched.happen(opened()))
    monkeypatch.setattr(watched.executor, "_check_armed", lambda _now_ns: None)
    halt.halt(watched.lab.state, "stop", now())
    assert watched.executor.admitted is not None
    assert _refused(lambda: watched.executor.approve(bundle)) == "executor.halted"
    assert (
        _refused(lambda: watched.executor.trip(HERE.address, HERE.port, 1_000_000_000, "by hand")) == "executor.halted"
    )
    watched.executor.release(HERE.address, HERE.port, "by hand")


def test_an_action_that_waits_does_not_begin_once_the_kill_switch_is_on(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    monkeypatch.setattr(watched.executor, "_check_armed", lambda _now_ns: None)
    halt.halt(watched.lab.state, "stop", now())
    act = watched.happen(opened()).actions[0]
    assert (act.action, act.outcome, act.guard.check) == ("recreate", "refused", "guard.disarmed")


def test_a_channel_that_hangs_does_not_pile_up_calls(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    release, told = threading.Event(), []

    def hang(_self: Any, number: int, *_: Any) -> str:
        told.append(number)
        release.wait(10)
        return "ops"

    monkeypatch.setattr(messenger, "MESSAGES_MAX", 2)
    monkeypatch.setattr(waiting, "TELL_AGAIN_NS", 1_000_000)
    watched.arm(broad(watched.lab))
    watched.happen(failures(9))
    monkeypatch.setattr(DeclaredChannels, "send", hang)
    eventually(lambda: len(told) == 1)
    time.sleep(1.5)  # six turns that find it due
    monkeypatch.setattr(waiting, "TELL_AGAIN_NS", 10**15)
    time.sleep(0.5)
    release.set()
    eventually(lambda: len(told) == 3)  # one on its way, one that waited, and one as soon as there was room
    time.sleep(0.5)
    assert len(told) == 3


def arm_telling(watched: Watched) -> None:
    """A runbook that notifies at each opening, with the failures as its code."""
    lab = watched.lab
    lab.runbook(
        "tell",
        '"""Tell it."""\nfrom pointcall_runbook import CircuitOpened, Decision, Level, Notify, channel, runbook\n\n'
        "@runbook\ndef opened(e: CircuitOpened) -> Decision:\n"
        '    return [Notify(channel=channel("ops"), level=Level.INFO, code=e.failures)]\n',
    )
    book = {"name": "tell", "source": "tell", "grants": {"actions": ["notify"], "channels": ["ops"]}}
    watched.arm(spec(lab) | {"runbooks": [book]})


def test_what_waited_for_a_channel_that_does_not_answer_fails_at_once_and_what_comes_later_is_tried(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, tried = threading.Event(), []

    def silent(*_: Any) -> str:
        tried.append(release.wait(20))
        time.sleep(0.05)
        raise ChannelError("channel ops could not be told", id="channel.unreachable")

    monkeypatch.setattr(messenger, "SLOW_NS", 50_000_000)
    monkeypatch.setattr(DeclaredChannels, "waits", lambda *_: True)
    monkeypatch.setattr(DeclaredChannels, "send", silent)
    arm_telling(watched)
    assert watched.node.current_sensors is not None
    for n in range(1, 6):
        watched.node.current_sensors.happen(failures(n))
    eventually(lambda: watched.executor._messenger._telling == 5)
    release.set()
    details = [watched.next_receipt().actions[0].detail for _ in range(5)]
    assert len(tried) == 1
    assert sum(d == {"error": "the channel did not answer the message before"} for d in details) == 4
    assert watched.happen(failures(6)).actions[0].detail["error"]["id"] == "channel.unreachable"
    assert len(tried) == 2


def test_a_notification_beyond_the_limit_fails_and_its_receipt_says_so(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(messenger, "MESSAGES_MAX", 2)
    monkeypatch.setattr(DeclaredChannels, "waits", lambda *_: True)
    monkeypatch.setattr(DeclaredChannels, "send", lambda *_: str(release.wait(20)))
    arm_telling(watched)
    assert watched.node.current_sensors is not None
    for n in (1, 2):
        watched.node.current_sensors.happen(failures(n))
    beyond = watched.happen(failures(3))
    assert (beyond.inputs.fields["failures"], beyond.actions[0].outcome) == ("3", "failed")
    assert beyond.actions[0].detail == {"error": "2 notifications are on their way"}
    release.set()
    assert [watched.next_receipt().actions[0].outcome for _ in range(2)] == ["applied", "applied"]
    assert watched.happen(failures(4)).actions[0].outcome == "applied"  # there is room again


@pytest.mark.parametrize("beyond", [True, False])
def test_a_person_who_could_not_be_called_is_called_later(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, beyond: bool
) -> None:
    """Neither a full queue nor a channel that is down makes an escalation forgotten."""
    watched.arm(broad(watched.lab))
    monkeypatch.setattr(waiting, "TELL_AGAIN_NS", 500_000_000)

    def down(*_: Any) -> str:
        raise ChannelError("down", id="channel.unreachable")

    with monkeypatch.context() as patched:
        patched.setattr(DeclaredChannels, "waits", lambda *_: True)
        patched.setattr(*((messenger, "MESSAGES_MAX", 0) if beyond else (DeclaredChannels, "send", down)))
        receipt = watched.happen(failures(9))
    assert (receipt.actions[0].action, receipt.actions[0].outcome) == ("escalate", "failed")
    assert [(e.run, e.code) for e in watched.executor.escalations()] == [(receipt.run.id, 9)]
    eventually(lambda: "notify channel=ops level=critical code=9" in watched.node.said)


def test_a_call_about_a_failed_action_that_finds_no_room_is_made_later(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "TELL_AGAIN_NS", 500_000_000)
    monkeypatch.setattr(RecordedServices, "healthy", lambda *_: "it is not ready")
    watched.arm()
    with monkeypatch.context() as patched:
        patched.setattr(messenger, "MESSAGES_MAX", 0)
        receipt = watched.happen(opened())
        time.sleep(1)  # several turns that find it due and no room
        assert watched.node.said == []
    assert [(e.run, e.code) for e in watched.executor.escalations()] == [(receipt.run.id, 0)]
    eventually(lambda: "notify channel=ops level=critical code=0" in watched.node.said)


# ---- what is in force outlives its text -----------------------------------------------------------------------------


def erased(executor: Any, *indices: int) -> None:
    retention.erase(executor.recorder, tuple(map(str, indices)), None, "asked by a person", now())


def config_of(executor: Any, what: str) -> int:
    return next(int(e.index) for e in executor.journal.entries(kind="config") if e.body["what"] == what)


def test_a_pause_holds_after_its_text_was_erased(make_lab: Callable[..., Lab]) -> None:
    """Nobody can say any more until when: the longest that a pause can be."""
    lab = make_lab()
    with lab.executor(RecordedNode()) as executor:
        executor.pause("because of Anna", 3600)
        erased(executor, config_of(executor, "paused"))
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        assert watched.happen(opened()).actions[0].guard.check == "guard.paused"
        left_s = (executor.paused_until_ns - time.monotonic_ns()) / 1e9
        assert DAY_S - 60 < left_s <= DAY_S == recorder.PAUSE_MAX.total_seconds()
        executor.resume("done")
        erased(executor, config_of(executor, "resumed"))
    with lab.executor(RecordedNode()) as executor:
        assert executor.state.guard.paused == ""


def test_an_escalation_holds_after_its_text_was_erased(make_lab: Callable[..., Lab]) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        first = Watched(lab, executor, node)
        first.arm(broad(lab))
        runs = [first.happen(failures(n)).run.id for n in (8, 9)]
        executor.acknowledge(runs[0], "seen")
        retention.erase(executor.recorder, runs, None, "asked by a person", now())
        assert all(e.closed for e in executor.journal.entries(kind="config") if e.run)
    with lab.executor(RecordedNode()) as executor:
        assert [(e.run, e.code) for e in executor.escalations()] == [(runs[1], 0)]
        executor.acknowledge(runs[1], "seen too")
    with lab.executor(RecordedNode()) as executor:
        assert executor.escalations() == ()


@pytest.mark.parametrize("part", ["intent", "outcome", "both"])
@pytest.mark.parametrize("n", [1, 6])  # open_circuit is about an address, kill about a service
def test_an_action_counts_and_has_one_outcome_after_its_text_was_erased(
    make_lab: Callable[..., Lab], part: str, n: int
) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm(broad(lab))
        run = watched.happen(failures(n)).run.id
        kinds = ("intent", "outcome") if part == "both" else (part,)
        erased(executor, *(e.index for e in executor.journal.entries(run=run) if e.kind in kinds))
    with lab.executor(RecordedNode()) as executor:
        assert [e.kind for e in executor.journal.entries(run=run)].count("outcome") == 1
        assert executor.state.guard.history.count(("actions",), time.monotonic_ns()) == 1


# ---- what an earlier executor left ----------------------------------------------------------------------------------


def test_a_service_that_was_not_adopted_is_in_the_log(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    make = watched.node.services

    def left_over(*given: Any) -> RecordedServices:
        services = make(*given)
        services.refused = {"api": "it runs another program", "db": ""}
        return services

    monkeypatch.setattr(watched.node, "services", left_over)
    watched.arm()
    (found,) = watched.executor.journal.entries(kind="refusal")
    assert (found.body["check"], found.body["what"]) == ("service.adoption", "api")
    assert found.body["got"] == "it runs another program"
    first = next(e for e in watched.executor.journal.entries(kind="intent"))
    assert found.index < first.index  # it is said before the start


def test_however_many_wait_one_message_calls_about_each_code(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm(broad(watched.lab))
    for n in (8, 9, 9, 9):
        watched.happen(failures(n))
    eventually(lambda: len(watched.node.said) == 4)
    executor = watched.executor
    soon, session = time.monotonic_ns() + 10**15, executor.session
    assert session is not None
    executor._loop.call(lambda: executor._messenger.call_again(session, soon))
    eventually(lambda: len(watched.node.said) == 6)
    executor._loop.call(lambda: executor._messenger.call_again(session, soon))  # nobody is due again
    time.sleep(0.3)
    assert sorted(watched.node.said[4:]) == [f"notify channel=ops level=critical code={n}" for n in (8, 9)]
    assert all(e.due_ns > soon for e in executor.escalations())


def test_what_an_earlier_executor_left_isolated_is_logged_and_counts(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_ns = time.monotonic_ns() + 60_000_000_000

    def isolations(_self: RecordedSensors) -> dict[int, int]:
        services = watched.node.current_services
        return dict.fromkeys(services.running.values(), until_ns) if services is not None else {}

    monkeypatch.setattr(RecordedSensors, "isolations", isolations)
    watched.arm(broad(watched.lab))
    api = service("api").number
    assert watched.executor.state.guard.leases == {("isolate", "service", api): until_ns}
    intent = next(e for e in watched.executor.journal.entries("intent") if e.body["action"] == "isolate")
    outcome = next(e for e in watched.executor.journal.entries("outcome") if e.body["action"] == "isolate")
    assert (intent.body["target"], intent.body["grant"]) == ("api", "kernel")
    assert (outcome.body["outcome"], outcome.body["detail"]["reason"]) == ("applied", "found isolated")


def test_disarming_takes_out_what_an_earlier_executor_left_pinned(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = [True]
    monkeypatch.setattr(RecordedNode, "unpin", lambda _self: pinned.pop() if pinned else False)
    for _ in range(2):
        watched.executor.disarm("nothing was armed")
    assert pinned == []
    said = [e.body for e in watched.executor.journal.entries("config") if e.body["what"] == "disarmed"]
    assert [body["detail"]["reason"] for body in said] == ["nothing was armed"]


def test_a_call_that_is_due_while_the_executor_ends_does_not_make_it_fail(watched: Watched) -> None:
    watched.arm(broad(watched.lab))
    watched.happen(failures(9))
    executor, session = watched.executor, watched.executor.session
    assert session is not None
    executor._messenger.close()
    executor._loop.call(lambda: executor._messenger.call_again(session, time.monotonic_ns() + 10**15))
    assert executor.failure is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"reason": 1}'])
def test_a_kill_switch_that_cannot_be_understood_is_on(tmp_path: Path, content: bytes) -> None:
    (tmp_path / halt.FILE).write_bytes(content)
    found = halt.halted(tmp_path)
    assert found is not None


def test_in_mode_monitor_of_the_node_nothing_acts(make_lab: Callable[..., Lab]) -> None:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node, mode="monitor") as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        receipt = watched.happen(opened())
        assert (receipt.run.mode, receipt.actions[0].outcome) == ("monitor", "monitored")
        assert node.current_services is not None
        assert node.current_services.starts == ["api"]  # at arming


# ---- channels -------------------------------------------------------------------------------------------------------


def declared(*channels: dict[str, str]) -> Any:
    """As much of a manifest as channels need."""
    from types import SimpleNamespace

    from pointcall_attest.manifest import Channel

    return SimpleNamespace(channels=tuple(Channel(**c) for c in channels))  # type: ignore[arg-type]


def test_a_unix_socket_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "told")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        channels = DeclaredChannels(declared({"name": "pager", "kind": "unix", "address": path}), "n1")
        number = channel("pager").number
        assert channels.waits(number)
        assert channels.send(number, Level.ERROR, 7) == "pager"
        assert json.loads(listening.recv(4096)) == {"node": "n1", "channel": "pager", "level": "error", "code": 7}
    with pytest.raises(ChannelError) as refused:
        channels.send(number, Level.ERROR, 7)
    assert refused.value.id == "channel.unreachable"


class Hook(BaseHTTPRequestHandler):
    """Answers what its server says and keeps what it was told."""

    def do_POST(self) -> None:
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.mark.parametrize(("status", "ok"), [(204, True), (302, False), (500, False)])
def test_a_webhook_is_told_once_and_not_led_elsewhere(status: int, ok: bool) -> None:
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        server.told, server.status = [], status  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/hook?x=1"
        channels = DeclaredChannels(declared({"name": "web", "kind": "webhook", "address": address}), "n1")
        if ok:
            channels.send(channel("web").number, Level.INFO, 1)
        else:
            with pytest.raises(ChannelError):
                channels.send(channel("web").number, Level.INFO, 1)
        server.shutdown()
        assert len(server.told) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        ("log", "x"), ("unix", "relative"), ("unix", ""), ("webhook", "http://example.org/"), ("webhook", "ftp://x/"),
        ("webhook", "https://user@x/"), ("webhook", "http://127.0.0.1.example/"), ("webhook", "https://x/ y"),
    ],
)  # fmt: skip
def test_an_address_fits_its_kind(kind: str, address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        declared({"name": "c", "kind": kind, "address": address})


def test_a_slow_channel_does_not_hold_up_the_loop(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(*_: Any) -> str:
        release.wait(10)
        return "ops"

    monkeypatch.setattr(DeclaredChannels, "waits", lambda *_: True)
    monkeypatch.setattr(DeclaredChannels, "send", slow)
    watched.arm(broad(watched.lab))
    assert watched.node.current_sensors is not None
    watched.node.current_sensors.happen(failures(9))
    assert watched.happen(failures(4)).actions[0].action == "freeze"
    release.set()
    assert watched.next_receipt().actions[0].action == "escalate"


def test_what_is_frozen_is_thawed_when_nothing_is_armed_any_more(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed: list[int] = []
    monkeypatch.setattr(RecordedServices, "thaw", lambda _self, number: thawed.append(number))
    watched.arm(broad(watched.lab))
    assert watched.happen(failures(4)).actions[0].action == "freeze"
    watched.executor.disarm("enough")
    eventually(lambda: thawed == [service("api").number])


def test_disarming_does_not_wait_for_a_service_that_somebody_recreates(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, thawed = threading.Event(), []

    def locked(_self: RecordedServices, number: int) -> None:
        assert free.wait(20)
        thawed.append(number)

    monkeypatch.setattr(RecordedServices, "thaw", locked)
    watched.arm(broad(watched.lab))
    assert watched.happen(failures(4)).actions[0].action == "freeze"
    watched.executor.disarm("enough")
    (said,) = [e for e in watched.executor.journal.entries("config") if e.body["what"] == "disarmed"]
    assert said.body["detail"]["stays"] == "yes"
    beats = watched.executor.beats
    eventually(lambda: watched.executor.beats > beats)
    assert thawed == []
    free.set()
    eventually(lambda: thawed == [service("api").number])


def test_a_freeze_that_is_under_way_while_it_is_disarmed_does_not_stay(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    real = RecordedServices.freeze

    def slow(self: RecordedServices, number: int, until_ns: int) -> None:
        began.set()
        assert go.wait(20)
        real(self, number, until_ns)

    monkeypatch.setattr(RecordedServices, "freeze", slow)
    watched.arm(broad(watched.lab))
    services = watched.node.current_services
    assert services is not None
    assert watched.node.current_sensors is not None
    watched.node.current_sensors.happen(failures(4))
    assert began.wait(10)
    watched.executor.disarm("enough")
    go.set()
    eventually(lambda: services.asked[-1:] == [("thaw", "api")])
    assert services.frozen_until == {}
