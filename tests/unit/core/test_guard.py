"""The guard's table: change one thing, fail one rule. And what holds for every sequence of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.core import guard
from pointcall_executor.core.guard import Grant, GuardState, Request, Rules
from pointcall_executor.core.history import KEEP_MAX, History
from pointcall_runbook.vocabulary import (
    Action,
    Address,
    Level,
    Network,
    Notify,
    OpenCircuit,
    Recreate,
    channel,
    service,
)

SECOND = 1_000_000_000
API, DB, OPS = service("api"), service("db"), channel("ops")
RECREATE = Recreate(API)
HERE = Address.parse("10.0.0.7")
GRANT = Grant(
    frozenset({"recreate", "notify", "open_circuit"}),
    frozenset({API.number, DB.number}),
    frozenset({OPS.number}),
    (Network("10.0.0.0/8"),),
)
RULES = Rules(services_at_once=2, never_touch_networks=(Network("10.9.0.0/16"),))


def request(action: Action = RECREATE, *, now_ns: int = 1000 * SECOND, **over: Any) -> Request:
    base = Request("fix", "run-1", 0, action, "enforce", GRANT, 10, now_ns)
    return dataclasses.replace(base, **over)


def objection(state: GuardState, asked: Request, rules: Rules = RULES) -> str | None:
    refusal = guard.judge(state, asked, rules)
    return refusal.rule if refusal else None


def test_a_granted_action_in_quiet_times_passes() -> None:
    assert objection(GuardState(), request()) is None


@pytest.mark.parametrize(
    ("state", "asked", "rule"),
    [
        (GuardState(paused="by anna"), request(), "guard.paused"),
        (GuardState(), request(grant=dataclasses.replace(GRANT, actions=frozenset())), "guard.grant-action"),
        (GuardState(), request(Recreate(service("other"))), "guard.grant-service"),
        (GuardState(), request(Notify(channel("else"), Level.INFO, 1)), "guard.grant-channel"),
        (GuardState(), request(OpenCircuit(Address.parse("192.0.2.1"), 80, 1)), "guard.grant-network"),
        (GuardState(), request(OpenCircuit(Address.parse("10.9.0.1"), 53, 1)), "guard.never-touch"),
        (GuardState(storm_until_ns=2000 * SECOND), request(), "guard.storm"),
        (GuardState(), request(per_minute=0), "guard.rate"),
        (GuardState(busy={("service", API.number): "run-0"}), request(), "guard.busy"),
        (GuardState(busy={("service", 5): "r", ("service", 6): "r"}), request(), "guard.blast-radius"),
        (GuardState(history=History().noted(("restart", API.number), 1000 * SECOND - 5)), request(), "guard.flapping"),
    ],
)
def test_one_wrong_thing_fails_exactly_its_rule(state: GuardState, asked: Request, rule: str) -> None:
    refusals = [r for check in guard.TABLE if (r := check(state, asked, RULES))]
    assert [r.rule for r in refusals] == [rule]
    assert all((r.want, r.got, r.hint) for r in refusals)


def test_a_service_without_a_declaration_is_never_granted() -> None:
    assert objection(GuardState(), request(Recreate(service("x").__class__(0)))) == "guard.grant-service"


def test_hold_off_doubles_with_each_recreation_and_is_bounded() -> None:
    state, waits = GuardState(), []
    for n in range(16):
        asked = request(now_ns=1000 * SECOND + n)
        state = guard.ended(guard.permitted(state, asked, RULES), "run-1", asked.action)
        waits.append(guard.holdoff_ns(state, API.number, 1001 * SECOND, RULES))
    assert waits[:4] == [SECOND, 2 * SECOND, 4 * SECOND, 8 * SECOND]
    assert waits[-1] == RULES.holdoff_max_ns


def test_hold_off_ends_when_an_hour_passed_in_peace() -> None:
    asked = request()
    state = guard.ended(guard.permitted(GuardState(), asked, RULES), "run-1", asked.action)
    assert guard.holdoff_ns(state, API.number, asked.now_ns + 3601 * SECOND, RULES) == 0


def test_a_burst_over_the_nodes_limit_is_a_storm_until_its_cool_down_ends() -> None:
    rules = dataclasses.replace(RULES, actions_per_minute=3)
    state = GuardState()
    for n in range(3):
        asked = request(OpenCircuit(HERE, 80 + n, SECOND), now_ns=1000 * SECOND + n)
        assert objection(state, asked, rules) is None
        state = guard.permitted(state, asked, rules)
    later = request(OpenCircuit(HERE, 99, SECOND), now_ns=1002 * SECOND)
    assert objection(state, later, rules) == "guard.storm"
    after = dataclasses.replace(later, now_ns=1001 * SECOND + rules.storm_cooldown_ns)
    assert objection(state, after, rules) is None


def test_a_notification_neither_holds_a_target_nor_counts_as_a_storm() -> None:
    state = GuardState()
    for n in range(5):
        asked = request(Notify(OPS, Level.INFO, n))
        state = guard.permitted(state, asked, dataclasses.replace(RULES, actions_per_minute=2))
    assert state.busy == {}
    assert state.storm_until_ns == 0


actions = st.one_of(
    st.sampled_from([Recreate(API), Recreate(DB)]),
    st.builds(OpenCircuit, st.just(HERE), st.integers(1, 5), st.just(SECOND)),
)


@given(st.lists(st.tuples(actions, st.integers(0, 3 * SECOND), st.booleans()), max_size=60))
def test_whatever_is_asked_the_limits_hold(steps: list[tuple[Action, int, bool]]) -> None:
    """Never two actions on one target, never beyond the blast radius, never more than the bucket allows."""
    state, now, held = GuardState(), 1000 * SECOND, {}
    permitted_at: list[int] = []
    for number, (action, pause, end_first) in enumerate(steps):
        now += pause
        if end_first and held:
            target, (run, held_action) = next(iter(held.items()))
            del held[target]
            state = guard.ended(state, run, held_action)
        asked = request(action, now_ns=now, run=f"run-{number}")
        if guard.judge(state, asked, RULES) is None:
            assert guard.target_of(action) not in held
            state = guard.permitted(state, asked, RULES)
            held[guard.target_of(action)] = (asked.run, action)
            permitted_at.append(now)
        assert set(state.busy) == set(held)
        assert sum(1 for t in held if t[0] == "service") <= RULES.services_at_once
        assert sum(1 for t in held if t[0] == "circuit") <= RULES.circuits_at_once
        assert sum(1 for at in permitted_at if now - 60 * SECOND < at <= now) <= 10


@given(st.lists(st.integers(0, 10**13), max_size=400))
def test_history_is_bounded_and_counts_only_the_last_hour(times: list[int]) -> None:
    history = History()
    for at in sorted(times):
        history = history.noted(("k",), at)
    kept = history.times.get(("k",), ())
    assert len(kept) <= KEEP_MAX
    if times:
        now = max(times)
        true_count = sum(1 for at in times if now - 3600 * SECOND < at <= now)
        assert history.count(("k",), now) == min(true_count, KEEP_MAX)
