"""What an action may touch, and what it gives back. The daemon provides the real thing, tests a small fake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pointcall_executor.services.managed import Started
from pointcall_runbook.vocabulary import Address, Level, Outcome


@dataclass(frozen=True, slots=True)
class Done:
    """What an action did: `detail` and `undo` go into the receipt as they are."""

    outcome: Outcome
    target: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    undo: str | None = None
    postcondition: str = ""


class Services(Protocol):
    """Declared services by number; services/managed.py says what each method promises."""

    def name(self, number: int) -> str: ...
    def destroy(self, number: int, grace_ns: int) -> int: ...
    def start(self, number: int) -> Started: ...
    def signal(self, number: int, sig: int) -> None: ...
    def freeze(self, number: int, until_ns: int) -> None: ...
    def thaw(self, number: int) -> None: ...
    def cgroup(self, number: int) -> int: ...
    def healthy(self, number: int) -> str: ...


class Circuits(Protocol):
    """The breaker's table, and what else refuses or ends traffic in the kernel."""

    def force(self, address: Address, port: int, until_ns: int) -> None: ...
    def close_circuit(self, address: Address, port: int) -> None: ...
    def probe_service(self, number: int) -> int: ...
    def kill_connections(self, address: Address, port: int) -> int: ...
    def isolate(self, cgroup_id: int, until_ns: int) -> None: ...
    def end_isolation(self, cgroup_id: int) -> None: ...


class Channels(Protocol):
    """Where notifications go."""

    def send(self, number: int, level: Level, code: int) -> str: ...


@dataclass(frozen=True, slots=True)
class World:
    """Everything an action can reach; `now_ns` is CLOCK_MONOTONIC."""

    services: Services
    circuits: Circuits
    channels: Channels
    now_ns: int
