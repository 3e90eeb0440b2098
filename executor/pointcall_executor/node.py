"""The real node behind the actions: declared services, circuits, channels, and the sensors that watch them.

Implements what actions/world.py asks for. recorded.py implements the same without a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from pointcall_attest.admission import Admitted
from pointcall_executor.actions.world import Channels, Circuits, Services
from pointcall_executor.arming import destinations_of
from pointcall_executor.config import Config
from pointcall_executor.core.event import Destination
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitState, netns_cookie, normalised
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from pointcall_executor.kernel.pins import Pinned, unpin
from pointcall_executor.kernel.ring import Ring
from pointcall_executor.services.groups import destroy_leftovers, remove_empty
from pointcall_executor.services.process import Process, ServiceError, Spawner, Started
from pointcall_runbook.vocabulary import Address, Level, Network, channel, service

OnMoved = Callable[[int, int], None]  # service number, its new cgroup id (0: none)


class Sensors(Circuits, Protocol):
    """The kernel side, real or recorded."""

    def fds(self) -> tuple[int, ...]: ...
    def drain(self) -> list[bytes]: ...
    def lost(self) -> Mapping[str, int]: ...
    def programs(self) -> tuple[tuple[str, int, str], ...]: ...
    def states(self) -> tuple[CircuitState, ...]: ...
    def watch(self, cgroup_id: int) -> None: ...
    def unwatch(self, cgroup_id: int) -> None: ...
    def changed(self) -> list[str]: ...
    def keep(self) -> None: ...
    def leave(self) -> None: ...
    def detach(self) -> None: ...


class RunningServices(Services, Protocol):
    """Services that take over from those of the session before.

    `adopt` says which must be started, and takes over those that run already as they are declared now. `undo` puts
    back what was there before; `commit` makes it final: what was not taken over is destroyed.
    """

    def adopt(self) -> Iterable[int]: ...
    def undo(self) -> None: ...
    def commit(self) -> None: ...
    def stop_all(self) -> None: ...
    def pids(self) -> Mapping[str, int]: ...


class Node(Protocol):
    """Makes what an admitted manifest needs. `before` are the services that run already: the same ones stay."""

    def sensors(self, admitted: Admitted, rules: Rules) -> Sensors: ...
    def services(self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved) -> RunningServices: ...
    def channels(self, admitted: Admitted) -> Channels: ...
    def shutdown(self) -> None: ...


class Pins:
    """Where this installation pins its breaker, and the record of what it was then."""

    def __init__(self, state_dir: Path, bpffs: Path = Path("/sys/fs/bpf")) -> None:
        self._record = state_dir / "pins.json"
        self.folder = bpffs / f"pointcall_{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"

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
        self.drop()
        pinned = breaker.pin(self.folder)
        self._record.write_text(json.dumps(pinned.identity.as_dict()))

    def drop(self) -> None:
        """Remove the pins. What this process holds stays."""
        unpin(self.folder)
        self._record.unlink(missing_ok=True)


class KernelSensors:
    """The breaker and the lifecycle sensor of this kernel, loaded from the admitted blobs."""

    def __init__(self, admitted: Admitted, rules: Rules, gate: Path, pins: Pins | None = None) -> None:
        self._pins, self._kept = pins, False
        self._identities: dict[str, Identity] = {}
        declared = destinations_of(admitted.manifest, netns_cookie())
        self._destinations = {d: n for d, n in declared.items() if not _never(d, n, rules)}
        self._places = {(d.address, d.port): d for d in self._destinations}
        self.breaker: BreakerSensor | None = None
        self.lifecycle: LifecycleSensor | None = None
        with contextlib.ExitStack() as undo:
            for sensor in admitted.manifest.sensors:
                blob = Blob.parse(admitted.files[sensor.blob])
                if sensor.name == "breaker":
                    make = functools.partial(_breaker, blob, gate, dict(sensor.params), rules.never_touch_networks)
                    self.breaker = pins.adopt(make) if pins else make(None)
                else:
                    self.lifecycle = LifecycleSensor(blob)
                undo.callback(self.detach)
            if self.breaker is not None:
                for destination in self._destinations:
                    self.breaker.arm(destination)
                self.breaker.attach()
            if self.lifecycle is not None:
                self.lifecycle.attach()
            self._identities = {name: sensor.identity() for name, sensor in self._sensors().items()}
            undo.pop_all()

    def _sensors(self) -> Mapping[str, BreakerSensor | LifecycleSensor]:
        found = {"breaker": self.breaker, "lifecycle": self.lifecycle}
        return {name: sensor for name, sensor in found.items() if sensor is not None}

    def changed(self) -> list[str]:
        """What is no longer as it was when it was armed: a swapped program, a link that was taken off."""
        return [line for n, sensor in self._sensors().items() for line in sensor.recheck(self._identities[n])]

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
        return tuple(program for sensor in self._sensors().values() for program in sensor.programs())

    def states(self) -> tuple[CircuitState, ...]:
        return tuple(self.breaker.circuits()) if self.breaker is not None else ()

    def watch(self, cgroup_id: int) -> None:
        if self.lifecycle is not None:
            self.lifecycle.watch(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        if self.lifecycle is not None:
            self.lifecycle.unwatch(cgroup_id)

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

    def probe_service(self, number: int) -> int:
        """Let the next connect to each address of the service be the one probe; how many circuits there are."""
        if self.breaker is None:
            return 0
        mine = [d for d, n in self._destinations.items() if n == number]
        for destination in mine:
            self.breaker.make_probe_ready(destination)
        return len(mine)

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
        for sensor in self._sensors().values():
            sensor.close()
        self.breaker = self.lifecycle = None

    def detach(self) -> None:
        """Everything out of the kernel, pins too. Twice without harm."""
        if self._pins is not None and self._kept:
            self._pins.drop()
            self._kept = False
        self.leave()


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


class ProcessServices:
    """Declared services of kind `process`, by number."""

    def __init__(
        self,
        admitted: Admitted,
        parent: str,
        folder: Path,
        spawner: Spawner,
        before: ProcessServices | None,
        on_moved: OnMoved,
    ) -> None:
        self._on_moved, self._parent, self._before = on_moved, parent, before
        self._by_number: dict[int, Process] = {}
        self._final = False
        self._stopped: list[int] = []  # of those before: what had to make room
        self._started: list[int] = []
        for name, declaration in admitted.declarations.items():
            number = service(name).number
            old = before.processes().get(number) if before else None
            same = old is not None and old.declaration.sha256 == declaration.sha256
            self._by_number[number] = old if old and same else Process(declaration, parent, folder, spawner)

    def processes(self) -> Mapping[int, Process]:
        return self._by_number

    def _process(self, number: int) -> Process:
        found = self._by_number.get(number)
        if found is None:
            raise ServiceError("no such service is declared", id="service.unknown", got=str(number))
        return found

    def name(self, number: int) -> str:
        return self._process(number).name

    def pids(self) -> Mapping[str, int]:
        return {p.name: p.pid if p.running else 0 for p in self._by_number.values()}

    def destroy(self, number: int, grace_ns: int) -> int:
        self._on_moved(number, 0)
        return self._process(number).destroy(grace_ns)

    def start(self, number: int) -> Started:
        process = self._process(number)
        if not self._final:
            self._make_room(number)
            self._started.append(number)
        return process.start(on_cgroup=lambda cgroup_id: self._on_moved(number, cgroup_id))

    def _make_room(self, number: int) -> None:
        """Two of one name would want the same address."""
        old = self._before.processes().get(number) if self._before else None
        if self._before is not None and old is not None and old is not self._by_number[number] and old.running:
            self._stopped.append(number)
            self._before.destroy(number, _grace_ns(old))

    def adopt(self) -> list[int]:
        """Take over what runs as declared; the numbers of the others. Leftovers of an earlier executor end here."""
        missing = []
        for number, process in self._by_number.items():
            if process.running:
                self._on_moved(number, process.cgroup_id)
            else:
                missing.append(number)
            if self._before is None:
                destroy_leftovers(self._parent, process.name)
        return missing

    def _end(self) -> tuple[ProcessServices | None, list[int], list[int]]:
        """The takeover is over: what it took over from, what it started and what it stopped."""
        found = self._before, self._started, self._stopped
        self._before, self._started, self._stopped, self._final = None, [], [], True
        return found

    def undo(self) -> None:
        """Destroy what this one started, start again what it stopped. ServiceError where that fails."""
        before, started, stopped = self._end()
        for number in started:
            self._by_number[number].destroy(0)
        if before is not None:
            for number in stopped:
                before.start(number)

    def commit(self) -> None:
        """Destroy the processes of before that were not taken over."""
        before, _, _ = self._end()
        staying = self._by_number.values()
        for process in before.processes().values() if before else ():
            if process not in staying:
                process.destroy(_grace_ns(process))

    def stop_all(self) -> None:
        for number, process in self._by_number.items():
            self.destroy(number, _grace_ns(process))


def _grace_ns(process: Process) -> int:
    return process.declaration.process.stop.grace_ms * 1_000_000


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"pointcall: {line}\n")


class LogChannels:
    """Channels of kind `log`: one structured line, on standard error unless the caller wants it elsewhere."""

    def __init__(self, admitted: Admitted, say: Callable[[str], None] = _to_stderr) -> None:
        self._say = say
        self._names = {channel(c.name).number: c.name for c in admitted.manifest.channels}

    def send(self, number: int, level: Level, code: int) -> str:
        name = self._names.get(number)
        if name is None:
            raise ServiceError("no such channel is declared", id="channel.unknown", got=str(number))
        self._say(f"notify channel={name} level={level.name.lower()} code={code}")
        return name


class KernelNode:
    """This machine."""

    def __init__(self, config: Config, state_dir: Path, say: Callable[[str], None] = _to_stderr) -> None:
        self._config, self._folder, self._say = config, state_dir / "services", say
        self._pins, self._forgotten = Pins(state_dir), False
        self._spawner: Spawner | None = None

    def begin(self) -> None:
        """Start the spawner now: it keeps the privileges that this process has at this moment. And drop old pins, which
        may need them too."""
        self._forget_pins()
        if self._spawner is None:
            self._spawner = Spawner()

    def sensors(self, admitted: Admitted, rules: Rules) -> KernelSensors:
        gate = find_root() / self._config.gate
        if self._config.gate:
            Cgroup.create(self._config.gate)
        self._forget_pins()
        return KernelSensors(admitted, rules, gate, self._pins if self._config.pin else None)

    def _forget_pins(self) -> None:
        """Those of an earlier life, where the settings want none now."""
        if not self._config.pin and not self._forgotten:
            self._pins.drop()
            self._forgotten = True

    def services(self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved) -> ProcessServices:
        self.begin()
        assert self._spawner is not None
        taken = before if isinstance(before, ProcessServices) else None
        return ProcessServices(admitted, self._config.cgroup, self._folder, self._spawner, taken, on_moved)

    def channels(self, admitted: Admitted) -> Channels:
        return LogChannels(admitted, self._say)

    def shutdown(self) -> None:
        """End the spawner and remove our cgroups if nothing lives in them."""
        if self._spawner is not None:
            self._spawner.close()
            self._spawner = None
        gate = "" if self._config.pin else self._config.gate  # a pinned breaker is attached to it
        for name in {self._config.cgroup, gate} - {""}:
            remove_empty(name)
