"""The kernel side of one session: the blobs of an admitted manifest, loaded, attached and watched.

Each entry of `sensors[]` is one kernel object, by its name. Not here: what a record means (core/trigger.py), who may
act (core/guard.py), how an entry becomes an object (sensor_objects.py). recorded.py stands in where there is no kernel.
Spec: docs/spec/kernel-abi.md.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from pointcall_attest import manifest as manifests
from pointcall_attest.admission import Admitted
from pointcall_executor.arming import ArmingError, destinations_of, node_wide, policies_of
from pointcall_executor.core.breaker import State, Word
from pointcall_executor.core.event import Destination, KernelEvent, Kind, PressureEvent, Source, encode
from pointcall_executor.core.guard import Rules
from pointcall_executor.core.stuck import Known, Seen, look
from pointcall_executor.hung_watch import HungWatch
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitPolicy, CircuitState, netns_cookie, normalised
from pointcall_executor.kernel.cgroup import by_id
from pointcall_executor.kernel.connections import ConnectionKiller
from pointcall_executor.kernel.drill import DrillInjector, Fault, Observed
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.isolation import Isolator, pinned_isolations
from pointcall_executor.kernel.kernel_object import KernelObject
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from pointcall_executor.kernel.lookout import Lookout
from pointcall_executor.kernel.pressure import PressureWatch
from pointcall_executor.kernel.sensor import Sensor
from pointcall_executor.kernel.storage import Histogram, StorageSensor
from pointcall_executor.kernel.syscalls import SyscallSensor
from pointcall_executor.kernel.tamper import TamperGuard
from pointcall_executor.kernel.transport import TransportSensor
from pointcall_executor.learning import Learned, Learning
from pointcall_executor.pins import Pins
from pointcall_executor.resolvers import Resolvers
from pointcall_executor.sensor_objects import Loading, pressure_watch
from pointcall_executor.sensor_params import MS_NS, split
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Address

TCP: Final = 6
CALM_SECONDS: Final = 1.0  # between two looks at the circuits while none is open
CALM_STUCK_NS: Final = 10_000_000_000  # only where stuck means open for so long: a second is little beside it


class KernelSensors:
    """The kernel objects of the admitted blobs, by the names of the manifest.

    `learned` outlives a session. `succeed` says, when these are kept, which ones they take over from: circuits and
    isolations go on. `resolvers`: protected like what the guard's never-touch list names.
    `watch_only`: no circuit refuses anything. KernelError `kernel.hook` names what this kernel lacks; then nothing
    stays loaded.
    """

    def __init__(
        self,
        admitted: Admitted,
        rules: Rules,
        gate: Path,
        pins: Pins | None = None,
        learned: Learned | None = None,
        succeed: Callable[[KernelSensors | None], KernelSensors | None] = lambda _: None,
        *,
        resolvers: Resolvers | None = None,
        watch_only: bool = False,
    ) -> None:
        self._pins, self._rules, self._gate = pins, rules, gate
        self._loading = Loading(pins, gate, rules.never_touch_networks)
        self._watch_only = watch_only
        self._kept = False  # the pins are of these
        self._notes = False  # what the pinned breaker loses is what these count
        self._ended = False  # disarmed: nothing begins any more
        self._learned, self._succeed = learned or Learned(), succeed
        self._identities: dict[str, Identity] = {}
        self._resolvers = resolvers
        self._declared = destinations_of(admitted.manifest, netns_cookie())
        self._destinations = {d: n for d, n in self._declared.items() if not self._protected(d, n)}
        self._policies = policies_of(admitted.manifest)
        self._services = {s.name: s.digest for s in admitted.manifest.services}
        self._objects: dict[str, KernelObject] = {}
        self._learning: Learning | None = None
        self._pressure: PressureWatch | None = None
        self._lookout: Lookout | None = None
        self._changing = threading.RLock()  # services move on other threads than the one that lets go
        self._stuck: Known = {}
        self._stuck_ns = 0
        self._hung: list[HungWatch] = []
        self._denied = 0  # attempts on a link when somebody asked last
        self._lost_before: int | None = None  # what had been recorded of it before these were armed
        with contextlib.ExitStack() as undo:
            undo.callback(self.leave)
            for sensor in admitted.manifest.sensors:
                self._load(sensor, admitted.files)
            # As the breaker has them: of this namespace or of all.
            wide = self.breaker is not None and self.breaker.node_wide
            self._circuits = {node_wide(d) if wide else d: n for d, n in self._destinations.items()}
            self._places: dict[tuple[Address, int], list[Destination]] = {}
            for each in self._circuits:  # TCP and UDP may share a port
                self._places.setdefault((each.address, each.port), []).append(each)
            self._attach()
            self._rings = tuple(each.ring for each in self._sensors().values())
            self._identities = {name: each.identity() for name, each in self._objects.items()}
            undo.pop_all()

    @property
    def breaker(self) -> BreakerSensor | None:
        found = self._objects.get("breaker")
        return found if isinstance(found, BreakerSensor) else None

    @property
    def isolator(self) -> Isolator | None:
        found = self._objects.get("isolate")
        return found if isinstance(found, Isolator) else None

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _load(self, sensor: manifests.Sensor, files: Mapping[str, bytes]) -> None:
        params, own = split(sensor)
        if sensor.blob is None:
            self._pressure = pressure_watch(own)
            return
        made = self._objects[sensor.name] = self._loading.loaded(sensor, files[sensor.blob], params)
        if sensor.name == "breaker":
            self._stuck_ns = own["stuck_ms"] * MS_NS
        if isinstance(made, StorageSensor) and own["hung_ms"]:
            if made.tells_in_flight:
                self._hung.append(HungWatch(made, Source[sensor.name.upper()], own["hung_ms"] * MS_NS))
            elif "hung_ms" in sensor.params:  # a manifest from before it goes on as it was
                raise ArmingError(
                    f"the programs of sensor {sensor.name} are too old for hung_ms", id="arm.sensor-param",
                    want="an object with pc_still", got=made.blob.name,
                    hint="build the manifest again: pointcall build",
                )  # fmt: skip
        if isinstance(made, SyscallSensor):
            self._learning = Learning(made, self._learned, own["learn_ms"] * MS_NS)

    def _attach(self) -> None:
        """First what is to be watched, then the links: nothing is seen half set up."""
        if self.breaker is not None:
            for destination in self._circuits:
                self.breaker.arm(destination, self._policy(destination))
        transport = self._objects.get("transport")
        if isinstance(transport, TransportSensor):
            for destination in self._destinations:
                if destination.protocol == TCP:
                    transport.watch(destination)
        for each in self._objects.values():
            if isinstance(each, Sensor | TamperGuard):
                each.attach()
        if self._pressure is not None or self._hung or (self.breaker is not None and self._stuck_ns):
            self._pressure = self._pressure or PressureWatch({})
            self._lookout = Lookout(self._look, self._pressure.interrupt)
            self._lookout.start()

    def _policy(self, destination: Destination) -> CircuitPolicy:
        """What this circuit may do."""
        return replace(self._policies[replace(destination, netns=0)], watch_only=self._watch_only)

    def _protected(self, to: Destination, number: int) -> bool:
        """Whether the guard's list or being a resolver forbids to touch it. `number`: of the service there, if any."""
        return _never(to, number, self._rules) or (self._resolvers is not None and to in self._resolvers)

    def _look(self, timeout_s: float) -> list[bytes]:
        """On the lookout's thread."""
        assert self._pressure is not None
        fired = self._pressure.wait(self._until_next(timeout_s))
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        found: list[KernelEvent] = [
            PressureEvent(Kind.PRESSURE, now_ns, p.cgroup, p.resource, p.stalled_ns, p.window_ns) for p in fired
        ]
        breaker = self.breaker
        if breaker is not None and self._stuck_ns:
            circuits = [Seen(c.destination, c.state, c.t_open_ns, c.probes, c.closed) for c in breaker.circuits()]
            self._stuck, stuck = look(self._stuck, circuits, now_ns, self._stuck_ns)
            found += stuck
        found += [event for each in self._hung for event in each.look(now_ns)]
        return [encode(event) for event in found]

    def _until_next(self, timeout_s: float) -> float:
        """How long the next look may wait, in seconds. Nothing open can be stuck soon: the kernel keeps when a circuit
        opens; and it keeps when an operation began."""
        assert self._pressure is not None
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        waits = [each.due_ns(now_ns) / 1e9 for each in self._hung]
        if self._pressure.measures:
            waits.append(timeout_s)
        if self._stuck_ns:
            waits.append(timeout_s if self._stuck or self._stuck_ns < CALM_STUCK_NS else CALM_SECONDS)
        return min(waits)

    # ---- what the loop asks for ------------------------------------------------------------------------------------

    def _sensors(self) -> Mapping[str, Sensor]:
        """Those that report through a ring."""
        return {name: each for name, each in self._objects.items() if isinstance(each, Sensor)}

    def changed(self) -> list[str]:
        """What is no longer as it was when it was armed: a swapped program, a link that was taken off."""
        return [line for name, each in self._objects.items() for line in each.recheck(self._identities[name])]

    def denied(self) -> int:
        """How often somebody tried to swap or take off a link, and was kept from it, since this was asked last."""
        guard = self._objects.get("tamper")
        if not isinstance(guard, TamperGuard):
            return 0
        before, self._denied = self._denied, guard.denied()
        return self._denied - before

    def fds(self) -> tuple[int, ...]:
        rings = tuple(sensor.ring.fileno() for sensor in self._sensors().values())
        return (*rings, self._lookout.fileno()) if self._lookout is not None else rings

    def drain(self, limit: int = 1 << 20) -> list[bytes]:
        """Every finished record, 56 bytes each; at most `limit` of each ring."""
        found = [record for ring in self._rings for record in ring.drain(limit)]
        return found + self._lookout.drain() if self._lookout is not None else found

    def lost(self) -> Mapping[str, int]:
        """Records that each sensor lost since it was armed; of a pinned breaker, since somebody looked last before
        these look for the first time: when they are armed, and those before them are gone. Also after `stop`."""
        found = {name: sensor.lost() for name, sensor in self._sensors().items()}
        if "breaker" in found and self._pins is not None:
            if self._lost_before is None:
                self._lost_before = self._pins.lost if self._loading.taken_up else 0
            if self._notes:
                self._pins.note_lost(found["breaker"])
            found["breaker"] -= self._lost_before
        return found

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        """(name, kernel id, tag) of every loaded program. From any thread."""
        with self._changing:
            return tuple(program for each in self._objects.values() for program in each.programs())

    def states(self) -> tuple[CircuitState, ...]:
        """From any thread."""
        with self._changing:
            return tuple(self.breaker.circuits()) if self.breaker is not None else ()

    def histograms(self) -> Mapping[str, Sequence[Histogram]]:
        """By sensor, how long operations on storage took since these were armed; nothing once they are let go. From any
        thread, and nobody waits while it reads: up to 4,096 a sensor, 40 ms where they are that many."""
        with contextlib.ExitStack() as opened:
            with self._changing:
                storage = {n: each for n, each in self._objects.items() if isinstance(each, StorageSensor)}
                kept = {name: opened.enter_context(each.latencies()) for name, each in storage.items()}
            return {name: tuple(each.histograms()) for name, each in kept.items()}

    def unwatched(self) -> Mapping[str, str]:
        """Declared destinations that no circuit is armed for, and why."""
        left = self._declared.keys() - self._destinations.keys() if self.breaker is not None else set()
        return {
            str(d): "guard.never_touch" if _never(d, self._declared[d], self._rules) else "a resolver of this node"
            for d in sorted(left)
        }

    def watch(self, cgroup_id: int, name: str) -> None:
        """This declared service runs in this cgroup now. KernelError where a pressure trigger is refused."""
        with self._changing:
            self._watch(cgroup_id, name)

    def _watch(self, cgroup_id: int, name: str) -> None:
        for each in self._objects.values():
            if isinstance(each, LifecycleSensor):
                each.watch(cgroup_id)
        if self._learning is not None:
            key = name, self._services.get(name, "")
            self._learning.watch(cgroup_id, key, time.clock_gettime_ns(time.CLOCK_MONOTONIC))
        if self._pressure is not None:
            self._pressure.watch(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        with self._changing:
            self._unwatch(cgroup_id)

    def _unwatch(self, cgroup_id: int) -> None:
        for each in self._objects.values():
            if isinstance(each, LifecycleSensor):
                each.unwatch(cgroup_id)
        if self._learning is not None:
            self._learning.unwatch(cgroup_id)
        if self._pressure is not None:
            self._pressure.unwatch(cgroup_id)
        if self.isolator is not None:
            self.isolator.sweep()

    def note_learned(self) -> None:
        """Take down what services were learned to call so far."""
        with self._changing:
            if self._learning is not None:
                self._learning.keep()

    # ---- what actions ask for --------------------------------------------------------------------------------------

    def _armed(self, address: Address, port: int) -> tuple[BreakerSensor, Sequence[Destination]]:
        there = self._there(address, port)
        if self.breaker is None or not there:
            raise ServiceError(
                "no circuit is armed there", id="circuit.unknown", want="a destination that the armed manifest watches",
                got=f"{address}:{port}", hint="pointcall status has the circuits",
            )  # fmt: skip
        return self.breaker, there

    def _there(self, address: Address, port: int) -> Sequence[Destination]:
        """The armed destinations there, of whichever protocol."""
        return self._places.get((normalised(Destination(address, port)).address, port), ())

    def force(self, address: Address, port: int, until_ns: int) -> None:
        breaker, there = self._armed(address, port)
        _all_or_none(breaker, there, lambda destination: breaker.force(destination, until_ns))

    def close_circuit(self, address: Address, port: int) -> None:
        breaker, there = self._armed(address, port)
        _all_or_none(breaker, there, breaker.close_circuit)

    def forced_until(self, address: Address, port: int) -> int:
        """Until when every circuit there is forced open; 0: nobody holds them open, or no circuit is armed there."""
        there = self._there(address, port)
        if self.breaker is None or not there:
            return 0
        words = [self.breaker.circuit(destination).word for destination in there]
        return min(word.time_us * 1000 if word.state is State.FORCED else 0 for word in words)

    def still_forced(self, address: Address, port: int) -> bool:
        """Whether somebody holds any circuit there open, and its time is not over."""
        if self.breaker is None:
            return False
        words = [self.breaker.circuit(destination).word for destination in self._there(address, port)]
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return any(word.state is State.FORCED and word.time_us > now_us for word in words)

    def allow(self, cgroup_ids: Collection[int]) -> None:
        """Never refuse what tasks of these cgroups connect to, nor take it for the half-open probe; of no others."""
        if self.breaker is not None:
            self.breaker.allow_only(cgroup_ids)

    def probe_service(self, number: int) -> int:
        """Let the next connect to each address of the service be the one probe; how many circuits are open for it."""
        if self.breaker is None:
            return 0
        mine = [d for d, n in self._circuits.items() if n == number]
        before = [self.breaker.make_probe_ready(destination).state for destination in mine]
        return sum(state in (State.OPEN, State.HALF) for state in before)

    def kill_connections(self, address: Address, port: int) -> int:
        """Reset every established TCP connection of this network namespace to there; how many there were.

        KernelError `kernel.undeclared` where the manifest has no sensor `connections`, CircuitError
        `kernel.circuit.never_touch` where the guard's list protects the destination, or it is a resolver.
        """
        killer = self._objects.get("connections")
        if not isinstance(killer, ConnectionKiller):
            raise _undeclared("connections", "kill_connections")
        target = normalised(Destination(address, port, netns_cookie()))
        if self._protected(target, self._declared.get(target, -1)):
            raise CircuitError(f"{target} is never touched", id="kernel.circuit.never_touch", got=str(target))
        return killer.kill(target)

    def isolate(self, cgroup_id: int, until_ns: int) -> None:
        """Refuse all traffic of a service's cgroup until `until_ns` (CLOCK_MONOTONIC); the kernel holds the deadline.

        KernelError `kernel.undeclared` where the manifest has no sensor `isolate`, `executor.disarmed` where these have
        been disarmed, else as Isolator.isolate.
        """
        with self._changing:
            if self._ended:
                raise KernelError("it was disarmed meanwhile", id="executor.disarmed", want="armed sensors", got="none")
            if self.isolator is None:
                raise _undeclared("isolate", "isolate")
            self.isolator.isolate(cgroup_id, until_ns)

    def isolated_until(self, cgroup_id: int) -> int:
        """Until when the cgroup is isolated; 0: it is not."""
        return self.isolations().get(cgroup_id, 0)

    def isolations(self) -> dict[int, int]:
        """Cgroup id -> until when, of every isolation that holds: of these, and what is pinned of earlier ones."""
        held = self.isolator.isolations() if self.isolator is not None else []
        pinned = pinned_isolations(self._pins.isolations) if self._pins is not None else {}
        return pinned | {each.cgroup: each.until_ns for each in held}

    def end_isolation(self, cgroup_id: int) -> None:
        """Let the traffic of a cgroup pass again. Twice without harm."""
        with self._changing:
            if self.isolator is None:
                raise _undeclared("isolate", "isolate")
            self.isolator.end(cgroup_id)

    def begin_drill(self, cgroup_id: int, fault: Fault, until_ns: int) -> None:
        """Inject a fault into a service's cgroup (0: the gate). KernelError `kernel.undeclared` without a sensor
        `drill`, CircuitError `kernel.circuit.never_touch` where the guard protects the destination or it is a
        resolver, else as DrillInjector.inject."""
        target = normalised(fault.destination)
        if self._protected(target, -1):
            raise CircuitError(f"{target} is never touched", id="kernel.circuit.never_touch", got=str(target))
        self._injector.inject(by_id(cgroup_id).path if cgroup_id else self._gate, fault, until_ns)

    def end_drill(self) -> Observed:
        """End the fault, and say what it did. KernelError where these sensors have been let go."""
        with self._changing:
            return self._injector.end()

    @property
    def _injector(self) -> DrillInjector:
        found = self._objects.get("drill")
        if not isinstance(found, DrillInjector):
            raise _undeclared("drill", "a drill")
        return found

    # ---- how long it stays -----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Take over what goes on from the sensors before, and pin the breaker if the settings say so: it protects also
        when this process is gone. KernelError where that fails: then the ones before are what goes on, as it was."""
        before = self._succeed(self)
        try:
            if before is not None:
                self._go_on_from(before)
            with self._pinned():
                self._take_isolations(before)
        except BaseException:
            self._succeed(before)
            raise
        self._kept = self._notes = self._pins is not None
        if before is not None:
            before._kept = False
            before._notes = before._notes and self._loading.taken_up
            if self.isolator is not None and before.isolator is not None:
                before.isolator.detach()  # its sweep would end what is ours now

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        """The breaker, if the settings say so; where the block fails it is not."""
        if self._pins is None or self.breaker is None:
            yield
            return
        with self._pins.keep(self.breaker, taken_up=self._loading.taken_up):
            yield
            self._disarm_undeclared(self.breaker)
            self._set_policies(self.breaker)

    def _go_on_from(self, before: KernelSensors) -> None:
        """With what can be shared: nothing is taken from those before."""
        if self._learning is not None and before._learning is not None:
            before._learning.keep()
            self._learning.refresh()
        if self.breaker is not None and before.breaker is not None:
            self.breaker.take_over(before.breaker)

    def _take_isolations(self, before: KernelSensors | None) -> None:
        """Also an earlier executor's become ours: they can be ended, and end with these."""
        if self.isolator is None:
            return
        held = pinned_isolations(self._pins.isolations) if self._pins is not None else {}
        if before is not None:
            held |= before.isolations()
        self.isolator.take_over(held)

    def _disarm_undeclared(self, breaker: BreakerSensor) -> None:
        """A breaker that was taken up again may still watch what an older manifest declared."""
        for circuit in list(breaker.circuits()):
            if circuit.destination not in self._circuits:
                breaker.disarm(circuit.destination)

    def _set_policies(self, breaker: BreakerSensor) -> None:
        """One that was taken up again has the policies of an older manifest."""
        for destination in self._circuits:
            breaker.set_policy(destination, self._policy(destination))

    def stop(self, *, leave: bool) -> None:
        """Nothing is seen any more, `leave`: but by what is pinned. What was lost can be asked for until they go."""
        with self._changing:
            self._ended = self._ended or not leave
            if not leave and self._pins is not None and self._kept:
                self.lost()  # from where these count is noted beside the pins
                self._pins.drop()
                self._kept = self._notes = False
            for sensor in self._sensors().values():
                sensor.detach()

    def leave(self) -> None:
        """This process lets go: what is pinned stays in the kernel, everything else is gone. Twice without harm."""
        with self._changing:
            self._let_go()

    def _let_go(self) -> None:
        if self._lookout is not None:
            self._lookout.close()
            self._lookout = None
        if self._pressure is not None:
            self._pressure.close()
            self._pressure = None
        if self._learning is not None:
            self._learning.keep()
            self._learning = None
        while self._objects:
            self._objects.popitem()[1].close()

    def detach(self) -> None:
        """Everything out of the kernel, pins too. Twice without harm."""
        self.stop(leave=False)
        self.leave()


def _all_or_none(breaker: BreakerSensor, there: Sequence[Destination], command: Callable[[Destination], Word]) -> None:
    """Where one of them cannot be commanded, those before it are as they were."""
    before: dict[Destination, Word] = {}
    try:
        for destination in there:
            before[destination] = command(destination)
    except BaseException:
        for destination, word in before.items():
            breaker.put_back(destination, word)
        raise


def _undeclared(sensor: str, action: str) -> KernelError:
    return KernelError(
        f"the manifest declares no kernel object for {action}", id="kernel.undeclared",
        want=f"a sensor `{sensor}`", got="none", hint=f"add `- name: {sensor}` to spec.sensors and sign again",
    )  # fmt: skip


def _never(destination: Destination, number: int, rules: Rules) -> bool:
    """Whether the never-touch list forbids a circuit there, by any of its three kinds."""
    return (
        number in rules.never_touch_services
        or (str(destination.address), destination.port) in rules.never_touch_destinations
        or any(destination.address in network for network in rules.never_touch_networks)
    )
