"""The executor: the shell around the pure core. It waits for kernel records and performs what the core says.

One loop thread owns the core's state and every decision. Kernel leases are applied on it at once; actions that need a
durable intent run on a small pool, one at a time for each target (the guard sees to that); receipts have another.
Everything that happened goes into the journal; if the journal fails, the executor disarms and stops: what cannot be
recorded must not be done.

A run belongs to the session and the epoch in which it was decided; both change only while no run is in flight. Until
then decisions wait in the ring, and the breaker in the kernel goes on by itself.

Trust: who can write the state folder can stop the node, not forge a receipt; who can write the trust folder can arm.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, assert_never

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_attest.admission import Admitted
from pointcall_attest.approval import Approval, verify_approval
from pointcall_attest.errors import RefusedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.run_id import run_id
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor import acting, left
from pointcall_executor.actions import KERNEL_LEASES, WITHOUT_INTENT
from pointcall_executor.arming import ArmingError
from pointcall_executor.brake import Brake
from pointcall_executor.config import RESTART, Config, ConfigError
from pointcall_executor.core import guard
from pointcall_executor.core.event import CircuitEvent, KernelEvent, decode
from pointcall_executor.core.step import (
    Armed,
    Decide,
    Decided,
    Effect,
    Ended,
    Happened,
    Input,
    Perform,
    Refuse,
    State,
    Withhold,
    step,
)
from pointcall_executor.core.trigger import notice
from pointcall_executor.drills import Drills
from pointcall_executor.epoch import Attested, Trust
from pointcall_executor.journal import Journal, StorageError
from pointcall_executor.kernel.breaker import CircuitState
from pointcall_executor.kernel.slow_file import SlowFile
from pointcall_executor.loop import Loop, StoppedError
from pointcall_executor.messenger import Messenger
from pointcall_executor.node import Node, Sensors
from pointcall_executor.recorder import Recorder, disarmed, ended, refused
from pointcall_executor.run import Act, Run
from pointcall_executor.running_epoch import RunningEpoch
from pointcall_executor.session import Bundle, Session
from pointcall_executor.sessions import ARMED, Sessions
from pointcall_executor.tee.platform import Platform, PlatformError
from pointcall_executor.waiting import Asked, Escalation, Waiting
from pointcall_executor.watch import Amiss, Watch
from pointcall_keys.node import EpochKeys
from pointcall_runbook.decision import Trap
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import (
    MAX_ACTIONS,
    Action,
    Address,
    Again,
    Call,
    CloseCircuit,
    Escalate,
    Freeze,
    OpenCircuit,
    Outcome,
    Remember,
    Service,
    Timer,
    capability,
)

__all__ = ["ARMED", "Bundle", "Executor", "StoppedError", "load_trust"]

TICK_SECONDS: Final = 0.25
SWITCH_SECONDS: Final = 0.0002  # how long a thread that signs or writes may keep the loop from deciding
ACTION_THREADS: Final = 4  # actions on different targets at once; more would only hide a storm
WRITER_THREADS: Final = 2  # receipts, checkpoints
RUNS_MAX: Final = 1024  # in flight; beyond, events wait in the kernel's rings, where what finds no room is counted
BATCH: Final = 256  # records of each ring in one turn of the loop: somebody may want to say stop
RENEW_AGAIN_NS: Final = 30_000_000_000  # after a platform that gave no evidence
QUIET_SECONDS: Final = 120.0  # how long arming waits for the runs in flight
CLOSE_SECONDS: Final = 1500.0  # how long closing does: longer than any grace and readiness together
APPROVAL_NS: Final = 60_000_000_000  # what a person approved is decided again at once, and over after that
TIMERS_MAX: Final = 1024  # pending `Again`s; a module that asks for more is refused
NO_REASON: Final = "no reason given"


def load_trust(folder: Path) -> Trust:
    """What the node was provisioned with. OSError where it is missing, MalformedError where it is wrong."""
    root = (folder / "trusted_root.json").read_bytes()
    policy = TrustPolicy.parse((folder / "policy.json").read_bytes())
    return Trust(policy, root, hashlib.sha256(root).hexdigest(), Roots.open(folder))


@dataclass(frozen=True, slots=True, order=True)
class _TimerDue:
    due_ns: int
    tag: int
    runbook: str
    subject: str
    service: int


class Executor:
    """One executor on one node. Methods may be called from any thread but the loop's; `close` ends it."""

    def __init__(self, state_dir: Path, config: Config, platform: Platform, node: Node) -> None:
        self.state_dir, self.config, self._node = state_dir, config, node
        self.origin = f"pointcall.dev/log/{config.node}"
        self.trust = load_trust(state_dir / "trust")
        self.journal = Journal.open(state_dir / "journal.db", origin=self.origin)
        self._recorder = Recorder(self.journal)
        self._epoch = RunningEpoch(platform, self._recorder, self.origin, lambda: self.config)
        self.state = State()
        self.on_receipt: Callable[[Run], None] = lambda _run: None
        self.on_record: Callable[[KernelEvent], None] = lambda _record: None  # on the loop: it must not wait

        self._session: Session | None = None
        self._stopped: Session | None = None  # disarmed, but its services run
        self._runs: dict[str, Run] = {}
        self._timers: list[_TimerDue] = []
        self._random = b""
        self._loop = Loop(self._full, self._drain, self._tick, self._pause, self._detach)
        self.drills = Drills(self)
        self._pool = ThreadPoolExecutor(ACTION_THREADS, thread_name_prefix="action")
        # Beside the pool: no action holds up what is known already.
        self._writer = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="writer")
        self._waiting = Waiting()
        self._messenger = Messenger(self._loop, self._recorder, self._waiting)
        self._brake = Brake(state_dir, self._loop)
        self._watch = Watch(state_dir, self._recorder, self._note_soon)
        self._sessions = Sessions(state_dir, node, self._recorder, self._epoch, self._brake)
        self._arming = threading.Lock()
        self._idle = threading.Condition()
        self._flying = 0  # runs decided whose receipt is not yet durable

        self._closed = self._renewing = False
        self._tick_due_ns = self._checkpoint_due_ns = 0
        self._paused_until_ns = 0
        self._acted: list[tuple[str, str, int]] | None = None  # until arming, what was done before: left.times
        self._failed: frozenset[int] = frozenset()  # places in it of what did not succeed
        sys.setswitchinterval(SWITCH_SECONDS)
        self._epoch.open(self._epoch.attest(None, self.trust, datetime.now(UTC)), self.trust, None, (), "boot")
        self._take_up()
        self._loop.start()

    def _take_up(self) -> None:
        """What an earlier executor left: open intents, a pause that is not over, people who have not answered."""
        found = self._recorder.reconcile()
        now, now_ns = datetime.now(UTC), time.monotonic_ns()
        if found.paused is not None and found.paused.until > now:
            self._paused_until_ns = now_ns + int((found.paused.until - now).total_seconds() * 1e9)
            self._brake.paused = found.paused.reason
            self.state = self.state._replace(guard=self.state.guard._replace(paused=found.paused.reason))
        if found.disarmed is not None:
            self._brake.disarmed_by_hand = found.disarmed or NO_REASON
            if self._node.unpin():  # who disarmed or armed last was killed in the middle of it
                self._recorder.record(disarmed(self._brake.disarmed_by_hand, stays=True))
        if gone := self._node.ended():
            self._recorder.record(ended(gone, self.config.mode))
        for run, code in found.escalations.items():
            self._waiting.call(run, (), code, now_ns)
        self._acted, self._failed = left.times(found.acted, now, now_ns), frozenset(found.failed)
        self.state = self.state._replace(guard=guard.recalled(self.state.guard, self._acted))
        left.record_meanwhile(self.state_dir, self._recorder)

    # ---- epochs ----------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop; nothing acts any more."""
        return self._loop.failure

    @property
    def beats(self) -> int:
        """Turns of the loop: whoever watches it sees that it lives."""
        return self._loop.beats

    @property
    def keys(self) -> EpochKeys:
        """The keys of the running epoch."""
        return self._recorder.keys

    @property
    def recorder(self) -> Recorder:
        """The one hand that writes the log, for who works beside the loop (shipping.py)."""
        return self._recorder

    @property
    def attested(self) -> Attested:
        """The evidence of the running epoch."""
        return self._epoch.attested

    @property
    def epoch_opened_ns(self) -> int:
        """When the running epoch was opened (CLOCK_MONOTONIC)."""
        return self._epoch.opened_ns

    @property
    def boot_id(self) -> str:
        """Which boot of the machine this is, "unknown" where it does not say."""
        return self._epoch.boot_id

    @property
    def verdict(self) -> Verdict:
        """What the node's own evidence is worth."""
        return self._epoch.attested.verdict

    @property
    def admitted(self) -> Admitted | None:
        """What is armed, None if nothing is."""
        session = self._session
        return session.admitted if session else None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One change of what is armed at a time, and none once the executor closes."""
        with self._arming:
            if self._closed:
                raise StoppedError("the executor is closing")
            yield

    def roll_epoch(self) -> None:
        """A new key and fresh evidence now; the armed manifest is judged again under the trust of now.

        RefusedError where it would not be admitted any more: then it is disarmed.
        """
        with self._changing():
            self._renew("asked for")

    def _renew(self, reason: str) -> None:
        session = self._session
        if session is None:
            attested, trust = self._epoch.attest(None, self.trust, datetime.now(UTC)), self.trust
            with self._quiet():
                self._loop.call(lambda: self._epoch.open(attested, trust, None, (), reason))
            return
        try:
            admitted, attested = self._sessions.admit(
                session.bundle, self.trust, session.judged_at(datetime.now(UTC), time.monotonic_ns())
            )
        except RefusedError as refusal:
            self._record_refusal(refusal)
            self._brake.outdate()
            self._loop.call(lambda: self._disarm("the armed manifest is not admitted any more"))
            raise
        with self._quiet():
            self._loop.call(lambda: self._continue(session, admitted, attested, reason))

    def _continue(self, session: Session, admitted: Admitted, attested: Attested, reason: str) -> None:
        """On the loop thread: the same session under a new epoch."""
        if self._session is not session:
            return
        self._epoch.open(attested, self.trust, admitted, session.bundle.signatures, reason)
        session.admitted, session.trust = admitted, self.trust

    def _renew_in_background(self) -> None:
        """At the end of an epoch's life, from the loop: the pool does it, and the loop goes on."""
        if self._renewing or self._closed:
            return
        self._renewing = True
        self._epoch.due_ns = time.monotonic_ns() + self._epoch.life_ns

        def renew() -> None:
            try:
                with contextlib.suppress(RefusedError, StoppedError), self._changing():
                    self._renew("lifetime")
            except (PlatformError, ArmingError, OSError) as error:
                self._loop.post(lambda error=error: self._no_evidence(error))  # type: ignore[misc]
            except BaseException as error:
                self._loop.fail(error)
            finally:
                self._renewing = False

        threading.Thread(target=renew, name="renewal", daemon=True).start()

    def _no_evidence(self, error: PlatformError | ArmingError | OSError) -> None:
        """On the loop: no new epoch now, for want of evidence or because runs in flight did not end. Tried again soon;
        what is armed is not on old evidence."""
        now_ns = time.monotonic_ns()
        self._epoch.due_ns = now_ns + RENEW_AGAIN_NS
        want, hint = "fresh evidence for a new epoch", "see what the platform offers: pointcall attest probe"
        if isinstance(error, ArmingError):
            want, hint = "a moment without a run in flight", "see which action does not end: pointcall status"
        self._recorder.record(refused("tee.renewal", "the next epoch", want, str(error), hint))
        if self._session is not None and now_ns > self.evidence_until_ns:
            self._disarm_by_itself(Amiss("tee.stale", "evidence of this epoch or the last", "older", hint))

    # ---- arming ----------------------------------------------------------------------------------------------------

    def arm(self, bundle: Bundle, *, by_itself: bool = False) -> Admitted:
        """Verify, attest, admit and arm. A refusal leaves everything as it was and is an entry of the log.

        `by_itself`: no person asks for it now, so not where a person has disarmed (ArmingError `arm.by-hand`).
        RefusedError carries every check; ArmingError, ServiceError and KernelError say what this node cannot do.
        """
        with self._changing():
            try:
                return self._arm(bundle, by_itself=by_itself)
            except RefusedError as refusal:
                self._record_refusal(refusal)
                raise
            except PointcallError as refusal:
                if self.failure is None:
                    self._recorder.record(refused(refusal.id, "manifest", refusal.want, refusal.got, refusal.hint))
                raise
            except OSError as error:
                got = ArmingError("the node cannot do what the manifest needs", id="arm.environment", got=str(error))
                self._recorder.record(refused(got.id, "manifest", "", got.got, ""))
                raise got from error

    def _record_refusal(self, refusal: RefusedError) -> None:
        for check in refusal.verdict.failed:
            self._recorder.record(refused(check.id, "manifest", check.expected, check.observed, check.hint))

    def _arm(self, bundle: Bundle, *, by_itself: bool) -> Admitted:
        self._brake.require_not_halted()
        self._brake.require_not_disarmed(by_itself=by_itself)
        generation, trust = self._brake.generation, self.trust
        at, at_ns = datetime.now(UTC), time.monotonic_ns()
        admitted, attested = self._sessions.admit(bundle, trust, at)
        with contextlib.ExitStack() as undo:
            session = self._sessions.make(admitted, bundle, trust, self.config.mode, at, at_ns, undo)
            with self._quiet(), contextlib.ExitStack() as put_back:  # nobody decides while services are put back
                self._sessions.start_services(session, self._session or self._stopped, put_back)
                self._loop.call(lambda: self._switch(session, attested, generation, by_itself=by_itself))
                put_back.pop_all()
            undo.pop_all()
        self._sessions.commit(session)
        return admitted

    def require_not_halted(self) -> None:
        """ArmingError `executor.halted` while the kill switch is on."""
        self._brake.require_not_halted()

    def require_not_paused(self) -> None:
        """ArmingError `executor.paused` while somebody has paused the executor."""
        self._brake.require_not_paused()

    def _switch(self, session: Session, attested: Attested, generation: int, *, by_itself: bool) -> None:
        """On the loop thread, with no run in flight: first what can fail, then the assignment."""
        if self._brake.generation != generation:
            raise ArmingError("it was disarmed meanwhile", id="arm.interrupted", hint="arm again if that is meant")
        self._brake.require_not_halted()
        self._brake.require_not_disarmed(by_itself=by_itself)
        manifest, old = session.admitted.manifest, self._session
        detail: dict[str, JsonValue] = {name: f"{number} {tag}" for name, number, tag in session.sensors.programs()}
        self.journal.raise_sequence(ARMED, manifest.sequence, manifest.sha256)
        with contextlib.ExitStack() as undo:
            for fd in session.sensors.fds():
                self._loop.watch(fd)
                undo.callback(self._loop.unwatch, fd)
            session.sensors.keep()  # from here on the pins are the new ones, and only a failed journal can stop it
            reason = "another manifest is armed" if old else "armed"
            self._epoch.open(attested, session.trust, session.admitted, session.bundle.signatures, reason)
            self._recorder.record(entry.Config(what="kernel programs", detail=detail))
            if unwatched := session.sensors.unwatched():
                self._recorder.record(entry.Config(what="destinations without a circuit", detail=dict(unwatched)))
            self._brake.disarmed_by_hand = ""  # that entry says it
            undo.pop_all()
        unseen = self._hand_over(session, old) if old is not None else []
        same = {b.name for b in session.armed.runbooks} & self._unchanged(session.armed)
        memory = {key: value for key, value in self.state.memory.items() if key[0] in same}
        self._timers = sorted(t for t in self._timers if t.runbook in same)
        held = guard.circuits_held(self.state.guard, left.forced(session.sensors))
        held = guard.isolations_held(held, left.isolated(session))
        if self._acted is not None:
            held = guard.rows_recalled(held, self._acted, session.armed.rules, self._failed)
        self.state = self.state._replace(armed=session.armed, memory=memory, guard=held._replace(approvals={}))
        self._acted = None
        self._session, self._stopped = session, None
        self._watch.begin()
        self._watch.count_lost(session.sensors)  # from here on these count: before others take over from them in turn
        self._waiting.forget_asked()
        if old is None:
            left.record_in_kernel(session, self._recorder)
        for record in unseen:
            self._record(record, time.monotonic_ns())

    def _hand_over(self, session: Session, old: Session) -> list[bytes]:
        """Drop the old session's sensors; the records that only they have seen."""
        seen = [record for record in old.sensors.drain() if self._only_before(record, session)]
        self.drills.disarmed(old)
        self._drop(old.sensors, leave=True)
        return seen

    def _only_before(self, record: bytes, session: Session) -> bool:
        """Both sessions see what happens once the new one is attached; a pinned ring is one and the same."""
        event = decode(record)
        return event.at_ns < session.attached_ns or (self.config.pin and isinstance(event, CircuitEvent))

    def _unchanged(self, armed: Armed) -> set[str]:
        """Names of runbooks whose module is the one that is armed now: only they keep what they remember."""
        now = {b.name: b.module for b in self.state.armed.runbooks} if self.state.armed else {}
        return {b.name for b in armed.runbooks if now.get(b.name) == b.module}

    def _drop(self, sensors: Sensors, *, leave: bool = False) -> None:
        """Out of the loop and out of the kernel; `leave` keeps what is pinned. Its loss is counted to the end."""
        for fd in sensors.fds():
            self._loop.unwatch(fd)
        sensors.stop(leave=leave)
        self._watch.count_lost(sensors)  # nothing more can be lost
        sensors.leave()

    def disarm(self, reason: str) -> None:
        """A person's word: stop acting. Everything out of the kernel, nothing armed, what waits is not done, also after
        a restart, until a person arms. Services go on running."""
        self._brake.outdate()
        self._loop.call(lambda: self._disarm(reason or NO_REASON, stays=True))

    def _disarm(self, reason: str, *, leave: bool = False, stays: bool = False) -> None:
        """On the loop thread. `stays`: a person asked for it. The entry comes last: before it, nobody was told that it
        is done, and after it nothing is left to be done."""
        new = stays and not self._brake.disarmed_by_hand
        if new:
            self._brake.disarmed_by_hand = reason
        if self._session is None:
            unpinned = not leave and self._node.unpin()  # of an earlier executor: this one has armed nothing
            if unpinned or new:
                self._recorder.record(disarmed(reason, stays=stays))
            return
        self._brake.outdate()  # once more: what the loop decided since somebody asked for this is not begun either
        self.state = self.state._replace(armed=None, guard=self.state.guard._replace(approvals={}))
        self._timers = []
        self._waiting.forget_asked()
        self.drills.disarmed(self._session)
        self._thaw_all(self._session)
        self._drop(self._session.sensors, leave=leave)
        self._stopped, self._session = self._session, None
        self._recorder.record(disarmed(reason, stays=stays))

    def _thaw_all(self, session: Session) -> None:
        """Nobody who is not armed holds a service still."""
        for action, *target in self.state.guard.leases:
            if action == capability(Freeze):
                with contextlib.suppress(PointcallError, OSError):
                    session.services.thaw(int(target[1]))

    def _disarm_by_itself(self, amiss: Amiss) -> None:
        """On the loop thread: what is armed may not be any more."""
        self._brake.outdate()
        self._recorder.record(refused(amiss.check, "the armed manifest", amiss.want, amiss.got, amiss.hint))
        self._disarm(amiss.check)

    def pause(self, reason: str, seconds: int) -> None:
        """Refuse every action for so long, also after a restart; the breaker in the kernel goes on."""
        self._brake.pause(reason or NO_REASON)
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        detail: dict[str, JsonValue] = {"reason": reason, "until": until.isoformat()}
        until_ns = time.monotonic_ns() + seconds * 1_000_000_000
        self._loop.call(lambda: self._set_paused(reason or NO_REASON, until_ns, "paused", detail))

    def resume(self, reason: str) -> None:
        """End a pause."""
        self._loop.call(lambda: self._set_paused("", 0, "resumed", {"reason": reason}))

    def _set_paused(self, paused: str, until_ns: int, what: str, detail: dict[str, JsonValue]) -> None:
        self.state = self.state._replace(guard=self.state.guard._replace(paused=paused))
        self._paused_until_ns = until_ns
        self._brake.pause(paused)
        self._recorder.record(entry.Config(what=what, detail=detail))
        if paused:
            self.drills.paused()

    def reload(self, config: Config) -> None:
        """Take over settings that can change while running, and read the trust and notices folders again.

        Another trust policy or notice means a new epoch, and judging the armed manifest again: RefusedError if it is
        disarmed by that. ConfigError `config.restart` where a setting needs a new process; OSError or MalformedError
        for the trust folder. Then everything stays as it was. PlatformError where there is no evidence now, ArmingError
        `arm.busy` where the runs in flight do not end: the new trust holds from the next epoch on, tried again soon.
        """
        changed = [name for name in RESTART if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise ConfigError("a setting needs a restart", id="config.restart", got=", ".join(changed))
        trust = load_trust(self.state_dir / "trust")
        with self._changing():
            self.config, before, self.trust = config, self.trust, trust
            self._recorder.record(entry.Config(what="settings", detail={"policy": trust.policy.sha256}))
            if trust != before or self._sessions.other_notices:
                try:
                    self._renew("the trust changed")
                except (PlatformError, ArmingError) as error:
                    self._loop.call(lambda error=error: self._no_evidence(error))  # type: ignore[misc]
                    raise

    # ---- what an operator does by hand, and what others may look at ------------------------------------------------

    def trip(self, address: Address, port: int, hold_ns: int, reason: str) -> None:
        """Force a circuit open for `hold_ns`. ServiceError `circuit.unknown` where none is armed; ArmingError
        `executor.halted`, or `circuit.monitor` in mode `monitor`."""
        with self.refusing(f"trip {address}:{port}"):
            self._loop.call(lambda: self._by_hand(OpenCircuit(address, port, hold_ns), reason))

    def release(self, address: Address, port: int, reason: str) -> None:
        """Close a circuit now. ServiceError `circuit.unknown` where none is armed."""
        with self.refusing(f"release {address}:{port}"):
            self._loop.call(lambda: self._by_hand(CloseCircuit(address, port), reason))

    @contextlib.contextmanager
    def refusing(self, what: str) -> Iterator[None]:
        """What a person asks for and does not get is an entry of the log, as with what a runbook asks for."""
        try:
            yield
        except PointcallError as refusal:
            if self.failure is None:
                self._recorder.record(refused(refusal.id, what, refusal.want, refusal.got, refusal.hint))
            raise

    def _by_hand(self, action: OpenCircuit | CloseCircuit, reason: str) -> None:
        session = self._session
        if session is None:
            raise StoppedError("nothing is armed", id="executor.disarmed", hint="pointcall arm")
        if isinstance(action, OpenCircuit):
            self._brake.require_not_halted()
            self._require_enforcing()
        act = Act(0, Call.of(action), action, target=acting.target_of(session, action))
        self._recorder.record(acting.intent(act, {}, grant="operator"))
        act.outcome, act.detail = Outcome.FAILED, {"reason": reason}
        try:
            done = acting.performed(act, action, acting.world_of(session))
            act.outcome, act.detail = done.outcome, {**done.detail, "reason": reason}
        finally:
            self._recorder.record(acting.outcome(act))

    def slow_file(self, path: Path, delay_s: float, seconds: float) -> SlowFile:
        """For a drill. KernelError `kernel.drill.file`, ServiceError."""
        return self._node.slow_file(path, delay_s, seconds)

    def _require_enforcing(self) -> None:
        if self.config.mode == "monitor":
            raise ArmingError(
                "this node only watches: no circuit refuses anything", id="circuit.monitor", want="mode enforce",
                got="mode monitor", hint="set mode = \"enforce\" in the node's settings, and restart it",
            )  # fmt: skip

    # ---- what waits for a person -----------------------------------------------------------------------------------

    def asked(self) -> tuple[Asked, ...]:
        """The calls that a second person can approve now."""
        return self._waiting.asked(time.monotonic_ns())

    def approve(self, bundle: bytes) -> str:
        """Let the runbook decide again about the event of the approved run, and let this one call through, once.

        VerifyError and MalformedError as of `verify_approval`; StoppedError where nothing is armed or asked for;
        ArmingError `executor.halted`. Where another rule holds the call back, the approval is over.
        """
        with self.refusing("approval"):
            return self._approve(bundle)

    def _approve(self, bundle: bytes) -> str:
        session = self._session
        if session is None:
            raise StoppedError("nothing is armed", id="executor.disarmed", hint="pointcall arm")
        approval = verify_approval(
            bundle,
            trusted_root=self.trust.trusted_root,
            policy=self.trust.policy,
            node=self.config.node,
            manifest=session.admitted.manifest.sha256,
            manifest_signers=frozenset(session.admitted.signed.signers),
            at=datetime.now(UTC),
        )
        with self._changing():  # no run begins while another manifest or epoch takes over
            self._brake.require_not_halted()
            self.journal.put_blob(bundle)
            self._loop.call(lambda: self._approved(session, approval))
        return approval.body.run

    def _approved(self, session: Session, approval: Approval) -> None:
        body, now_ns = approval.body, time.monotonic_ns()
        asked = self._waiting.take(body.run, body.index, now_ns) if self._session is session else None
        call = asked.run.acts[asked.index].call if asked else None
        if asked is None or call is None or (call.action, tuple(map(str, call.args))) != (body.action, body.args):
            raise StoppedError(
                "nothing like this waits for an approval", id="approval.unknown", want="a call that was held back",
                got=f"{body.run} call {body.index}", hint="pointcall approve --list",
            )  # fmt: skip
        run, action = asked.run, asked.run.acts[asked.index].action
        assert action is not None, "only well-formed calls are asked about"
        detail: dict[str, JsonValue] = {
            "run": body.run,
            "index": body.index,
            "action": body.action,
            "by": f"{approval.by.identity} by {approval.by.issuer}",
            "approval": approval.sha256,
        }
        self._recorder.record(entry.Config(what="approved", detail=detail), body.run)
        remaining = int((body.expires - datetime.now(UTC)).total_seconds() * 1e9)
        until_ns = now_ns + min(APPROVAL_NS, remaining)
        judged = guard.approved(self.state.guard, run.runbook.name, action, until_ns)
        self.state = self.state._replace(guard=judged)
        try:
            self._advance(Happened(run.event, run.subject, now_ns, only=run.runbook.name), "approval", now_ns)
        finally:  # it was for that run, and for no other of this runbook
            self.state = self.state._replace(guard=self.state.guard._replace(approvals={}))

    def escalations(self) -> tuple[Escalation, ...]:
        """Whom nobody has answered yet."""
        return tuple(self._waiting.escalations.values())

    def acknowledge(self, run: str, reason: str) -> None:
        """A person has seen it. StoppedError `escalation.unknown` where nobody was called for this run."""
        self._loop.call(lambda: self._messenger.acknowledge(run, reason))

    # ---- what others may look at and write -------------------------------------------------------------------------

    def record(self, body: entry.Body) -> int:
        """Append an entry of the running epoch; its index, once it is durable."""
        return self._recorder.record(body)

    def fresh_evidence(self, nonce: bytes) -> tuple[EvidenceBundle, Attested, Trust, Admitted | None]:
        """Evidence over the caller's nonce (32 bytes), and what it binds: the epoch, its trust, its manifest."""
        return self._epoch.fresh_evidence(nonce)

    def checkpoint_now(self) -> Checkpoint:
        """A checkpoint that covers everything that is in the log now."""
        found = self._recorder.checkpoint(force=True)
        assert found is not None, "the log has its first entry since the executor started"
        return found

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        """(name, kernel id, tag) of every BPF program that is loaded for the armed manifest."""
        session = self._session
        return session.sensors.programs() if session else ()

    def circuits(self) -> tuple[CircuitState, ...]:
        """Every armed circuit as the kernel has it."""
        session = self._session
        return session.sensors.states() if session else ()

    def running_services(self) -> Mapping[str, int]:
        """Declared services and the pid of each, 0 where it does not run."""
        session = self._session or self._stopped
        return session.services.pids() if session else {}

    @property
    def session(self) -> Session | None:
        """What is armed, running; None if nothing is."""
        return self._session

    @property
    def evidence_until_ns(self) -> int:
        """Until when what is armed stays armed where no fresh evidence can be had (CLOCK_MONOTONIC)."""
        return self._epoch.evidence_until_ns

    @property
    def lost_events(self) -> int:
        """Events that the sensors of this session could not deliver."""
        return self._watch.lost

    @property
    def disarmed_by_hand(self) -> str:
        """Why a person has disarmed: it stays so, also after a restart, until a person arms. Empty where none has."""
        return self._brake.disarmed_by_hand

    @property
    def paused_until_ns(self) -> int:
        """When a pause ends by itself (CLOCK_MONOTONIC), 0 where there is none."""
        return self._paused_until_ns

    @property
    def checked_ns(self) -> int:
        """When the kernel's programs were last compared with what was armed, 0 where they were not yet."""
        return self._watch.checked_ns

    @staticmethod
    def now_ns() -> int:
        """CLOCK_MONOTONIC."""
        return time.monotonic_ns()

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _detach(self, error: BaseException) -> None:
        """The loop has failed: whatever it was, nothing may act any more."""
        self._brake.generation += 1
        self.state = self.state._replace(armed=None)
        if self._session is not None:
            # A storage may be back soon: what is pinned stays for the next executor, as after SIGKILL.
            leave = self.config.pin and isinstance(error, StorageError)
            with contextlib.suppress(Exception):
                self._session.sensors.stop(leave=leave)
            with contextlib.suppress(Exception):
                self._session.sensors.leave()
        with self._idle:
            self._idle.notify_all()

    def _full(self) -> bool:
        """Whether too many runs have no receipt yet."""
        return self._flying >= RUNS_MAX

    def _drain(self, received_ns: int) -> None:
        """What the sensors have seen."""
        session = self._session
        if session is not None:
            for record in session.sensors.drain(BATCH):
                self._record(record, received_ns)

    def _pause(self) -> float:
        """How long the loop waits at most, in seconds."""
        if not self._timers or self._loop.waits():
            return TICK_SECONDS
        return max(0.0, min(TICK_SECONDS, (self._timers[0].due_ns - time.monotonic_ns()) / 1e9))

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No decision begins, and none is in flight. ArmingError `arm.busy` if the runs in flight do not end."""
        self._loop.call(lambda: self._loop.hold(True))
        try:
            with self._idle:
                ended = self._idle.wait_for(lambda: self._flying == 0 or self.failure is not None, QUIET_SECONDS)
            if not ended:
                raise ArmingError("runs in flight do not end", id="arm.busy", got=f"{self._flying} runs")
            yield
        finally:
            with contextlib.suppress(StoppedError):
                self._loop.call(lambda: self._loop.hold(False))

    def _tick(self, now_ns: int) -> None:
        """What is due, at the end of each turn."""
        while self._timers and self._timers[0].due_ns <= now_ns and not self._loop.waits():
            self._fire(heapq.heappop(self._timers))
        if self._paused_until_ns and now_ns >= self._paused_until_ns:
            self._set_paused("", 0, "resumed", {"reason": "the pause is over"})
        if now_ns < self._tick_due_ns:
            return
        self._tick_due_ns = now_ns + int(TICK_SECONDS * 1e9)
        self._recorder.watch()
        if self._session is not None:
            self._watch.count_lost(self._session.sensors)
        self._check_armed(now_ns)
        session = self._session or self._stopped
        if session is not None:
            self._messenger.call_again(session, now_ns)
        if now_ns >= self._epoch.due_ns:
            self._renew_in_background()
        if now_ns >= self._checkpoint_due_ns and not self._closed:
            self._checkpoint_due_ns = now_ns + int(self.config.checkpoint_seconds * 1e9)
            self._writer.submit(self._checkpoint)

    def _checkpoint(self) -> None:
        try:
            self._recorder.checkpoint()
        except BaseException as error:
            self._loop.fail(error)

    def _check_armed(self, now_ns: int) -> None:
        session = self._session
        amiss = self._watch.amiss(session, now_ns) if session is not None else None
        if amiss is not None:
            self._disarm_by_itself(amiss)

    def _note_soon(self) -> None:
        if not self._closed:
            self._writer.submit(self._note)

    def _note(self) -> None:
        try:
            self._node.note()
        except BaseException as error:
            self._loop.fail(error)

    # ---- one record through to its actions -------------------------------------------------------------------------

    def _record(self, raw: bytes, received_ns: int) -> None:
        session = self._session
        if session is None:  # a record before it disarmed the executor
            return
        record = decode(raw)
        history, noticed = notice(record, session.topology, self.state.guard.history)
        self.state = self.state._replace(guard=self.state.guard._replace(history=history))
        try:
            if noticed.event is not None:
                happening = Happened(noticed.event, noticed.subject, received_ns)
                self._advance(happening, noticed.sensor, received_ns)
        finally:
            self.on_record(record)  # people wait, actions do not

    def _advance(self, happening: Input, sensor: str, received_ns: int) -> None:
        self.state, effects = step(self.state, happening)
        for effect in effects:
            self._effect(effect, sensor, received_ns)

    def _effect(self, effect: Effect, sensor: str, received_ns: int) -> None:
        match effect:
            case Decide():
                self._decide(effect, sensor, received_ns)
            case Perform(id, index, action):
                run = self._runs[id]
                self._perform(run, run.acts[index], action)
            case Withhold(id, index, action):
                run = self._runs[id]
                act = run.acts[index]
                act.action, act.target, act.outcome = action, acting.target_of(run.session, action), Outcome.MONITORED
                act.over = True
            case Refuse(id, index, action, refusal):
                run = self._runs[id]
                self._refuse(run, run.acts[index], action, refusal)
                run.acts[index].over = True
            case _:
                assert_never(effect)

    def _decide(self, effect: Decide, sensor: str, received_ns: int) -> None:
        """Run the handler and let the core judge what it wants."""
        session, epoch = self._session, self._epoch
        assert session is not None
        assert epoch.receipts is not None
        book, name = effect.runbook, type(effect.event).__name__
        run = Run(
            id=run_id(time.time_ns() // 1_000_000, self._chance()),
            number=next(epoch.numbers),
            runbook=book,
            event=effect.event,
            subject=effect.subject,
            sensor=sensor,
            args=effect.args,
            fuel_limit=session.admitted.modules[book.name].handlers[name].fuel_bound + 1,
            started=datetime.now(UTC),
            event_ns=effect.event.at,  # type: ignore[attr-defined]
            received_ns=received_ns,
            session=session,
            epoch=epoch.receipts,
            generation=self._brake.generation,
        )
        self._take_off(run)
        try:
            decided = session.runners[book.name].decide(name, effect.args)
        except Trap as trap:
            run.decided_ns = time.monotonic_ns()
            self._quarantine(run, trap.kind, str(trap))
            return
        run.decided_ns = time.monotonic_ns()
        run.calls, run.fuel_used = decided.calls, decided.fuel
        if len(run.calls) > MAX_ACTIONS:
            self._quarantine(run, "too many actions", f"{len(run.calls)} calls, at most {MAX_ACTIONS}")
            return
        run.acts = [Act(i, call) for i, call in enumerate(run.calls)]
        now_ns = time.monotonic_ns()
        self._advance(Decided(run.id, book, effect.subject, run.calls, now_ns), sensor, received_ns)
        self._maybe_finish(run)

    def _take_off(self, run: Run) -> None:
        self._runs[run.id] = run
        with self._idle:
            self._flying += 1

    def _land(self) -> None:
        with self._idle:
            self._flying -= 1
            room = self._flying == RUNS_MAX - 1
            self._idle.notify_all()
        if room:
            self._loop.wake()

    def _chance(self) -> bytes:
        """10 random bytes, drawn in advance: a system call here would give up the interpreter lock at a bad time."""
        if len(self._random) < 10:
            self._random = os.urandom(4096)
        drawn, self._random = self._random[:10], self._random[10:]
        return drawn

    def _quarantine(self, run: Run, kind: str, got: str) -> None:
        """A module that traps is not asked again until another manifest is armed."""
        run.trap, run.calls = kind, ()
        armed = self.state.armed
        if armed is not None:
            kept = tuple(r for r in armed.runbooks if r.name != run.runbook.name)
            self.state = self.state._replace(armed=replace(armed, runbooks=kept))
        want = "a decision within its proven bound"
        hint = "arm a manifest with a fixed module"
        self._recorder.submit(refused("runbook.quarantined", run.runbook.name, want, got, hint), run.id)
        self._maybe_finish(run)

    def _refuse(self, run: Run, act: Act, action: Action | None, refusal: guard.Refusal) -> None:
        act.action, act.refusal, act.outcome = action, refusal, Outcome.REFUSED
        act.target = acting.target_of(run.session, action) if action else ""
        what = f"{act.call.action} {act.target}"
        if refusal.rule == "guard.approval":
            self._waiting.ask(run, act.index, time.monotonic_ns())
        self._recorder.submit(refused(refusal.rule, what, refusal.want, refusal.got, refusal.hint), run.id)

    # ---- actions ---------------------------------------------------------------------------------------------------

    def _perform(self, run: Run, act: Act, action: Action) -> None:
        act.action, act.target = action, acting.target_of(run.session, action)
        name = capability(type(action))
        if isinstance(action, Remember | Again):
            self._built_in(run, act, action)
        elif name in WITHOUT_INTENT and run.session.channels.waits(action.channel.number):  # type: ignore[attr-defined]
            self._send(run, act, action)
        elif name in KERNEL_LEASES or name in WITHOUT_INTENT:
            acting.apply(self.journal, run, act, action)
            self._ended(run, act)
        else:
            self._pool.submit(self._durable, run, act, action)

    def _send(self, run: Run, act: Act, action: Action) -> None:
        """Tell a channel that may be slow, beside everything else."""
        against = self._messenger.send(
            lambda: acting.apply(self.journal, run, act, action), lambda: self._ended(run, act)
        )
        if against:
            act.outcome, act.detail = Outcome.FAILED, {"error": against}
            self._ended(run, act)

    def _built_in(self, run: Run, act: Act, action: Remember | Again) -> None:
        """The core's own actions: `remember` is done by the step itself, `again` is a timer here."""
        act.started_ns = act.ended_ns = time.monotonic_ns()
        act.outcome, act.over = Outcome.APPLIED, True
        act.postcondition = (
            "a timer is set" if isinstance(action, Again) else "the next decision starts from this value"
        )
        if isinstance(action, Again):
            if len(self._timers) >= TIMERS_MAX:
                act.outcome, act.detail = Outcome.FAILED, {"error": f"more than {TIMERS_MAX} timers"}
                act.postcondition = ""
                return
            number = getattr(run.event, "service", Service(0)).number
            due_ns = act.started_ns + action.after
            heapq.heappush(self._timers, _TimerDue(due_ns, action.tag, run.runbook.name, run.subject, number))

    def _fire(self, timer: _TimerDue) -> None:
        restarts = self.state.guard.history.count(("restart", timer.service), timer.due_ns)
        event = Timer(timer.due_ns, timer.tag, Service(timer.service), restarts)
        now_ns = time.monotonic_ns()
        self._advance(Happened(event, timer.subject, now_ns, only=timer.runbook), "timer", now_ns)

    def _durable(self, run: Run, act: Act, action: Action) -> None:
        """On the pool: the intent is on disk before anything is done."""
        try:
            refusal = self._brake.called_off(run)
            if refusal is None:
                act.intent = self._recorder.record(acting.intent(act, run.epoch.names), run.id)
                act.intent_ns = time.monotonic_ns()
                with self._brake.lock:  # once more: writing takes its time, and somebody may have said stop meanwhile
                    refusal = self._brake.too_late(run)
                    act.started_ns = time.monotonic_ns()
            if refusal is None:
                acting.apply(self.journal, run, act, action)
            else:
                self._refuse(run, act, action, refusal)
        except BaseException as error:
            self._loop.fail(error)
            return
        self._loop.post(lambda: self._ended(run, act))

    def _ended(self, run: Run, act: Act) -> None:
        """On the loop thread: free the target, let the runbook go on, finish the run when all its actions ended."""
        assert act.action is not None
        assert act.outcome is not None
        now_ns = time.monotonic_ns()
        if isinstance(act.action, Escalate) and act.outcome in (Outcome.APPLIED, Outcome.FAILED):
            why = "the runbook decided it" + ("" if act.outcome is Outcome.APPLIED else ", and could not tell")
            self._messenger.called(run, (act.action.channel.number,), act.action.code, why)
        elif act.call.action not in WITHOUT_INTENT:
            back = act.detail.get("rolled_back") == "yes"
            held = guard.settled(self.state.guard, act.action, act.outcome, now_ns, rolled_back=back)
            self.state = self.state._replace(guard=held)
            if act.outcome not in (Outcome.APPLIED, Outcome.REFUSED):
                self._messenger.escalate(run, act)
        act.over = True
        self._advance(Ended(run.id, run.runbook, run.subject, act.action, act.outcome, now_ns), "action", now_ns)
        self._maybe_finish(run)

    def _maybe_finish(self, run: Run) -> None:
        if run.finished and not run.closing:
            run.closing = True
            self._runs.pop(run.id, None)
            self._writer.submit(self._finish, run)

    def _finish(self, run: Run) -> None:
        """Beside the loop: what is not yet recorded of the run, then its receipt."""
        try:
            for act in run.acts:
                if act.action is None:
                    continue
                if act.intent is None and act.outcome in (Outcome.REFUSED, Outcome.MONITORED):
                    continue
                if act.intent is None and act.call.action in KERNEL_LEASES:
                    act.intent = self._recorder.record(acting.intent(act, run.epoch.names), run.id)
                self._recorder.submit(acting.outcome(act), run.id)
            run.receipt_index = self._recorder.receipt(run.receipt())
        except BaseException as error:
            self._loop.fail(error)
            return
        finally:
            self._land()
        self.on_receipt(run)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, *, stop_services: bool = False, reason: str = "stopped") -> None:
        """Disarm, let running actions end, close the epoch. `stop_services`: also destroy the declared services."""
        if self._closed:
            return
        with contextlib.suppress(PointcallError):
            self.drills.close()
        self._closed = True
        if (telling := self._session or self._stopped) is not None:
            telling.channels.hurry()  # a channel that nobody answers must not hold up the end
        self._brake.outdate()
        with self._arming, contextlib.suppress(PointcallError):
            self._loop.call(lambda: self._disarm(reason, leave=self.config.pin))
            with self._idle:
                self._idle.wait_for(lambda: self._flying == 0 or self.failure is not None, CLOSE_SECONDS)
        self._pool.shutdown(wait=True)
        self._loop.stop()  # before the messenger: it gives it work
        self._writer.shutdown(wait=True)  # of an action that took longer than anything may, too
        self._messenger.close()
        session = self._session or self._stopped
        if stop_services and session is not None:
            session.services.stop_all()
        self._node.shutdown()
        if self.failure is None:
            try:
                self._recorder.close(reason)
            except PointcallError as error:
                self._loop.failure = error
        self.journal.close()
        self._loop.close()
