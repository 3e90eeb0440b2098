"""The doing of one action: perform it, look whether it holds, take it back where it does not; its intent and outcome.

Not here: what each action does (actions/), whether it may be done (core/guard.py), when and where (runs.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from pointcall_attest import entry
from pointcall_executor.actions import KERNEL_LEASES, REGISTRY
from pointcall_executor.actions.world import Done, Verb, World
from pointcall_executor.arming import names_of
from pointcall_executor.core import guard
from pointcall_executor.journal import Journal
from pointcall_executor.recorder import Recorder
from pointcall_executor.run import Act, Run, arguments, grant_of
from pointcall_executor.session import Session
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Action, Outcome


def apply(journal: Journal, run: Run, act: Act, action: Action) -> None:
    """Do it, and keep what became of it. What the system refuses is an outcome, not an exception.

    JournalError where nothing can be recorded any more: then it is not done.
    """
    act.started_ns = time.monotonic_ns()
    journal.require()
    try:
        done = performed(act, action, world_of(run.session))
    except (PointcallError, OSError) as error:
        detail = error.as_dict() if isinstance(error, PointcallError) else {"message": str(error)}
        done = Done(Outcome.FAILED, act.target, {"error": detail})
    act.ended_ns = time.monotonic_ns()
    act.outcome, act.target, act.detail = done.outcome, done.target, done.detail
    act.undo, act.postcondition = done.undo, done.postcondition


def world_of(session: Session) -> World:
    """What the actions of this session can reach, now."""
    cgroups = session.topology.cgroups
    return World(session.services, session.sensors, session.channels, time.monotonic_ns(), cgroups)


def performed(act: Act, action: Action, world: World) -> Done:
    """Do it and look whether it holds; where it does not, take it back."""
    verb = REGISTRY[act.call.action]
    done = verb.perform(action, world)
    act.applied_ns = time.monotonic_ns()
    found = verb.amiss(action, world) if done.outcome is Outcome.APPLIED and verb.amiss is not None else ""
    if not found:
        return done
    detail = {**done.detail, "amiss": found, "rolled_back": _rolled_back(verb, action, world)}
    return replace(done, outcome=Outcome.UNCONFIRMED, detail=detail, undo=None)


def _rolled_back(verb: Verb, action: Action, world: World) -> str:
    if verb.undo is None:
        return "it cannot be taken back"
    try:
        verb.undo(action, world)
    except (PointcallError, OSError) as error:
        return f"failed: {error}"
    return "yes"


def target_of(session: Session, action: Action) -> str:
    """What an action is about, in words."""
    target = guard.target_of(action)
    if target[0] == "service":
        return session.topology.names.get(int(target[1]), str(target[1]))
    if target[0] == "channel":
        return names_of(session.admitted.manifest).get(int(target[1]), str(target[1]))
    return ":".join(str(part) for part in target[1:]) or str(target[0])


def intent(act: Act, names: Mapping[int, str], grant: str = "") -> entry.Intent:
    """The entry that it is about to be tried. `grant`: on whose word, where it is not a runbook's."""
    args = arguments(act, names)
    return entry.Intent(action=act.call.action, target=act.target, args=args, grant=grant or grant_of(act))


def outcome(act: Act) -> entry.OutcomeBody:
    """The entry of what became of it."""
    assert act.outcome is not None
    return entry.OutcomeBody(
        action=act.call.action,
        target=act.target,
        outcome=act.outcome.name.lower(),  # type: ignore[arg-type]
        detail=dict(act.detail),
        postcondition=act.postcondition,
        undo=act.undo,
    )


def complete(recorder: Recorder, run: Run) -> None:
    """What is not yet recorded of a run whose actions are over, then its receipt."""
    for act in run.acts:
        if act.action is None:
            continue
        if act.intent is None and act.outcome in (Outcome.REFUSED, Outcome.MONITORED):
            continue
        if act.intent is None and act.call.action in KERNEL_LEASES:
            act.intent = recorder.record(intent(act, run.epoch.names), run.id)
        recorder.submit(outcome(act), run.id)
    run.receipt_index = recorder.receipt(run.receipt())
