"""The whole loop without a kernel: what may be armed, what happens to an event, what is left to prove it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from pointcall_attest import entry, pack, signature_child
from pointcall_attest.entry import Entry
from pointcall_attest.errors import AttestError, MalformedError, RefusedError
from pointcall_attest.pack_check import Trust, verify_pack
from pointcall_attest.receipt import Receipt
from pointcall_attest.replay import replay_all
from pointcall_attest.run_id import run_id
from pointcall_attest.trust import Roots
from pointcall_executor import daemon, in_flight, recorder, running_epoch, runs, session, watch
from pointcall_executor.arming import ArmingError
from pointcall_executor.config import ConfigError
from pointcall_executor.core.event import CircuitEvent, Destination, Kind, ProcessEvent
from pointcall_executor.daemon import Bundle, Executor, StoppedError
from pointcall_executor.journal import JournalReader
from pointcall_executor.recorded import RecordedNode, RecordedSensors, RecordedServices
from pointcall_executor.run import Run
from pointcall_executor.services.process import ServiceError, Started
from pointcall_executor.tee.platform import PlatformError
from pointcall_runbook.vocabulary import Address
from tests.lab import IDENTITY, Lab

PORT = 8443
HERE = Destination(Address.parse("127.0.0.1"), PORT)
RECREATE = '''"""Recreate a service whose clients are refused; tell somebody after the third time."""
from pointcall_runbook import (
    NO_SERVICE, CircuitOpened, Decision, Level, Notify, OomKilled, Recreate, channel, parameter, runbook
)

LIMIT = parameter(3, lo=0, hi=100)

@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE:
        return []
    if e.restarts >= LIMIT:
        return [Notify(channel=channel("ops"), level=Level.ERROR, code=1)]
    return [Recreate(service=e.service)]

@runbook
def killed(e: OomKilled) -> Decision:
    return [Recreate(service=e.service)]
'''
TRAPPING = '(module (func (export "decide_CircuitOpened") (param i64 i64 i64 i64 i64 i64 i64 i64 i64) unreachable))'


def declare(lab: Lab, name: str = "api", **over: Any) -> str:
    program = Path("/bin/true").resolve()
    files = [{"path": str(program), "sha256": hashlib.sha256(program.read_bytes()).hexdigest()}]
    return lab.declare(name, {"argv": [str(program)], "files": files} | over)


def spec(lab: Lab, **over: Any) -> dict[str, Any]:
    lab.runbook("fix", RECREATE)
    grants = {"actions": ["recreate", "notify"], "services": ["api"], "channels": ["ops"]}
    body = {
        "runbooks": [{"name": "fix", "source": "fix", "grants": grants}],
        "sensors": [{"name": "breaker"}, {"name": "lifecycle"}],
        "services": [{"name": "api", "declaration": declare(lab), "listen": [{"address": "127.0.0.1", "port": PORT}]}],
        "channels": [{"name": "ops", "kind": "log"}],
    }
    return body | over


def opened(kind: Kind = Kind.CIRCUIT_OPENED) -> CircuitEvent:
    return CircuitEvent(kind, time.monotonic_ns(), HERE, 5, 111, 0, 0)


class Watched:
    """A running executor on a recorded node, and the runs that it finished."""

    def __init__(self, lab: Lab, executor: Executor, node: RecordedNode) -> None:
        self.lab, self.executor, self.node = lab, executor, node
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        executor.on_receipt = self._runs.put

    def arm(self, body: dict[str, Any] | None = None, sequence: int = 1, **over: Any) -> None:
        self.executor.arm(self.lab.sign(self.lab.assemble(body or spec(self.lab), sequence, **over)))

    def happen(self, event: CircuitEvent | ProcessEvent) -> Receipt:
        """Let it happen; the receipt of the run that it led to."""
        assert self.node.current_sensors is not None
        self.node.current_sensors.happen(event)
        return self.next_receipt()

    def next_receipt(self) -> Receipt:
        run = self._runs.get(timeout=10)
        return self.executor.journal.receipt(run.id).receipt()

    def kinds(self) -> list[str]:
        return [e.kind for e in self.executor.journal.entries()]

    def refusals(self) -> list[str]:
        return [e.body["check"] for e in self.executor.journal.entries(kind="refusal")]


@pytest.fixture
def watched(lab: Lab) -> Iterator[Watched]:
    node = RecordedNode()
    with lab.executor(node) as executor:
        yield Watched(lab, executor, node)


# ---- what may be armed ----------------------------------------------------------------------------------------------


def flipped(bundle: Bundle) -> Bundle:
    name = next(n for n in bundle.files if n.endswith(".wasm"))
    content = bytearray(bundle.files[name])
    content[20] ^= 1
    return replace(bundle, files={**bundle.files, name: bytes(content)})


REFUSED: dict[str, tuple[Callable[[Lab], Bundle], str]] = {
    "a flipped byte in a module": (lambda lab: flipped(lab.sign(lab.assemble(spec(lab)))), "subject.digest"),
    "expired": (lambda lab: lab.sign(lab.assemble(spec(lab), days=-0.5)), "manifest.expires"),
    "a wrong measurement": (
        lambda lab: lab.sign(lab.assemble(spec(lab, referenceValues={"snp": ["ab" * 48]}))),
        "tee.measurement",
    ),
    "another identity": (
        lambda lab: lab.sign(lab.assemble(spec(lab)), identity="https://git.example/mallory/x"),
        "manifest.signer",
    ),
    "unsigned": (lambda lab: Bundle((), lab.assemble(spec(lab)).files), "manifest.unsigned"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_admitted_is_not_armed_and_leaves_an_entry(watched: Watched, what: str) -> None:
    make, check = REFUSED[what]
    with pytest.raises(RefusedError) as refusal:
        watched.executor.arm(make(watched.lab))
    assert [c.id for c in refusal.value.verdict.failed] == [check]
    assert watched.executor.admitted is None
    assert watched.executor.state.armed is None
    assert watched.refusals() == [check]


def test_an_older_sequence_is_refused_also_after_a_restart(lab: Lab) -> None:
    newer, older = lab.sign(lab.assemble(spec(lab), 7)), lab.sign(lab.assemble(spec(lab), 6))
    with lab.executor() as executor:
        executor.arm(newer)
    with lab.executor() as executor:
        with pytest.raises(RefusedError) as refusal:
            executor.arm(older)
        assert [c.id for c in refusal.value.verdict.failed] == ["manifest.sequence"]
        executor.arm(newer)


def test_emulation_is_refused_unless_the_policy_allows_it(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(tee={"allow_emulated": False})
    with lab.executor() as executor, pytest.raises(RefusedError) as refusal:
        executor.arm(lab.sign(lab.assemble(spec(lab))))
    assert [c.id for c in refusal.value.verdict.failed] == ["tee.emulated"]


def test_a_refused_manifest_leaves_the_armed_one_at_work(watched: Watched) -> None:
    watched.arm(sequence=4)
    with pytest.raises(RefusedError):
        watched.arm(sequence=3)
    assert watched.happen(opened()).actions[0].outcome == "applied"


@pytest.mark.parametrize(
    ("over", "check"),
    [
        ({"sensors": [{"name": "telescope", "blob": "breaker"}]}, "arm.sensor"),
        ({"guard": {"neverTouch": ["elsewhere"]}}, "arm.never-touch"),
    ],
)
def test_what_this_executor_cannot_do_is_not_promised(watched: Watched, over: dict[str, Any], check: str) -> None:
    with pytest.raises((ArmingError, RefusedError)) as refusal:
        watched.arm(spec(watched.lab, **over))
    assert refusal.value.id == check
    assert watched.refusals() == [check]


# ---- what happens to an event ---------------------------------------------------------------------------------------


def test_an_opened_circuit_recreates_its_service_with_intent_before_outcome_before_receipt(watched: Watched) -> None:
    watched.arm()
    receipt = watched.happen(opened())
    (act,) = receipt.actions
    assert (act.action, act.target, act.outcome, act.guard.outcome) == ("recreate", "api", "applied", "permit")
    assert watched.kinds()[-3:] == ["intent", "outcome", "receipt"]
    times = receipt.timeline_ns
    assert times.intent is not None
    assert times.applied is not None
    assert times.event <= times.received <= times.decided <= times.intent <= times.applied
    assert watched.node.current_services is not None
    assert watched.node.current_services.starts == ["api", "api"]
    assert watched.node.current_sensors is not None
    assert ("probe", str(HERE)) in watched.node.current_sensors.commands


def test_facts_count_and_parameters_of_the_manifest_decide(watched: Watched) -> None:
    body = spec(watched.lab)
    body["runbooks"][0]["parameters"] = {"LIMIT": 1}
    watched.arm(body)
    watched.happen(opened())
    second = watched.happen(opened())
    assert second.inputs.fields["restarts"] == "1"
    assert second.inputs.fields["opens"] == "2"
    assert [a.action for a in second.actions] == ["notify"]


def test_an_oom_kill_in_the_services_cgroup_reaches_its_handler(watched: Watched) -> None:
    watched.arm()
    assert watched.node.current_sensors is not None
    (cgroup,) = watched.node.current_sensors.watched
    event = ProcessEvent(Kind.OOM_VICTIM, time.monotonic_ns(), 7, cgroup, 9, 0, 0, "api")
    receipt = watched.happen(event)
    assert (receipt.trigger.event, receipt.trigger.sensor) == ("OomKilled", "lifecycle")
    assert watched.node.current_sensors.watched != {cgroup}


def test_monitor_leaves_the_same_evidence_and_does_nothing(watched: Watched) -> None:
    body = spec(watched.lab)
    body["runbooks"][0]["mode"] = "monitor"
    watched.arm(body)
    receipt = watched.happen(opened())
    assert (receipt.run.mode, receipt.actions[0].outcome) == ("monitor", "monitored")
    assert watched.node.current_services is not None
    assert watched.node.current_services.starts == ["api"]


def test_a_paused_executor_refuses_and_says_so(watched: Watched) -> None:
    watched.arm()
    watched.executor.pause("maintenance", 60)
    receipt = watched.happen(opened())
    assert (receipt.actions[0].outcome, receipt.actions[0].guard.check) == ("refused", "guard.paused")
    assert watched.refusals() == ["guard.paused"]
    watched.executor.resume("done")
    assert watched.happen(opened()).actions[0].outcome == "applied"


def test_a_pause_ends_by_itself(watched: Watched) -> None:
    watched.arm()
    watched.executor.pause("short", 0)
    deadline = time.monotonic() + 5
    while watched.executor.state.guard.paused:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_module_that_traps_is_quarantined_and_asked_no_more(watched: Watched) -> None:
    body = spec(watched.lab)
    (watched.lab.sources / "trap.wasm").write_bytes(bytes(wasmtime.wat2wasm(TRAPPING)))
    body["runbooks"] = [{"name": "trap", "module": "trap.wasm", "grants": {"actions": []}}]
    watched.arm(body)
    receipt = watched.happen(opened())
    assert (receipt.decision.trap, receipt.actions) == ("unreachable", ())
    assert watched.refusals() == ["runbook.quarantined"]
    assert watched.executor.state.armed is not None
    assert watched.executor.state.armed.runbooks == ()


def test_a_service_that_cannot_start_is_an_outcome_not_a_crash(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pointcall_executor.services.process import ServiceError

    watched.arm()

    def broken(number: int) -> None:
        raise ServiceError("the file changed", id="service.digest")

    monkeypatch.setattr(watched.node.current_services, "start", broken)
    (act,) = watched.happen(opened()).actions
    assert act.outcome == "failed"
    assert act.detail["error"] == {"id": "service.digest", "message": "the file changed"}
    assert watched.executor.failure is None


def test_disarmed_means_nothing_is_decided(watched: Watched) -> None:
    watched.arm()
    sensors = watched.node.current_sensors
    watched.executor.disarm("enough")
    assert watched.executor.state.armed is None
    assert sensors is not None
    assert sensors.fds() == ()
    with pytest.raises(StoppedError):
        watched.executor.trip(HERE.address, PORT, 1, "by hand")


def test_an_operator_acts_with_intent_and_outcome_but_without_a_run(watched: Watched) -> None:
    watched.arm()
    watched.executor.trip(HERE.address, PORT, 1_000_000_000, "looks bad")
    intent, outcome = watched.executor.journal.entries()[-2:]
    assert (intent.kind, intent.body["grant"], intent.run) == ("intent", "operator", None)
    assert (outcome.kind, outcome.body["detail"]["reason"]) == ("outcome", "looks bad")


def test_a_newer_manifest_takes_over_and_its_epoch_is_vouched_for(watched: Watched) -> None:
    watched.arm(sequence=1)
    first = watched.executor.keys
    watched.arm(sequence=3)
    assert first.wiped
    epochs = watched.executor.journal.entries(kind="epoch-open")
    closes = watched.executor.journal.entries(kind="epoch-close")
    assert [c.body["next"] for c in closes] == [e.epoch for e in epochs[1:]]
    assert watched.executor.admitted is not None
    assert watched.happen(opened()).runbook.manifest == watched.executor.admitted.manifest.sha256


# ---- what is left to prove it ---------------------------------------------------------------------------------------


def proof(watched: Watched) -> tuple[pack.Pack, Trust]:
    receipt = watched.happen(opened())
    watched.executor.checkpoint_now()
    roots = Roots.open(watched.lab.trust)
    trust = Trust(watched.executor.trust.policy.raw, watched.executor.trust.trusted_root, roots)
    return pack.export(watched.executor.journal, receipt.run.id, roots=roots), trust


def test_a_run_verifies_offline_and_replays_identically(watched: Watched) -> None:
    watched.arm()
    proven, trust = proof(watched)
    verdict = verify_pack(proven, trust=trust, in_process=True)
    assert verdict.failed == ()
    assert (verdict.passed, verdict.tier) == (True, "emulated")
    runs: list[Entry] = watched.executor.journal.runs()
    assert [r.identical for r in replay_all(runs, watched.executor.journal.blob)] == [True]


def test_another_trust_policy_does_not_believe_it(watched: Watched) -> None:
    watched.arm()
    proven, trust = proof(watched)
    strict = trust.policy.replace(b"true", b"false")
    failed = {c.id for c in verify_pack(proven, trust=replace(trust, policy=strict), in_process=True).failed}
    assert "tee.emulated" in failed


def test_the_epoch_is_closed_at_the_end_and_everything_is_covered_by_a_checkpoint(lab: Lab) -> None:
    with lab.executor() as executor:
        executor.arm(lab.sign(lab.assemble(spec(lab))))
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        last, head = journal.entries()[-1], journal.head()
        assert (last.kind, last.body["next"]) == ("epoch-close", None)
        assert head is not None
        assert head.size == journal.size


def test_a_clock_that_is_set_back_undoes_nothing_that_was_admitted_and_revives_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = [timedelta()]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + shift[0]

    watched.arm()
    begun = datetime.now(UTC)
    for module in (daemon, running_epoch, watch):
        monkeypatch.setattr(module, "datetime", Clock)
    shift[0] = timedelta(hours=-2)
    executor = watched.executor
    executor.roll_epoch()
    assert executor.admitted is not None
    assert executor.session is not None
    assert executor.session.judged_at(Clock.now(UTC), time.monotonic_ns()) >= begun
    lasts = executor.admitted.manifest.predicate.expires - executor.session.admitted_at
    executor.session.admitted_ns -= int(lasts.total_seconds() * 1e9)  # so much time has passed, whatever the clock says
    deadline = time.monotonic() + 5
    while executor.admitted is not None:
        assert time.monotonic() < deadline, "what has expired stays armed"
        time.sleep(0.01)


def test_a_failed_journal_stops_the_executor_and_detaches(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    sensors = watched.node.current_sensors
    assert sensors is not None

    def broken(_leaf: bytes, _opening: object = None) -> Future[int]:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(watched.executor.journal, "enqueue", broken)
    sensors.happen(opened())
    deadline = time.monotonic() + 5
    while watched.executor.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sensors.fds() == ()
    assert watched.node.current_services is not None
    assert watched.node.current_services.starts == ["api"]
    with pytest.raises((StoppedError, AttestError)):
        watched.executor.pause("too late", 1)


def test_a_key_lives_as_long_as_its_epoch_and_vouches_for_the_next(watched: Watched) -> None:
    watched.arm()
    first = watched.executor.keys
    watched.executor.roll_epoch()
    assert first.wiped
    receipt = watched.happen(opened())
    assert receipt.run.epoch == watched.executor.keys.id != first.id
    proven, trust = proof(watched)
    assert verify_pack(proven, trust=trust, in_process=True).failed == ()


# ---- one session after another --------------------------------------------------------------------------------------


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_armed_manifest_that_expires_is_disarmed(watched: Watched) -> None:
    watched.arm(days=5 / 86400)
    eventually(lambda: watched.executor.admitted is None)
    assert watched.executor.state.armed is None
    assert watched.refusals() == ["manifest.expires"]


def test_what_the_kernel_kept_others_from_is_in_the_log_and_nothing_is_disarmed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RECHECK_NS", 50_000_000)
    told = iter((0, 3))
    monkeypatch.setattr(RecordedSensors, "denied", lambda _: next(told, 0))
    watched.arm()
    eventually(lambda: watched.refusals() == ["kernel.tamper"])
    (refusal,) = watched.executor.journal.entries(kind="refusal")
    assert refusal.body["got"] == "3 attempts, all denied by the kernel"
    assert watched.executor.admitted is not None


def test_a_trust_policy_that_no_longer_names_the_signer_disarms(watched: Watched) -> None:
    watched.arm()
    signers = [{"issuer": watched.lab.sigstore.issuer, "identity": "https://git.example/else"}]
    watched.lab.set_policy(signers=signers)
    with pytest.raises(RefusedError):
        watched.executor.reload(watched.executor.config)
    assert watched.executor.state.armed is None
    assert "manifest.signer" in watched.refusals()


def test_settings_that_are_read_again_with_the_same_trust_change_no_epoch(watched: Watched) -> None:
    watched.arm()
    before = watched.executor.keys.id
    watched.executor.reload(watched.executor.config)
    assert watched.executor.keys.id == before
    assert watched.executor.state.armed is not None


def test_another_trust_policy_that_still_admits_opens_a_new_epoch(watched: Watched) -> None:
    watched.arm()
    before = watched.executor.keys.id
    issuer = watched.lab.sigstore.issuer
    signers = [{"issuer": issuer, "identity": name} for name in (IDENTITY, "https://git.example/else")]
    watched.lab.set_policy(signers=signers)
    watched.executor.reload(watched.executor.config)
    receipt = watched.happen(opened())
    assert receipt.run.epoch == watched.executor.keys.id != before
    proven, trust = proof(watched)
    assert verify_pack(proven, trust=trust, in_process=True).failed == ()


@pytest.mark.parametrize("why", ["no evidence", "a run that does not end"])
def test_another_trust_policy_that_cannot_be_applied_now_is_tried_again_soon(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Not only at the end of the epoch, and not only where the folder changes once more."""
    watched.arm()
    executor, issuer = watched.executor, watched.lab.sigstore.issuer
    before = executor.keys.id
    watched.lab.set_policy(signers=[{"issuer": issuer, "identity": n} for n in (IDENTITY, "https://git.example/else")])
    with monkeypatch.context() as away:
        if why == "no evidence":
            error: type[Exception] = PlatformError

            def nothing(*_: Any) -> Any:
                raise PlatformError("the quote service is away")

            away.setattr(type(executor._epoch._platform), "evidence", nothing)
        else:
            error = ArmingError
            away.setattr(daemon, "QUIET_SECONDS", 0.05)
            away.setattr(executor._runs.in_flight, "count", 1)
        with pytest.raises(error):
            executor.reload(executor.config)
        assert (executor.keys.id, executor.admitted is not None) == (before, True)
        assert executor._epoch.due_ns <= time.monotonic_ns() + daemon.RENEW_AGAIN_NS
        assert watched.refusals() == ["tee.renewal"]
    executor._epoch.due_ns = 1
    eventually(lambda: executor.keys.id != before)
    assert watched.happen(opened()).run.epoch == executor.keys.id
    proven, trust = proof(watched)
    assert verify_pack(proven, trust=trust, in_process=True).failed == ()


def test_what_is_armed_is_not_on_old_evidence_where_no_epoch_can_follow(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    monkeypatch.setattr(daemon, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(watched.executor._runs.in_flight, "count", 1)
    watched.executor._epoch.opened_ns = time.monotonic_ns() - (2 * 15 * 60 + 1) * 1_000_000_000
    watched.executor._epoch.due_ns = 1
    try:
        eventually(lambda: watched.executor.admitted is None)
        eventually(lambda: watched.refusals() == ["tee.renewal", "tee.stale"])
    finally:
        monkeypatch.setattr(watched.executor._runs.in_flight, "count", 0)


def test_a_platform_that_does_not_even_say_no_does_not_keep_anything_armed(watched: Watched) -> None:
    watched.arm()
    watched.executor._renewing = True  # somebody asks the platform and hears nothing
    watched.executor._epoch.opened_ns = time.monotonic_ns() - (2 * 15 * 60 + 31) * 1_000_000_000
    eventually(lambda: watched.executor.admitted is None)
    eventually(lambda: watched.refusals() == ["tee.stale"])


def test_what_a_person_trips_and_does_not_hold_is_no_success(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    monkeypatch.setattr(RecordedSensors, "forced_until", lambda *_: 0)
    with pytest.raises(StoppedError) as refusal:
        watched.executor.trip(HERE.address, PORT, 1_000_000_000, "looks bad")
    assert refusal.value.id == "circuit.unconfirmed"
    assert watched.executor.journal.entries("outcome")[-1].body["outcome"] == "unconfirmed"
    assert watched.refusals() == ["circuit.unconfirmed"]


def test_the_end_of_an_epoch_does_not_hold_decisions_for_a_slow_action(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    monkeypatch.setattr(daemon, "RENEW_SECONDS", 0.05)
    slow = Slow(watched, monkeypatch)
    watched.executor._epoch.due_ns = 1
    eventually(lambda: watched.refusals() == ["tee.renewal"])
    assert not watched.executor._loop._held
    assert watched.executor._epoch.due_ns > time.monotonic_ns()  # soon again
    slow.go.set()
    assert watched.next_receipt().actions[0].outcome == "applied"
    key = watched.executor.keys.id
    watched.executor._epoch.due_ns = 1
    eventually(lambda: watched.executor.keys.id != key)
    assert watched.executor.admitted is not None


def test_a_verifier_that_gives_no_answer_says_nothing_about_the_manifest(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    signature_child.discard()
    with monkeypatch.context() as starved:
        starved.setattr(signature_child.sys, "executable", "/nowhere")  # type: ignore[attr-defined]
        watched.executor._epoch.due_ns = 1
        eventually(lambda: watched.refusals() == ["tee.renewal"])
    assert watched.executor.admitted is not None
    key = watched.executor.keys.id
    watched.executor._epoch.due_ns = 1
    eventually(lambda: watched.executor.keys.id != key)


def test_trust_that_cannot_be_read_changes_nothing(watched: Watched) -> None:
    watched.arm()
    before = watched.executor.trust
    (watched.lab.state / "trust/policy.json").rename(watched.lab.state / "policy.json")
    with pytest.raises(ConfigError) as refusal:
        watched.executor.reload(watched.executor.config)
    assert refusal.value.id == "config.trust"
    assert watched.executor.trust is before
    assert watched.executor.admitted is not None


def test_nothing_of_a_drill_begins_once_somebody_has_said_stop(watched: Watched) -> None:
    watched.arm()
    session = watched.executor.session
    assert session is not None
    with watched.executor.beginning(session):
        pass
    watched.executor.pause("look first", 60)
    with pytest.raises(ArmingError) as paused, watched.executor.beginning(session):
        raise AssertionError("it has begun")
    watched.executor.resume("go on")
    watched.executor.disarm("enough")
    with pytest.raises(StoppedError) as gone, watched.executor.beginning(session):
        raise AssertionError("it has begun")
    assert (paused.value.id, gone.value.id) == ("executor.paused", "executor.disarmed")


def test_what_goes_wrong_at_the_very_end_is_a_failure(watched: Watched) -> None:
    loop = watched.executor._loop
    loop.hold(True)

    def last() -> None:
        loop._stopping = True
        loop.fail(OSError(5, "at the very end"))

    loop.post(last)
    eventually(lambda: loop.failure is not None)
    assert "at the very end" in str(loop.failure)


def test_a_descriptor_that_is_not_waited_for_any_more_does_not_hinder_disarming(watched: Watched) -> None:
    loop, number = watched.executor._loop, os.eventfd(0)
    try:
        loop.call(lambda: loop.watch(number))
        loop.call(lambda: loop.unwatch(number))
        loop.call(lambda: loop.unwatch(number))
        assert loop.failure is None
    finally:
        os.close(number)


def test_services_are_not_started_once_somebody_has_disarmed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def start(self: RecordedServices, number: int) -> Started:
        started.append(number)
        watched.executor.disarm("no")
        return Started(1, 1, 0, 0, 0, 0, "")

    monkeypatch.setattr(RecordedServices, "adopt", lambda _self: (1, 2, 3))
    monkeypatch.setattr(RecordedServices, "name", lambda _self, number: f"svc-{number}")
    monkeypatch.setattr(RecordedServices, "start", start)
    with pytest.raises(ArmingError) as refusal:
        watched.arm()
    assert (refusal.value.id, started) == ("arm.interrupted", [1])


class Slow:
    """Holds `start` of a recorded service until it is let go."""

    def __init__(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        services = watched.node.current_services
        assert services is not None
        start = services.start

        def slow(number: int) -> Started:
            self.began.set()
            assert self.go.wait(10)
            return start(number)

        monkeypatch.setattr(services, "start", slow)
        assert watched.node.current_sensors is not None
        watched.node.current_sensors.happen(opened())
        assert self.began.wait(10)


def test_the_next_manifest_waits_for_the_run_in_flight_which_keeps_its_epoch(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    assert watched.executor.admitted is not None
    first, epoch = watched.executor.admitted.manifest.sha256, watched.executor.keys.id
    slow = Slow(watched, monkeypatch)
    arming = threading.Thread(target=watched.arm, kwargs={"sequence": 3})
    arming.start()
    time.sleep(0.2)
    assert watched.executor.admitted.manifest.sha256 == first
    slow.go.set()
    arming.join(10)
    receipt = watched.next_receipt()
    assert (receipt.runbook.manifest, receipt.run.epoch) == (first, epoch)
    assert watched.executor.admitted.manifest.sha256 != first
    order = [(e.kind, e.epoch) for e in watched.executor.journal.entries()]
    assert order.index(("receipt", epoch)) < order.index(("epoch-close", epoch))


def test_closing_with_an_action_in_flight_keeps_its_outcome_and_receipt(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        slow = Slow(watched, monkeypatch)
        threading.Timer(0.3, slow.go.set).start()
        executor.close(reason="shutdown")
        assert executor.failure is None
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        kinds = [e.kind for e in journal.entries()]
    after = kinds[kinds.index("intent", 4) :]
    assert [k for k in after if k in ("outcome", "receipt", "epoch-close")][-3:] == [
        "outcome",
        "receipt",
        "epoch-close",
    ]


def test_what_waits_when_it_is_disarmed_is_not_begun(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    journal, held, go = watched.executor.journal, threading.Event(), threading.Event()
    submit = watched.executor._pool.submit

    def later(work: Callable[..., object], *args: Any) -> Future[Any]:
        def wait() -> object:
            held.set()
            assert go.wait(10)
            return work(*args)

        return submit(wait)

    monkeypatch.setattr(watched.executor._pool, "submit", later)
    assert watched.node.current_sensors is not None
    watched.node.current_sensors.happen(opened())
    assert held.wait(10)
    watched.executor.disarm("enough")
    go.set()
    receipt = watched.next_receipt()
    assert (receipt.actions[0].outcome, receipt.actions[0].guard.check) == ("refused", "guard.disarmed")
    assert watched.node.current_services is not None
    assert watched.node.current_services.starts == ["api"]
    assert journal.count("receipt") == 1


@pytest.mark.parametrize("stop", ["disarm", "pause"])
def test_whoever_says_stop_while_the_intent_is_written_is_obeyed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    watched.arm()
    record = watched.executor._recorder.record

    def meanwhile(body: entry.Body, run: str | None = None) -> int:
        index = record(body, run)
        if isinstance(body, entry.Intent) and run is not None:
            watched.executor.disarm("stop") if stop == "disarm" else watched.executor.pause("stop", 60)
        return index

    monkeypatch.setattr(watched.executor._recorder, "record", meanwhile)
    (acted,) = watched.happen(opened()).actions
    check = "guard.disarmed" if stop == "disarm" else "guard.paused"
    assert (acted.outcome, acted.guard.check, acted.intent is not None) == ("refused", check, True)
    assert watched.node.current_services is not None
    assert watched.node.current_services.starts == ["api"]
    (intent, outcome) = [e for e in watched.executor.journal.entries() if e.run and e.kind in ("intent", "outcome")]
    assert (intent.index, outcome.body["outcome"]) == (acted.intent, "refused")
    assert check in watched.refusals()


def test_what_was_lost_until_the_end_is_in_the_log(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    monkeypatch.setattr(daemon, "TICK_SECONDS", 3600)
    time.sleep(0.3)
    monkeypatch.setattr(RecordedSensors, "lost", lambda _: {"breaker": 7})
    watched.executor.disarm("enough")
    assert [e.body["count"] for e in watched.executor.journal.entries(kind="lost")] == [7]


def test_a_journal_that_failed_for_somebody_else_stops_the_loop_too(watched: Watched) -> None:
    watched.arm()
    sensors = watched.node.current_sensors
    watched.executor.journal._failure = sqlite3.OperationalError("disk I/O error")
    deadline = time.monotonic() + 5
    while watched.executor.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sensors is not None
    assert sensors.fds() == ()


def test_records_that_only_the_old_session_saw_reach_the_new_one(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    old = watched.node.current_sensors
    assert old is not None
    hold = watched.executor._loop.hold

    def held(value: bool) -> None:
        hold(value)
        if value:
            old.happen(replace(opened(), at_ns=1))

    monkeypatch.setattr(watched.executor._loop, "hold", held)
    watched.arm(sequence=3)
    assert watched.next_receipt().trigger.at_ns == 1


def test_what_is_held_open_stays_so_when_another_manifest_takes_over(watched: Watched) -> None:
    watched.arm()
    watched.executor.trip(HERE.address, PORT, 60_000_000_000, "by hand")
    watched.arm(sequence=3)
    assert watched.node.current_sensors is not None
    assert watched.node.current_sensors.forced_until(HERE.address, PORT) > time.monotonic_ns()


def test_a_manifest_that_cannot_be_armed_leaves_everything_as_it_was(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    before, services = watched.executor.admitted, watched.node.current_services
    sensors = watched.node.current_sensors
    assert before is not None
    assert services is not None

    def broken(self: RecordedServices, number: int) -> Started:
        raise ServiceError("no such file", id="service.file")

    body = spec(watched.lab)
    body["services"].append({"name": "new", "declaration": declare(watched.lab, "new")})
    with monkeypatch.context() as patched:
        patched.setattr(RecordedServices, "start", broken)
        with pytest.raises(ServiceError):
            watched.arm(body, 3)
    assert watched.executor.admitted is before
    assert watched.refusals() == ["service.file"]
    watched.node.current_sensors, watched.node.current_services = sensors, services
    receipt = watched.happen(opened())
    assert receipt.runbook.manifest == before.manifest.sha256
    assert services.starts == ["api", "api"]
    watched.arm(body, 3)  # its sequence was not used up


def test_an_intent_that_a_crash_left_open_is_closed_as_unconfirmed(lab: Lab) -> None:
    with lab.executor() as executor:
        executor.record(entry.Intent(action="recreate", target="api", args={}, grant="recreate:api"))
    with lab.executor() as executor:
        (outcome,) = executor.journal.entries(kind="outcome")
        assert (outcome.body["action"], outcome.body["target"], outcome.body["outcome"]) == (
            "recreate", "api", "unconfirmed",
        )  # fmt: skip
    with lab.executor() as executor:
        assert executor.journal.count("outcome") == 1


@pytest.mark.parametrize("notices", [0, 2, 5])
def test_intents_and_outcomes_are_matched_also_beyond_what_is_looked_through(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, notices: int
) -> None:
    monkeypatch.setattr(recorder, "RECONCILED_MAX", 4)
    done, cut, chatty = (run_id(1_700_000_000_000, bytes(9) + bytes([n])) for n in range(3))
    fields: dict[str, Any] = {"outcome": "applied", "detail": {}, "postcondition": "", "undo": None}
    with lab.executor() as executor:
        for run in (done, cut):
            intent = entry.Intent(action="recreate", target="api", args={}, grant="recreate:api")
            executor.recorder.record(intent, run)
        executor.recorder.record(entry.OutcomeBody(action="recreate", target="api", **fields), done)
        for _ in range(notices):  # they have no intents
            executor.recorder.record(entry.OutcomeBody(action="notify", target="ops", **fields), chatty)
    for _ in range(2):
        with lab.executor() as executor:
            outcomes = [(e.run, e.body["outcome"]) for e in executor.journal.entries(kind="outcome") if e.run != chatty]
            assert outcomes == [(done, "applied"), (cut, "unconfirmed")]


# ---- every way in which arming fails leaves what was there ----------------------------------------------------------


def test_arming_waits_for_runs_in_flight_but_not_for_ever(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.arm()
    before = watched.executor.admitted
    monkeypatch.setattr(daemon, "QUIET_SECONDS", 0.1)
    slow = Slow(watched, monkeypatch)
    with pytest.raises(ArmingError) as refusal:
        watched.arm(sequence=3)
    assert refusal.value.id == "arm.busy"
    assert watched.executor.admitted is before
    slow.go.set()
    assert watched.next_receipt().actions[0].outcome == "applied"


def test_while_arming_waits_for_a_slow_action_decisions_go_on(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    monkeypatch.setattr(daemon, "HOLD_SECONDS", 0.05)
    monkeypatch.setattr(daemon, "BETWEEN_SECONDS", 0.5)
    slow, armed = Slow(watched, monkeypatch), watched.node.current_sensors
    assert armed is not None
    arming = threading.Thread(target=lambda: watched.arm(sequence=3))
    arming.start()
    eventually(lambda: watched.executor._loop._held)
    armed.happen(opened())
    assert watched.next_receipt().actions[0].guard.check == "guard.busy"
    assert arming.is_alive()
    slow.go.set()
    assert watched.next_receipt().actions[0].outcome == "applied"
    arming.join()
    assert watched.executor.admitted is not None
    assert watched.executor.admitted.manifest.sequence == 3


def test_who_asks_for_a_change_while_another_takes_long_is_told_so_and_stopping_does_not_wait(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    before = watched.executor.admitted
    monkeypatch.setattr(daemon, "PATIENCE_SECONDS", 0.05)
    slow = Slow(watched, monkeypatch)  # a run in flight, for which the next manifest waits
    with ThreadPoolExecutor(1) as operator:
        first = operator.submit(watched.arm, sequence=3)
        while not watched.executor._arming.locked():
            time.sleep(0.001)
        with pytest.raises(ArmingError) as refusal:
            watched.arm(sequence=5)
        assert (refusal.value.id, refusal.value.want) == ("arm.busy", "one change of what is armed at a time")
        watched.executor.pause("look first", 60)
        assert watched.executor.state.guard.paused == "look first"
        slow.go.set()
        first.result(timeout=20)
    assert watched.executor.admitted is not before


def test_a_late_command_reaches_no_descriptor_of_somebody_else(watched: Watched) -> None:
    loop = watched.executor._loop
    number = loop._wake
    watched.executor.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    os.dup2(other, number)
    try:
        loop.post(lambda: None)
        loop.wake()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(number)
    finally:
        os.close(number)
        if other != number:
            os.close(other)


def test_what_the_system_refuses_while_arming_is_a_refusal(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: RecordedServices, number: int) -> Started:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordedServices, "start", broken)
    with pytest.raises(ArmingError) as refusal:
        watched.arm()
    assert refusal.value.id == "arm.environment"
    assert watched.refusals() == ["arm.environment"]
    assert watched.executor.admitted is None


def test_a_disarming_wins_over_the_arming_that_it_meets(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    start = RecordedServices.start

    def disarmed_meanwhile(self: RecordedServices, number: int) -> Started:
        watched.executor.disarm("no")
        return start(self, number)

    monkeypatch.setattr(RecordedServices, "start", disarmed_meanwhile)
    with pytest.raises(ArmingError) as refusal:
        watched.arm()
    assert refusal.value.id == "arm.interrupted"
    assert watched.executor.admitted is None
    assert watched.executor.journal.highest_sequence(daemon.ARMED) is None


@pytest.mark.parametrize("over", [{"node": "other"}, {"mode": "monitor"}])
def test_a_setting_that_needs_a_restart_is_not_taken_over(watched: Watched, over: dict[str, str]) -> None:
    before = watched.executor.config
    with pytest.raises(ConfigError) as refusal:
        watched.executor.reload(before.model_copy(update=over))
    assert (refusal.value.id, refusal.value.got) == ("config.restart", next(iter(over)))
    assert watched.executor.config is before


@pytest.mark.parametrize(("limit", "value"), [("MAX_FILES", 1), ("MAX_FOLDER_BYTES", 5)])
def test_a_folder_with_more_than_a_manifest_could_name_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / "files" / name).write_bytes(b"xyz")
    assert Bundle.read(tmp_path).files == {"a": b"xyz", "b": b"xyz"}
    monkeypatch.setattr(session, limit, value)
    with pytest.raises(MalformedError) as refusal:
        Bundle.read(tmp_path)
    assert refusal.value.id == "manifest.folder"


def test_a_platform_without_evidence_is_asked_again_and_old_evidence_disarms(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.arm()
    executor = watched.executor

    def nothing(*_: Any) -> Any:
        raise PlatformError("the quote service is away")

    def until(check: str) -> None:
        executor._epoch.due_ns = 1
        deadline = time.monotonic() + 10
        while check not in watched.refusals():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(type(executor._epoch._platform), "evidence", nothing)
    until("tee.renewal")
    assert executor.failure is None
    assert executor.admitted is not None
    executor._epoch.opened_ns -= 3 * 15 * 60_000_000_000
    until("tee.stale")
    eventually(lambda: executor.admitted is None)  # said first, done next
    assert executor.failure is None


def test_only_so_many_runs_are_in_flight_and_the_rest_waits_in_the_ring(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deciding is faster than writing down: without an end, a storm would fill the memory with what is not written."""
    monkeypatch.setattr(in_flight, "RUNS_MAX", 8)
    monkeypatch.setattr(runs, "BATCH", 4)
    watched.arm()
    executor, sensors = watched.executor, watched.node.current_sensors
    assert sensors is not None
    receipt, go = executor._recorder.receipt, threading.Event()

    def late(body: Receipt) -> int:
        assert go.wait(30)
        return receipt(body)

    monkeypatch.setattr(executor._recorder, "receipt", late)
    for _ in range(100):
        sensors.happen(opened())
    eventually(lambda: executor._runs.in_flight.count >= 8)
    beats = executor.beats
    eventually(lambda: executor.beats > beats + 1)  # the loop turns: it waits for no receipt
    assert 8 <= executor._runs.in_flight.count < 8 + 4
    assert len(sensors._records) == 100 - executor._runs.in_flight.count
    executor.pause("look first", 60)  # a person is heard meanwhile
    go.set()
    for _ in range(100):
        watched.next_receipt()
    assert executor.journal.count("receipt") == 100
    assert executor._runs.in_flight.count == 0


def test_a_slow_action_holds_up_no_receipt_of_another_run(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a checkpoint: actions may take minutes, and as many at once as there are threads for them."""
    watched.arm()
    executor, sensors = watched.executor, watched.node.current_sensors
    assert sensors is not None
    go = threading.Event()
    for _ in range(daemon.ACTION_THREADS):
        executor._pool.submit(go.wait, 30)
    try:
        sensors.happen(opened())
        refused = watched.happen(opened())  # the first one is in flight
        assert (refused.actions[0].outcome, refused.actions[0].guard.check) == ("refused", "guard.busy")
        size = executor.journal.size
        eventually(lambda: (head := executor.journal.head()) is not None and head.size >= size)
    finally:
        go.set()
    assert watched.next_receipt().actions[0].outcome == "applied"
