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
from pointcall_executor.services.declared import DeclaredServices, Kinds, OnMoved, Reach
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.services.spawning import Spawner
from pointcall_runbook.vocabulary import Address, Level, Network, channel

__all__ = ["KernelNode", "KernelSensors", "LogChannels", "Node", "OnMoved", "Pins", "RunningServices", "Sensors"]


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
        self._pins = Pins(state_dir)
        self._spawner: Spawner | None = None
        self._made: Kinds | None = None
        self._services: DeclaredServices | None = None

    def sensors(self, admitted: Admitted, rules: Rules) -> KernelSensors:
        gate = find_root() / self._config.gate
        if self._config.gate:
            Cgroup.create(self._config.gate)
        if not self._config.pin:
            self._pins.drop()
        made = KernelSensors(admitted, rules, gate, self._pins if self._config.pin else None)
        made.allow(self._spawning().cgroup_id)
        return made

    def _spawning(self) -> Spawner:
        if self._spawner is None:
            self._spawner = Spawner(self._config.cgroup)
        return self._spawner

    def _kinds(self) -> Kinds:
        config = self._config
        if self._made is None:
            reach = Reach(config.systemd_bus, config.podman_socket, config.kubeconfig)
            self._made = Kinds(config.cgroup, self._folder, self._spawning(), reach)
        return self._made

    def services(self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved) -> DeclaredServices:
        taken = before if isinstance(before, DeclaredServices) else None
        self._services = DeclaredServices(admitted, self._kinds(), taken, on_moved)
        return self._services

    def channels(self, admitted: Admitted) -> Channels:
        return LogChannels(admitted, self._say)

    def shutdown(self) -> None:
        """End the spawner and remove our cgroups if nothing lives in them."""
        if self._services is not None:
            self._services.release()
            self._services = None
        if self._made is not None:
            self._made.close()
            self._made = None
        if self._spawner is not None:
            self._spawner.close()
            self._spawner = None
        gate = "" if self._config.pin else self._config.gate  # a pinned breaker is attached to it
        for name in {self._config.cgroup, gate} - {""}:
            remove_empty(name)
