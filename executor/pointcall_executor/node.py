"""The real node behind the actions: declared services, circuits, channels, and the sensors that watch them.

Implements what actions/world.py asks for. recorded.py implements the same without a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from pointcall_attest.admission import Admitted
from pointcall_executor.actions.world import Channels, Circuits, Services
from pointcall_executor.config import Config
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.breaker import CircuitState
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.drill import Fault, Observed
from pointcall_executor.learning import Learned
from pointcall_executor.pins import Pins
from pointcall_executor.sensors import KernelSensors
from pointcall_executor.services.groups import destroy_leftovers, remove_empty
from pointcall_executor.services.process import Process, ServiceError, Spawner, Started
from pointcall_runbook.vocabulary import Level, channel, service

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
    def begin_drill(self, cgroup_id: int, fault: Fault, until_ns: int) -> None: ...
    def end_drill(self) -> Observed: ...
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
        self._pins = Pins(state_dir)
        self._learned = Learned()
        self._kept: KernelSensors | None = None
        self._spawner: Spawner | None = None

    def sensors(self, admitted: Admitted, rules: Rules) -> KernelSensors:
        gate = find_root() / self._config.gate
        if self._config.gate:
            Cgroup.create(self._config.gate)
        if not self._config.pin:
            self._pins.drop()
        pins = self._pins if self._config.pin else None
        return KernelSensors(admitted, rules, gate, pins, self._learned, self._succeed)

    def _succeed(self, kept: KernelSensors) -> KernelSensors | None:
        """These are in service from now on; the ones that were before."""
        before, self._kept = self._kept, kept
        return before

    def services(self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved) -> ProcessServices:
        if self._spawner is None:
            self._spawner = Spawner()
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
