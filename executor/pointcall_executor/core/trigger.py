"""From a kernel record to an event with facts: which service it is about, how often it happened lately. Pure.

A record about something that the manifest does not declare starts nothing and is only counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from pointcall_executor.core.event import CircuitEvent, Destination, KernelEvent, Kind, ProcessEvent
from pointcall_executor.core.history import History, Key
from pointcall_runbook.vocabulary import U63, CircuitClosed, CircuitOpened, Event, OomKilled, ProcessExited, Service


@dataclass(frozen=True, slots=True)
class Topology:
    """What is where: which declared service listens on a destination, which cgroup holds which service."""

    listeners: Mapping[tuple[str, int], int] = field(default_factory=dict)  # (address, port) -> service number
    cgroups: Mapping[int, int] = field(default_factory=dict)  # cgroup v2 id -> service number
    names: Mapping[int, str] = field(default_factory=dict)  # service number -> name

    def listening(self, destination: Destination) -> int:
        """The service that declares this destination, 0 if none does."""
        return self.listeners.get((str(destination.address), destination.port), 0)

    def moved(self, number: int, cgroup_id: int) -> Topology:
        """The same after a service got a new cgroup; 0 where it has none."""
        kept = {c: n for c, n in self.cgroups.items() if n != number}
        return replace(self, cgroups={**kept, cgroup_id: number} if cgroup_id else kept)


@dataclass(frozen=True, slots=True)
class Noticed:
    """A record with its meaning: the event for runbooks (None: nothing to decide) and what it is about."""

    event: Event | None
    subject: str
    sensor: str


def _circuit(record: CircuitEvent, topology: Topology, history: History) -> tuple[History, Noticed]:
    where, number = record.destination, topology.listening(record.destination)
    subject = str(where)
    key: Key = ("opened", subject)
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


def notice(record: KernelEvent, topology: Topology, history: History) -> tuple[History, Noticed]:
    """What a record means here, and the history with it."""
    match record:
        case CircuitEvent():
            return _circuit(record, topology, history)
        case ProcessEvent():
            return _process(record, topology, history)
        case _:
            assert_never(record)
