"""The guard: between a decision and its action. One table of rules, read from top to bottom; the first that objects
refuses. Pure: time comes in with the request, the state goes in and out.

Each refusal names its rule (a stable id, docs/checks.md), what was wanted, what was found and what would allow it.
Words follow Node Healthcheck. Spec: DESIGN section 4, docs/spec/guard.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pointcall_executor.core.history import History
from pointcall_runbook.vocabulary import (
    Action,
    Address,
    CloseCircuit,
    KillConnections,
    Mode,
    Network,
    OpenCircuit,
    Recreate,
    capability,
)

MINUTE_NS: Final = 60_000_000_000
Target = tuple[str | int, ...]

# Actions that change nothing outside the executor: never held back by limits that protect services.
HARMLESS: Final = frozenset({"notify", "escalate", "remember", "again"})


@dataclass(frozen=True, slots=True)
class Grant:
    """What one runbook may do: from the manifest."""

    actions: frozenset[str] = frozenset()
    services: frozenset[int] = frozenset()
    channels: frozenset[int] = frozenset()
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The guard's limits for the whole node: from the manifest. `None` means no limit of that kind."""

    actions_per_minute: int = 30  # over all runbooks: more is a storm
    storm_cooldown_ns: int = 5 * MINUTE_NS
    services_at_once: int = 1
    circuits_at_once: int = 16
    holdoff_ns: int = 1_000_000_000  # between two recreations of one service; doubles with each in the hour
    holdoff_max_ns: int = 10 * MINUTE_NS
    never_touch_services: frozenset[int] = frozenset()
    never_touch_networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One action that a decision asks for."""

    runbook: str
    run: str
    index: int
    action: Action
    mode: Mode
    grant: Grant
    per_minute: int
    now_ns: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an action did not happen. `rule` is stable."""

    rule: str
    want: str
    got: str
    hint: str


@dataclass(frozen=True, slots=True)
class GuardState:
    """What the guard remembers. `busy` maps a target in flight to the run that holds it."""

    paused: str = ""
    storm_until_ns: int = 0
    busy: Mapping[Target, str] = field(default_factory=dict)
    history: History = field(default_factory=History)


def target_of(action: Action) -> Target:
    """What an action acts on; two actions with the same target never run at once."""
    match action:
        case OpenCircuit(address, port) | CloseCircuit(address, port) | KillConnections(address, port):
            return ("circuit", str(address), port)
        case _ if hasattr(action, "service"):
            return ("service", action.service.number)
        case _ if hasattr(action, "channel"):
            return ("channel", action.channel.number)
        case _:
            return ("runbook",)


def _address(action: Action) -> Address | None:
    return getattr(action, "address", None)


def _service(action: Action) -> int | None:
    service = getattr(action, "service", None)
    return None if service is None else service.number


def _paused(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if not state.paused:
        return None
    return Refusal("guard.paused", "not paused", f"paused: {state.paused}", "pointcall resume")


def _action_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    name = capability(type(request.action))
    if name in request.grant.actions:
        return None
    granted = ", ".join(sorted(request.grant.actions)) or "nothing"
    return Refusal("guard.grant-action", granted, name, "add the action to the runbook's grants in the manifest")


def _service_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    number = _service(request.action)
    if number is None or number in request.grant.services:
        return None
    got = "no service" if number == 0 else f"service {number}"
    return Refusal("guard.grant-service", "a granted service", got, "add the service to the runbook's grants")


def _channel_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    channel = getattr(request.action, "channel", None)
    if channel is None or channel.number in request.grant.channels:
        return None
    hint = "add the channel to the runbook's grants"
    return Refusal("guard.grant-channel", "a granted channel", f"channel {channel.number}", hint)


def _network_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    address = _address(request.action)
    if address is None or any(address in net for net in request.grant.networks):
        return None
    nets = ", ".join(n.text for n in request.grant.networks) or "no network"
    return Refusal("guard.grant-network", nets, str(address), "add the network to the runbook's grants")


def _never_touch(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    address, number = _address(request.action), _service(request.action)
    listed = number in rules.never_touch_services or (
        address is not None and any(address in net for net in rules.never_touch_networks)
    )
    if not listed:
        return None
    got = str(address) if address is not None else f"service {number}"
    return Refusal("guard.never-touch", "a target outside the never-touch list", got, "act by hand, or change the list")


def _one_at_a_time(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    holder = state.busy.get(target_of(request.action))
    if holder is None or capability(type(request.action)) in HARMLESS:
        return None
    return Refusal("guard.busy", "no action in flight on the target", f"run {holder}", "it will end or expire")


def _bucket(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    used = state.history.count(("runbook", request.runbook), request.now_ns, MINUTE_NS)
    if used < request.per_minute:
        return None
    want = f"at most {request.per_minute} actions a minute"
    return Refusal("guard.rate", want, f"{used} in the last minute", "raise limits.per_minute, or fix the cause")


def _storm(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if request.now_ns >= state.storm_until_ns:
        return None
    left = (state.storm_until_ns - request.now_ns) // 1_000_000_000
    return Refusal("guard.storm", "no storm", f"cool-down for another {left} s", "look before it acts again")


def _blast_radius(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    kind = target_of(request.action)[0]
    limit = {"service": rules.services_at_once, "circuit": rules.circuits_at_once}.get(str(kind))
    used = sum(1 for t in state.busy if t[0] == kind)
    if limit is None or used < limit:
        return None
    return Refusal(
        "guard.blast-radius", f"at most {limit} at once", f"{used} {kind}s in flight", "wait for them to end"
    )


def holdoff_ns(state: GuardState, number: int, now_ns: int, rules: Rules) -> int:
    """How long after its last recreation a service is left alone: doubles with each one in the last hour."""
    times = state.history.count(("restart", number), now_ns)
    return 0 if times == 0 else min(rules.holdoff_ns << min(times - 1, 32), rules.holdoff_max_ns)


def _flapping(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if not isinstance(request.action, Recreate):
        return None
    number = request.action.service.number
    last = state.history.last(("restart", number))
    wait = holdoff_ns(state, number, request.now_ns, rules)
    if last is None or request.now_ns - last >= wait:
        return None
    age = (request.now_ns - last) // 1_000_000
    want = f"{wait // 1_000_000} ms since the last recreation"
    return Refusal("guard.flapping", want, f"{age} ms", "the hold-off ends by itself; fix why the service fails")


Rule = Callable[[GuardState, Request, Rules], Refusal | None]

# The table. Order matters: what is forbidden comes before what is only too much.
TABLE: Final[tuple[Rule, ...]] = (
    _paused,
    _action_granted,
    _service_granted,
    _channel_granted,
    _network_granted,
    _never_touch,
    _storm,
    _bucket,
    _one_at_a_time,
    _blast_radius,
    _flapping,
)


def judge(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    """The first objection of the table, or None."""
    for rule in TABLE:
        refusal = rule(state, request, rules)
        if refusal is not None:
            return refusal
    return None


def permitted(state: GuardState, request: Request, rules: Rules) -> GuardState:
    """The state after an action was let through. A burst over the node's limit starts a storm cool-down."""
    now, history = request.now_ns, state.history
    history = history.noted(("runbook", request.runbook), now)
    busy = dict(state.busy)
    until = state.storm_until_ns
    if capability(type(request.action)) not in HARMLESS:
        history = history.noted(("actions",), now)
        if history.count(("actions",), now, MINUTE_NS) >= rules.actions_per_minute:
            until = now + rules.storm_cooldown_ns
        busy[target_of(request.action)] = request.run
    if isinstance(request.action, Recreate):
        history = history.noted(("restart", request.action.service.number), now)
    return replace(state, busy=busy, history=history, storm_until_ns=until)


def ended(state: GuardState, run: str, action: Action) -> GuardState:
    """The state after an action ended: its target is free again."""
    target = target_of(action)
    if state.busy.get(target) != run:
        return state
    return replace(state, busy={t: r for t, r in state.busy.items() if t != target})
