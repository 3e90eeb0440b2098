"""The kernel: circuits as core/breaker.py has them, rings that lose what does not fit and count it exactly, pins.

A kernel lives as long as the machine. What a process loaded goes with it, except a pinned breaker. Clients connect
through the attached breakers; what they meet decides the circuit.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pointcall_attest.admission import Admitted
from pointcall_executor.arming import destinations_of
from pointcall_executor.core import breaker
from pointcall_executor.core.event import CircuitEvent, Destination, Kind, ProcessEvent, encode
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.sensors import _never
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Address
from tests.sim.scheduler import MINUTE, Process, Scheduler
from tests.sim.threads import Descriptors

LEASE_MAX_NS = 60 * MINUTE
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
    left: int = 0  # what was lost when nobody was there to count any more
    armed: bool = False  # of a session that was armed: before that nobody promised to count


@dataclass(slots=True)
class Breaker:
    """A loaded breaker: its circuits, its ring, and where readers wait."""

    circuits: dict[Destination, breaker.Circuit]
    params: breaker.Params
    ring: Ring
    holders: set[int] = field(default_factory=set)  # descriptors that wait for the ring
    attached: bool = True
    stopped: bool = False  # its links are taken off, its counters are there
    pinned: bool = False
    watch_only: bool = False  # does everything but refuse


class Kernel:
    """The machine's kernel."""

    def __init__(self, scheduler: Scheduler, descriptors: Descriptors) -> None:
        self.scheduler, self.descriptors = scheduler, descriptors
        self.breakers: list[Breaker] = []
        self.pinned: Breaker | None = None
        self.lifecycles: list[LifecycleRing] = []
        self.ring_size = 64
        self.tampered = False
        self.sensors: list[Sensors] = []
        self.pinned_isolations: dict[int, int] = {}  # cgroup id -> until when
        self.pinned_lost = 0  # what the record beside the pins says
        self.vanished: Callable[[object, Ring, int], None] = lambda *_: None
        self.begun_anew: Callable[[Breaker, Destination], None] = lambda *_: None

    def unpin(self) -> bool:
        """Take every pin away; whether there were any. What a process holds stays."""
        found, held = self.pinned is not None or bool(self.pinned_isolations), self.pinned
        self.pinned, self.pinned_lost = None, 0
        self.pinned_isolations.clear()
        if held is not None:
            held.pinned = False
            self.forget(held)
        return found

    def let_pass(self) -> dict[str, list[str]]:
        """Nothing that is pinned refuses anything from now on: what was in force until now, by kind."""
        held, now = self.pinned, self.scheduler.now
        found = {"isolations": [str(cgroup_id) for cgroup_id, t in self.pinned_isolations.items() if t > now]}
        self.pinned_isolations.clear()
        if held is not None and not held.watch_only:
            closed = breaker.State.CLOSED
            found["circuits"] = [str(d) for d, c in held.circuits.items() if c.word.state is not closed]
            self.follow(held, watch_only=True)
        return {what: targets for what, targets in found.items() if targets}

    def follow(self, held: Breaker, *, watch_only: bool) -> None:
        """The circuits of a breaker begin anew where it turns from refusing to watching, or the other way round."""
        if held.watch_only != watch_only:
            held.watch_only = watch_only
            for destination in held.circuits:
                held.circuits[destination] = breaker.Circuit()
                self.begun_anew(held, destination)

    def forget(self, held: Breaker) -> None:
        """A breaker that neither a pin nor a process holds is gone, with what was lost when nobody was there."""
        if not held.pinned and not held.holders and held.attached:
            held.attached = False
            self.breakers.remove(held)
            self.vanished(held, held.ring, held.ring.left)

    def isolated(self, cgroup_id: int) -> bool:
        """Whether its traffic is refused now."""
        held = [s.isolations_held.get(cgroup_id, 0) for s in self.sensors if s.isolations_held is not None]
        return max([*held, self.pinned_isolations.get(cgroup_id, 0)]) > self.scheduler.now

    def lost(self, *, seen: bool = False) -> int:
        """Events that the rings which are there could not take; `seen`: while an executor was there to count."""
        rings = [(held.ring, bool(held.holders) or not seen) for held in (*self.breakers, *self.lifecycles)]
        return sum(ring.lost if whole else ring.left for ring, whole in rings if ring.armed)

    def emit(self, ring: Ring, holders: set[int], record: bytes) -> None:
        ring.produced += 1
        if len(ring.records) >= ring.size:
            ring.lost += 1
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
            if circuit is None or not held.attached or held.stopped:
                continue
            after, effects = breaker.step(circuit, breaker.Connect(now_us), held.params)
            held.circuits[destination] = after
            self._tell(held, destination, after, effects)
            if breaker.Effect.REFUSED in effects and not held.watch_only:
                return None
            asking.append((held, breaker.Effect.PROBE in effects))
        return asking

    def result(self, destination: Destination, asking: list[tuple[Breaker, bool]], good: bool) -> None:
        """How a connect ended."""
        now_us = self.scheduler.now // 1000
        for held, probe in asking:
            circuit = held.circuits.get(destination)
            if circuit is None or not held.attached or held.stopped:
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

    def __init__(
        self,
        machine: Any,
        process: Process,
        admitted: Admitted,
        rules: Rules,
        succeed: Callable[[Sensors | None], Sensors | None],
        *,
        pin: bool,
        watch_only: bool,
    ) -> None:
        self.machine, self.process, self.admitted, self._succeed = machine, process, admitted, succeed
        self.kernel: Kernel = machine.kernel
        self.scheduler: Scheduler = machine.scheduler
        self.scheduler.alive()
        self._pin, self._kept, self._watch_only = pin, False, watch_only
        declared = destinations_of(admitted.manifest, 0)
        self.destinations = {d: n for d, n in declared.items() if not _never(d, n, rules)}
        self.places = {(str(d.address), d.port): d for d in self.destinations}
        self.breaker: Breaker | None = None
        self.lifecycle: LifecycleRing | None = None
        self.isolations_held: dict[int, int] | None = None
        self._connections = False
        self._notes = self._served = False
        self._lost_before: int | None = None
        self._taken_up = False
        self.fd = self.kernel.descriptors.open()
        self.gone = False
        for sensor in admitted.manifest.sensors:
            match sensor.name:
                case "breaker":
                    self._load_breaker(machine.params)
                case "lifecycle":
                    self.lifecycle = LifecycleRing(Ring(self.kernel.ring_size))
                    self.lifecycle.holders.add(self.fd)
                    self.kernel.lifecycles.append(self.lifecycle)
                case "isolate":
                    self.isolations_held = {}
                    pinned, now = self.kernel.pinned_isolations, self.scheduler.now
                    self.kernel.pinned_isolations = {c: until for c, until in pinned.items() if until > now}
                case "connections":
                    self._connections = True
        machine.sensors.append(self)
        self.kernel.sensors.append(self)

    def _load_breaker(self, params: breaker.Params) -> None:
        kernel = self.kernel
        if self._pin and kernel.pinned is not None and not self.machine.other_constants():
            self.breaker = kernel.pinned
            self._taken_up = True
            for destination in self.destinations:
                self.breaker.circuits.setdefault(destination, breaker.Circuit())
        else:
            circuits = dict.fromkeys(self.destinations, breaker.Circuit())
            self.breaker = Breaker(circuits, params, Ring(kernel.ring_size), watch_only=self._watch_only)
            kernel.breakers.append(self.breaker)
        self.breaker.holders.add(self.fd)
        kernel.descriptors.signal(self.fd, len(self.breaker.ring.records))

    def _rings(self) -> dict[str, Ring]:
        found = {"breaker": self.breaker, "lifecycle": self.lifecycle}
        return {name: held.ring for name, held in found.items() if held is not None}

    def fds(self) -> tuple[int, ...]:
        return () if self.gone else (self.fd,)

    def drain(self, limit: int = 1 << 20) -> list[bytes]:
        self.scheduler.alive()
        found: list[bytes] = []
        for ring in self._rings().values():
            taken = [ring.records.popleft() for _ in range(min(limit, len(ring.records)))]
            found += taken
            ring.drained += len(taken)
        if not self.gone:
            self.kernel.descriptors.signal(self.fd, sum(len(ring.records) for ring in self._rings().values()))
        return found

    def lost(self) -> Mapping[str, int]:
        found = {name: ring.lost for name, ring in self._rings().items()}
        if self._pin and "breaker" in found:
            if self._lost_before is None:
                self._lost_before = self.kernel.pinned_lost if self._taken_up else 0
            if self._notes:
                self.kernel.pinned_lost = max(self.kernel.pinned_lost, found["breaker"])
            found["breaker"] -= self._lost_before
        return found

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        return tuple((name, 1, "tag") for name in self._rings())

    def states(self) -> tuple[Any, ...]:
        circuits = self.breaker.circuits if self.breaker is not None else {}
        return tuple(SimpleNamespace(destination=d, word=c.word) for d, c in circuits.items())

    def isolations(self) -> Mapping[int, int]:
        pinned = self.kernel.pinned_isolations if self._pin else {}
        found = {**pinned, **(self.isolations_held or {})}
        return {cgroup_id: until for cgroup_id, until in found.items() if until > self.scheduler.now}

    def watch(self, cgroup_id: int, _name: str) -> None:
        self.scheduler.alive()
        if self.lifecycle is not None:
            self.lifecycle.watched.add(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        self.scheduler.alive()
        if self.lifecycle is not None:
            self.lifecycle.watched.discard(cgroup_id)
        if self.isolations_held is not None:
            now = self.scheduler.now
            self.isolations_held = {c: until for c, until in self.isolations_held.items() if until > now}

    def changed(self) -> list[str]:
        return ["breaker: another program"] if self.kernel.tampered and not self.gone else []

    def denied(self) -> int:
        return 0

    def unwatched(self) -> Mapping[str, str]:
        return {}

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
        self._within_the_hour(until_ns)
        if self.machine.contrary():  # somebody else has closed it
            return
        self._change(destination, breaker.Force(until_ns // 1000))
        self.machine.auditor.forced(self.breaker, destination, until_ns)

    def _within_the_hour(self, until_ns: int) -> None:
        self.machine.auditor.asks_for(until_ns)
        if not 0 < until_ns - self.scheduler.now <= LEASE_MAX_NS:
            raise CircuitError("a lease must end within the hour", id="kernel.circuit.lease", got=str(until_ns))

    def forced_until(self, address: Address, port: int) -> int:
        destination = self.places.get((str(address), port))
        if destination is None or self.breaker is None:
            return 0
        word = self.breaker.circuits[destination].word
        return word.time_us * 1000 if word.state is breaker.State.FORCED else 0

    def still_forced(self, address: Address, port: int) -> bool:
        return self.forced_until(address, port) > self.scheduler.now

    def kill_connections(self, address: Address, port: int) -> int:
        self.scheduler.alive()
        if not self._connections or self.gone:
            raise KernelError("no kernel object for it", id="kernel.undeclared", got="kill_connections")
        return 1 if self.machine.contrary() else 0

    def _isolator(self) -> dict[int, int]:
        self.scheduler.preempt()
        if self.isolations_held is None or self.gone:
            raise KernelError("no kernel object for it", id="kernel.undeclared", got="isolate")
        return self.isolations_held

    def isolate(self, cgroup_id: int, until_ns: int) -> None:
        isolations = self._isolator()
        self._within_the_hour(until_ns)
        if cgroup_id not in self.machine.services:
            raise KernelError("there is no such cgroup", id="kernel.cgroup.gone", got=str(cgroup_id))
        pinned_ns = self.kernel.pinned_isolations.get(cgroup_id, 0)
        until_ns = max(until_ns, isolations.get(cgroup_id, 0), pinned_ns)
        if self.machine.contrary():
            return
        isolations[cgroup_id] = until_ns
        if self._pin:
            self.kernel.pinned_isolations[cgroup_id] = until_ns

    def isolated_until(self, cgroup_id: int) -> int:
        return self.isolations().get(cgroup_id, 0)

    def end_isolation(self, cgroup_id: int) -> None:
        self._isolator().pop(cgroup_id, None)
        self.kernel.pinned_isolations.pop(cgroup_id, None)

    def close_circuit(self, address: Address, port: int) -> None:
        destination = self._known(address, port)
        self._change(destination, breaker.Close())
        self.machine.auditor.closed(self.breaker, destination)

    def probe_service(self, number: int) -> int:
        self.scheduler.alive()
        mine = [d for d, n in self.destinations.items() if n == number] if self.breaker is not None else []
        for destination in mine:
            self._change(destination, breaker.ProbeReady(self.scheduler.now // 1000))
        return len(mine)

    def keep(self) -> None:
        self.scheduler.alive()
        if self._pin and self.machine.no_pins():
            raise KernelError("the sensor could not be pinned", id="kernel.pin", got="no bpf file system")
        self.machine.auditor.arms(self.admitted.manifest)
        before = self._succeed(self)
        if before is not None:
            self._take_over(before)
        self._served = True
        for ring in self._rings().values():
            ring.armed = True
        if self._pin:
            if self.isolations_held is not None:
                pinned, now = self.kernel.pinned_isolations, self.scheduler.now
                self.isolations_held |= {c: t for c, t in pinned.items() if t > now and c in self.machine.services}
            if self.breaker is not None:
                self._pin_breaker(self.breaker)
            self._kept = self._notes = True
        if before is not None:
            before._kept, before._notes = False, before._notes and self._taken_up

    def _pin_breaker(self, held: Breaker) -> None:
        kernel = self.kernel
        if kernel.pinned is not None and kernel.pinned is not held:
            kernel.pinned.pinned = False
            kernel.forget(kernel.pinned)
        kernel.pinned, held.pinned = held, True
        kernel.follow(held, watch_only=self._watch_only)
        if not self._taken_up:
            kernel.pinned_lost = 0
        for destination in [d for d in held.circuits if d not in self.destinations]:
            self.machine.auditor.closed(held, destination)  # nobody watches it any more, so nobody refuses there
            del held.circuits[destination]

    def _take_over(self, before: Sensors) -> None:
        mine, theirs = self.breaker, before.breaker
        if mine is not None and theirs is not None and mine is not theirs:
            for destination in [d for d in theirs.circuits if d in mine.circuits]:
                mine.circuits[destination] = theirs.circuits[destination]
            self.machine.auditor.taken_over(theirs, mine)
        if self.isolations_held is not None and before.isolations_held is not None:
            for cgroup_id, until_ns in before.isolations_held.items():
                if until_ns > self.scheduler.now and cgroup_id in self.machine.services:
                    self.isolations_held[cgroup_id] = until_ns

    def stop(self, *, leave: bool) -> None:
        """Only what stays pinned goes on seeing."""
        self.scheduler.alive()
        if not leave and self._kept:
            self.lost()
            self.kernel.unpin()
            self._kept = self._notes = False
        if self.lifecycle is not None:
            self.lifecycle.watched.clear()
        if self.breaker is not None and not self.breaker.pinned and self.breaker.holders == {self.fd}:
            self.breaker.stopped = True

    def leave(self) -> None:
        """The process lets go of what it loaded; also what its end does."""
        if self.gone:
            return
        self.gone = True
        self.machine.sensors.remove(self)
        self.kernel.sensors.remove(self)
        self.isolations_held = None
        if self.breaker is not None:
            self.breaker.holders.discard(self.fd)
            if self._served:  # else whoever has it pinned still counts from where it looked last
                self.breaker.ring.left = self.breaker.ring.lost
            self.kernel.forget(self.breaker)
        if self.lifecycle is not None:
            self.lifecycle.holders.discard(self.fd)
            self.kernel.lifecycles.remove(self.lifecycle)
            self.kernel.vanished(self.lifecycle, self.lifecycle.ring, self.lifecycle.ring.lost)
        self.kernel.descriptors.close(self.fd)
        self.breaker = self.lifecycle = None

    def detach(self) -> None:
        self.scheduler.alive()
        self.stop(leave=False)
        self.leave()
