"""The kernel: circuits as core/breaker.py has them, rings that lose what does not fit and count it exactly, pins.

A kernel lives as long as the machine. What a process loaded goes with it, except a pinned breaker. Clients connect
through the attached breakers; what they meet decides the circuit.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pointcall_attest.admission import Admitted
from pointcall_executor.arming import destinations_of
from pointcall_executor.core import breaker
from pointcall_executor.core.event import CircuitEvent, Destination, Kind, ProcessEvent, encode
from pointcall_executor.core.guard import Rules
from pointcall_executor.node import _never
from pointcall_executor.services.process import ServiceError
from pointcall_runbook.vocabulary import Address
from tests.sim.scheduler import Process, Scheduler
from tests.sim.threads import Descriptors

_KINDS = {
    breaker.Effect.OPENED: Kind.CIRCUIT_OPENED,
    breaker.Effect.REOPENED: Kind.CIRCUIT_REOPENED,
    breaker.Effect.CLOSED: Kind.CIRCUIT_CLOSED,
    breaker.Effect.EXPIRED: Kind.CIRCUIT_EXPIRED,
    breaker.Effect.PROBE: Kind.CIRCUIT_HALF_OPEN,
}


@dataclass(slots=True)
class Ring:
    """Records until they are drained. `produced` = drained + lost + what is in it + what was thrown away with it."""

    size: int
    records: collections.deque[bytes] = field(default_factory=collections.deque)
    produced: int = 0
    lost: int = 0
    drained: int = 0
    losses: list[int] = field(default_factory=list)  # when
    told: int = 0  # of those lost, what the auditor has settled
    armed: bool = False  # somebody asked what it lost: before that nobody promised to count


@dataclass(slots=True)
class Breaker:
    """A loaded breaker: its circuits, its ring, and where readers wait."""

    circuits: dict[Destination, breaker.Circuit]
    params: breaker.Params
    ring: Ring
    holders: set[int] = field(default_factory=set)  # descriptors that wait for the ring
    attached: bool = True
    pinned: bool = False


class Kernel:
    """The machine's kernel."""

    def __init__(self, scheduler: Scheduler, descriptors: Descriptors) -> None:
        self.scheduler, self.descriptors = scheduler, descriptors
        self.breakers: list[Breaker] = []
        self.pinned: Breaker | None = None
        self.lifecycles: list[LifecycleRing] = []
        self.ring_size = 64
        self.tampered = False

    def lost(self) -> int:
        """Events that the rings which are there could not take."""
        return sum(held.ring.lost - held.ring.told for held in (*self.breakers, *self.lifecycles) if held.ring.armed)

    def emit(self, ring: Ring, holders: set[int], record: bytes) -> None:
        ring.produced += 1
        if len(ring.records) >= ring.size:
            ring.lost += 1
            ring.losses.append(self.scheduler.now)
            return
        ring.records.append(record)
        for fd in holders:
            self.descriptors.signal(fd, len(ring.records))

    def attempt(self, destination: Destination) -> list[tuple[Breaker, bool]] | None:
        """A client asks to connect: None if a breaker refuses it, else who wants to know how it ends."""
        now_us = self.scheduler.now // 1000
        asking: list[tuple[Breaker, bool]] = []
        for held in self.breakers:
            circuit = held.circuits.get(destination)
            if circuit is None or not held.attached:
                continue
            after, effects = breaker.step(circuit, breaker.Connect(now_us), held.params)
            held.circuits[destination] = after
            self._tell(held, destination, after, effects)
            if breaker.Effect.REFUSED in effects:
                return None
            asking.append((held, breaker.Effect.PROBE in effects))
        return asking

    def result(self, destination: Destination, asking: list[tuple[Breaker, bool]], good: bool) -> None:
        """How a connect ended."""
        now_us = self.scheduler.now // 1000
        for held, probe in asking:
            circuit = held.circuits.get(destination)
            if circuit is None or not held.attached:
                continue
            event = breaker.Succeeded(now_us, probe) if good else breaker.Failed(now_us, probe)
            after, effects = breaker.step(circuit, event, held.params)
            held.circuits[destination] = after
            self._tell(held, destination, after, effects)

    def _tell(
        self, held: Breaker, where: Destination, circuit: breaker.Circuit, effects: tuple[breaker.Effect, ...]
    ) -> None:
        for effect in effects:
            kind = _KINDS.get(effect)
            if kind is not None:
                event = CircuitEvent(kind, self.scheduler.now, where, circuit.word.count & 255, 111, 0, 0)
                self.emit(held.ring, held.holders, encode(event))

    def exited(self, event: ProcessEvent) -> None:
        """A process of a cgroup ended: the lifecycle sensors that watch it hear of it."""
        for held in self.lifecycles:
            if event.cgroup in held.watched:
                self.emit(held.ring, held.holders, encode(event))


@dataclass(slots=True)
class LifecycleRing:
    """A loaded lifecycle sensor."""

    ring: Ring
    watched: set[int] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)


class Sensors:
    """What node.KernelSensors is on a real kernel."""

    def __init__(self, machine: Any, process: Process, admitted: Admitted, rules: Rules, *, pin: bool) -> None:
        self.machine, self.process, self.admitted = machine, process, admitted
        self.kernel: Kernel = machine.kernel
        self.scheduler: Scheduler = machine.scheduler
        self.scheduler.alive()
        self._pin, self._kept = pin, False
        declared = destinations_of(admitted.manifest, 0)
        self.destinations = {d: n for d, n in declared.items() if not _never(d, n, rules)}
        self.places = {(str(d.address), d.port): d for d in self.destinations}
        self.breaker: Breaker | None = None
        self.lifecycle: LifecycleRing | None = None
        self.fd = self.kernel.descriptors.open()
        self.gone = False
        for sensor in admitted.manifest.sensors:
            if sensor.name == "breaker":
                self._load_breaker(machine.params)
            else:
                self.lifecycle = LifecycleRing(Ring(self.kernel.ring_size))
                self.lifecycle.holders.add(self.fd)
                self.kernel.lifecycles.append(self.lifecycle)
        machine.sensors.append(self)

    def _load_breaker(self, params: breaker.Params) -> None:
        kernel = self.kernel
        if self._pin and kernel.pinned is not None:
            self.breaker = kernel.pinned
            for destination in self.destinations:
                self.breaker.circuits.setdefault(destination, breaker.Circuit())
        else:
            circuits = dict.fromkeys(self.destinations, breaker.Circuit())
            self.breaker = Breaker(circuits, params, Ring(kernel.ring_size))
            kernel.breakers.append(self.breaker)
        self.breaker.holders.add(self.fd)
        kernel.descriptors.signal(self.fd, len(self.breaker.ring.records))

    def _rings(self) -> dict[str, Ring]:
        found = {"breaker": self.breaker, "lifecycle": self.lifecycle}
        return {name: held.ring for name, held in found.items() if held is not None}

    def fds(self) -> tuple[int, ...]:
        return () if self.gone else (self.fd,)

    def drain(self) -> list[bytes]:
        self.scheduler.alive()
        found: list[bytes] = []
        for ring in self._rings().values():
            found += ring.records
            ring.drained += len(ring.records)
            ring.records.clear()
        if not self.gone:
            self.kernel.descriptors.signal(self.fd, 0)
        return found

    def lost(self) -> Mapping[str, int]:
        for ring in self._rings().values():
            ring.armed = True
        return {name: ring.lost for name, ring in self._rings().items()}

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        return tuple((name, 1, "tag") for name in self._rings())

    def states(self) -> tuple[Any, ...]:
        return ()

    def watch(self, cgroup_id: int) -> None:
        self.scheduler.alive()
        if self.lifecycle is not None:
            self.lifecycle.watched.add(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        self.scheduler.alive()
        if self.lifecycle is not None:
            self.lifecycle.watched.discard(cgroup_id)

    def changed(self) -> list[str]:
        return ["breaker: another program"] if self.kernel.tampered and not self.gone else []

    def _known(self, address: Address, port: int) -> Destination:
        self.scheduler.preempt()
        destination = self.places.get((str(address), port))
        if destination is None or self.breaker is None or self.gone:
            raise ServiceError("no circuit is armed there", id="circuit.unknown", got=f"{address}:{port}")
        return destination

    def _change(self, destination: Destination, event: breaker.Event) -> None:
        assert self.breaker is not None
        circuits = self.breaker.circuits
        circuits[destination], _ = breaker.step(circuits[destination], event, self.breaker.params)

    def force(self, address: Address, port: int, until_ns: int) -> None:
        destination = self._known(address, port)
        self._change(destination, breaker.Force(until_ns // 1000))
        self.machine.auditor.forced(self.breaker, destination, until_ns)

    def close_circuit(self, address: Address, port: int) -> None:
        destination = self._known(address, port)
        self._change(destination, breaker.Close())
        self.machine.auditor.closed(self.breaker, destination)

    def probe_service(self, number: int) -> int:
        self.scheduler.alive()
        mine = [d for d, n in self.destinations.items() if n == number] if self.breaker is not None else []
        for destination in mine:
            self._change(destination, breaker.ProbeReady(self.scheduler.now // 1000))
            self.machine.auditor.closed(self.breaker, destination)
        return len(mine)

    def keep(self) -> None:
        self.scheduler.alive()
        if self._pin and self.breaker is not None:
            for destination in list(self.breaker.circuits):
                if destination not in self.destinations:
                    del self.breaker.circuits[destination]
            if self.kernel.pinned is not None and self.kernel.pinned is not self.breaker:
                self.kernel.pinned.pinned = False
                self._forget(self.kernel.pinned)
            self.kernel.pinned, self.breaker.pinned, self._kept = self.breaker, True, True

    def _forget(self, held: Breaker) -> None:
        """A breaker that neither a pin nor a process holds is gone."""
        if not held.pinned and not held.holders and held.attached:
            held.attached = False
            self.kernel.breakers.remove(held)
            self.machine.auditor.vanished(held, held.ring)

    def leave(self) -> None:
        """The process lets go of what it loaded; also what its end does."""
        if self.gone:
            return
        self.gone = True
        self.machine.sensors.remove(self)
        if self.breaker is not None:
            self.breaker.holders.discard(self.fd)
            if not self.breaker.pinned:
                self.machine.auditor.settle(self.breaker.ring)
            self._forget(self.breaker)
        if self.lifecycle is not None:
            self.lifecycle.holders.discard(self.fd)
            self.kernel.lifecycles.remove(self.lifecycle)
            self.machine.auditor.vanished(self.lifecycle, self.lifecycle.ring)
        self.kernel.descriptors.close(self.fd)
        self.breaker = self.lifecycle = None

    def detach(self) -> None:
        self.scheduler.alive()
        if self._kept and self.kernel.pinned is self.breaker and self.breaker is not None:
            self.kernel.pinned, self.breaker.pinned = None, False
        self._kept = False
        self.leave()
