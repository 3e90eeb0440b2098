"""The guard's table: change one thing, fail one rule. And what holds for every sequence of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.core import guard
from pointcall_executor.core.guard import Bucket, Grant, GuardState, Limits, Request, Rules
from pointcall_executor.core.history import KEEP_MAX, KEYS_MAX, OPENED, History
from pointcall_runbook.vocabulary import (
    Action,
    Address,
    CloseCircuit,
    Freeze,
    Isolate,
    Level,
    Network,
    Notify,
    OpenCircuit,
    Outcome,
    Recreate,
    Thaw,
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
RULES = Rules(services=4, services_at_once=2, never_touch_networks=(Network("10.9.0.0/16"),))


def request(action: Action = RECREATE, *, now_ns: int = 1000 * SECOND, **over: Any) -> Request:
    base = Request("fix", "run-1", action, "enforce", GRANT, Limits(per_minute=10, burst=10), now_ns)
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
        (GuardState(), request(limits=Limits(approval=frozenset({"recreate"}))), "guard.approval"),
        (
            GuardState(buckets={("fix", ("service", API.number)): Bucket(999_999, 1000 * SECOND, 1001 * SECOND)}),
            request(),
            "guard.rate",
        ),
        (
            GuardState(history=History().noted(("target", "fix", "service", API.number), 999 * SECOND)),
            request(limits=Limits(hold_off_ns=2 * SECOND)),
            "guard.hold-off",
        ),
        (GuardState(busy={("service", API.number): "run-0"}), request(), "guard.busy"),
        (GuardState(busy={("service", 5): "r", ("service", 6): "r"}), request(), "guard.blast-radius"),
        (GuardState(recreated={API.number: (1, 1000 * SECOND - 5)}), request(), "guard.flapping"),
    ],
)
def test_one_wrong_thing_fails_exactly_its_rule(state: GuardState, asked: Request, rule: str) -> None:
    refusals = [r for check in guard.FORBIDDEN + guard.TOO_MUCH if (r := check(state, asked, RULES))]
    assert [r.rule for r in refusals] == [rule]
    assert all((r.want, r.got, r.hint) for r in refusals)


def test_a_service_without_a_declaration_is_never_granted() -> None:
    assert objection(GuardState(), request(Recreate(service("x").__class__(0)))) == "guard.grant-service"


def recreated(state: GuardState, now_ns: int) -> GuardState:
    asked = request(now_ns=now_ns)
    return guard.ended(guard.permitted(state, asked, RULES), "run-1", RECREATE)


def test_the_flap_hold_off_doubles_with_each_recreation_and_is_bounded() -> None:
    state, waits = GuardState(), []
    for n in range(16):
        state = recreated(state, 1000 * SECOND + n)
        waits.append(guard.flap_ns(state, API.number, 1001 * SECOND, RULES))
    assert waits[:4] == [SECOND, 2 * SECOND, 4 * SECOND, 8 * SECOND]
    assert waits[-1] == RULES.flap_max_ns


def test_the_flap_hold_off_remembers_longer_than_an_hour() -> None:
    state, at, waits = GuardState(), 1000 * SECOND, []
    for _ in range(40):
        at += max(guard.flap_ns(state, API.number, at, RULES), SECOND)
        state = recreated(state, at)
        waits.append(guard.flap_ns(state, API.number, at, RULES))
    assert at > 3 * 3600 * SECOND
    assert waits == sorted(waits)


@pytest.mark.parametrize(("healthy_delay_s", "quiet_s"), [(0, 3600), (30, 30)])
def test_the_flap_hold_off_starts_anew_once_the_service_was_quiet_for_long_enough(
    healthy_delay_s: int, quiet_s: int
) -> None:
    rules = dataclasses.replace(RULES, healthy_delay_ns=healthy_delay_s * SECOND)
    state = recreated(recreated(GuardState(), 1000 * SECOND), 1003 * SECOND)
    assert guard.flap_ns(state, API.number, (1003 + quiet_s) * SECOND - 1, rules) == 2 * SECOND
    assert guard.flap_ns(state, API.number, (1003 + quiet_s) * SECOND, rules) == 0


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.UNCONFIRMED])
def test_quiet_alone_is_no_health_the_service_has_to_come_back_first(outcome: Outcome) -> None:
    quiet = 2 * guard.HOUR_NS
    state = recreated(recreated(GuardState(), 1000 * SECOND), 1003 * SECOND)
    down = guard.settled(state, RECREATE, outcome, 1004 * SECOND, rolled_back=False)
    assert guard.flap_ns(down, API.number, 1003 * SECOND + quiet, RULES) == 2 * SECOND
    down = recreated(down, 1003 * SECOND + quiet)
    assert down.recreated[API.number][0] == 3
    well = guard.settled(down, RECREATE, Outcome.APPLIED, 1004 * SECOND + quiet, rolled_back=False)
    assert guard.flap_ns(well, API.number, 1003 * SECOND + quiet + guard.HOUR_NS - 1, RULES) == 4 * SECOND
    assert guard.flap_ns(well, API.number, 1003 * SECOND + quiet + guard.HOUR_NS, RULES) == 0
    assert recreated(well, 1003 * SECOND + 2 * quiet).recreated[API.number][0] == 1


def test_what_was_not_begun_says_nothing_about_health() -> None:
    down = guard.settled(GuardState(), RECREATE, Outcome.FAILED, SECOND, rolled_back=False)
    assert guard.settled(down, RECREATE, Outcome.REFUSED, 2 * SECOND, rolled_back=False).unwell == {API.number}
    assert guard.settled(down, Freeze(API, SECOND), Outcome.APPLIED, 2 * SECOND, rolled_back=False).unwell == {
        API.number
    }


def test_after_a_restart_a_recreation_that_failed_proves_no_health_either() -> None:
    acted = [("recreate", "api", at * SECOND) for at in (100, 100 + 7200)]
    assert guard.rows_recalled(GuardState(), acted, RULES).recreated[API.number][0] == 1
    after = guard.rows_recalled(GuardState(), acted, RULES, {0})
    assert (after.recreated[API.number][0], after.unwell) == (2, frozenset())
    assert guard.rows_recalled(GuardState(), acted, RULES, {1}).unwell == {API.number}


def test_a_bucket_lets_a_burst_through_and_refills() -> None:
    limits, state = Limits(per_minute=6, burst=2), GuardState()
    for n in range(2):
        asked = request(OpenCircuit(HERE, 80, SECOND), limits=limits, now_ns=1000 * SECOND + n)
        assert objection(state, asked) is None
        state = guard.ended(guard.permitted(state, asked, RULES), "run-1", asked.action)
    third = request(OpenCircuit(HERE, 80, SECOND), limits=limits, now_ns=1001 * SECOND)
    assert objection(state, third) == "guard.rate"
    assert objection(state, dataclasses.replace(third, now_ns=1011 * SECOND)) is None
    elsewhere = request(OpenCircuit(HERE, 81, SECOND), limits=limits, now_ns=1001 * SECOND)
    assert objection(state, elsewhere) is None


@given(
    per_minute=st.integers(1, 600),
    burst=st.integers(1, 100),
    steps=st.lists(st.integers(0, 90 * SECOND), max_size=30),
)
def test_to_forget_a_bucket_that_is_full_again_changes_no_answer(per_minute: int, burst: int, steps: list[int]) -> None:
    limits, now, kept, pruned = Limits(per_minute=per_minute, burst=burst), 1000 * SECOND, GuardState(), GuardState()
    for step in steps:
        now += step
        asked = request(OpenCircuit(HERE, 80, SECOND), limits=limits, now_ns=now)
        pruned = guard.counted(pruned._replace(events_since_ns=0), now, RULES)
        assert objection(pruned, asked) == objection(kept, asked)
        if objection(kept, asked) is None:
            kept = guard.ended(guard.permitted(kept, asked, RULES), "run-1", asked.action)
            pruned = guard.ended(guard.permitted(pruned, asked, RULES), "run-1", asked.action)
    assert guard.counted(pruned._replace(events_since_ns=0), now + 6000 * SECOND, RULES).buckets == {}


def test_the_node_as_a_whole_has_a_rate_too() -> None:
    rules, state = dataclasses.replace(RULES, actions_per_minute=3), GuardState()
    for n in range(3):
        asked = request(OpenCircuit(HERE, 80 + n, SECOND), now_ns=1000 * SECOND + n)
        state = guard.permitted(state, asked, rules)
    later = request(OpenCircuit(HERE, 99, SECOND), now_ns=1002 * SECOND)
    assert objection(state, later, rules) == "guard.node-rate"
    assert objection(state, dataclasses.replace(later, now_ns=1061 * SECOND), rules) is None


def test_more_events_in_a_minute_than_a_node_should_see_are_a_storm_until_its_cool_down_ends() -> None:
    rules, state = dataclasses.replace(RULES, storm_events_per_minute=3), GuardState(events_since_ns=1000 * SECOND)
    for n in range(4):
        assert state.storm_until_ns == 0
        state = guard.counted(state, 1000 * SECOND + n, rules)
    assert objection(state, request(now_ns=1001 * SECOND), rules) == "guard.storm"
    assert objection(state, request(now_ns=1001 * SECOND + rules.storm_cooldown_ns), rules) is None


@pytest.mark.parametrize(
    ("over", "limit"),
    [
        ({}, 2),
        ({"services_percent": 25}, 1),
        ({"services_percent": 10}, 1),
        ({"min_healthy_percent": 75}, 1),
        ({"min_healthy_percent": 76}, 0),
        ({"services": 1, "min_healthy_percent": 100}, 0),
    ],
)
def test_the_blast_radius_is_the_lowest_of_its_limits(over: dict[str, int], limit: int) -> None:
    assert guard.services_limit(dataclasses.replace(RULES, **over)) == limit


def test_the_node_rate_counts_further_than_facts_do() -> None:
    rules, state = dataclasses.replace(RULES, actions_per_minute=KEEP_MAX + 40), GuardState()
    for n in range(rules.actions_per_minute):
        assert guard._node_rate(state, request(), rules) is None
        asked = request(OpenCircuit(HERE, n + 1, 1), now_ns=1000 * SECOND + n)
        state = guard.permitted(state, asked, rules)
    refusal = guard._node_rate(state, request(now_ns=1001 * SECOND), rules)
    assert refusal is not None
    assert refusal.rule == "guard.node-rate"


def test_a_circuit_that_is_held_open_counts_until_its_lease_ends() -> None:
    rules = dataclasses.replace(RULES, circuits_at_once=2)
    state = GuardState()
    for port in (1, 2):
        state = held(state, OpenCircuit(HERE, port, 10 * SECOND), 1000 * SECOND)
    third = OpenCircuit(HERE, 3, SECOND)
    assert objection(state, request(third), rules) == "guard.blast-radius"
    assert objection(state, request(OpenCircuit(HERE, 1, SECOND)), rules) is None
    assert objection(state, request(third, now_ns=1011 * SECOND), rules) is None
    closing = request(CloseCircuit(HERE, 2), grant=dataclasses.replace(GRANT, actions=frozenset({"close_circuit"})))
    assert objection(state, closing, rules) is None
    state = held(state, closing.action, 1000 * SECOND)
    assert objection(state, request(third), rules) is None


def test_a_notification_holds_nothing_and_is_never_too_much() -> None:
    asked = request(Notify(OPS, Level.INFO, 1))
    assert guard.permitted(GuardState(), asked, RULES) == GuardState()
    assert objection(GuardState(storm_until_ns=2000 * SECOND), asked) is None


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
        assert sum(1 for at in permitted_at if now - 60 * SECOND < at <= now) <= RULES.actions_per_minute


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


def test_a_flood_of_destinations_makes_the_guard_forget_nothing_that_it_did() -> None:
    history = History().noted(("restart", API.number), 1).noted(("target", "fix", "service", API.number), 1)
    for number in range(KEYS_MAX + 100):
        history = history.noted((OPENED, f"tcp://192.0.2.1:{number}"), 2 + number)
        history = history.noted((OPENED, "tcp://192.0.2.2:443"), 2 + number)  # again and again: not the oldest
    assert len(history.times) == KEYS_MAX
    assert history.count(("restart", API.number), KEYS_MAX) == 1
    assert history.last(("target", "fix", "service", API.number)) == 1
    assert history.last((OPENED, "tcp://192.0.2.1:0")) is None
    assert history.count((OPENED, "tcp://192.0.2.2:443"), KEYS_MAX + 200) == KEEP_MAX


def test_where_there_are_only_deeds_the_oldest_is_forgotten() -> None:
    history = History()
    for number in range(KEYS_MAX + 1):
        history = history.noted(("target", "fix", "service", number), number)
    assert len(history.times) == KEYS_MAX
    assert history.last(("target", "fix", "service", 0)) is None
    assert history.last(("target", "fix", "service", KEYS_MAX)) == KEYS_MAX


WIDE = dataclasses.replace(GRANT, actions=frozenset({"recreate", "isolate", "freeze", "thaw"}))


def held(
    state: GuardState,
    action: Action,
    now_ns: int,
    outcome: Outcome = Outcome.APPLIED,
    *,
    rolled_back: bool = False,
) -> GuardState:
    asked = request(action, grant=WIDE, now_ns=now_ns)
    state = guard.settled(guard.permitted(state, asked, RULES), action, outcome, now_ns, rolled_back=rolled_back)
    return guard.ended(state, "run-1", action)


def test_a_service_that_is_held_counts_for_the_blast_radius_until_its_lease_ends() -> None:
    rules = dataclasses.replace(RULES, services_at_once=1)
    state = held(GuardState(), Isolate(DB, 10 * SECOND), 1000 * SECOND)
    asked = request(grant=WIDE, now_ns=1005 * SECOND)
    assert objection(state, asked, rules) == "guard.blast-radius"
    assert objection(state, dataclasses.replace(asked, now_ns=1010 * SECOND), rules) is None
    own = request(Recreate(DB), grant=WIDE, now_ns=1005 * SECOND)
    assert objection(state, own, rules) is None


@pytest.mark.parametrize(
    ("actions", "left"),
    [
        ((Isolate(DB, SECOND), Freeze(DB, SECOND)), {"isolate", "freeze"}),
        ((Isolate(DB, SECOND), Freeze(DB, SECOND), Thaw(DB)), {"isolate"}),
        ((Isolate(DB, SECOND), Freeze(DB, SECOND), Recreate(DB)), set()),
        ((Isolate(DB, SECOND), Recreate(API)), {"isolate"}),
        ((OpenCircuit(HERE, 80, SECOND), CloseCircuit(HERE, 80)), set()),
        ((OpenCircuit(HERE, 80, SECOND), CloseCircuit(HERE, 81)), {"open_circuit"}),
    ],
)
def test_what_ends_a_lease(actions: tuple[Action, ...], left: set[str]) -> None:
    state = GuardState()
    for action in actions:
        state = held(state, action, 1000 * SECOND)
    assert {str(key[0]) for key in state.leases} == left


@pytest.mark.parametrize(
    ("outcome", "rolled_back", "left"),
    [
        (Outcome.APPLIED, False, 1007),
        (Outcome.UNCONFIRMED, False, 1007),  # it may hold
        (Outcome.UNCONFIRMED, True, None),
        (Outcome.FAILED, False, 1003),  # the one before does
        (Outcome.REFUSED, False, 1003),
    ],
)
def test_what_is_held_after_a_second_lease(outcome: Outcome, rolled_back: bool, left: int | None) -> None:
    state = held(GuardState(), Isolate(DB, 3 * SECOND), 1000 * SECOND)
    state = held(state, Isolate(DB, 6 * SECOND), 1001 * SECOND, outcome, rolled_back=rolled_back)
    assert [until // SECOND for until in state.leases.values()] == ([left] if left else [])


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.REFUSED, Outcome.UNCONFIRMED])
def test_what_did_not_end_a_lease_leaves_it_held(outcome: Outcome) -> None:
    state = held(GuardState(), Freeze(DB, SECOND), 1000 * SECOND)
    assert held(state, Thaw(DB), 1000 * SECOND, outcome).leases == state.leases


def test_a_lease_counts_from_when_it_was_taken_and_not_from_when_it_was_let_through() -> None:
    action = Freeze(DB, 10 * SECOND)
    state = guard.permitted(GuardState(), request(action, grant=WIDE, now_ns=1000 * SECOND), RULES)
    state = guard.settled(state, action, Outcome.APPLIED, 1030 * SECOND, rolled_back=False)
    asked = request(grant=WIDE, now_ns=1035 * SECOND)
    rules = dataclasses.replace(RULES, services_at_once=1)
    assert objection(guard.ended(state, "run-1", action), asked, rules) == "guard.blast-radius"


def test_an_approval_is_for_one_action_of_one_runbook_once_and_in_time() -> None:
    limits = Limits(approval=frozenset({"recreate"}), burst=10)
    asked = request(limits=limits)
    state = guard.approved(GuardState(), "fix", RECREATE, asked.now_ns + 5)
    assert objection(state, asked) is None
    for other in (
        dataclasses.replace(asked, runbook="another"),
        dataclasses.replace(asked, action=Recreate(API, 1)),
        dataclasses.replace(asked, action=Recreate(DB)),
        dataclasses.replace(asked, now_ns=asked.now_ns + 5),
    ):
        assert objection(state, other) == "guard.approval"
    spent = guard.ended(guard.permitted(state, asked, RULES), "run-1", RECREATE)
    assert spent.approvals == {}


def test_an_approved_notification_is_sent_once() -> None:
    asked = request(Notify(OPS, Level.INFO, 1), limits=Limits(approval=frozenset({"notify"})))
    state = guard.approved(GuardState(), "fix", asked.action, asked.now_ns + 5)
    assert objection(state, asked) is None
    assert objection(guard.permitted(state, asked, RULES), asked) == "guard.approval"


def test_more_actions_than_facts_count_are_remembered_where_the_limit_is_higher() -> None:
    acted = [("kill", "api", SECOND)] * (KEEP_MAX + 10)
    state = guard.recalled(GuardState(), acted)
    assert state.history.count(("actions",), 2 * SECOND, guard.MINUTE_NS) == KEEP_MAX + 10


def test_what_an_earlier_executor_did_is_remembered_with_its_age() -> None:
    now_ns = 7200 * SECOND
    acted = [("recreate", "db", 3600 * SECOND), ("recreate", "api", 7170 * SECOND), ("freeze", "api", 7180 * SECOND)]
    state = guard.recalled(GuardState(), acted)
    assert state.history.count(("restart", API.number), now_ns) == 1
    assert state.history.count(("restart", DB.number), now_ns) == 0
    assert state.history.count(("actions",), now_ns, guard.MINUTE_NS) == 2
    assert guard.recalled(GuardState(), [("recreate", "api", -5)]).history.times == {}


@pytest.mark.parametrize(("quiet_s", "streak"), [(5, 1), (60, 1), (61, 2), (0, 2), (7200, 3)])
def test_a_row_of_recreations_is_counted_by_the_manifest_that_is_armed_first(quiet_s: int, streak: int) -> None:
    acted = [("recreate", "api", at * SECOND) for at in (100, 100 + 5000, 100 + 5000 + 60)]
    rules = dataclasses.replace(RULES, healthy_delay_ns=quiet_s * SECOND)
    state = guard.rows_recalled(GuardState(recreated={7: (9, 9)}), acted, rules)
    assert state.recreated == {API.number: (streak, 5160 * SECOND)}
    assert guard.rows_recalled(state, [("kill", "api", 5), ("recreate", "api", -5)], rules).recreated == {}


def test_what_the_kernel_isolates_is_held_and_nothing_else() -> None:
    state = GuardState(
        leases={
            ("isolate", "service", 1): 5,
            ("freeze", "service", 1): 6,
            ("open_circuit", "circuit", "10.0.0.1", 80): 7,
        }
    )
    held = guard.isolations_held(state, {2: 9}).leases
    assert held == {
        ("freeze", "service", 1): 6, ("open_circuit", "circuit", "10.0.0.1", 80): 7, ("isolate", "service", 2): 9,
    }  # fmt: skip
