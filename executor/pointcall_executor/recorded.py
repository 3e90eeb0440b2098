"""The same loop without a kernel: recorded events in, services and circuits that only remember what was asked of them.

For machines without root or BPF, and for scenario tests. Whatever runs on it is labelled `recorded`; nothing outside
this process changes.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pointcall_attest.admission import Admitted
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.actions.world import Channels
from pointcall_executor.arming import destinations_of
from pointcall_executor.channels import DeclaredChannels
from pointcall_executor.core.event import Destination, KernelEvent, encode
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel.breaker import CircuitState
from pointcall_executor.kernel.drill import Fault, Observed
from pointcall_executor.kernel.slow_file import SlowFile
from pointcall_executor.kernel.storage import Histogram
from pointcall_executor.node import NONE, OnMoved, RunningServices
from pointcall_executor.services.managed import ServiceError, Started, not_running
from pointcall_runbook.vocabulary import Address, service

_CGROUPS: Final = itertools.count(1)  # ids that no two recorded services share


class RecordedSensors:
    """A ring that is filled by `happen`, and circuits as a list of commands."""

    def __init__(self, admitted: Admitted, before: RecordedSensors | None = None) -> None:
        self._before = before
        self.destinations = destinations_of(admitted.manifest, 0)
        self.commands: list[tuple[str, str]] = []
        self._forced: dict[tuple[Address, int], int] = {}
        self._records: collections.deque[bytes] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self.watched: set[int] = set()
        self.isolated: dict[int, int] = {}  # cgroup id -> until when, ns

    def happen(self, event: KernelEvent) -> None:
        """Let the executor see this record."""
        self._records.append(encode(event))
        os.eventfd_write(self._wake, 1)

    def fds(self) -> tuple[int, ...]:
        return (self._wake,) if self._wake >= 0 else ()

    def drain(self, limit: int = 1 << 20) -> list[bytes]:
        found: list[bytes] = []
        while self._records and len(found) < limit:
            os.eventfd_read(self._wake)
            found.append(self._records.popleft())
        return found

    def lost(self) -> Mapping[str, int]:
        return {}

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        return ()

    def states(self) -> tuple[CircuitState, ...]:
        return ()

    def histograms(self) -> Mapping[str, Sequence[Histogram]]:
        return {}

    def isolations(self) -> Mapping[int, int]:
        return {cgroup_id: until_ns for cgroup_id, until_ns in self.isolated.items() if until_ns > time.monotonic_ns()}

    def watch(self, cgroup_id: int, name: str) -> None:
        self.watched.add(cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        self.watched.discard(cgroup_id)

    def _known(self, address: Address, port: int) -> Destination:
        for destination in self.destinations:
            if (destination.address, destination.port) == (address, port):
                return destination
        raise ServiceError(
            "no circuit is armed there", id="circuit.unknown", want="a destination that the armed manifest watches",
            got=f"{address}:{port}", hint="pointcall status has the circuits",
        )  # fmt: skip

    def force(self, address: Address, port: int, until_ns: int) -> None:
        self.commands.append(("force", str(self._known(address, port))))
        self._forced[(address, port)] = until_ns

    def close_circuit(self, address: Address, port: int) -> None:
        self.commands.append(("close", str(self._known(address, port))))
        self._forced.pop((address, port), None)

    def forced_until(self, address: Address, port: int) -> int:
        return self._forced.get((address, port), 0)

    def still_forced(self, address: Address, port: int) -> bool:
        return self.forced_until(address, port) > time.monotonic_ns()

    def probe_service(self, number: int) -> int:
        mine = [d for d, n in self.destinations.items() if n == number]
        self.commands += [("probe", str(d)) for d in mine]
        return len(mine)

    def kill_connections(self, address: Address, port: int) -> int:
        self.commands.append(("kill_connections", f"{address}:{port}"))
        return 0

    def isolate(self, cgroup_id: int, until_ns: int) -> None:
        self.isolated[cgroup_id] = max(until_ns, self.isolated.get(cgroup_id, 0))
        self.commands.append(("isolate", str(cgroup_id)))

    def isolated_until(self, cgroup_id: int) -> int:
        return self.isolated.get(cgroup_id, 0)

    def end_isolation(self, cgroup_id: int) -> None:
        self.isolated.pop(cgroup_id, None)
        self.commands.append(("end_isolation", str(cgroup_id)))

    def begin_drill(self, cgroup_id: int, fault: Fault, until_ns: int) -> None:
        self.commands.append(("begin_drill", f"{cgroup_id} {fault.destination}"))

    def end_drill(self) -> Observed:
        self.commands.append(("end_drill", ""))
        return Observed()

    def changed(self) -> list[str]:
        return []

    def denied(self) -> int:
        return 0

    def unwatched(self) -> Mapping[str, str]:
        return {}

    def keep(self) -> None:
        """What the ones before held goes on."""
        if self._before is not None and self._before._wake >= 0:
            self._forced |= self._before._forced
            self.isolated |= self._before.isolated
        self._before = None

    def stop(self, *, leave: bool) -> None:
        """Nothing is attached."""

    def leave(self) -> None:
        self.detach()

    def detach(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


class RecordedServices:
    """Services that start at once and do nothing."""

    def __init__(self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved) -> None:
        self._running = dict(before.running) if isinstance(before, RecordedServices) else {}
        self._names = {service(s.name).number: s.name for s in admitted.manifest.services}
        self._on_moved = on_moved
        self.starts: list[str] = []
        self.asked: list[tuple[str, ...]] = []  # signals, freezes and thaws, in order
        self.frozen_until: dict[int, int] = {}  # service number -> until when, CLOCK_MONOTONIC ns
        self.refused: dict[str, str] = {}  # whatever a story says was left by an earlier executor

    def name(self, number: int) -> str:
        if number not in self._names:
            raise ServiceError("no such service is declared", id="service.unknown", got=str(number))
        return self._names[number]

    def destroy(self, number: int, grace_ns: int) -> int:
        self.name(number)
        self._running.pop(number, None)
        self.frozen_until.pop(number, None)
        self._on_moved(number, 0)
        return 0

    def start(self, number: int) -> Started:
        begin = time.monotonic_ns()
        self.starts.append(self.name(number))
        cgroup_id = self._running[number] = next(_CGROUPS)
        self._on_moved(number, cgroup_id)
        return Started(0, cgroup_id, 0, 0, 0, time.monotonic_ns() - begin, "recorded")

    def signal(self, number: int, sig: int) -> None:
        self.cgroup(number)
        self.asked.append(("signal", self.name(number), str(sig)))

    def freeze(self, number: int, until_ns: int) -> None:
        self.cgroup(number)
        self.frozen_until[number] = until_ns
        self.asked.append(("freeze", self.name(number), str(until_ns)))

    def thaw(self, number: int) -> None:
        self.asked.append(("thaw", self.name(number)))
        self.frozen_until.pop(number, None)

    def frozen(self, number: int, until_ns: int) -> bool:
        return self.frozen_until.get(number) == until_ns

    def cgroup(self, number: int) -> int:
        if number not in self._running:
            raise not_running(self.name(number))
        return self._running[number]

    def healthy(self, number: int) -> str:
        if number not in self._running:
            return f"{self.name(number)} does not run"
        return "it is frozen" if self.frozen_until.get(number, 0) > time.monotonic_ns() else ""

    @property
    def running(self) -> Mapping[int, int]:
        """Service number -> made-up cgroup id."""
        return self._running

    def adopt(self) -> list[int]:
        """What was started before counts as running."""
        for number, cgroup_id in self._running.items():
            self._on_moved(number, cgroup_id)
        return [number for number in self._names if number not in self._running]

    def undo(self) -> Mapping[str, str]:
        """Nothing runs."""
        return {}

    def commit(self) -> Mapping[str, str]:
        """Nothing runs."""
        return {}

    def stop_all(self) -> None:
        """Nothing runs."""

    def pids(self) -> Mapping[str, int]:
        return dict.fromkeys(self._names.values(), 0)


class RecordedNode:
    """Stands in for this machine. Its parts are public so that a story can drive and look at them."""

    def __init__(self) -> None:
        self.said: list[str] = []  # what its channels were told
        self.current_sensors: RecordedSensors | None = None
        self.current_services: RecordedServices | None = None

    def sensors(self, admitted: Admitted, rules: Rules) -> RecordedSensors:
        self.current_sensors = RecordedSensors(admitted, self.current_sensors)
        return self.current_sensors

    def services(
        self, admitted: Admitted, before: RunningServices | None, on_moved: OnMoved,
        earlier: Mapping[str, ServiceDeclaration] = NONE,
    ) -> RecordedServices:  # fmt: skip
        self.current_services = RecordedServices(admitted, before, on_moved)
        return self.current_services

    def channels(self, admitted: Admitted) -> Channels:
        return DeclaredChannels(admitted.manifest, "recorded", self.said.append)

    def slow_file(self, path: Path, delay_s: float, seconds: float) -> SlowFile:
        return SlowFile(path, delay_s, seconds)

    def note(self) -> None:
        """Nothing is learned here."""

    def unpin(self) -> bool:
        """Nothing is pinned."""
        return False

    def ended(self) -> Mapping[str, Sequence[str]]:
        """Nothing was."""
        return {}

    def hurry(self) -> None:
        """Nobody waits."""

    def shutdown(self) -> None:
        """Nothing to end."""
