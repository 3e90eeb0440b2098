"""Circuits that stay open are reported, once for each time that the limit passes."""

from __future__ import annotations

import pytest

from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Destination, Kind, StuckEvent
from pointcall_executor.core.stuck import Known, Seen, look
from pointcall_runbook.vocabulary import Address

SECOND = 1_000_000_000
DB = Destination(Address.parse("10.0.0.1"), 5432, 7)
LIMIT = 10 * SECOND


def seen(state: State, opened_s: int = 100, probes: int = 0, closed: int = 0) -> Seen:
    return Seen(DB, state, opened_s * SECOND, probes, closed)


def told(*looks: tuple[int, Seen]) -> list[tuple[int, int, int]]:
    """(when, open for, probes) of every report, in seconds."""
    known: Known = {}
    found = []
    for at_s, circuit in looks:
        known, reports = look(known, [circuit], at_s * SECOND, LIMIT)
        found += [(at_s, r.open_for_ns // SECOND, r.probes) for r in reports]
    return found


def test_it_is_reported_when_the_limit_passes_and_each_time_that_it_passes_again() -> None:
    assert told(*((s, seen(State.OPEN)) for s in range(100, 132))) == [(110, 10, 0), (120, 20, 0), (130, 30, 0)]


def test_failed_probes_do_not_start_it_again_and_are_counted() -> None:
    story = [(101, seen(State.OPEN)), (105, seen(State.HALF, 100, 1)), (106, seen(State.OPEN, 106, 1))]
    assert told(*story, (111, seen(State.OPEN, 109, 2))) == [(111, 11, 2)]


@pytest.mark.parametrize("state", [State.CLOSED, State.FORCED])
def test_a_closed_or_forced_circuit_is_not_stuck(state: State) -> None:
    assert told((101, seen(State.OPEN)), (105, seen(state)), (112, seen(State.OPEN, 112))) == []
    assert told(*((s, seen(state)) for s in range(100, 140))) == []


def test_one_that_closed_and_opened_between_two_looks_counts_anew() -> None:
    assert told((101, seen(State.OPEN)), (112, seen(State.OPEN, 111, 1, closed=1))) == []


def test_the_report_names_no_namespace() -> None:
    _, (report,) = look({}, [seen(State.OPEN)], 111 * SECOND, LIMIT)
    assert report == StuckEvent(Kind.CIRCUIT_STUCK, 111 * SECOND, Destination(DB.address, 5432), 11 * SECOND, 0)
