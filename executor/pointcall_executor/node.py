"""The real node behind the actions: declared services, circuits, channels, and the sensors that watch them.

Implements what actions/world.py asks for. recorded.py implements the same without a kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from pointcall_attest.admission import Admitted
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.actions.world import Channels, Circuits, Services
from pointcall_executor.arming import ArmingError
from pointcall_executor.channels import DeclaredChannels, to_stderr
from pointcall_executor.config import Config
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.breaker import CircuitState
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.drill import Fault, Observed
from pointcall_executor.kernel.slow_file import SlowFile
from pointcall_executor.kernel.storage import Histogram
from pointcall_executor.learning import Kept
from pointcall_executor.pins import Pins
from pointcall_executor.resolvers import Resolvers
from pointcall_executor.sensors import KernelSensors
from pointcall_executor.services.declared import DeclaredServices, Kinds, OnMoved, check_distinct
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.reach import Reach
from pointcall_executor.services.spawning import Spawner

__all__ = ["KernelNode", "KernelSensors", "Node", "OnMoved", "Pins", "RunningServices", "Sensors"]


class Sensors(Circuits, Protocol):
    """The kernel side, real or recorded."""

    def fds(self) -> tuple[int, ...]: ...
    def drain(self, limit: int = ...) -> list[bytes]: ...
    def lost(self) -> Mapping[str, int]: ...
    def programs(self) -> tuple[tuple[str, int, str], ...]: ...
    def states(self) -> tuple[CircuitState, ...]: ...
    def histograms(self) -> Mapping[str, Sequence[Histogram]]: ...
    def isolations(self) -> Mapping[int, int]: ...
    def watch(self, cgroup_id: int, name: str) -> None: ...
    def unwatch(self, cgroup_id: int) -> None: ...
    def begin_drill(self, cgroup_id: int, fault: Fault, until_ns: int) -> None: ...
    def end_drill(self) -> Observed: ...
    def changed(self) -> list[str]: ...
    def denied(self) -> int: ...
    def unwatched(self) -> Mapping[str, str]: ...
    def keep(self) -> None: ...
    def stop(self, *, leave: bool) -> None: ...
    def leave(self) -> None: ...
    def detach(self) -> None: ...


NONE: Final[Mapping[str, ServiceDeclaration]] = MappingProxyType({})


class RunningServices(Services, Protocol):
    """Services that take over from those of the session before.

    `adopt` says which must be started, and takes over those that run already as they are declared now; `refused` then
    says of each why what an earlier executor left was not (empty: it was, or there was nothing). `undo` puts back what
    was there before; `commit` makes it final: what was not taken over is destroyed. Both answer with the names of those
    that they ended or started, and why one could not be (empty: it was).
    """

    @property
    def refused(self) -> Mapping[str, str]: ...
    def adopt(self) -> Iterable[int]: ...
    def undo(self) -> Mapping[str, str]: ...
    def commit(self) -> Mapping[str, str]: ...
    def stop_all(self) -> None: ...
    def pids(self) -> Mapping[str, int]: ...


class Node(Protocol):
    """Makes what an admitted manifest needs. `before` are the services that run already: the same ones stay. `earlier`:
    where there are none, what the log says was declared here last, by an executor that may have left it running.

    `unpin` takes out of the kernel what an earlier executor left pinned; False where there was nothing. `ended` says
    once what was in force of it and ended because the settings of now want none, by kind: for the log. `note` puts on
    disk what only this process knows, every few seconds and not on the loop's thread. `hurry`: the executor ends, and
    nobody waits for a cluster any more.
    """

    def sensors(self, admitted: Admitted, rules: Rules) -> Sensors: ...
    def services(
        self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved,
        earlier: Mapping[str, ServiceDeclaration] = NONE,
    ) -> RunningServices: ...  # fmt: skip
    def channels(self, admitted: Admitted) -> Channels: ...
    def unpin(self) -> bool: ...
    def ended(self) -> Mapping[str, Sequence[str]]: ...
    def note(self) -> None: ...
    def slow_file(self, path: Path, delay_s: float, seconds: float) -> SlowFile: ...
    def hurry(self) -> None: ...
    def shutdown(self) -> None: ...


class KernelNode:
    """This machine."""

    def __init__(self, config: Config, state_dir: Path, say: Callable[[str], None] = to_stderr) -> None:
        self._config, self._folder, self._say = config, state_dir / "services", say
        self._pins, self._forgotten = Pins(state_dir), False
        self._passing = False  # what is pinned refuses nothing any more
        self._ended: Mapping[str, Sequence[str]] = {}
        self._learned = Kept(state_dir / "learned.json", time.monotonic_ns())
        self._kept: KernelSensors | None = None
        self._spawner: Spawner | None = None
        self._made: Kinds | None = None
        self._services: DeclaredServices | None = None

    def begin(self) -> None:
        """Start the spawner now: it keeps the privileges that this process has at this moment. And drop old pins, or
        tell them to let pass, which may need them too."""
        self._forget_pins()
        if self._spawner is None:
            self._spawner = Spawner(self._config.cgroup)

    def sensors(self, admitted: Admitted, rules: Rules) -> KernelSensors:
        gate = find_root() / self._config.gate
        if self._config.gate:
            Cgroup.create(self._config.gate)
        self._forget_pins()
        pins = self._pins if self._config.pin else None
        allowed = {self._spawning().cgroup_id, *_allowed(self._config.allowed_cgroups)}
        resolvers = Resolvers.read() if self._config.protect_resolvers else None
        watch_only, learned = self._config.mode == "monitor", self._learned.learned
        made = KernelSensors(
            admitted, rules, gate, pins, learned, self._succeed, resolvers=resolvers, watch_only=watch_only
        )
        made.allow(allowed)
        return made

    def _forget_pins(self) -> None:
        """Those of an earlier life, where the settings want none now; in mode `monitor` what they refuse."""
        if not self._config.pin and not self._forgotten:
            held = self._pins.in_force()
            self._pins.drop()
            self._forgotten, self._ended = True, held
        elif self._config.mode == "monitor" and not self._passing:
            held = self._pins.in_force()
            self._pins.let_pass()
            self._passing, self._ended = True, held

    def unpin(self) -> bool:
        if self._forgotten:  # at the beginning, with the privileges of that moment
            return False
        found = self._pins.found()
        self._pins.drop()
        return found

    def ended(self) -> Mapping[str, Sequence[str]]:
        self._forget_pins()
        ended, self._ended = self._ended, {}
        return ended

    def _succeed(self, kept: KernelSensors | None) -> KernelSensors | None:
        """These are in service from now on; the ones that were before."""
        before, self._kept = self._kept, kept
        return before

    def note(self) -> None:
        if self._kept is not None:
            self._kept.note_learned()
        self._learned.save(time.monotonic_ns())

    def slow_file(self, path: Path, delay_s: float, seconds: float) -> SlowFile:
        """Made by the spawner: this process may not mount."""
        return SlowFile(path, delay_s, seconds, self._spawning().run)

    def _spawning(self) -> Spawner:
        if self._spawner is None:
            self._spawner = Spawner(self._config.cgroup)
        return self._spawner.watch()

    def _kinds(self) -> Kinds:
        config = self._config
        if self._made is None:
            reach = Reach(config.systemd_bus, config.podman_socket, config.kubeconfig)
            self._made = Kinds(config.cgroup, self._folder, self._spawning(), reach)
        return self._made

    def services(
        self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved,
        earlier: Mapping[str, ServiceDeclaration] = NONE,
    ) -> DeclaredServices:  # fmt: skip
        check_distinct(admitted.declarations.values())
        taken = before if isinstance(before, DeclaredServices) else None
        if taken is None and earlier:
            taken = DeclaredServices.left(earlier, self._kinds())
        self._services = DeclaredServices(admitted.declarations, self._kinds(), taken, on_moved)
        return self._services

    def channels(self, admitted: Admitted) -> Channels:
        return DeclaredChannels(admitted.manifest, self._config.node, self._say)

    def hurry(self) -> None:
        if self._made is not None:
            self._made.hurry()

    def shutdown(self) -> None:
        """End the spawner and remove our cgroups if nothing lives in them."""
        self._learned.save(time.monotonic_ns())
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


def _allowed(names: Sequence[str]) -> Iterator[int]:
    """The ids that these cgroups have now. ArmingError `arm.allowed-cgroup` where one is not there."""
    for name in names:
        try:
            yield Cgroup(find_root() / name).id
        except OSError as error:
            raise ArmingError(
                "a cgroup that is never refused is not there", id="arm.allowed-cgroup",
                want=f"the cgroup {name} below {find_root()}", got=error.strerror or "",
                hint="start what lives in it before arming, or take it out of the setting allowed_cgroups",
            ) from None  # fmt: skip
