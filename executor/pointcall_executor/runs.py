"""The runs: from a kernel record to the receipt. Asks the core, performs what it says, writes what became of it.

The loop owns the state of the core and the session under which it decides. Kernel leases are applied on the loop; what
needs a durable intent runs on the pool, receipts are written beside both. Not here: what is armed, and who says stop.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, assert_never

from pointcall_attest.run_id import run_id
from pointcall_executor import acting
from pointcall_executor.actions import KERNEL_LEASES, WITHOUT_INTENT
from pointcall_executor.brake import Brake
from pointcall_executor.core import guard
from pointcall_executor.core.event import KernelEvent, decode
from pointcall_executor.core.step import (
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
from pointcall_executor.in_flight import InFlight
from pointcall_executor.loop import Loop
from pointcall_executor.messenger import Messenger
from pointcall_executor.recorder import Recorder, refused
from pointcall_executor.run import Act, Run
from pointcall_executor.running_epoch import RunningEpoch
from pointcall_executor.session import Session
from pointcall_executor.timers import TimerDue, Timers
from pointcall_executor.waiting import Waiting
from pointcall_runbook.decision import Trap
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import (
    MAX_ACTIONS,
    Action,
    Again,
    Escalate,
    Freeze,
    Outcome,
    Remember,
    Service,
    Timer,
    capability,
)

BATCH: Final = 256  # records of each ring in one turn of the loop: somebody may want to say stop


class Runs:
    """All on the loop thread, but for what the pool and the writer are given."""

    def __init__(
        self, loop: Loop, recorder: Recorder, epoch: RunningEpoch, brake: Brake, waiting: Waiting, messenger: Messenger,
        pool: ThreadPoolExecutor, writer: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self._loop, self._recorder, self._epoch, self._brake = loop, recorder, epoch, brake
        self._waiting, self._messenger, self._pool, self._writer = waiting, messenger, pool, writer
        self._journal = recorder.journal
        self.state = State()
        self.session: Session | None = None  # what is armed
        self.on_receipt: Callable[[Run], None] = lambda _run: None
        self.on_record: Callable[[KernelEvent], None] = lambda _record: None  # it must not wait
        self.in_flight = InFlight(loop)
        self._by_id: dict[str, Run] = {}  # those of which an action is not over
        self.timers = Timers()
        self._random = b""

    def pause(self, seconds: float) -> float:
        """How long to wait until the next timer is due, at most so many seconds."""
        due_ns = self.timers.next_ns
        if due_ns is None or self._loop.waits():
            return seconds
        return max(0.0, min(seconds, (due_ns - time.monotonic_ns()) / 1e9))

    @staticmethod
    def thaw(session: Session, numbers: Sequence[int]) -> None:
        """Let these services go on, beside the loop: who recreates one keeps it locked for as long as that takes."""

        def thawed() -> None:
            for number in numbers:
                with contextlib.suppress(PointcallError, OSError):
                    session.services.thaw(number)

        threading.Thread(target=thawed, name="thaw", daemon=True).start()

    def fire(self, now_ns: int) -> None:
        """The timers that are due."""
        while self.timers.due(now_ns) and not self._loop.waits():
            self._fire(self.timers.take())

    def decide_again(self, run: Run, action: Action, until_ns: int, now_ns: int) -> None:
        """About the event of this run, its approved action let through once."""
        judged = guard.approved(self.state.guard, run.runbook.name, action, until_ns)
        self.state = self.state._replace(guard=judged)
        try:
            self._advance(Happened(run.event, run.subject, now_ns, only=run.runbook.name), "approval", now_ns)
        finally:  # it was for that run, and for no other of this runbook
            self.state = self.state._replace(guard=self.state.guard._replace(approvals={}))

    # ---- one record through to its actions -------------------------------------------------------------------------

    def drain(self, received_ns: int) -> None:
        """What the sensors have seen."""
        session = self.session
        if session is not None:
            for record in session.sensors.drain(BATCH):
                self.record(record, received_ns)

    def record(self, raw: bytes, received_ns: int) -> None:
        """One kernel record, through to the actions that it leads to."""
        session = self.session
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
                run = self._by_id[id]
                self._perform(run, run.acts[index], action)
            case Withhold(id, index, action):
                run = self._by_id[id]
                act = run.acts[index]
                act.action, act.target, act.outcome = action, acting.target_of(run.session, action), Outcome.MONITORED
                act.over = True
            case Refuse(id, index, action, refusal):
                run = self._by_id[id]
                self._refuse(run, run.acts[index], action, refusal)
                run.acts[index].over = True
            case _:
                assert_never(effect)

    def _decide(self, effect: Decide, sensor: str, received_ns: int) -> None:
        """Run the handler and let the core judge what it wants."""
        session, epoch = self.session, self._epoch
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
        self._by_id[run.id] = run
        self.in_flight.take_off()
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
            self._send(run, act, action, action.channel.number)  # type: ignore[attr-defined]
        elif name in KERNEL_LEASES or name in WITHOUT_INTENT:
            acting.apply(self._journal, run, act, action)
            self._ended(run, act)
        else:
            self._pool.submit(self._durable, run, act, action)

    def _send(self, run: Run, act: Act, action: Action, number: int) -> None:
        """Tell a channel that may be slow, beside everything else."""

        def tell() -> bool:
            acting.apply(self._journal, run, act, action)
            return act.outcome is Outcome.APPLIED

        def skip(why: str) -> None:
            act.outcome, act.detail = Outcome.FAILED, {"error": why}

        against = self._messenger.send(number, tell, skip, lambda: self._ended(run, act))
        if against:
            skip(against)
            self._ended(run, act)

    def _built_in(self, run: Run, act: Act, action: Remember | Again) -> None:
        """The core's own actions: `remember` is done by the step itself, `again` is a timer here."""
        act.started_ns = act.ended_ns = time.monotonic_ns()
        act.outcome, act.over = Outcome.APPLIED, True
        act.postcondition = (
            "a timer is set" if isinstance(action, Again) else "the next decision starts from this value"
        )
        if isinstance(action, Again):
            number = getattr(run.event, "service", Service(0)).number
            due_ns = act.started_ns + action.after
            against = self.timers.set(TimerDue(due_ns, action.tag, run.runbook.name, run.subject, number))
            if against:
                act.outcome, act.detail, act.postcondition = Outcome.FAILED, {"error": against}, ""

    def _fire(self, timer: TimerDue) -> None:
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
                acting.apply(self._journal, run, act, action)
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
            if isinstance(act.action, Freeze) and run.generation != self._brake.generation:
                self.thaw(run.session, [act.action.service.number])  # disarmed while it was under way
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
            self._by_id.pop(run.id, None)
            self._writer.submit(self._finish, run)

    def _finish(self, run: Run) -> None:
        """Beside the loop: what is not yet recorded of the run, then its receipt."""
        try:
            acting.complete(self._recorder, run)
        except BaseException as error:
            self._loop.fail(error)
            return
        finally:
            self.in_flight.land()
        self.on_receipt(run)
