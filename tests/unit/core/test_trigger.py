"""Records become events with facts; what is not declared starts nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.core.event import (
    CircuitEvent,
    Destination,
    Kind,
    PressureEvent,
    ProcessEvent,
    Source,
    StorageEvent,
    StuckEvent,
    SyscallEvent,
    TransportEvent,
)
from pointcall_executor.core.history import History
from pointcall_executor.core.trigger import Topology, notice
from pointcall_runbook.vocabulary import (
    NO_SERVICE,
    U32,
    Address,
    CircuitClosed,
    CircuitOpened,
    CircuitStuck,
    ConnectionsReset,
    ConnectSlow,
    DiskError,
    Event,
    FilesystemSlow,
    OomKilled,
    Operation,
    PressureHigh,
    ProcessExited,
    Resource,
    RetransmitStorm,
    SyscallUnusual,
    Unusual,
    service,
    slots,
)

SECOND = 1_000_000_000
API = service("api")
HERE = Destination(Address.parse("127.0.0.1"), 8080, 7)
ELSEWHERE = Destination(Address.parse("127.0.0.1"), 9090, 7)
TOPOLOGY = Topology({("127.0.0.1", 8080, 6): API.number}, {42: API.number}, {API.number: "api"})


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


def test_tcp_and_udp_on_one_port_may_be_two_services() -> None:
    dns = service("dns")
    topology = Topology({("127.0.0.1", 8080, 6): API.number, ("127.0.0.1", 8080, 17): dns.number})
    for where, owner in ((HERE, API), (replace(HERE, protocol=17), dns)):
        noticed = notice(circuit(Kind.CIRCUIT_OPENED, where=where), topology, History())[1]
        assert isinstance(noticed.event, CircuitOpened)
        assert noticed.event.service == owner


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


# ---- the detectors ---------------------------------------------------------------------------------------------------

AT = 100 * SECOND
RESTARTED = History().noted(("restart", API.number), 50 * SECOND)
SDA1 = 8 << 20 | 1


def storage(kind: Kind, cgroup: int, source: Source = Source.STORAGE) -> StorageEvent:
    return StorageEvent(kind, AT, cgroup, SDA1, Operation.WRITE, 9, 5, 2, source, 7 * SECOND)


def test_each_detection_becomes_its_event_with_the_facts_of_its_service() -> None:
    told = {
        StuckEvent(Kind.CIRCUIT_STUCK, AT, HERE, 60 * SECOND, 3): (
            CircuitStuck(AT, HERE.address, 8080, 60 * SECOND, 3, API, 1), "tcp://127.0.0.1:8080", "breaker",
        ),
        TransportEvent(Kind.CONNECT_SLOW, AT, HERE, 4, 6): (
            ConnectSlow(AT, HERE.address, 8080, 4, 6, API, 1), "tcp://127.0.0.1:8080", "transport",
        ),
        storage(Kind.STORAGE_SLOW, 42, Source.FUSE): (
            FilesystemSlow(AT, SDA1, Operation.WRITE, 9, 5, 7 * SECOND, API, 1), "api device 8:1 write", "fuse",
        ),
        storage(Kind.DISK_ERROR, 42): (DiskError(AT, SDA1, 2, API), "api device 8:1", "storage"),
        SyscallEvent(Kind.SYSCALL_NOVEL, AT, 7, 42, 101, -1, 1, 9): (
            SyscallUnusual(AT, Unusual.NOVEL, 101, 1, 9, API, 1), "api", "syscalls",
        ),
        SyscallEvent(Kind.SYSCALL_ERRORS, AT, 7, 42, 257, -2, 2**40, 2**41): (
            SyscallUnusual(AT, Unusual.ERRORS, 257, U32, U32, API, 1), "api", "syscalls",
        ),
        PressureEvent(Kind.PRESSURE, AT, 42, Resource.MEMORY, SECOND, 2 * SECOND): (
            PressureHigh(AT, Resource.MEMORY, SECOND, 2 * SECOND, API, 1), "api", "pressure",
        ),
    }  # fmt: skip
    for record, (event, subject, sensor) in told.items():
        history, noticed = notice(record, TOPOLOGY, RESTARTED)
        assert (noticed.event, noticed.subject, noticed.sensor) == (event, subject, sensor)
        assert history is RESTARTED
        assert slots(event)


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        (Kind.RESETS, ConnectionsReset(AT, HERE.address, HERE.port, 4, API, 1)),
        (Kind.RETRANSMITS, RetransmitStorm(AT, HERE.address, HERE.port, 4, API, 1)),
    ],
)
def test_resets_and_retransmissions_are_about_who_listens_there(kind: Kind, event: Event) -> None:
    noticed = notice(TransportEvent(kind, AT, HERE, 4, 6), TOPOLOGY, RESTARTED)[1]
    assert (noticed.event, noticed.subject, noticed.sensor) == (event, str(HERE), "transport")


@pytest.mark.parametrize(
    "record",
    [
        storage(Kind.STORAGE_SLOW, 43),
        storage(Kind.DISK_ERROR, 43),
        SyscallEvent(Kind.SYSCALL_NOVEL, AT, 7, 43, 101, -1, 1, 9),
        PressureEvent(Kind.PRESSURE, AT, 43, Resource.CPU, SECOND, 2 * SECOND),
    ],
)
def test_a_cgroup_that_nobody_declared_starts_nothing(
    record: StorageEvent | SyscallEvent | PressureEvent,
) -> None:
    assert notice(record, TOPOLOGY, History())[1].event is None


@pytest.mark.parametrize("nobody", [0, 1])
def test_storage_trouble_of_nobody_in_particular_is_the_nodes(nobody: int) -> None:
    _, slow = notice(storage(Kind.STORAGE_SLOW, nobody), TOPOLOGY, History())
    _, error = notice(storage(Kind.DISK_ERROR, nobody), TOPOLOGY, History())
    assert isinstance(slow.event, FilesystemSlow)
    assert isinstance(error.event, DiskError)
    assert (slow.event.service, error.event.service) == (NO_SERVICE, NO_SERVICE)
    assert (slow.subject, error.subject) == ("node device 8:1 write", "node device 8:1")
