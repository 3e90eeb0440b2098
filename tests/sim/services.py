"""Declared services as processes that start slowly, fail, flap, die or never become ready; and channels.

What runs belongs to the machine and outlives the executor; `Services` is what one session holds of it, with the
promises of node.ProcessServices. Nothing here is random by itself: the machine's seed decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pointcall_attest.admission import Admitted
from pointcall_executor.channels import ChannelError
from pointcall_executor.core.event import Kind, ProcessEvent
from pointcall_executor.node import OnMoved
from pointcall_executor.services.managed import ServiceError, Started, not_running
from pointcall_runbook.vocabulary import Level, channel, service
from tests.sim.scheduler import MILLISECOND, SECOND, Process, Scheduler


@dataclass(slots=True)
class Temper:
    """How a service behaves; chances are one in so many."""

    start_ns: int = 20 * MILLISECOND
    stop_ns: int = 5 * MILLISECOND
    fail_one_in: int = 20
    hang_one_in: int = 40
    flap_one_in: int = 10
    ready_deadline_ns: int = 10 * SECOND


@dataclass(slots=True)
class Running:
    """One service of the machine: what runs of it, if anything does."""

    name: str
    number: int
    declaration: str
    cgroup_id: int = 0
    up: bool = False
    since_ns: int = 0
    frozen_until_ns: int = 0
    temper: Temper = field(default_factory=Temper)


class Services:
    """The services of one session."""

    def __init__(
        self, machine: Any, process: Process, admitted: Admitted, before: Services | None, on_moved: OnMoved
    ) -> None:
        self.machine, self.process, self._on_moved = machine, process, on_moved
        self.scheduler: Scheduler = machine.scheduler
        machine.held.append(self)
        self._before = before
        self._started: list[int] = []
        self._stopped: list[int] = []
        self._final = self._undoing = False
        self.own: dict[int, Running] = {}
        self.refused: dict[str, str] = {}  # this machine leaves nothing that is not as declared
        for name, declared in admitted.declarations.items():
            number = service(name).number
            old = before.own.get(number) if before is not None else None
            same = old is not None and old.declaration == declared.sha256
            self.own[number] = old if same and old is not None else machine.declare(name, number, declared.sha256)

    def _of(self, number: int) -> Running:
        self.scheduler.alive()
        if number not in self.own:
            raise ServiceError("no such service is declared", id="service.unknown", got=str(number))
        return self.own[number]

    def name(self, number: int) -> str:
        return self._of(number).name

    def pids(self) -> Mapping[str, int]:
        return {held.name: int(held.up) for held in self.own.values()}

    def destroy(self, number: int, grace_ns: int) -> int:
        self._on_moved(number, 0)
        return self._destroy(self._of(number), grace_ns)

    def _destroy(self, held: Running, grace_ns: int) -> int:
        auditor, begin = self.machine.auditor, self.scheduler.now
        auditor.touch(held.number, undoing=self._undoing)
        try:
            if held.cgroup_id:
                stubborn = self.scheduler.random.random() < 0.1
                self.scheduler.sleep(grace_ns if stubborn else min(grace_ns, held.temper.stop_ns))
            self.machine.stopped(held)
        finally:
            auditor.untouch(held.number, undoing=self._undoing)
        return self.scheduler.now - begin

    def start(self, number: int) -> Started:
        held = self._of(number)
        if not self._final:
            self._make_room(number, held)
            self._started.append(number)
        auditor, chance, begin = self.machine.auditor, self.scheduler.random, self.scheduler.now
        auditor.touch(number, undoing=self._undoing)
        try:
            if held.cgroup_id:
                self.machine.stopped(held)
            held.cgroup_id = next(self.machine.cgroups)
            self._on_moved(number, held.cgroup_id)
            temper = held.temper
            if chance.random() * temper.hang_one_in < 1:
                self.scheduler.sleep(temper.ready_deadline_ns)
                self.machine.stopped(held)
                raise ServiceError("it did not become ready in time", id="service.ready")
            self.scheduler.sleep(int(temper.start_ns * (0.5 + chance.random())))
            if chance.random() * temper.fail_one_in < 1:
                self.machine.stopped(held)
                raise ServiceError("it ended before it was ready", id="service.exited")
            self.machine.started(held)
        finally:
            auditor.untouch(number, undoing=self._undoing)
        return Started(0, held.cgroup_id, 0, 0, 0, self.scheduler.now - begin, "simulated")

    def _make_room(self, number: int, held: Running) -> None:
        old = self._before.own.get(number) if self._before is not None else None
        if old is not None and old is not held and old.cgroup_id and old.up:
            self._stopped.append(number)
            assert self._before is not None
            self._before.destroy(number, 0)

    def signal(self, number: int, sig: int) -> None:
        held = self._running(number)
        if sig in (9, 15):
            self.machine.dies(held, held.cgroup_id)

    def _running(self, number: int) -> Running:
        held = self._of(number)
        if not held.cgroup_id or not held.up:
            raise not_running(held.name)
        return held

    def freeze(self, number: int, until_ns: int) -> None:
        held = self._running(number)
        self.scheduler.preempt()
        self.machine.auditor.asks_for(until_ns)
        held.frozen_until_ns = until_ns

    def thaw(self, number: int) -> None:
        held = self._of(number)
        self.scheduler.preempt()
        held.frozen_until_ns = 0

    def frozen(self, number: int, until_ns: int) -> bool:
        held = self._of(number)
        self.scheduler.preempt()
        return self.scheduler.now >= until_ns or (held.frozen_until_ns > 0 and not self.machine.contrary())

    def cgroup(self, number: int) -> int:
        held = self._of(number)
        if not held.cgroup_id:
            raise not_running(held.name)
        return held.cgroup_id

    def healthy(self, number: int) -> str:
        held = self._of(number)
        self.scheduler.preempt()
        if not held.cgroup_id or not held.up:
            return "its main process does not run"
        if held.frozen_until_ns > self.scheduler.now:
            return "it is frozen"
        return "it does not answer" if self.machine.contrary() else ""

    def adopt(self) -> list[int]:
        missing = []
        for number, held in list(self.own.items()):
            old = self._before.own.get(number) if self._before is not None else None
            if old is None:
                left = self.machine.left_over(held)
                held = self.own[number] = left or held
            if held.cgroup_id and held.up:
                self._on_moved(number, held.cgroup_id)
            else:
                missing.append(number)
        return missing

    def undo(self) -> Mapping[str, str]:
        self.scheduler.alive()
        before, started, stopped = self._before, self._started, self._stopped
        self._before, self._final, self._started, self._stopped = None, True, [], []
        self._undoing = True
        told = {self.own[number].name: "" for number in dict.fromkeys([*started, *stopped])}
        for number in started:
            self._destroy(self.own[number], 0)
        for number in stopped:
            assert before is not None
            before._undoing = True
            try:
                before.start(number)
            except ServiceError as error:
                told[self.own[number].name] = str(error)
            finally:
                before._undoing = False
        return told

    def commit(self) -> Mapping[str, str]:
        self.scheduler.alive()
        before, ended = self._before, dict[str, str]()
        self._before, self._final, self._started, self._stopped = None, True, [], []
        if before is None:
            self.machine.sweep(self.own)
        for number, held in (before.own if before is not None else {}).items():
            if self.own.get(number) is not held:
                self._destroy(held, 0)
                ended[held.name] = ""
        return ended

    def stop_all(self) -> None:
        for number in self.own:
            self.destroy(number, 0)


class Channels:
    """Channels of the machine: some calls fail, and those that go through somebody else take their time."""

    def __init__(self, machine: Any, admitted: Admitted) -> None:
        self.machine = machine
        self._channels = {channel(c.name).number: c for c in admitted.manifest.channels}

    def waits(self, number: int) -> bool:
        return number in self._channels and self._channels[number].kind != "log"

    def hurry(self) -> None:
        """What is under way takes the time it takes."""

    def send(self, number: int, level: Level, code: int) -> str:
        machine = self.machine
        machine.scheduler.preempt()
        machine.auditor.told(number, code, waits=self.waits(number))
        if number not in self._channels:
            raise ChannelError("no such channel is declared", id="channel.unknown", got=str(number))
        if self.waits(number):
            slow = machine.scheduler.random.random() < 0.05
            machine.scheduler.sleep(machine.scheduler.random.randrange(5 * SECOND if slow else 20 * MILLISECOND))
        if machine.scheduler.random.random() < 0.05:
            raise ChannelError("it could not be told", id="channel.unreachable")
        return str(self._channels[number].name)


def exit_of(held: Running, now_ns: int, kind: Kind = Kind.PROCESS_EXIT) -> ProcessEvent:
    """The kernel's record of its end."""
    life = max(now_ns - held.since_ns, 0)
    oom = kind is Kind.OOM_VICTIM
    return ProcessEvent(kind, now_ns, 1, held.cgroup_id, 9, 0 if oom else life, int(oom), "service")
