"""What an earlier executor left: what its log says it did, what the kernel still holds, what came while none ran.

Not here: how the log is read (recorder.py), and what follows for the state (daemon.py, core/guard.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_executor import acting, probes, standing
from pointcall_executor.arming import names_of
from pointcall_executor.core.breaker import State
from pointcall_executor.epoch import NOTHING
from pointcall_executor.halt import halted
from pointcall_executor.journal import Journal
from pointcall_executor.node import Sensors
from pointcall_executor.recorder import Recorder, disarmed, refused
from pointcall_executor.run import Act
from pointcall_executor.session import Session
from pointcall_executor.sessions import ARMED
from pointcall_runbook.vocabulary import Action, Address, Call, Isolate, OpenCircuit, Outcome, Service


def times(acted: Iterable[tuple[str, str, datetime]], now: datetime, now_ns: int) -> list[tuple[str, str, int]]:
    """(action, target, when by CLOCK_MONOTONIC): what the log says in wall-clock time, none of it later than now."""
    ages = ((action, target, int((now - at).total_seconds() * 1e9)) for action, target, at in acted)
    return [(action, target, now_ns - max(0, age_ns)) for action, target, age_ns in ages]


def forced(sensors: Sensors) -> list[tuple[Address, int, int]]:
    """(address, port, until when) of every circuit that is forced open now."""
    found = ((c.destination.address, c.destination.port, c.word) for c in sensors.states())
    held = ((address, port, word.time_us * 1000) for address, port, word in found if word.state is State.FORCED)
    now_ns = time.monotonic_ns()  # a lease that is over is in the word until somebody connects
    return [(address, port, until_ns) for address, port, until_ns in held if until_ns > now_ns]


def isolated(session: Session) -> dict[int, int]:
    """Service number -> until when it is isolated, of those that are declared."""
    owners, found = session.topology.cgroups, session.sensors.isolations()
    return {owners[cgroup_id]: until_ns for cgroup_id, until_ns in found.items() if cgroup_id in owners}


def record_meanwhile(state_dir: Path, recorder: Recorder) -> None:
    """What came while no executor ran: a halt, unmeasured probes."""
    held = halted(state_dir)
    if held is not None:
        recorder.record(entry.Config(what="halted", detail={"reason": held.reason, "since": held.since}))
    for body in probes.pending(state_dir):
        what = body.pop("what", "")
        recorder.record(entry.Config(what=f"unmeasured probe {what}", detail={**body, "measured": "no"}))
    probes.taken(state_dir)


def recall_standing(state_dir: Path, journal: Journal, recorder: Recorder, *, anew: bool) -> None:
    """Let a log that is begun anew know what the one before did, if there was one: how this node stands. One that was
    begun anew and does not know what was armed was cut off before that, which comes last."""
    found = standing.read(state_dir) if anew or journal.highest_sequence(ARMED) is None else None
    if found is None or not (anew or found.manifest is not None):
        return
    detail: dict[str, JsonValue] = {"sequence": found.sequence, "manifest": found.manifest or NOTHING}
    recorder.record(entry.Config(what="the log before this one is gone", detail=detail))
    if found.disarmed is not None:
        recorder.record(disarmed(found.disarmed, stays=True))
    if found.manifest is not None:
        journal.raise_sequence(ARMED, found.sequence, found.manifest)


def keep_standing(state_dir: Path, journal: Journal, recorder: Recorder, disarmed_by_hand: str | None) -> None:
    """Write down how this node stands, for a log that may be begun anew. Where that fails, the log says so."""
    reason = None if disarmed_by_hand is None else disarmed_by_hand[: standing.MAX_REASON_CHARS]
    now = standing.Standing(
        sequence=journal.highest_sequence(ARMED) or 0, manifest=journal.sequence_digest(ARMED), disarmed=reason
    )
    try:
        standing.keep(state_dir, now)
    except OSError as error:
        want, hint = "what a new log would have to know, on disk", "make room; this log has it meanwhile"
        recorder.record(refused("executor.standing", standing.FILE, want, str(error), hint))


def record_in_kernel(session: Session, recorder: Recorder) -> None:
    """Circuits and isolations that an executor before this one left pinned: their slot was the intent."""
    now_ns = time.monotonic_ns()
    found: list[tuple[Action, int, str]] = [
        (OpenCircuit(address, port, max(0, until_ns - now_ns)), until_ns, "found held open")
        for address, port, until_ns in forced(session.sensors)
    ]
    found += [
        (Isolate(Service(number), max(0, until_ns - now_ns)), until_ns, "found isolated")
        for number, until_ns in isolated(session).items()
    ]
    names = names_of(session.admitted.manifest)
    for action, until_ns, reason in found:
        act = Act(0, Call.of(action), action, target=acting.target_of(session, action))
        recorder.record(acting.intent(act, names, grant="kernel"))
        act.outcome, act.detail = Outcome.APPLIED, {"until_ns": str(until_ns), "reason": reason}
        recorder.record(acting.outcome(act))
