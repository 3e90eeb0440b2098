"""Records become events with facts; what is not declared starts nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.core.event import CircuitEvent, Destination, Kind, ProcessEvent
from pointcall_executor.core.history import History
from pointcall_executor.core.trigger import Topology, notice
from pointcall_runbook.vocabulary import Address, CircuitClosed, CircuitOpened, OomKilled, ProcessExited, service

SECOND = 1_000_000_000
API = service("api")
HERE = Destination(Address.parse("127.0.0.1"), 8080, 7)
ELSEWHERE = Destination(Address.parse("127.0.0.1"), 9090, 7)
TOPOLOGY = Topology({("127.0.0.1", 8080): API.number}, {42: API.number}, {API.number: "api"})


def circuit(kind: Kind, at_s: int = 100, where: Destination = HERE) -> CircuitEvent:
    return CircuitEvent(kind, at_s * SECOND, where, 5, 111, 0, 0)


def process(kind: Kind, cgroup: int = 42, code: int = 9) -> ProcessEvent:
    return ProcessEvent(kind, 100 * SECOND, 7, cgroup, code, 3 * SECOND, 0, "api")


def test_an_opened_circuit_knows_its_service_and_how_often_it_opened() -> None:
    history = History().noted(("restart", API.number), 50 * SECOND)
    history, first = notice(circuit(Kind.CIRCUIT_OPENED), TOPOLOGY, history)
    _, second = notice(circuit(Kind.CIRCUIT_REOPENED, 101), TOPOLOGY, history)
    assert first.event == CircuitOpened(100 * SECOND, HERE.address, 8080, 5, False, 1, API, 1)
    assert second.event == CircuitOpened(101 * SECOND, HERE.address, 8080, 5, True, 2, API, 1)


def test_a_destination_that_nobody_declares_has_no_service() -> None:
    _, noticed = notice(circuit(Kind.CIRCUIT_OPENED, where=ELSEWHERE), TOPOLOGY, History())
    assert isinstance(noticed.event, CircuitOpened)
    assert noticed.event.service.number == 0


def test_a_closed_circuit_says_for_how_long_it_was_open() -> None:
    history, _ = notice(circuit(Kind.CIRCUIT_OPENED), TOPOLOGY, History())
    _, noticed = notice(circuit(Kind.CIRCUIT_CLOSED, 103), TOPOLOGY, history)
    assert noticed.event == CircuitClosed(103 * SECOND, HERE.address, 8080, 3 * SECOND, API, 0)


@pytest.mark.parametrize("kind", [Kind.CIRCUIT_HALF_OPEN, Kind.CIRCUIT_EXPIRED])
def test_a_probe_or_an_expired_lease_decides_nothing(kind: Kind) -> None:
    assert notice(circuit(kind), TOPOLOGY, History())[1].event is None


def test_what_happens_to_a_process_is_about_the_service_of_its_cgroup() -> None:
    history, killed = notice(process(Kind.OOM_VICTIM), TOPOLOGY, History())
    assert killed.event == OomKilled(100 * SECOND, API, 1, 0)
    _, ended = notice(process(Kind.PROCESS_EXIT, code=3 << 8), TOPOLOGY, history)
    assert ended.event == ProcessExited(100 * SECOND, API, 0, 3, 3 * SECOND, 1, 0)


def test_a_process_of_no_declared_service_starts_nothing_and_is_not_remembered() -> None:
    history, noticed = notice(process(Kind.OOM_VICTIM, cgroup=43), TOPOLOGY, History())
    assert (noticed.event, history) == (None, History())


def test_a_recreated_service_leaves_its_old_cgroup() -> None:
    moved = TOPOLOGY.moved(API.number, 99)
    assert moved.cgroups == {99: API.number}
    assert moved.moved(API.number, 0).cgroups == {}


@given(st.lists(st.sampled_from([k for k in Kind if k < Kind.OOM_VICTIM]), max_size=30))
def test_facts_never_leave_their_range(kinds: list[Kind]) -> None:
    history = History()
    for second, kind in enumerate(kinds):
        history, noticed = notice(circuit(kind, second), TOPOLOGY, history)
        if isinstance(noticed.event, CircuitOpened):
            assert 1 <= noticed.event.opens <= second + 1
