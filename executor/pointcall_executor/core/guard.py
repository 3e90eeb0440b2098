"""The guard: between a decision and its action. One table of rules, read from top to bottom; the first that objects
refuses. Pure: time comes in with the request, the state goes in and out.

Each refusal names its rule (a stable id, docs/checks.md), what was wanted, what was found and what would allow it.
Words follow Node Healthcheck. Spec: DESIGN section 4, docs/spec/guard.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from pointcall_executor.core.history import HOUR_NS, History
from pointcall_runbook.vocabulary import (
    Action,
    Address,
    CloseCircuit,
    Freeze,
    Isolate,
    KillConnections,
    Mode,
    Network,
    OpenCircuit,
    Outcome,
    Recreate,
    Thaw,
    capability,
    service,
)

MINUTE_NS: Final = 60_000_000_000
TOKEN_MICRO: Final = 1_000_000
Target = tuple[str | int, ...]

# Actions that change nothing outside the executor: never held back by limits that protect services.
HARMLESS: Final = frozenset({"notify", "escalate", "remember", "again"})
Lease = OpenCircuit | Isolate | Freeze  # what holds a target for a time
ENDS: Final[Mapping[type[Action], frozenset[str]]] = {  # which leases on its target an action ends
    CloseCircuit: frozenset({"open_circuit"}),
    Thaw: frozenset({"freeze"}),
    Recreate: frozenset({"isolate", "freeze"}),  # they are those of the cgroup that is destroyed
}


@dataclass(frozen=True, slots=True)
class Grant:
    """What one runbook may do: from the manifest."""

    actions: frozenset[str] = frozenset()
    services: frozenset[int] = frozenset()
    channels: frozenset[int] = frozenset()
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one runbook about one target: from the manifest."""

    per_minute: int = 6  # refill of its bucket
    burst: int = 3  # size of its bucket
    hold_off_ns: int = 0  # least time between two actions
    approval: frozenset[str] = frozenset()  # actions that a second person must approve


@dataclass(frozen=True, slots=True)
class Rules:
    """The guard's limits over all runbooks of the node: from the manifest."""

    actions_per_minute: int = 60
    services: int = 1  # how many are declared: what the percentages are of
    services_at_once: int = 1
    services_percent: int = 100
    min_healthy_percent: int = 0  # of the declared services must stay untouched
    circuits_at_once: int = 64
    storm_events_per_minute: int = 600
    storm_cooldown_ns: int = 5 * MINUTE_NS
    healthy_delay_ns: int = 0  # ready again and quiet for so long, a service counts as recovered; 0: an hour
    flap_base_ns: int = 1_000_000_000  # hold-off after the first recreation; doubles with each one
    flap_max_ns: int = 10 * MINUTE_NS
    never_touch_services: frozenset[int] = frozenset()
    never_touch_networks: tuple[Network, ...] = ()
    never_touch_destinations: frozenset[tuple[str, int]] = frozenset()


# Named tuples where a copy is made for every event: it takes a fifth of the time of a dataclass.
_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


@dataclass(slots=True)
class Request:
    """One action that a decision asks for. What the rules ask of the action is looked up once, here; nothing changes
    it afterwards (not frozen: that would take longer to make than to judge)."""

    runbook: str
    run: str
    action: Action
    mode: Mode
    grant: Grant
    limits: Limits
    now_ns: int
    name: str = field(init=False)  # of the capability
    target: Target = field(init=False)
    address: Address | None = field(init=False)
    service: int | None = field(init=False)  # its number, 0: none of the declared ones

    def __post_init__(self) -> None:
        action = self.action
        self.name, self.target = capability(type(action)), target_of(action)
        self.address = getattr(action, "address", None)
        self.service = int(self.target[1]) if self.target[0] == "service" else None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an action did not happen. `rule` is stable."""

    rule: str
    want: str
    got: str
    hint: str


class Bucket(NamedTuple):
    """Tokens of one runbook about one target, in millionths, at a time."""

    tokens_micro: int
    at_ns: int
    full_ns: int  # when it is full again, which is as good as none


class GuardState(NamedTuple):
    """What the guard remembers. `busy` maps a target in flight to the run that holds it."""

    paused: str = ""
    storm_until_ns: int = 0
    events_since_ns: int = 0  # the running minute in which events are counted
    events: int = 0
    busy: Mapping[Target, str] = _NOTHING
    buckets: Mapping[tuple[str, Target], Bucket] = _NOTHING
    leases: Mapping[Target, int] = _NOTHING  # (action, *target) -> until when it is held
    approvals: Mapping[tuple[str, Action], int] = _NOTHING  # (runbook, action) -> until when
    recreated: Mapping[int, tuple[int, int]] = _NOTHING  # service -> (times in a row, last one)
    unwell: frozenset[int] = frozenset()  # services whose last recreation did not bring them back
    history: History = History()


def target_of(action: Action) -> Target:
    """What an action acts on; two actions with the same target never run at once."""
    if isinstance(action, OpenCircuit | CloseCircuit | KillConnections):
        return ("circuit", str(action.address), action.port)
    about = getattr(action, "service", None)
    if about is not None:
        return ("service", about.number)
    channel = getattr(action, "channel", None)
    return ("runbook",) if channel is None else ("channel", channel.number)


def _paused(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if not state.paused:
        return None
    return Refusal("guard.paused", "not paused", f"paused: {state.paused}", "pointcall resume")


def _action_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if request.name in request.grant.actions:
        return None
    granted = ", ".join(sorted(request.grant.actions)) or "nothing"
    return Refusal(
        "guard.grant-action", granted, request.name, "add the action to the runbook's grants in the manifest"
    )


def _service_granted(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    number = request.service
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
    address = request.address
    if address is None or any(address in net for net in request.grant.networks):
        return None
    nets = ", ".join(n.text for n in request.grant.networks) or "no network"
    return Refusal("guard.grant-network", nets, str(address), "add the network to the runbook's grants")


def _never_touch(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    address, number = request.address, request.service
    listed = number in rules.never_touch_services or (
        address is not None
        and (
            any(address in net for net in rules.never_touch_networks)
            or request.target[1:] in rules.never_touch_destinations
        )
    )
    if not listed:
        return None
    got = str(address) if address is not None else f"service {number}"
    return Refusal("guard.never-touch", "a target outside the never-touch list", got, "act by hand, or change the list")


def _approval(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    """An approval is for exactly this action with these arguments, once, and ends."""
    if request.name not in request.limits.approval or request.now_ns < _approved_until(state, request):
        return None
    got = "an approval that has ended" if _approved_until(state, request) else "none"
    return Refusal("guard.approval", "approval by a second person", got, f"pointcall approve {request.run}")


def _approved_until(state: GuardState, request: Request) -> int:
    return state.approvals.get((request.runbook, request.action), 0)


def _one_at_a_time(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    holder = state.busy.get(request.target)
    if holder is None:
        return None
    return Refusal("guard.busy", "no action in flight on the target", f"run {holder}", "it will end or expire")


def _tokens(state: GuardState, request: Request) -> int:
    """Millionths of a token that the runbook has for this target now."""
    full = request.limits.burst * TOKEN_MICRO
    bucket = state.buckets.get((request.runbook, request.target))
    if bucket is None:
        return full
    refill = (request.now_ns - bucket.at_ns) * request.limits.per_minute * TOKEN_MICRO // MINUTE_NS
    return min(full, bucket.tokens_micro + refill)


def _taken(state: GuardState, request: Request) -> Bucket:
    """The bucket with one token less."""
    limits, left = request.limits, _tokens(state, request) - TOKEN_MICRO
    missing = limits.burst * TOKEN_MICRO - left
    return Bucket(left, request.now_ns, request.now_ns - (-missing * MINUTE_NS // (limits.per_minute * TOKEN_MICRO)))


def _rate(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if _tokens(state, request) >= TOKEN_MICRO:
        return None
    want = f"{request.limits.per_minute} a minute, {request.limits.burst} at a time"
    return Refusal("guard.rate", want, "the bucket is empty", "raise limits.per_minute, or fix the cause")


def _node_rate(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    used = state.history.count(("actions",), request.now_ns, MINUTE_NS)
    if used < rules.actions_per_minute:
        return None
    want = f"at most {rules.actions_per_minute} actions a minute on this node"
    return Refusal("guard.node-rate", want, f"{used} in the last minute", "look before it acts again")


def _hold_off(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    wait = request.limits.hold_off_ns
    last = state.history.last(("target", request.runbook, *request.target)) if wait else None
    if last is None or request.now_ns - last >= wait:
        return None
    age = (request.now_ns - last) // 1_000_000
    return Refusal("guard.hold-off", f"{wait // 1_000_000} ms since the last time", f"{age} ms", "it ends by itself")


def _storm(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if request.now_ns >= state.storm_until_ns:
        return None
    left = (state.storm_until_ns - request.now_ns) // 1_000_000_000
    return Refusal("guard.storm", "no storm", f"cool-down for another {left} s", "look before it acts again")


def _touched(state: GuardState, request: Request) -> int:
    """How many targets of the same kind are touched besides this one: actions in flight, and leases that hold."""
    target = request.target
    touched = set(state.busy)
    if type(request.action) not in (CloseCircuit, Thaw):  # ending one is never held back by those that hold
        touched |= {held[1:] for held, until_ns in state.leases.items() if until_ns > request.now_ns}
    return sum(1 for other in touched if other[0] == target[0] and other != target)


def services_limit(rules: Rules) -> int:
    """How many services may be in flight at once: the lowest of the absolute, percent and healthy limits, at least 1
    where `min_healthy_percent` leaves room at all."""
    percent = max(1, rules.services * rules.services_percent // 100)
    must_stay = -(-rules.services * rules.min_healthy_percent // 100)
    return min(rules.services_at_once, percent, rules.services - must_stay)


def _blast_radius(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    kind = str(request.target[0])
    limit = {"service": services_limit(rules), "circuit": rules.circuits_at_once}.get(kind)
    if limit is None or len(state.busy) + len(state.leases) < limit:  # the quick answer to a dear question
        return None
    used = _touched(state, request)
    if used < limit:
        return None
    return Refusal("guard.blast-radius", f"at most {limit} at once", f"{used} other {kind}s", "wait for them to end")


def flap_ns(state: GuardState, number: int, now_ns: int, rules: Rules) -> int:
    """How long a service is left alone after its last recreation: doubles with each one before it recovered."""
    streak, last = state.recreated.get(number, (0, 0))
    if streak == 0 or (now_ns - last >= _quiet(rules) and number not in state.unwell):
        return 0
    return min(rules.flap_base_ns << min(streak - 1, 32), rules.flap_max_ns)


def _quiet(rules: Rules) -> int:
    return rules.healthy_delay_ns or HOUR_NS


def _in_a_row(state: GuardState, number: int, now_ns: int, quiet_ns: int) -> Mapping[int, tuple[int, int]]:
    """`recreated` after one more recreation: a service that came back and was quiet for long enough counts from one
    again."""
    streak, last = state.recreated.get(number, (0, 0))
    goes_on = now_ns - last < quiet_ns or number in state.unwell
    return {**state.recreated, number: (streak + 1 if goes_on else 1, now_ns)}


def _flapping(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    if not isinstance(request.action, Recreate):
        return None
    number = request.action.service.number
    _, last = state.recreated.get(number, (0, 0))
    wait = flap_ns(state, number, request.now_ns, rules)
    if request.now_ns - last >= wait:
        return None
    age = (request.now_ns - last) // 1_000_000
    want = f"{wait // 1_000_000} ms since the last recreation"
    return Refusal("guard.flapping", want, f"{age} ms", "the hold-off ends by itself; fix why the service fails")


Rule = Callable[[GuardState, Request, Rules], Refusal | None]

# The table. What is forbidden comes before what is only too much; what is harmless meets the first part only.
FORBIDDEN: Final[tuple[Rule, ...]] = (
    _paused,
    _action_granted,
    _service_granted,
    _channel_granted,
    _network_granted,
    _never_touch,
    _approval,
)
TOO_MUCH: Final[tuple[Rule, ...]] = (
    _storm,
    _node_rate,
    _rate,
    _hold_off,
    _one_at_a_time,
    _blast_radius,
    _flapping,
)


def judge(state: GuardState, request: Request, rules: Rules) -> Refusal | None:
    """The first objection of the table, or None."""
    for table in (FORBIDDEN,) if request.name in HARMLESS else (FORBIDDEN, TOO_MUCH):
        for rule in table:
            refusal = rule(state, request, rules)
            if refusal is not None:
                return refusal
    return None


def permitted(state: GuardState, request: Request, rules: Rules) -> GuardState:
    """The state after an action was let through: a token is spent, the target is held."""
    approvals = _spent(state.approvals, request)
    if request.name in HARMLESS:
        return state if approvals is state.approvals else state._replace(approvals=approvals)
    now, target = request.now_ns, request.target
    history = state.history.noted(("actions",), now, keep=rules.actions_per_minute, window_ns=MINUTE_NS)
    history = history.noted(("target", request.runbook, *target), now)
    recreated = state.recreated
    if isinstance(request.action, Recreate):
        number = request.action.service.number
        history = history.noted(("restart", number), now)
        recreated = _in_a_row(state, number, now, _quiet(rules))
    buckets = {**state.buckets, (request.runbook, target): _taken(state, request)}
    return state._replace(
        busy={**state.busy, target: request.run},
        buckets=buckets,
        approvals=approvals,
        recreated=recreated,
        history=history,
    )


def _spent(approvals: Mapping[tuple[str, Action], int], request: Request) -> Mapping[tuple[str, Action], int]:
    key = (request.runbook, request.action)
    return {k: until for k, until in approvals.items() if k != key} if key in approvals else approvals


def approved(state: GuardState, runbook: str, action: Action, until_ns: int) -> GuardState:
    """The state after a second person has approved exactly this action of this runbook, once, until then."""
    return state._replace(approvals={**state.approvals, (runbook, action): until_ns})


def circuits_held(state: GuardState, forced: Iterable[tuple[Address, int, int]]) -> GuardState:
    """The state with exactly these circuits held open: (address, port, until when), as the kernel says."""
    kept = {key: until for key, until in state.leases.items() if key[1] != "circuit"}
    name = capability(OpenCircuit)
    held: dict[Target, int] = {(name, "circuit", str(address), port): until for address, port, until in forced}
    return state._replace(leases={**kept, **held})


def isolations_held(state: GuardState, isolated: Mapping[int, int]) -> GuardState:
    """The state with exactly these services isolated: number -> until when, as the kernel says."""
    name = capability(Isolate)
    kept = {key: until for key, until in state.leases.items() if key[0] != name}
    held: dict[Target, int] = {(name, "service", number): until for number, until in isolated.items()}
    return state._replace(leases={**kept, **held})


def settled(state: GuardState, action: Action, outcome: Outcome, now_ns: int, *, rolled_back: bool) -> GuardState:
    """The state with what an action that has ended holds from now on, and without what it has ended.

    While it was in flight its target was busy. What may hold counts as held; what failed has changed nothing.
    """
    target, ends = target_of(action), ENDS.get(type(action), frozenset())
    own = (capability(type(action)), *target)
    leases = {held: until for held, until in state.leases.items() if until > now_ns}
    if rolled_back:
        leases.pop(own, None)
    elif isinstance(action, Lease) and outcome in (Outcome.APPLIED, Outcome.UNCONFIRMED):
        leases[own] = max(now_ns + action.hold, leases.get(own, 0))
    elif outcome is Outcome.APPLIED:
        leases = {held: until for held, until in leases.items() if held[1:] != target or held[0] not in ends}
    return state._replace(leases=leases, unwell=_unwell(state.unwell, action, outcome))


def _unwell(before: frozenset[int], action: Action, outcome: Outcome) -> frozenset[int]:
    """A recreation says by its post-condition whether the service is well; one that was not begun says nothing."""
    if not isinstance(action, Recreate) or outcome not in (Outcome.APPLIED, Outcome.FAILED, Outcome.UNCONFIRMED):
        return before
    number = {action.service.number}
    return before - number if outcome is Outcome.APPLIED else before | number


def recalled(state: GuardState, acted: Sequence[tuple[str, str, int]]) -> GuardState:
    """The state with what an earlier executor did: (action, target in words, when in ns), oldest first.

    A restart must not make the guard forget how often a service was recreated, nor how often the node acted. What was
    done before the machine started has no place on its clock.
    """
    history = state.history
    for action, target, at in acted:
        if at < 0:
            continue
        history = history.noted(("actions",), at, keep=len(acted))
        if action == capability(Recreate):
            history = history.noted(("restart", service(target).number), at)
    return state._replace(history=history)


def rows_recalled(
    state: GuardState, acted: Sequence[tuple[str, str, int]], rules: Rules, failed: Collection[int] = ()
) -> GuardState:
    """The state with how often each service was recreated in a row by an earlier executor, `acted` as for `recalled`;
    `failed` are the places in it of what was not done as it should have been.

    Which quiet ends a row is a rule of a manifest, so this waits for the first one that is armed: under the same
    manifest a restart changes nothing.
    """
    state = state._replace(recreated=_NOTHING, unwell=frozenset())
    for place, (action, target, at) in enumerate(acted):
        if at >= 0 and action == capability(Recreate):
            about = service(target)
            outcome = Outcome.FAILED if place in failed else Outcome.APPLIED
            row = _in_a_row(state, about.number, at, _quiet(rules))
            state = state._replace(recreated=row, unwell=_unwell(state.unwell, Recreate(about), outcome))
    return state


def counted(state: GuardState, now_ns: int, rules: Rules) -> GuardState:
    """The state after one more event. More of them in a minute than a node should see is a storm."""
    if now_ns - state.events_since_ns >= MINUTE_NS:
        leases = {held: until for held, until in state.leases.items() if until > now_ns}
        buckets = {key: bucket for key, bucket in state.buckets.items() if bucket.full_ns > now_ns}
        return state._replace(events_since_ns=now_ns, events=1, leases=leases, buckets=buckets)
    until = state.storm_until_ns
    if state.events + 1 > rules.storm_events_per_minute:
        until = now_ns + rules.storm_cooldown_ns
    return state._replace(events=state.events + 1, storm_until_ns=until)


def ended(state: GuardState, run: str, action: Action) -> GuardState:
    """The state after an action ended: its target is free again."""
    target = target_of(action)
    if state.busy.get(target) != run:
        return state
    return state._replace(busy={t: r for t, r in state.busy.items() if t != target})
