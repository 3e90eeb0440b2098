"""The life of a run as stories: what happened, what was decided, what the core asks the shell to do."""

from __future__ import annotations

import dataclasses

import pytest

from pointcall_executor.core.guard import Grant, Rules
from pointcall_executor.core.step import (
    MEMORY_MAX,
    Armed,
    Decide,
    Decided,
    Ended,
    Happened,
    Perform,
    Refuse,
    Runbook,
    State,
    Withhold,
    step,
)
from pointcall_runbook.vocabulary import (
    ActionDone,
    ActionKind,
    Address,
    Call,
    CircuitOpened,
    OomKilled,
    Outcome,
    Recreate,
    Remember,
    service,
    slots,
)

API = service("api")
OPENED = CircuitOpened(10, Address.parse("127.0.0.1"), 8080, 5, False, 1, API, 0)
BOOK = Runbook(
    "refusing-dependency",
    "1.0.0",
    "ab" * 32,
    frozenset({"CircuitOpened"}),
    Grant(frozenset({"recreate", "remember"}), frozenset({API.number})),
    "enforce",
)
RECREATE = Call.of(Recreate(API, 0))


def armed(*books: Runbook) -> State:
    return State(Armed("cd" * 32, books, Rules()))


def test_nothing_armed_nothing_happens() -> None:
    assert step(State(), Happened(OPENED, "api", 20)) == (State(), ())


def test_an_event_reaches_every_runbook_that_handles_it_with_its_parameters_and_slots() -> None:
    first = dataclasses.replace(BOOK, parameters=(7,), slots=(1, 2))
    other = dataclasses.replace(BOOK, name="oom", events=frozenset({"OomKilled"}))
    _, effects = step(armed(first, other), Happened(OPENED, "api", 20))
    assert effects == (Decide(first, OPENED, "api", (*slots(OPENED), 7, 1, 2)),)


def test_a_granted_call_is_performed_and_its_target_is_held_until_it_ends() -> None:
    state, effects = step(armed(BOOK), Decided("r1", BOOK, "api", (RECREATE,), 30))
    assert effects == (Perform("r1", 0, Recreate(API, 0)),)
    _, effects = step(state, Decided("r2", BOOK, "api", (RECREATE,), 31))
    assert [type(e) for e in effects] == [Refuse]
    assert effects[0].refusal.rule == "guard.busy"
    state, effects = step(state, Ended("r1", BOOK, "api", Recreate(API, 0), Outcome.APPLIED, 40))
    assert effects == ()
    assert state.guard.busy == {}


def test_monitor_records_and_does_nothing() -> None:
    book = dataclasses.replace(BOOK, mode="monitor")
    before = armed(book)
    state, effects = step(before, Decided("r1", book, "api", (RECREATE,), 30))
    assert effects == (Withhold("r1", 0, Recreate(API, 0)),)
    assert state == before


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (Call("recreate", (API.number, -1)), "guard.call"),
        (Call("recreate", (API.number,)), "guard.call"),
        (Call("reboot", ()), "guard.call"),
        (Call("kill", (API.number, 9)), "guard.grant-action"),
    ],
)
def test_the_host_checks_every_call_whatever_the_module_says(call: Call, rule: str) -> None:
    _, effects = step(armed(BOOK), Decided("r1", BOOK, "api", (call,), 30))
    assert [(type(e), e.refusal.rule) for e in effects] == [(Refuse, rule)]


def test_at_most_eight_actions_of_one_decision_are_looked_at() -> None:
    _, effects = step(armed(BOOK), Decided("r1", BOOK, "api", (RECREATE,) * 9, 30))
    assert effects[8].refusal.rule == "guard.too-many"


def test_disarmed_between_decision_and_action_means_no_action() -> None:
    _, effects = step(State(), Decided("r1", BOOK, "api", (RECREATE,), 30))
    assert [e.refusal.rule for e in effects] == ["guard.disarmed"]


def test_what_is_remembered_comes_back_with_the_next_event_about_the_same_subject_only() -> None:
    book = dataclasses.replace(BOOK, slots=(0, 0), ranges=((0, 9), (0, 99)))
    state, _ = step(armed(book), Decided("r1", book, "api", (Call.of(Remember(1, 42)),), 30))
    _, (same,) = step(state, Happened(OPENED, "api", 50))
    _, (other,) = step(state, Happened(OPENED, "db", 50))
    assert same.args[-2:] == (0, 42)
    assert other.args[-2:] == (0, 0)


def test_of_too_many_targets_the_one_remembered_longest_ago_starts_anew() -> None:
    book = dataclasses.replace(BOOK, slots=(0,), ranges=((0, 9),))
    state = armed(book)
    for number in (*range(MEMORY_MAX), 0, MEMORY_MAX):  # the first one again, then one more than there is room for
        state, _ = step(state, Decided("r1", book, f"target {number}", (Call.of(Remember(0, 7)),), 30))
    assert len(state.memory) == MEMORY_MAX
    assert state.memory.get((book.name, "target 1")) is None
    assert state.memory[book.name, "target 0"] == state.memory[book.name, f"target {MEMORY_MAX}"] == (7,)


@pytest.mark.parametrize("call", [Remember(2, 1), Remember(0, 10)])
def test_a_slot_that_was_not_declared_or_a_value_out_of_its_range_is_not_remembered(call: Remember) -> None:
    book = dataclasses.replace(BOOK, slots=(0, 0), ranges=((0, 9), (0, 99)))
    state, (effect,) = step(armed(book), Decided("r1", book, "api", (Call.of(call),), 30))
    assert isinstance(effect, Refuse)
    assert effect.refusal.rule == "guard.call"
    assert state.memory == {}


def test_a_runbook_with_an_action_done_handler_goes_on_when_its_action_ended() -> None:
    book = dataclasses.replace(BOOK, events=frozenset({"CircuitOpened", "ActionDone"}))
    state, _ = step(armed(book), Decided("r1", book, "api", (RECREATE,), 30))
    _, (decide,) = step(state, Ended("r1", book, "api", Recreate(API, 0), Outcome.FAILED, 40))
    assert decide.event == ActionDone(40, ActionKind.RECREATE, Outcome.FAILED, API, 1)


def test_an_event_that_no_armed_runbook_handles_is_left_alone() -> None:
    assert step(armed(BOOK), Happened(OomKilled(1, API, 1, 0), "api", 2))[1] == ()
