"""The kernel side of one session: the blobs of an admitted manifest, loaded, attached and watched.

Each entry of `sensors[]` is one kernel object, by its name. Not here: what a record means (core/trigger.py), who may
act (core/guard.py). recorded.py stands in where there is no kernel. Spec: docs/spec/kernel-abi.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pointcall_attest.admission import Admitted
from pointcall_executor.arming import destinations_of
from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Destination
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitState, netns_cookie, normalised
from pointcall_executor.kernel.connections import ConnectionKiller
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.isolation import Isolator, end_pinned
from pointcall_executor.kernel.kernel_object import KernelObject
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from pointcall_executor.kernel.pins import Pinned, unpin
from pointcall_executor.kernel.ring import Ring
from pointcall_executor.kernel.sensor import Sensor
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Address, Network

PROBE_NS: Final = 1_000_000_000  # forced for an instant, before its probe may leave
BPFFS: Final = Path("/sys/fs/bpf")


class Pins:
    """Where this installation pins its breaker and its isolations, and the record of what the breaker was then."""

    def __init__(self, state_dir: Path, bpffs: Path = BPFFS) -> None:
        self._record = state_dir / "pins.json"
        self.folder = bpffs / f"pointcall_{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"
        self.isolations = bpffs / f"{self.folder.name}_isolated"

    def adopt(self, make: Callable[[Pinned | None], BreakerSensor]) -> BreakerSensor:
        """The pinned breaker if it is exactly what was recorded and wanted, else a new one. The pins stay as they are:
        what they hold protects until something else is kept, or until it is detached."""
        try:
            identity = Identity.from_dict(json.loads(self._record.read_bytes()))
            return make(Pinned(self.folder, identity))
        except (OSError, ValueError, KeyError, TypeError, KernelError):
            return make(None)

    def keep(self, breaker: BreakerSensor) -> None:
        """Let the breaker outlive this process. KernelError where bpffs is not mounted."""
        self._drop_breaker()
        pinned = breaker.pin(self.folder)
        self._record.write_text(json.dumps(pinned.identity.as_dict()))

    def drop(self) -> None:
        """Remove all pins. What this process holds stays."""
        self._drop_breaker()
        end_pinned(self.isolations, only_expired=False)
        with contextlib.suppress(FileNotFoundError):
            self.isolations.rmdir()

    def _drop_breaker(self) -> None:
        unpin(self.folder)
        self._record.unlink(missing_ok=True)


class KernelSensors:
    """The kernel objects of the admitted blobs, by the names of the manifest."""

    def __init__(self, admitted: Admitted, rules: Rules, gate: Path, pins: Pins | None = None) -> None:
        self._pins, self._kept, self._rules = pins, False, rules
        self._identities: dict[str, Identity] = {}
        declared = destinations_of(admitted.manifest, netns_cookie())
        self._destinations = {d: n for d, n in declared.items() if not _never(d, n, rules)}
        self._places = {(d.address, d.port): d for d in self._destinations}
        self.breaker: BreakerSensor | None = None
        self.lifecycle: LifecycleSensor | None = None
        self._killer: ConnectionKiller | None = None
        self._isolator: Isolator | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.detach)
            for sensor in admitted.manifest.sensors:
                self._load(sensor.name, Blob.parse(admitted.files[sensor.blob]), dict(sensor.params), gate)
            self._attach()
            self._identities = {name: each.identity() for name, each in self._objects().items()}
            undo.pop_all()

    def _load(self, name: str, blob: Blob, params: Mapping[str, int], gate: Path) -> None:
        match name:
            case "breaker":
                make = functools.partial(_breaker, blob, gate, params, self._rules.never_touch_networks)
                self.breaker = self._pins.adopt(make) if self._pins else make(None)
            case "connections":
                self._killer = ConnectionKiller(blob)
            case "isolate":
                if self._pins is not None:
                    end_pinned(self._pins.isolations, only_expired=True)
                self._isolator = Isolator(blob, self._pins.isolations if self._pins else None)
            case _:
                self.lifecycle = LifecycleSensor(blob)

    def _attach(self) -> None:
        """First what is to be watched, then the links: nothing is seen half set up."""
        if self.breaker is not None:
            for destination in self._destinations:
                self.breaker.arm(destination)
        for sensor in self._sensors().values():
            sensor.attach()

    def _objects(self) -> Mapping[str, KernelObject]:
        found = {
            "breaker": self.breaker,
            "lifecycle": self.lifecycle,
            "connections": self._killer,
            "isolate": self._isolator,
        }
        return {name: each for name, each in found.items() if each is not None}

    def _sensors(self) -> Mapping[str, Sensor]:
        """Those that report."""
        return {name: each for name, each in self._objects().items() if isinstance(each, Sensor)}

    def changed(self) -> list[str]:
        """What is no longer as it was when it was armed: a swapped program, a link that was taken off."""
        return [line for n, each in self._objects().items() for line in each.recheck(self._identities[n])]

    def _rings(self) -> Mapping[str, Ring]:
        return {name: sensor.ring for name, sensor in self._sensors().items()}

    def fds(self) -> tuple[int, ...]:
        return tuple(ring.fileno() for ring in self._rings().values())

    def drain(self) -> list[bytes]:
        """Every finished record of every ring, 56 bytes each."""
        return [record for ring in self._rings().values() for record in ring.drain()]

    def lost(self) -> Mapping[str, int]:
        return {name: sensor.lost() for name, sensor in self._sensors().items()}

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        """(name, kernel id, tag) of every loaded program."""
        return tuple(program for each in self._objects().values() for program in each.programs())

    def states(self) -> tuple[CircuitState, ...]:
        return tuple(self.breaker.circuits()) if self.breaker is not None else ()

    def watch(self, cgroup_id: int) -> None:
        if self.lifecycle is not None:
            self.lifecycle.watch(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        if self.lifecycle is not None:
            self.lifecycle.unwatch(cgroup_id)
        if self._isolator is not None:
            self._isolator.sweep()

    # ---- what actions ask for --------------------------------------------------------------------------------------

    def _armed(self, address: Address, port: int) -> tuple[BreakerSensor, Destination]:
        destination = self._places.get((address, port))
        if self.breaker is None or destination is None:
            raise ServiceError("no circuit is armed there", id="circuit.unknown", got=f"{address}:{port}")
        return self.breaker, destination

    def force(self, address: Address, port: int, until_ns: int) -> None:
        breaker, destination = self._armed(address, port)
        breaker.force(destination, until_ns)

    def close_circuit(self, address: Address, port: int) -> None:
        breaker, destination = self._armed(address, port)
        breaker.close_circuit(destination)

    def forced_until(self, address: Address, port: int) -> int:
        """Until when the circuit is forced open; 0: nobody holds it open, or no circuit is armed there."""
        destination = self._places.get((address, port))
        if self.breaker is None or destination is None:
            return 0
        word = self.breaker.circuit(destination).word
        return word.time_us * 1000 if word.state is State.FORCED else 0

    def allow(self, cgroup_id: int) -> None:
        """Never refuse what this cgroup connects to, and never take it for the half-open probe."""
        if self.breaker is not None:
            self.breaker.allow(cgroup_id)

    def probe_service(self, number: int) -> int:
        """Let the next connect to each address of the service be the one probe; how many circuits there are."""
        if self.breaker is None:
            return 0
        mine = [d for d, n in self._destinations.items() if n == number]
        for destination in mine:
            self.breaker.make_probe_ready(destination)
        return len(mine)

    def kill_connections(self, address: Address, port: int) -> int:
        """Reset every established TCP connection of this network namespace to there; how many there were.

        KernelError `kernel.undeclared` where the manifest has no sensor `connections`, CircuitError
        `kernel.circuit.never_touch` where the guard's list protects the destination.
        """
        if self._killer is None:
            raise _undeclared("connections", "kill_connections")
        target = normalised(Destination(address, port, netns_cookie()))
        if _never(target, self._destinations.get(target, -1), self._rules):
            raise CircuitError(f"{target} is never touched", id="kernel.circuit.never_touch", got=str(target))
        return self._killer.kill(target)

    def isolate(self, cgroup_id: int, until_ns: int) -> None:
        """Refuse all traffic of a service's cgroup until `until_ns` (CLOCK_MONOTONIC); the kernel holds the deadline.

        KernelError `kernel.undeclared` where the manifest has no sensor `isolate`, else as Isolator.isolate.
        """
        if self._isolator is None:
            raise _undeclared("isolate", "isolate")
        self._isolator.isolate(cgroup_id, until_ns)

    def isolated_until(self, cgroup_id: int) -> int:
        """Until when the cgroup is isolated; 0: it is not."""
        held = self._isolator.isolations() if self._isolator is not None else []
        return next((i.until_ns for i in held if i.cgroup == cgroup_id), 0)

    def end_isolation(self, cgroup_id: int) -> None:
        """Let the traffic of a cgroup pass again. Twice without harm."""
        if self._isolator is None:
            raise _undeclared("isolate", "isolate")
        self._isolator.end(cgroup_id)

    def inherit(self, before: object) -> None:
        """Hold what the sensors of the session before hold: a takeover is no gap in what is refused.

        A circuit that is forced open stays so until its time; one that the breaker opened lets one probe through first,
        because how its failures came is not known here. Isolations stay until theirs.
        """
        if not isinstance(before, KernelSensors) or before.breaker is self.breaker:
            return
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for circuit in before.states():
            place = (circuit.destination.address, circuit.destination.port)
            if circuit.state is State.CLOSED or place not in self._places:
                continue
            forced = circuit.state is State.FORCED
            self.force(*place, circuit.word.time_us * 1000 if forced else now_ns + PROBE_NS)
            if not forced and self.breaker is not None:
                self.breaker.make_probe_ready(self._places[place])
        for isolation in before._isolator.isolations() if before._isolator and self._isolator else ():
            self.isolate(isolation.cgroup, isolation.until_ns)

    # ---- how long it stays -----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Pin the breaker if the settings say so: it protects also when this process is gone."""
        if self._pins is not None and self.breaker is not None:
            self._disarm_undeclared(self.breaker)
            self._pins.keep(self.breaker)
            self._kept = True

    def _disarm_undeclared(self, breaker: BreakerSensor) -> None:
        """A breaker that was taken up again may still watch what an older manifest declared."""
        armed = {normalised(d) for d in self._destinations}
        for circuit in list(breaker.circuits()):
            if circuit.destination not in armed:
                breaker.disarm(circuit.destination)

    def leave(self) -> None:
        """This process lets go: what is pinned stays in the kernel, everything else is gone."""
        for each in self._objects().values():
            each.close()
        self.breaker = self.lifecycle = self._killer = self._isolator = None

    def detach(self) -> None:
        """Everything out of the kernel, pins too. Twice without harm."""
        if self._pins is not None and self._kept:
            self._pins.drop()
            self._kept = False
        self.leave()


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


def _breaker(
    blob: Blob, gate: Path, constants: Mapping[str, int], never: tuple[Network, ...], pinned: Pinned | None
) -> BreakerSensor:
    return BreakerSensor(blob, cgroup=gate, constants=constants, never_touch=never, pinned=pinned)
