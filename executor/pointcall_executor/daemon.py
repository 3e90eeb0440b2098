"""The executor: the one door to everything that runs. Its life: begin, arm, change epochs, disarm, pause, end.

What is left here is what changes what is armed and under which epoch, and what people ask for by hand. The work is done
by the modules that this one ties together: runs.py (a kernel record through to its receipt, the state of the core) on
loop.py (the one thread that owns it), under brake.py (who said stop), with sessions.py, running_epoch.py, messenger.py,
watch.py and left.py. Everything that happened goes into the journal; if the journal fails, the executor disarms and
stops: what cannot be recorded must not be done.

A run belongs to the session and the epoch in which it was decided; both change only while no run is in flight. Until
then decisions wait in the ring, and the breaker in the kernel goes on by itself.

Trust: who can write the state folder can stop the node, not forge a receipt; who can write the trust folder can arm.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_attest.admission import Admitted
from pointcall_attest.approval import Approval, verify_approval
from pointcall_attest.errors import RefusedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import UNANSWERED
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor import acting, left
from pointcall_executor.arming import ArmingError
from pointcall_executor.brake import Brake
from pointcall_executor.config import RESTART, Config, ConfigError
from pointcall_executor.core import guard
from pointcall_executor.core.event import CircuitEvent, KernelEvent, decode
from pointcall_executor.core.step import Armed, State
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
from pointcall_executor.runs import Runs
from pointcall_executor.session import Bundle, Session
from pointcall_executor.sessions import ARMED, Sessions
from pointcall_executor.tee.platform import Platform, PlatformError
from pointcall_executor.waiting import Asked, Escalation, Waiting
from pointcall_executor.watch import Amiss, Watch
from pointcall_keys.node import EpochKeys
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address, Call, CloseCircuit, Freeze, OpenCircuit, Outcome, capability

__all__ = ["ARMED", "Bundle", "Executor", "StoppedError", "load_trust"]

TICK_SECONDS: Final = 0.25
SWITCH_SECONDS: Final = 0.0002  # how long a thread that signs or writes may keep the loop from deciding
ACTION_THREADS: Final = 4  # actions on different targets at once; more would only hide a storm
WRITER_THREADS: Final = 2  # receipts, checkpoints
RENEW_AGAIN_NS: Final = 30_000_000_000  # after a platform that gave no evidence
PATIENCE_SECONDS: Final = 5.0  # how long somebody waits who asks for a change while another one is under way
QUIET_SECONDS: Final = 120.0  # how long arming waits for a moment without a run in flight
HOLD_SECONDS: Final = 1.0  # how long no decision begins for that, and then they may for a while
BETWEEN_SECONDS: Final = 4.0
RENEW_SECONDS: Final = 5.0  # how long an epoch's end waits for them, as long as it may be tried again
CLOSE_SECONDS: Final = 1500.0  # how long closing does: longer than any grace and readiness together
APPROVAL_NS: Final = 60_000_000_000  # what a person approved is decided again at once, and over after that
NO_REASON: Final = "no reason given"


def load_trust(folder: Path) -> Trust:
    """What the node was provisioned with. OSError where it is missing, MalformedError where it is wrong."""
    root = (folder / "trusted_root.json").read_bytes()
    policy = TrustPolicy.parse((folder / "policy.json").read_bytes())
    return Trust(policy, root, hashlib.sha256(root).hexdigest(), Roots.open(folder))


class Executor:
    """One executor on one node. Methods may be called from any thread but the loop's; `close` ends it."""

    def __init__(self, state_dir: Path, config: Config, platform: Platform, node: Node) -> None:
        self.state_dir, self.config, self._node = state_dir, config, node
        self.origin = f"pointcall.dev/log/{config.node}"
        self.trust = load_trust(state_dir / "trust")
        self.journal = Journal.open(state_dir / "journal.db", origin=self.origin)
        anew = self.journal.size == 0
        self._recorder = Recorder(self.journal)
        self._epoch = RunningEpoch(platform, self._recorder, self.origin, lambda: self.config)
        self._stopped: Session | None = None  # disarmed, but its services run
        self._loop = Loop()
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
        self._standing = threading.Lock()
        self._runs = Runs(
            self._loop, self._recorder, self._epoch, self._brake, self._waiting, self._messenger, self._pool,
            self._writer,
        )  # fmt: skip
        self._closed = self._renewing = False
        self._tick_due_ns = self._checkpoint_due_ns = 0
        self._paused_until_ns = 0
        self._acted: list[tuple[str, str, int]] | None = None  # until arming, what was done before: left.times
        self._failed: frozenset[int] = frozenset()  # places in it of what did not succeed
        sys.setswitchinterval(SWITCH_SECONDS)
        self._epoch.open(self._epoch.attest(None, self.trust, datetime.now(UTC)), self.trust, None, (), "boot")
        left.recall_standing(state_dir, self.journal, self._recorder, anew=anew)
        self._take_up()
        self._loop.start(self._runs.in_flight.full, self._runs.drain, self._tick, self._pause, self._detach)

    def _take_up(self) -> None:
        """What an earlier executor left: open intents, a pause that is not over, people who have not answered."""
        found = self._recorder.reconcile()
        now, now_ns = datetime.now(UTC), time.monotonic_ns()
        if found.paused is not None and found.paused.until > now:
            self._paused_until_ns = now_ns + int((found.paused.until - now).total_seconds() * 1e9)
            self._brake.paused = found.paused.reason
            self._runs.state = self._runs.state._replace(
                guard=self._runs.state.guard._replace(paused=found.paused.reason)
            )
        if found.disarmed is not None:
            self._brake.disarmed_by_hand = found.disarmed or NO_REASON
            if self._node.unpin():  # who disarmed or armed last was killed in the middle of it
                self._recorder.record(disarmed(self._brake.disarmed_by_hand, stays=True))
        if gone := self._node.ended():
            self._recorder.record(ended(gone, self.config.mode))
        for run, code in found.escalations.items():
            self._waiting.call(run, (), code, now_ns)
        self._acted, self._failed = left.times(found.acted, now, now_ns), frozenset(found.failed)
        self._runs.state = self._runs.state._replace(guard=guard.recalled(self._runs.state.guard, self._acted))
        left.record_meanwhile(self.state_dir, self._recorder)

    # ---- epochs ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self, patience_s: float = -1) -> Iterator[None]:
        """One change of what is armed at a time, and none once the executor closes.

        ArmingError `arm.busy` where the one before it is not over within `patience_s` (-1: however long it takes): who
        asks over the API must not keep a thread waiting that somebody else needs to say stop.
        """
        if not self._arming.acquire(timeout=patience_s):
            raise ArmingError(
                "another change is not over yet", id="arm.busy", want="one change of what is armed at a time",
                got=f"one that takes longer than {patience_s:g} s", hint="ask again when it is done: pointcall events",
            )  # fmt: skip
        try:
            if self._closed:
                raise StoppedError("the executor is closing")
            yield
        finally:
            self._arming.release()

    def roll_epoch(self) -> None:
        """A new key and fresh evidence now; the armed manifest is judged again under the trust of now.

        RefusedError where it would not be admitted any more: then it is disarmed.
        """
        with self._changing():
            self._renew("asked for")

    def _renew(self, reason: str, patience_s: float | None = None) -> None:
        """`patience_s`: how long to wait for a moment without a run in flight, QUIET_SECONDS where not given."""
        session = self._runs.session
        if session is None:
            attested, trust = self._epoch.attest(None, self.trust, datetime.now(UTC)), self.trust
            with self._quiet(patience_s):
                self._loop.call(lambda: self._epoch.open(attested, trust, None, (), reason))
            return
        try:
            admitted, attested = self._sessions.admit(
                session.bundle, self.trust, session.judged_at(datetime.now(UTC), time.monotonic_ns())
            )
        except RefusedError as refusal:
            if any(check.id == UNANSWERED for check in refusal.verdict.failed):  # it could not be judged at all
                raise ArmingError(
                    "the signatures cannot be verified now", id="arm.environment", got=refusal.got
                ) from None
            self._record_refusal(refusal)
            self._brake.outdate()
            self._loop.call(lambda: self._disarm("the armed manifest is not admitted any more"))
            raise
        with self._quiet(patience_s):
            self._loop.call(lambda: self._continue(session, admitted, attested, reason))

    def _continue(self, session: Session, admitted: Admitted, attested: Attested, reason: str) -> None:
        """On the loop thread: the same session under a new epoch."""
        if self._runs.session is not session:
            return
        self._epoch.open(attested, self.trust, admitted, session.bundle.signatures, reason)
        session.admitted, session.trust = admitted, self.trust
        self._sessions.judged()

    def _renew_in_background(self) -> None:
        """At the end of an epoch's life, from the loop: the pool does it, and the loop goes on."""
        if self._renewing or self._closed:
            return
        self._renewing = True
        self._epoch.due_ns = time.monotonic_ns() + self._epoch.life_ns

        def renew() -> None:
            try:
                with contextlib.suppress(RefusedError, StoppedError), self._changing():
                    last = time.monotonic_ns() > self.evidence_until_ns - int(2 * QUIET_SECONDS * 1e9)
                    self._renew("lifetime", QUIET_SECONDS if last else RENEW_SECONDS)
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
        if isinstance(error, ArmingError) and error.id == "arm.busy":
            want, hint = "a moment without a run in flight", "see which action does not end: pointcall status"
        self._recorder.record(refused("tee.renewal", "the next epoch", want, str(error), hint))
        if self._runs.session is not None and now_ns > self.evidence_until_ns:
            self._disarm_by_itself(Amiss("tee.stale", "evidence of this epoch or the last", "older", hint))

    # ---- arming ----------------------------------------------------------------------------------------------------

    def arm(self, bundle: Bundle, *, by_itself: bool = False) -> Admitted:
        """Verify, attest, admit and arm. A refusal leaves everything as it was and is an entry of the log.

        `by_itself`: no person asks for it now, so not where a person has disarmed (ArmingError `arm.by-hand`). Where
        one asks, ArmingError `arm.busy` while something else is being armed, which says nothing about the manifest and
        is no entry. RefusedError carries every check; ArmingError, ServiceError and KernelError say what this node
        cannot do.
        """
        with self._changing(-1 if by_itself else PATIENCE_SECONDS):
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
                got = ArmingError(
                    "the node cannot do what the manifest needs", id="arm.environment", want="a node that can",
                    got=str(error), hint="see what it names, and `pointcall doctor`; then arm again",
                )  # fmt: skip
                self._recorder.record(refused(got.id, "manifest", got.want, got.got, got.hint))
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
                before = self._runs.session or self._stopped
                started = self._sessions.start_services(session, before, generation, put_back)
                self._loop.call(lambda: self._switch(session, attested, generation, started, by_itself=by_itself))
                put_back.pop_all()
            undo.pop_all()
        self._sessions.commit(session)
        self._keep_standing()
        return admitted

    def require_not_halted(self) -> None:
        """ArmingError `executor.halted` while the kill switch is on."""
        self._brake.require_not_halted()

    def require_not_paused(self) -> None:
        """ArmingError `executor.paused` while somebody has paused the executor."""
        self._brake.require_not_paused()

    def _switch(
        self, session: Session, attested: Attested, generation: int, started: frozenset[int], *, by_itself: bool
    ) -> None:
        """On the loop thread, with no run in flight: first what can fail, then the assignment."""
        self._brake.require(generation)
        self._brake.require_not_halted()
        self._brake.require_not_disarmed(by_itself=by_itself)
        manifest, old = session.admitted.manifest, self._runs.session
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
        memory = {key: value for key, value in self._runs.state.memory.items() if key[0] in same}
        self._runs.timers.keep(same)
        held = guard.circuits_held(self._runs.state.guard, left.forced(session.sensors))
        held = guard.isolations_held(held, left.isolated(session))
        if self._acted is not None:
            held = guard.rows_recalled(held, self._acted, session.armed.rules, self._failed)
        self._runs.state = self._runs.state._replace(
            armed=session.armed, memory=memory, guard=held._replace(approvals={}, unwell=held.unwell - started)
        )
        self._acted = None
        self._runs.session, self._stopped = session, None
        self._sessions.judged()
        self._watch.begin()
        self._watch.count_lost(session.sensors)  # from here on these count: before others take over from them in turn
        self._waiting.forget_asked()
        if old is None:
            left.record_in_kernel(session, self._recorder)
        for record in unseen:
            self._runs.record(record, time.monotonic_ns())

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
        now = {b.name: b.module for b in self._runs.state.armed.runbooks} if self._runs.state.armed else {}
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
        self._keep_standing()

    def _keep_standing(self) -> None:
        with self._standing:  # who arms and who disarms at once: what holds in the end is what stands there
            left.keep_standing(self.state_dir, self.journal, self._recorder, self._brake.disarmed_by_hand or None)

    def _disarm(self, reason: str, *, leave: bool = False, stays: bool = False) -> None:
        """On the loop thread. `stays`: a person asked for it. The entry comes last: before it, nobody was told that it
        is done, and after it nothing is left to be done."""
        new = stays and not self._brake.disarmed_by_hand
        if new:
            self._brake.disarmed_by_hand = reason
        if self._runs.session is None:
            unpinned = not leave and self._node.unpin()  # of an earlier executor: this one has armed nothing
            if unpinned or new:
                self._recorder.record(disarmed(reason, stays=stays))
            return
        self._brake.outdate()  # once more: what the loop decided since somebody asked for this is not begun either
        self._runs.state = self._runs.state._replace(armed=None, guard=self._runs.state.guard._replace(approvals={}))
        self._runs.timers.keep(frozenset())
        self._waiting.forget_asked()
        self.drills.disarmed(self._runs.session)
        self._thaw_all(self._runs.session)
        self._drop(self._runs.session.sensors, leave=leave)
        self._stopped, self._runs.session = self._runs.session, None
        self._recorder.record(disarmed(reason, stays=stays))

    def _thaw_all(self, session: Session) -> None:
        """Nobody who is not armed holds a service still."""
        leases = self._runs.state.guard.leases
        frozen = [int(target[1]) for action, *target in leases if action == capability(Freeze)]
        if frozen:
            self._runs.thaw(session, frozen)

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
        self._runs.state = self._runs.state._replace(guard=self._runs.state.guard._replace(paused=paused))
        self._paused_until_ns = until_ns
        self._brake.pause(paused)
        self._recorder.record(entry.Config(what=what, detail=detail))
        if paused:
            self.drills.paused()

    def reload(self, config: Config) -> None:
        """Take over settings that can change while running, and read the trust and notices folders again.

        Another trust policy or notice means a new epoch, and judging the armed manifest again: RefusedError if it is
        disarmed by that. ConfigError `config.restart` where a setting needs a new process, `config.trust` where the
        trust folder cannot be read, MalformedError where it is wrong: then everything stays as it was. PlatformError or
        OSError where there is no evidence now, ArmingError `arm.busy` where the runs in flight do not end: the new
        trust holds from the next epoch on, tried again soon.
        """
        changed = [name for name in RESTART if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise ConfigError("a setting needs a restart", id="config.restart", got=", ".join(changed))
        try:
            trust = load_trust(self.state_dir / "trust")
        except OSError as error:
            raise ConfigError("the trust folder cannot be read", id="config.trust", got=str(error)) from error
        with self._changing():
            self.config, before, self.trust = config, self.trust, trust
            self._recorder.record(entry.Config(what="settings", detail={"policy": trust.policy.sha256}))
            if trust != before or (self._runs.session is not None and self._sessions.other_notices):
                try:
                    self._renew("the trust changed")
                except (PlatformError, ArmingError, OSError) as error:
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
            if self.failure is None and not self._closed:
                self._recorder.record(refused(refusal.id, what, refusal.want, refusal.got, refusal.hint))
            raise

    def _by_hand(self, action: OpenCircuit | CloseCircuit, reason: str) -> None:
        session = self._runs.session
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
        if done.outcome is not Outcome.APPLIED:
            raise StoppedError(
                "it was done, but does not hold", id="circuit.unconfirmed", want=done.postcondition or "that it holds",
                got=str(done.detail.get("amiss", done.outcome.name.lower())), hint="see the log: pointcall events",
            )  # fmt: skip

    @contextlib.contextmanager
    def beginning(self, session: Session) -> Iterator[None]:
        """Around what a drill does at once: nobody hears that everything has stopped while it begins.

        StoppedError or ArmingError where somebody has said stop meanwhile.
        """
        with self._brake.lock:
            if self._runs.session is not session:
                raise StoppedError(
                    "what allowed it is not armed any more", id="executor.disarmed", hint="pointcall arm"
                )
            self._brake.require_not_halted()
            self._brake.require_not_paused()
            yield

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
        ArmingError `executor.halted`, `arm.busy`. Where another rule holds the call back, the approval is over.
        """
        with self.refusing("approval"):
            return self._approve(bundle)

    def _approve(self, bundle: bytes) -> str:
        session = self._runs.session
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
        with self._changing(PATIENCE_SECONDS):  # no run begins while another manifest or epoch takes over
            self._brake.require_not_halted()
            self.journal.put_blob(bundle)
            self._loop.call(lambda: self._approved(session, approval))
        return approval.body.run

    def _approved(self, session: Session, approval: Approval) -> None:
        body, now_ns = approval.body, time.monotonic_ns()
        asked = self._waiting.take(body.run, body.index, now_ns) if self._runs.session is session else None
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
        self._runs.decide_again(run, action, until_ns, now_ns)

    def escalations(self) -> tuple[Escalation, ...]:
        """Whom nobody has answered yet."""
        return tuple(self._waiting.escalations.values())

    def acknowledge(self, run: str, reason: str) -> None:
        """A person has seen it. StoppedError `escalation.unknown` where nobody was called for this run."""
        self._loop.call(lambda: self._messenger.acknowledge(run, reason))

    # ---- what others may look at and write -------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state of the core, replaced whole."""
        return self._runs.state

    @property
    def on_receipt(self) -> Callable[[Run], None]:
        """Called with each run whose receipt is durable, not on the loop."""
        return self._runs.on_receipt

    @on_receipt.setter
    def on_receipt(self, told: Callable[[Run], None]) -> None:
        self._runs.on_receipt = told

    @property
    def on_record(self) -> Callable[[KernelEvent], None]:
        """Called with each kernel record, on the loop: it must not wait."""
        return self._runs.on_record

    @on_record.setter
    def on_record(self, told: Callable[[KernelEvent], None]) -> None:
        self._runs.on_record = told

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
        session = self._runs.session
        return session.admitted if session else None

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
        session = self._runs.session
        return session.sensors.programs() if session else ()

    def circuits(self) -> tuple[CircuitState, ...]:
        """Every armed circuit as the kernel has it."""
        session = self._runs.session
        return session.sensors.states() if session else ()

    def running_services(self) -> Mapping[str, int]:
        """Declared services and the pid of each, 0 where it does not run."""
        session = self._runs.session or self._stopped
        return session.services.pids() if session else {}

    @property
    def admitted_last(self) -> Admitted | None:
        """What is armed, or was until it was disarmed: what the running services are. None if nothing was yet."""
        session = self._runs.session or self._stopped
        return session.admitted if session else None

    @property
    def session(self) -> Session | None:
        """What is armed, running; None if nothing is."""
        return self._runs.session

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
        self._runs.state = self._runs.state._replace(armed=None)
        if self._runs.session is not None:
            # A storage may be back soon: what is pinned stays for the next executor, as after SIGKILL.
            leave = self.config.pin and isinstance(error, StorageError)
            with contextlib.suppress(Exception):
                self._runs.session.sensors.stop(leave=leave)
            with contextlib.suppress(Exception):
                self._runs.session.sensors.leave()
        self._runs.in_flight.give_up()

    def _pause(self) -> float:
        """How long the loop waits at most, in seconds."""
        return self._runs.pause(TICK_SECONDS)

    @contextlib.contextmanager
    def _quiet(self, patience_s: float | None = None) -> Iterator[None]:
        """No decision begins, and none is in flight. ArmingError `arm.busy` if the runs in flight do not end.

        Where one takes long, decisions are held for a second at a time: nobody goes without them for its sake.
        """
        in_flight, within_s = self._runs.in_flight, QUIET_SECONDS if patience_s is None else patience_s
        deadline_ns = time.monotonic_ns() + int(within_s * 1e9)
        while True:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            with self._held():
                if in_flight.ended_within(max(0.0, min(HOLD_SECONDS, left_s))):
                    yield
                    return
            if left_s <= HOLD_SECONDS or self._closed:
                raise ArmingError(
                    "runs in flight do not end", id="arm.busy", want=f"a moment without one in {within_s:g} s",
                    got=f"{in_flight.count} runs", hint="see which action takes so long: pointcall status",
                )  # fmt: skip
            in_flight.ended_within(min(BETWEEN_SECONDS, left_s - HOLD_SECONDS))

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """No decision begins."""
        self._loop.call(lambda: self._loop.hold(True))
        try:
            yield
        finally:
            with contextlib.suppress(StoppedError):
                self._loop.call(lambda: self._loop.hold(False))

    def _tick(self, now_ns: int) -> None:
        """What is due, at the end of each turn."""
        self._runs.fire(now_ns)
        if now_ns < self._tick_due_ns:
            return
        self._tick_due_ns = now_ns + int(TICK_SECONDS * 1e9)
        self._recorder.watch()  # first: a pause that could not be written does not end as if it had been
        if self._paused_until_ns and now_ns >= self._paused_until_ns:
            self._set_paused("", 0, "resumed", {"reason": "the pause is over"})
        if self._runs.session is not None:
            self._watch.count_lost(self._runs.session.sensors)
        self._check_armed(now_ns)
        session = self._runs.session or self._stopped
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
        """Whether what is armed may still be."""
        session = self._runs.session
        amiss = self._watch.amiss(session, now_ns) if session is not None else None
        if session is not None and amiss is None and now_ns > self.evidence_until_ns + RENEW_AGAIN_NS:
            hint = "see what the platform offers: pointcall attest probe"  # it does not even say no
            amiss = Amiss("tee.stale", "evidence of this epoch or the last", "older", hint)
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

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, *, stop_services: bool = False, reason: str = "stopped") -> None:
        """Disarm, let running actions end, close the epoch. `stop_services`: also destroy the declared services."""
        if self._closed:
            return
        with contextlib.suppress(PointcallError):
            self.drills.close()
        self._closed = True
        if (telling := self._runs.session or self._stopped) is not None:
            telling.channels.hurry()  # a channel that nobody answers must not hold up the end
        self._node.hurry()
        self._brake.outdate()
        with self._arming, contextlib.suppress(PointcallError):
            self._loop.call(lambda: self._disarm(reason, leave=self.config.pin))
            self._runs.in_flight.ended_within(CLOSE_SECONDS)
        self._pool.shutdown(wait=True)
        self._loop.stop()  # before the messenger: it gives it work
        self._writer.shutdown(wait=True)  # of an action that took longer than anything may, too
        self._messenger.close()
        session = self._runs.session or self._stopped
        if stop_services and session is not None:
            try:
                session.services.stop_all()
            except (PointcallError, OSError) as error:
                want, hint = "every service stopped", "end what runs by hand"
                with contextlib.suppress(PointcallError):
                    self._recorder.record(refused("service.left", "services", want, str(error), hint))
        self._node.shutdown()
        if self.failure is None:
            try:
                self._recorder.close(reason)
            except PointcallError as error:
                self._loop.failure = error
        self.journal.close()
        self._loop.close()
