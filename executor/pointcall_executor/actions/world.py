"""What an action may touch, and what it gives back. The session provides the real thing, tests a small fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from pointcall_executor.services.managed import Started, not_running
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
    """Declared services by number. ServiceError where one is unknown, or of a kind that cannot do it."""

    def name(self, number: int) -> str: ...
    def destroy(self, number: int, grace_ns: int) -> int: ...
    def start(self, number: int) -> Started: ...
    def signal(self, number: int, signal: int) -> None: ...
    def freeze(self, number: int, until_ns: int) -> None: ...
    def thaw(self, number: int) -> None: ...
    def frozen(self, number: int, until_ns: int) -> bool: ...
    def cgroup(self, number: int) -> int: ...
    def healthy(self, number: int) -> str: ...


class Circuits(Protocol):
    """The breaker's table, and what else the kernel holds for a time. Times are CLOCK_MONOTONIC ns.

    Several circuits may share an address and a port (TCP and UDP): a command is for all of them or changes none,
    `forced_until` says how long all are held open, `still_forced` whether any is.
    """

    def force(self, address: Address, port: int, until_ns: int) -> None: ...
    def close_circuit(self, address: Address, port: int) -> None: ...
    def forced_until(self, address: Address, port: int) -> int: ...
    def still_forced(self, address: Address, port: int) -> bool: ...
    def probe_service(self, number: int) -> int: ...
    def kill_connections(self, address: Address, port: int) -> int: ...
    def isolate(self, cgroup_id: int, until_ns: int) -> None: ...
    def end_isolation(self, cgroup_id: int) -> None: ...
    def isolated_until(self, cgroup_id: int) -> int: ...


class Channels(Protocol):
    """Where notifications go. `waits`: sending to it may take a while, and must not hold up the loop."""

    def send(self, number: int, level: Level, code: int) -> str: ...
    def waits(self, number: int) -> bool: ...
    def hurry(self) -> None: ...


class World(NamedTuple):
    """Everything an action can reach; `now_ns` is CLOCK_MONOTONIC."""

    services: Services
    circuits: Circuits
    channels: Channels
    now_ns: int
    cgroups: Mapping[int, int] = MappingProxyType({})  # cgroup id -> service that runs in it now

    def cgroup_of(self, number: int) -> int:
        """The cgroup of a service, without asking anybody who may be slow. ServiceError where none is known."""
        for cgroup_id, owner in self.cgroups.items():
            if owner == number:
                return cgroup_id
        raise not_running(self.services.name(number))


@dataclass(frozen=True, slots=True)
class Verb:
    """One action: `perform` does it; `amiss` says what of its post-condition does not hold, empty if it holds; `undo`
    takes it back, as far as that is possible."""

    perform: Callable[[Any, World], Done]
    amiss: Callable[[Any, World], str] | None = None
    undo: Callable[[Any, World], None] | None = None
