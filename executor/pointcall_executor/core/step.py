"""The life of a run as a pure step: what happened + state -> new state + what the shell must do next.

    Happened(event) -> Decide*          a trigger matched: run these handlers with these arguments
    Decided(run, calls) -> Perform* | Withhold* | Refuse*       the guard spoke about each call
    Ended(run, action, outcome) -> Decide*                      its target is free; ActionDone may continue the runbook

No clock: `now_ns` (CLOCK_MONOTONIC) comes in with each input. No I/O: the shell (runs.py) performs and reports back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple, assert_never

from pointcall_executor.core import guard
from pointcall_executor.core.guard import Grant, GuardState, Limits, Refusal, Request, Rules
from pointcall_runbook.vocabulary import (
    MAX_ACTIONS,
    Action,
    ActionDone,
    ActionKind,
    Call,
    Event,
    Mode,
    Outcome,
    Remember,
    Service,
    capability,
    slots,
)

# Actions that say nothing worth deciding about when they end; they never start an `ActionDone`.
SILENT = frozenset({"remember", "again", "notify", "escalate"})
MEMORY_MAX: Final = 4096  # (runbook, target) with remembered slots; clients can name destinations without end


@dataclass(frozen=True, slots=True)
class Runbook:
    """One armed runbook, as the manifest and the verified module state it."""

    name: str
    version: str
    module: str  # sha256
    events: frozenset[str]
    grant: Grant
    mode: Mode
    limits: Limits = field(default_factory=Limits)
    parameters: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()  # initial values of its remembered slots
    ranges: tuple[tuple[int, int], ...] = ()  # inclusive bounds of each slot


@dataclass(frozen=True, slots=True)
class Armed:
    """Everything that is armed. Built from an `Admitted` manifest and nothing else (arming.py)."""

    manifest: str  # sha256
    runbooks: tuple[Runbook, ...]
    rules: Rules


class State(NamedTuple):
    """The whole memory of the core. `memory` holds remembered slots by (runbook, target)."""

    armed: Armed | None = None
    guard: GuardState = GuardState()
    memory: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType({})


class Happened(NamedTuple):
    """An event with its facts. `subject` names what it is about, for remembered slots: a service or a destination.

    `only` is the runbook whose timer it is; empty: every runbook that handles the event.
    """

    event: Event
    subject: str
    now_ns: int
    only: str = ""


class Decided(NamedTuple):
    """A handler returned these calls."""

    run: str
    runbook: Runbook
    subject: str
    calls: tuple[Call, ...]
    now_ns: int


class Ended(NamedTuple):
    """An action of a run ended."""

    run: str
    runbook: Runbook
    subject: str
    action: Action
    outcome: Outcome
    now_ns: int


Input = Happened | Decided | Ended


class Decide(NamedTuple):
    """Run the handler for `event` with these i64 arguments."""

    runbook: Runbook
    event: Event
    subject: str
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Perform:
    """Do this action; the guard let it through."""

    run: str
    index: int
    action: Action


@dataclass(frozen=True, slots=True)
class Withhold:
    """The guard would let it through, but the runbook is in mode `monitor`: record it, do nothing."""

    run: str
    index: int
    action: Action


@dataclass(frozen=True, slots=True)
class Refuse:
    """Not done, and why. `action` is None where the call itself was not well-formed."""

    run: str
    index: int
    action: Action | None
    refusal: Refusal


Effect = Decide | Perform | Withhold | Refuse


def _decide(state: State, runbook: Runbook, event: Event, subject: str) -> Decide:
    remembered = state.memory.get((runbook.name, subject), runbook.slots)
    return Decide(runbook, event, subject, slots(event) + runbook.parameters + remembered)


def happened(state: State, happening: Happened) -> tuple[State, tuple[Effect, ...]]:
    """Every armed runbook that handles the event decides. Nothing is armed, nothing happens."""
    if state.armed is None:
        return state, ()
    name, armed = type(happening.event).__name__, state.armed
    state = State(armed, guard.counted(state.guard, happening.now_ns, armed.rules), state.memory)
    chosen = [r for r in armed.runbooks if name in r.events and happening.only in ("", r.name)]
    return state, tuple([_decide(state, r, happening.event, happening.subject) for r in chosen])


def _typed(call: Call) -> Action | Refusal:
    try:
        return call.typed()
    except ValueError as error:
        return Refusal("guard.call", "a known action with arguments in range", str(error), "the module is wrong")


def _rememberable(book: Runbook, action: Remember) -> Remember | Refusal:
    """The verifier cannot prove which slot a module writes, nor what; the next decision would be made from it."""
    if action.slot < len(book.ranges):
        lo, hi = book.ranges[action.slot]
        if lo <= action.value <= hi:
            return action
    want = f"one of {len(book.ranges)} declared slots, in its range"
    return Refusal("guard.call", want, f"slot {action.slot} = {action.value}", "the module is wrong")


def _remembered(state: State, runbook: Runbook, subject: str, action: Remember) -> State:
    key, memory = (runbook.name, subject), dict(state.memory)
    values = list(memory.pop(key, runbook.slots))
    values[action.slot] = action.value
    memory[key] = tuple(values)  # at the end: what was remembered longest ago is the first
    if len(memory) > MEMORY_MAX:
        del memory[next(iter(memory))]
    return state._replace(memory=memory)


def _judged(state: State, armed: Armed, decided: Decided, index: int, call: Call) -> tuple[State, Effect]:
    action = _typed(call)
    if isinstance(action, Remember):
        action = _rememberable(decided.runbook, action)
    if isinstance(action, Refusal):
        return state, Refuse(decided.run, index, None, action)
    book = decided.runbook
    request = Request(book.name, decided.run, action, book.mode, book.grant, book.limits, decided.now_ns)
    refusal = guard.judge(state.guard, request, armed.rules)
    if refusal is not None:
        return state, Refuse(decided.run, index, action, refusal)
    if book.mode == "monitor":
        return state, Withhold(decided.run, index, action)
    if isinstance(action, Remember):
        state = _remembered(state, book, decided.subject, action)
    return state._replace(guard=guard.permitted(state.guard, request, armed.rules)), Perform(decided.run, index, action)


def decided(state: State, decision: Decided) -> tuple[State, tuple[Effect, ...]]:
    """The guard's word about each call, in the order in which they were made."""
    if state.armed is None:
        why = Refusal("guard.disarmed", "armed", "disarmed while deciding", "arm a manifest")
        return state, tuple(Refuse(decision.run, i, None, why) for i in range(len(decision.calls)))
    effects: list[Effect] = []
    for index, call in enumerate(decision.calls):
        if index >= MAX_ACTIONS:
            why = Refusal("guard.too-many", f"at most {MAX_ACTIONS} actions", str(len(decision.calls)), "decide less")
            effects.append(Refuse(decision.run, index, None, why))
            continue
        state, effect = _judged(state, state.armed, decision, index, call)
        effects.append(effect)
    return state, tuple(effects)


def ended(state: State, end: Ended) -> tuple[State, tuple[Effect, ...]]:
    """Free the target; where the runbook is still armed as it was and has an `ActionDone` handler, let it go on."""
    state = state._replace(guard=guard.ended(state.guard, end.run, end.action))
    name = capability(type(end.action))
    if state.armed is None or end.runbook not in state.armed.runbooks:
        return state, ()
    if name in SILENT or "ActionDone" not in end.runbook.events:
        return state, ()
    service = getattr(end.action, "service", Service(0))
    restarts = state.guard.history.count(("restart", service.number), end.now_ns)
    event = ActionDone(end.now_ns, ActionKind[name.upper()], end.outcome, service, restarts)
    return state, (_decide(state, end.runbook, event, end.subject),)


def step(state: State, happening: Input) -> tuple[State, tuple[Effect, ...]]:
    """One step of the core."""
    match happening:
        case Happened():
            return happened(state, happening)
        case Decided():
            return decided(state, happening)
        case Ended():
            return ended(state, happening)
        case _:
            assert_never(happening)
