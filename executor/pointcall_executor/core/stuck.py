"""Circuits that stay open: (what was known, the circuits now) -> (what is known, reports). Pure; no kernel, no clock.

A circuit is stuck when it has been open or half-open for longer than a limit, and it is reported again each time the
limit passes once more. A forced circuit is meant, so it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Destination, Kind, StuckEvent


@dataclass(frozen=True, slots=True)
class Seen:
    """What the kernel says of one circuit. `opened_ns`: when it opened last; `probes`: that ever left; `closed`: how
    often a probe closed it."""

    destination: Destination
    state: State
    opened_ns: int
    probes: int
    closed: int


@dataclass(frozen=True, slots=True)
class Open:
    """One circuit that is not closed: since when, how many probes had left by then, when it was reported last."""

    since_ns: int
    probes: int
    closed: int
    reported_ns: int


Known = Mapping[Destination, Open]


def look(known: Known, circuits: Iterable[Seen], now_ns: int, limit_ns: int) -> tuple[Known, list[StuckEvent]]:
    """What is known after this look, and one event for each circuit that is stuck."""
    after: dict[Destination, Open] = {}
    reports = []
    for circuit in circuits:
        if circuit.state not in (State.OPEN, State.HALF):
            continue
        # Opened again by a failed probe it counts from its first opening, as far as we saw that one.
        open_ = known.get(circuit.destination)
        if open_ is None or open_.closed != circuit.closed:
            open_ = Open(circuit.opened_ns, circuit.probes, circuit.closed, circuit.opened_ns)
        if now_ns - open_.reported_ns >= limit_ns:
            target = replace(circuit.destination, netns=0)
            probes, open_for = max(circuit.probes - open_.probes, 0), now_ns - open_.since_ns
            reports.append(StuckEvent(Kind.CIRCUIT_STUCK, now_ns, target, open_for, probes))
            open_ = replace(open_, reported_ns=now_ns)
        after[circuit.destination] = open_
    return after, reports
