"""From a kernel record to an event with facts: which service it is about, how often it happened lately. Pure.

A record about something that the manifest does not declare starts nothing and is only counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, assert_never

from pointcall_executor.core.event import (
    CircuitEvent,
    Destination,
    KernelEvent,
    Kind,
    PressureEvent,
    ProcessEvent,
    StorageEvent,
    StuckEvent,
    SyscallEvent,
    TransportEvent,
)
from pointcall_executor.core.history import OPENED, History, Key
from pointcall_runbook.vocabulary import (
    U32,
    U63,
    CircuitClosed,
    CircuitOpened,
    CircuitStuck,
    ConnectionsReset,
    ConnectSlow,
    DiskError,
    Event,
    FilesystemSlow,
    OomKilled,
    PressureHigh,
    ProcessExited,
    RetransmitStorm,
    Service,
    SyscallUnusual,
    Unusual,
)

# Storage is often used by nobody in particular: 0, or the root of the v2 tree, where most tasks of a hybrid host are.
NODE_WIDE: Final = frozenset({0, 1})


@dataclass(frozen=True, slots=True)
class Topology:
    """What is where: which declared service listens on a destination, which cgroup holds which service."""

    listeners: Mapping[tuple[str, int, int], int] = field(default_factory=dict)  # address, port, protocol -> service
    cgroups: Mapping[int, int] = field(default_factory=dict)  # cgroup v2 id -> service number
    names: Mapping[int, str] = field(default_factory=dict)  # service number -> name

    def listening(self, destination: Destination) -> int:
        """The service that declares this destination, 0 if none does.

        Whatever its namespace: only armed destinations report, and armed are those of the executor's own namespace and
        node-wide ones, which are never loopback (arming.node_wide).
        """
        return self.listeners.get((str(destination.address), destination.port, destination.protocol), 0)

    def moved(self, number: int, cgroup_id: int) -> Topology:
        """The same after a service got a new cgroup; 0 where it has none."""
        kept = {c: n for c, n in self.cgroups.items() if n != number}
        return replace(self, cgroups={**kept, cgroup_id: number} if cgroup_id else kept)


class Noticed(NamedTuple):
    """A record with its meaning: the event for runbooks (None: nothing to decide) and what it is about."""

    event: Event | None
    subject: str
    sensor: str


def _circuit(record: CircuitEvent, topology: Topology, history: History) -> tuple[History, Noticed]:
    where, number = record.destination, topology.listening(record.destination)
    subject = str(where)
    key: Key = (OPENED, subject)
    at, service = record.at_ns, Service(number)
    restarts = history.count(("restart", number), at)
    match record.kind:
        case Kind.CIRCUIT_OPENED | Kind.CIRCUIT_REOPENED:
            again = record.kind is Kind.CIRCUIT_REOPENED
            history = history.noted(key, at)
            opens = history.count(key, at)
            event = CircuitOpened(at, where.address, where.port, record.failures, again, opens, service, restarts)
            return history, Noticed(event, subject, "breaker")
        case Kind.CIRCUIT_CLOSED:
            opened = history.last(key)
            open_for = min(max(at - opened, 0), U63) if opened is not None else 0
            closed = CircuitClosed(at, where.address, where.port, open_for, service, restarts)
            return history, Noticed(closed, subject, "breaker")
        case _:
            return history, Noticed(None, subject, "breaker")


def _process(record: ProcessEvent, topology: Topology, history: History) -> tuple[History, Noticed]:
    number = topology.cgroups.get(record.cgroup, 0)
    subject = topology.names.get(number, "")
    if number == 0:
        return history, Noticed(None, subject, "lifecycle")
    kind = "oom" if record.kind is Kind.OOM_VICTIM else "exit"
    key: Key = (kind, number)
    at, service = record.at_ns, Service(number)
    history = history.noted(key, at)
    count, restarts = history.count(key, at), history.count(("restart", number), at)
    event: Event = (
        OomKilled(at, service, count, restarts)
        if kind == "oom"
        else ProcessExited(at, service, record.signal, record.status, record.life_ns, count, restarts)
    )
    return history, Noticed(event, subject, "lifecycle")


def _stuck(record: StuckEvent, topology: Topology, history: History) -> Noticed:
    where, number = record.destination, topology.listening(record.destination)
    restarts = history.count(("restart", number), record.at_ns)
    open_for = min(record.open_for_ns, U63)
    stuck = CircuitStuck(record.at_ns, where.address, where.port, open_for, record.probes, Service(number), restarts)
    return Noticed(stuck, str(where), "breaker")


def _transport(record: TransportEvent, topology: Topology, history: History) -> Noticed:
    where, number = record.destination, topology.listening(record.destination)
    at, address, port, service = record.at_ns, where.address, where.port, Service(number)
    restarts = history.count(("restart", number), at)
    event: Event
    match record.kind:
        case Kind.RESETS:
            event = ConnectionsReset(at, address, port, record.count, service, restarts)
        case Kind.RETRANSMITS:
            event = RetransmitStorm(at, address, port, record.count, service, restarts)
        case _:
            event = ConnectSlow(at, address, port, record.count, record.attempts, service, restarts)
    return Noticed(event, str(where), "transport")


def _storage(record: StorageEvent, topology: Topology, history: History) -> Noticed:
    """What another program of the node does to its own files is not our business; what nobody is named for, is."""
    number = topology.cgroups.get(record.cgroup, 0)
    device = f"{record.device >> 20}:{record.device & 0xFFFFF}"
    subject, sensor = f"{topology.names.get(number, 'node')} device {device}", record.source.name.lower()
    if number == 0 and record.cgroup not in NODE_WIDE:
        return Noticed(None, subject, sensor)
    at, service = record.at_ns, Service(number)
    if record.kind is Kind.DISK_ERROR:
        return Noticed(DiskError(at, record.device, record.errors, service), subject, sensor)
    restarts, longest = history.count(("restart", number), at), min(record.longest_ns, U63)
    slow = FilesystemSlow(
        at, record.device, record.operation, record.operations, record.slow, longest, service, restarts
    )
    return Noticed(slow, f"{subject} {record.operation.name.lower()}", sensor)


def _syscall(record: SyscallEvent, topology: Topology, history: History) -> Noticed:
    number = topology.cgroups.get(record.cgroup, 0)
    subject = topology.names.get(number, "")
    if number == 0:
        return Noticed(None, subject, "syscalls")
    kind = Unusual.NOVEL if record.kind is Kind.SYSCALL_NOVEL else Unusual.ERRORS
    restarts = history.count(("restart", number), record.at_ns)
    errors, calls = min(record.errors, U32), min(record.calls, U32)
    unusual = SyscallUnusual(record.at_ns, kind, record.number, errors, calls, Service(number), restarts)
    return Noticed(unusual, subject, "syscalls")


def _pressure(record: PressureEvent, topology: Topology, history: History) -> Noticed:
    number = topology.cgroups.get(record.cgroup, 0)
    subject = topology.names.get(number, "")
    if number == 0:
        return Noticed(None, subject, "pressure")
    restarts = history.count(("restart", number), record.at_ns)
    stalled, window = min(record.stalled_ns, U63), min(record.window_ns, U63)
    high = PressureHigh(record.at_ns, record.resource, stalled, window, Service(number), restarts)
    return Noticed(high, subject, "pressure")


def notice(record: KernelEvent, topology: Topology, history: History) -> tuple[History, Noticed]:
    """What a record means here, and the history with it."""
    match record:
        case CircuitEvent():
            return _circuit(record, topology, history)
        case ProcessEvent():
            return _process(record, topology, history)
        case StuckEvent():
            return history, _stuck(record, topology, history)
        case TransportEvent():
            return history, _transport(record, topology, history)
        case StorageEvent():
            return history, _storage(record, topology, history)
        case SyscallEvent():
            return history, _syscall(record, topology, history)
        case PressureEvent():
            return history, _pressure(record, topology, history)
        case _:
            assert_never(record)
