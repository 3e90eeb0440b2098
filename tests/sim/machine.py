"""One simulated machine: everything from one seed, with the real executor on it.

What is real: daemon.py and the modules it ties together, run.py, recorder.py, session.py, arming.py, actions/, the
whole core, the interpreter, the compiled library. What is simulated: time, threads, disk and journal, kernel, services,
clients, admission, keys.
`installed` puts the simulated parts where the executor's modules look for them, and takes them away again.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from pointcall_attest import entry
from pointcall_attest.errors import RefusedError, VerifyError
from pointcall_attest.receipt import Receipt
from pointcall_attest.verdict import Check, Verdict
from pointcall_executor import (
    acting,
    brake,
    daemon,
    in_flight,
    left,
    loop,
    messenger,
    recorder,
    run,
    running_epoch,
    runs,
    session,
    sessions,
    watch,
)
from pointcall_executor.config import Config
from pointcall_executor.core import breaker
from pointcall_executor.core.event import Destination, Kind
from pointcall_executor.halt import Halt
from pointcall_executor.journal import JournalError
from pointcall_executor.node import OnMoved
from pointcall_runbook.decision import Trap
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address, service
from tests.sim import kernel as kernels
from tests.sim import services as servers
from tests.sim import threads
from tests.sim.auditor import Auditor, BrokenError
from tests.sim.disk import Disk, Journal, Leaf
from tests.sim.runbooks import NAMES, Runner, Spec, spec, town
from tests.sim.scheduler import MILLISECOND, MINUTE, SECOND, Process, Scheduler, Task

EPOCH = datetime(2026, 11, 23, tzinfo=UTC)
CALM_NS = 20 * MINUTE  # after the last event: everything that was begun must end in this time
HASH = "0" * 64
OPERATIONS = {  # what operators do, and how often
    "arm": 6, "older": 2, "disarm": 2, "pause": 3, "resume": 4, "trip": 4, "release": 4, "reload": 1, "roll": 2,
    "checkpoint": 1, "stop": 1, "halt": 2, "clear": 1, "approve": 8, "acknowledge": 3,
}  # fmt: skip
# where a name that is replaced may live
SHELL: list[ModuleType] = [
    acting,
    brake,
    daemon,
    in_flight,
    left,
    loop,
    messenger,
    running_epoch,
    runs,
    sessions,
    watch,
]
DOORS: list[ModuleType] = [*SHELL, recorder, run, session]  # they must not see the real clock or threads


@dataclass(slots=True)
class Scenario:
    """What may happen in this run; drawn from the seed. Chances are one in so many events of the operator's clock."""

    gap_ns: int = 10 * MILLISECOND  # between two attempts of one client
    operator_ns: int = 10 * SECOND
    fault_ns: int = 30 * SECOND
    death_ns: int = 5 * SECOND
    crash: bool = True
    disk_faults: bool = True
    clock_jumps: bool = True
    pin: bool = False
    bursts: bool = True
    preempt_one_in: int = 0
    contrary_one_in: int = 0  # what was done does not hold
    monitor: bool = False  # the mode of the node, first
    changes_mode: bool = False  # it has another one now and then when it starts
    mischief: float = 0.0

    @classmethod
    def drawn(cls, chance: random.Random) -> Scenario:
        gap = int(MILLISECOND * 10 ** chance.uniform(0, 3.3))
        return cls(
            gap_ns=gap,
            operator_ns=gap * chance.choice((50, 200, 1000)),
            fault_ns=gap * chance.choice((200, 1000, 5000)),
            death_ns=gap * chance.choice((5, 50, 500)),
            crash=chance.random() < 0.7,
            disk_faults=chance.random() < 0.5,
            clock_jumps=chance.random() < 0.5,
            pin=chance.random() < 0.4,
            bursts=chance.random() < 0.6,
            preempt_one_in=chance.choice((0, 0, 3, 10, 50)),
            contrary_one_in=chance.choice((0, 3, 20, 100)),
            monitor=chance.random() < 0.08,
            mischief=chance.choice((0.0, 0.01, 0.05)),
            changes_mode=random.Random(gap).random() < 0.3,
        )


class Keys:
    """Keys of an epoch: they sign nothing here, but know whether they were wiped."""

    def __init__(self, number: int) -> None:
        self.id = f"{number:064x}"
        self.spki, self.public_key, self.wiped = b"", "", False

    def verifier(self, origin: str) -> str:
        return origin

    def sign(self, payload: Leaf) -> Leaf:
        assert not self.wiped, "these keys were wiped"
        payload.epoch = self.id
        return payload

    def sign_checkpoint(self, origin: str, size: int, root: bytes) -> object:
        assert not self.wiped, "these keys were wiped"
        return size

    def certify_next(self, following: Keys | None, *, reason: str, at: datetime, ktime_ns: int) -> Leaf:
        return self.sign(Leaf("epoch-close", None, {"reason": reason}, self.id))

    def wipe(self) -> None:
        self.wiped = True


class SimulatedReceipt(Receipt):
    """A real receipt, checked field by field, that is not turned into bytes."""

    def sealed(self, salt: bytes) -> Any:
        return Leaf("receipt", self.run.id, {"receipt": self}, ""), None


@dataclass(frozen=True, slots=True)
class Admitted:
    """What admission makes of a spec."""

    spec: Spec
    signed: Any = field(default_factory=lambda: SimpleNamespace(signers=()))
    verdict: Verdict = field(default_factory=lambda: Verdict((), "emulated"))

    @property
    def manifest(self) -> Any:
        return self.spec.manifest

    @property
    def modules(self) -> Mapping[str, Any]:
        return {name: m.info for name, m in self.spec.modules.items()}

    @property
    def declarations(self) -> Mapping[str, Any]:
        return self.spec.declarations

    @property
    def files(self) -> Mapping[str, bytes]:
        return {}

    def module(self, name: str) -> Any:
        return name


class Signature(bytes):
    """Stands for the signature bundle of a spec."""

    spec: Spec


class Approved(bytes):
    """Stands for the signature bundle of an approval."""

    body: Any
    manifest: str


def bundle(chosen: Spec) -> session.Bundle:
    signature = Signature(chosen.manifest.payload)
    signature.spec = chosen
    return session.Bundle((signature,), {})


class Node:
    """The machine, as the executor asks for it."""

    def __init__(self, machine: Machine, process: Process, *, pin: bool, watch_only: bool) -> None:
        self._machine, self._process, self._pin, self._watch_only = machine, process, pin, watch_only
        self._kept: kernels.Sensors | None = None
        self._ended = machine.kernel.let_pass() if watch_only else {}

    def sensors(self, admitted: Any, rules: Any) -> Any:
        return kernels.Sensors(
            self._machine, self._process, admitted, rules, self._succeed, pin=self._pin, watch_only=self._watch_only
        )

    def unpin(self) -> bool:
        self._machine.scheduler.alive()
        return self._machine.kernel.unpin()

    def ended(self) -> dict[str, list[str]]:
        if self._ended:
            self._machine.auditor.counts["ended at start"] += 1
        return self._ended

    def note(self) -> None:
        self._machine.scheduler.alive()

    def _succeed(self, kept: kernels.Sensors | None) -> kernels.Sensors | None:
        before, self._kept = self._kept, kept
        return before

    def services(self, admitted: Any, before: Any, on_moved: OnMoved, earlier: Any = ()) -> Any:
        return servers.Services(self._machine, self._process, admitted, before, on_moved)

    def channels(self, admitted: Any) -> Any:
        return servers.Channels(self._machine, admitted)

    def hurry(self) -> None:
        self._machine.scheduler.alive()

    def shutdown(self) -> None:
        self._machine.scheduler.alive()


class Machine:
    """A machine, its town of services, its operators and its troubles."""

    def __init__(self, seed: int, known: frozenset[str] = frozenset(), scenario: Scenario | None = None) -> None:
        self.seed = seed
        self.scheduler = Scheduler(seed)
        chance = self.chance = self.scheduler.random
        self.scenario = scenario or Scenario.drawn(chance)
        self.scheduler.preempt_one_in = self.scenario.preempt_one_in
        self.descriptors = threads.Descriptors(self.scheduler)
        self.disk = Disk(base_ns=int(10 ** chance.uniform(4, 7.3)))
        self.kernel = kernels.Kernel(self.scheduler, self.descriptors)
        self.kernel.ring_size = chance.choice((4, 16, 64, 1024))
        self.auditor = Auditor(self, known)
        self.kernel.vanished, self.kernel.begun_anew = self.auditor.vanished, self.auditor.closed
        self.monitor, self._modes = self.scenario.monitor, random.Random(seed)
        self.params = breaker.Params(
            threshold=chance.choice((1, 3, 5)),
            cooldown_us=chance.choice((1000, 100_000, 1_000_000)),
            cooldown_max_us=chance.choice((0, 60_000_000)),
        )
        self.town = town(chance)
        self.names = {service(n).number: n for n in NAMES} | {daemon_number(n): n for n in ("ops", "oncall", "nowhere")}
        self.numbers = [service(n).number for n in self.town.listens] + [service("nobody").number, 0]
        self.destinations = [
            Destination(Address.parse(a), p, 0) for places in self.town.listens.values() for a, p in places
        ]
        self.places = [(d.address, d.port) for d in self.destinations] + [(Address.parse("192.0.2.1"), 9)]
        self.wall_offset_ns = 0
        self.specs: list[Spec] = []
        self._by_digest: dict[str, Spec] = {}
        self.services: dict[int, servers.Running] = {}  # what runs, by cgroup
        self.cgroups = itertools.count(1)
        self.halt: Halt | None = None
        self.halted_ns = 0  # since when, if it is
        self.looked_from: tuple[daemon.Executor | None, int] = (None, 0)  # from which turn of its loop it must see that
        self.jumped_ns = -1  # when the clock jumped last
        self.sensors: list[kernels.Sensors] = []
        self.held: list[servers.Services] = []  # of every session of this process
        self.process = Process("nobody")
        self.process.dead = True
        self.executor: daemon.Executor | None = None
        self.closing: daemon.Executor | None = None  # somebody has asked it to stop
        self.journal: Journal | None = None
        self.events = self.crashes = self.starts = 0
        self.calm = False
        self._epochs = itertools.count(1)
        self._commands: list[Task] = []
        self._sequence = 0
        self.trace = 0

    # ---- what is where ---------------------------------------------------------------------------------------------

    @property
    def wall(self) -> datetime:
        return EPOCH + timedelta(microseconds=(self.scheduler.now + self.wall_offset_ns) // 1000)

    def spec_of(self, sha256: str) -> Spec:
        return self._by_digest[sha256]

    def mode_of(self, book: Any) -> str:
        """In which mode a runbook of a manifest is here."""
        return "monitor" if self.monitor else str(book.mode)

    def armed_manifest(self) -> Any:
        admitted = self.executor.admitted if self.executor is not None else None
        return admitted.manifest if admitted is not None else None

    def new_spec(self) -> Spec:
        self._sequence += self.chance.choice((0, 1, 1, 2))
        made = spec(self.chance, self.town, max(1, self._sequence), len(self.specs), self.wall)
        self.specs.append(made)
        self._by_digest[made.manifest.sha256] = made
        return made

    def declare(self, name: str, number: int, declaration: str) -> servers.Running:
        """A service that does not run yet. Each has its own temper."""
        chance = self.chance
        temper = servers.Temper(
            start_ns=int(10 ** chance.uniform(6, 9.5)),
            stop_ns=int(10 ** chance.uniform(5, 9)),
            fail_one_in=chance.choice((10, 100, 10**6)),
            hang_one_in=chance.choice((20, 200, 10**6)),
            flap_one_in=chance.choice((2, 10, 1000)),
            ready_deadline_ns=chance.choice((2, 10, 150)) * SECOND,
        )
        return servers.Running(name, number, declaration, temper=temper)

    def started(self, held: servers.Running) -> None:
        held.up, held.since_ns = True, self.scheduler.now
        self.services[held.cgroup_id] = held
        if self.chance.random() * held.temper.flap_one_in < 1:
            cgroup = held.cgroup_id
            self.scheduler.after(self.chance.randrange(SECOND), lambda: self._die(held, cgroup))

    def stopped(self, held: servers.Running) -> None:
        held.up = False
        if held.cgroup_id:
            self.services.pop(held.cgroup_id, None)
            held.cgroup_id, held.frozen_until_ns = 0, 0

    def left_over(self, wanted: servers.Running) -> servers.Running | None:
        """What an earlier executor left of this service, if it can be proven to be what is wanted; else it ends."""
        for held in [h for h in self.services.values() if h.number == wanted.number]:
            if held.up and held.declaration == wanted.declaration and self.chance.random() < 0.8:
                held.frozen_until_ns = 0
                return held
            self.stopped(held)
        return None

    def sweep(self, declared: Container[int]) -> None:
        """What is left of services that are not declared any more ends."""
        for held in list(self.services.values()):
            if held.number not in declared:
                self.stopped(held)

    def contrary(self) -> bool:
        """Whether what was just done does not hold, or the service does not answer."""
        one_in = self.scenario.contrary_one_in
        return bool(one_in) and not self.calm and self.chance.random() * one_in < 1

    def other_constants(self) -> bool:
        """Whether a manifest wants its breaker with other constants than the pinned one has."""
        return not self.calm and self.chance.random() < 0.1

    def no_pins(self) -> bool:
        """Whether nothing can be pinned now."""
        return not self.calm and self.chance.random() < 0.02

    def held_services(self) -> set[int]:
        """Services that are frozen or isolated now. Of one that another manifest replaced, the new instance counts: the
        old one goes as soon as that manifest is armed."""
        now, kernel = self.scheduler.now, self.kernel
        newest = {held.number: cgroup for cgroup, held in sorted(self.services.items())}
        found = ((cgroup, self.services[cgroup]) for cgroup in newest.values())
        return {held.number for cgroup, held in found if held.frozen_until_ns > now or kernel.isolated(cgroup)}

    def dies(self, held: servers.Running, cgroup: int) -> None:
        """The main process of a service gets a signal that ends it."""
        self._die(held, cgroup)

    def _die(self, held: servers.Running, cgroup: int) -> None:
        if held.cgroup_id != cgroup or not held.up:
            return
        held.up = False
        kind = Kind.OOM_VICTIM if self.chance.random() < 0.3 else Kind.PROCESS_EXIT
        self.kernel.exited(servers.exit_of(held, self.scheduler.now, kind))

    # ---- what happens ----------------------------------------------------------------------------------------------

    def run(self, events: int) -> None:
        """Let so many things happen, then let everything end. BrokenError where it does not."""
        with installed(self):
            self._begin()
            while self.events < events:
                if not self.scheduler.turn():
                    raise BrokenError("ends", "nothing happens any more")
                self._look()
            self._calm_down()

    def _look(self) -> None:
        if self.auditor.broken is not None:
            raise self.auditor.broken
        if self.process.uncaught is not None:
            raise BrokenError("failed", repr(self.process.uncaught)) from self.process.uncaught
        executor = self.executor
        if executor is not None and executor.failure is not None and not self.auditor.failing:
            self.auditor.failing = True
            if not isinstance(executor.failure, JournalError):
                self._failed(executor.failure)

    def _failed(self, failure: BaseException) -> None:
        if "after shutdown" in str(failure) and "close-cuts-off" in self.auditor.known:
            self.auditor.found["close-cuts-off"] += 1
            return
        raise BrokenError("failed", repr(failure)) from failure

    def _every(self, gap_ns: Callable[[], int], happen: Callable[[], None]) -> None:
        def again() -> None:
            if self.calm:
                return
            self.events += 1
            happen()
            self.scheduler.after(gap_ns(), again)

        self.scheduler.after(gap_ns(), again)

    def _gap(self, mean_ns: int) -> Callable[[], int]:
        return lambda: min(int(self.chance.expovariate(1.0) * mean_ns), 100 * mean_ns)

    def _begin(self) -> None:
        scenario = self.scenario
        for destination in self.destinations:
            self._every(self._gap(scenario.gap_ns), lambda d=destination: self._connect(d))  # type: ignore[misc]
        self._every(self._gap(scenario.death_ns), self._somebody_dies)
        self._every(self._gap(scenario.operator_ns), self._command)
        self._every(self._gap(scenario.fault_ns), self._trouble)
        self._watch()
        self._start()

    def _watch(self) -> None:
        if not self.calm:
            executor = self.executor
            if executor is not None and executor.failure is None and self.closing is not executor:
                self.auditor.are_called_again()
            self.scheduler.after(MINUTE, self._watch)

    def _connect(self, destination: Destination) -> None:
        asking = self.kernel.attempt(destination)
        self._protected(destination)
        if asking is None:
            self.auditor.refused(destination)
            return
        good = self._answers(destination)
        if self.chance.random() < 0.8:
            self.kernel.result(destination, asking, good)
        else:
            self.scheduler.after(self.chance.randrange(3 * SECOND), lambda: self._answered(destination, asking, good))

    def _answered(self, destination: Destination, asking: list[Any], good: bool) -> None:
        self.events += 1
        self.kernel.result(destination, asking, good)

    def _answers(self, destination: Destination) -> bool:
        place = (str(destination.address), destination.port)
        for held in self.services.values():
            if self.kernel.isolated(held.cgroup_id):
                self.auditor.refused(held.name)
                continue
            if held.frozen_until_ns > self.scheduler.now:
                continue
            if held.up and place in self.town.listens[held.name]:
                return self.chance.random() < 0.98
        return False

    def _protected(self, destination: Destination) -> None:
        executor = self.executor
        if executor is None or executor.failure is not None or executor.admitted is None:
            return
        for sensors in self.sensors:
            if sensors.breaker is not None and sensors.admitted.manifest is executor.admitted.manifest:
                return
        self.auditor.unprotected(destination)

    def _somebody_dies(self) -> None:
        up = [held for held in self.services.values() if held.up]
        if not up:
            return
        held = self.chance.choice(up)
        self._die(held, held.cgroup_id)
        if self.scenario.bursts and self.chance.random() < 0.1:
            event = servers.exit_of(held, self.scheduler.now)
            for _ in range(self.chance.choice((5, 50, 300))):
                self.kernel.exited(event)

    # ---- the executor's life ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self.calm and self.starts:
            return
        self.starts += 1
        process = self.process = Process(f"executor {self.starts}")
        self._commands = []
        self.held.clear()
        self.auditor.new_process()
        self.scheduler.spawn(process, "main", lambda: self._main(process))

    def _main(self, process: Process) -> None:
        pin = self.scenario.pin
        if self.scenario.changes_mode and self._modes.random() < 0.5:
            self.monitor = not self.monitor
        config = Config(
            node="sim", tee="emulated", pin=pin, mode="monitor" if self.monitor else "enforce",
            checkpoint_seconds=self.chance.choice((1, 10, 60)), epoch_minutes=self.chance.choice((1, 15)),
        )  # fmt: skip
        try:
            executor = daemon.Executor(
                Path("/nonexistent/sim"), config, self, Node(self, process, pin=pin, watch_only=self.monitor)
            )  # type: ignore[arg-type]
        except JournalError:
            self._again_later(process)
            return
        executor.on_receipt = lambda done: self.auditor.acknowledge(done.receipt_index, done.id)
        self.executor = executor
        self.auditor.restarted()
        chosen = self.specs[-1] if self.specs and self.chance.random() < 0.8 else self.new_spec()
        self._arm(executor, chosen, by_itself=True)
        patience = self.chance.choice((5, 30, 300)) * SECOND
        tried = self.scheduler.now
        while executor.failure is None:
            self.scheduler.sleep(SECOND)
            if executor.admitted is None and self.scheduler.now - tried > patience and not self.calm:
                tried = self.scheduler.now
                self._arm(executor, self.new_spec())
        self._close(executor, process, "failure")

    def _close(self, executor: daemon.Executor, process: Process, reason: str) -> None:
        if self.closing is executor:  # somebody else does it
            return
        self.closing = executor
        try:
            executor.close(reason=reason)
        except JournalError:  # it had failed, and nobody had asked it for anything since
            self.auditor.counts["closed late"] += 1
        else:
            if executor.failure is None and self.executor is executor:
                self.auditor.closed_down(executor.state.guard.busy)
        self._again_later(process)

    def _again_later(self, process: Process) -> None:
        """The process ends; the machine starts it again."""
        self._end_of(process)

    def _end_of(self, process: Process) -> None:
        self.executor = None
        process.dead = True
        self._gone(process)
        self.scheduler.after(self.chance.randrange(SECOND), self._start)
        self.scheduler.kill(process)

    def _gone(self, process: Process) -> None:
        if self.journal is not None:
            self.journal.lose_power()
            self.journal = None
        if self.disk.locked is process:
            self.disk.locked = None
        for sensors in list(self.sensors):
            if sensors.process is process:
                sensors.leave()
        for held in self.services.values():  # the spawner keeps no freeze longer than its executor
            held.frozen_until_ns = 0
        for command in self._commands:
            command.done = command.done or process.dead

    def crash(self) -> None:
        """kill -9."""
        process = self.process
        if process.dead:
            return
        self.crashes += 1
        self._end_of(process)

    # ---- operators -------------------------------------------------------------------------------------------------

    def _command(self) -> None:
        executor, process = self.executor, self.process
        if executor is None or process.dead:
            return
        self._commands = [c for c in self._commands if not c.done]
        if len(self._commands) >= 3:
            return
        self._commands.append(self.scheduler.spawn(process, "operator", lambda: self._operate(executor, process)))

    def _operate(self, executor: daemon.Executor, process: Process) -> None:
        kind = self.chance.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
        self.auditor.counts[f"operator {kind}"] += 1
        try:
            self._do(executor, process, kind)
        except PointcallError as refusal:
            self.auditor.counts[f"refused {refusal.id}"] += 1

    def _do(self, executor: daemon.Executor, process: Process, kind: str) -> None:
        address, port = self.chance.choice(self.places)
        match kind:
            case "arm":
                self._arm(executor, self.new_spec())
            case "older":
                self._arm(executor, self.chance.choice(self.specs))
            case "disarm":
                executor.disarm("the operator says so")
            case "pause":
                self._pause(executor)
            case "resume":
                self.auditor.resuming += 1
                executor.resume("go on")
                self.auditor.resuming -= 1
            case "halt":
                self._halt()
            case "clear":
                self.halt = None
            case "approve":
                self._approve(executor)
            case "acknowledge":
                self._acknowledge(executor)
            case "trip":
                executor.trip(address, port, self.chance.choice((1, SECOND, MINUTE, 60 * MINUTE)), "by hand")
            case "release":
                executor.release(address, port, "by hand")
            case "reload":
                executor.reload(executor.config)
            case "roll":
                executor.roll_epoch()
            case "checkpoint":
                executor.checkpoint_now()
            case "stop":
                if self.executor is executor and self.chance.random() < 0.3:
                    self._close(executor, process, "stopped")

    def _pause(self, executor: daemon.Executor) -> None:
        seconds = self.chance.choice((1, 10, 60))
        if self.auditor.pausing is not None:
            return
        self.auditor.pausing = self.scheduler.now + seconds * SECOND
        executor.pause("the operator looks", seconds)

    def _arm(self, executor: daemon.Executor, chosen: Spec, *, by_itself: bool = False) -> None:
        held, persons = self.halt, self.auditor.arming
        persons += () if by_itself else (executor,)
        try:
            executor.arm(bundle(chosen), by_itself=by_itself)
        except PointcallError as refusal:
            self.auditor.counts[f"refused {refusal.id}"] += 1
        else:
            if held is not None and self.halt is held:
                self.auditor.fail("halted", "a manifest was armed")
        finally:
            if not by_itself:
                persons.remove(executor)

    def _halt(self) -> None:
        if self.halt is None:
            held = self.halt = Halt("the operator says so", "")
            self.halted_ns, self.looked_from = self.scheduler.now, (None, 0)
            self.scheduler.after(300 * MILLISECOND, lambda: self._must_look(held))
            self.scheduler.after(self.chance.choice((SECOND, 10 * SECOND, 10 * MINUTE)), lambda: self._clear(held))

    def _must_look(self, held: Halt) -> None:
        if self.halt is held and self.executor is not None:
            self.looked_from = self.executor, self.executor.beats

    def _clear(self, held: Halt) -> None:
        if self.halt is held:
            self.halt = None

    def _approve(self, executor: daemon.Executor) -> None:
        """A second person looks at what waits and says yes: in time, late, twice, or to something else."""
        chance, asked, manifest = self.chance, executor.asked(), self.armed_manifest()
        if not asked or manifest is None:
            return
        one = chance.choice(asked)
        call, issued = one.run.acts[one.index].call, self.wall
        other = chance.choice(("", "", "", "", "run", "args", "manifest"))
        body = SimpleNamespace(
            run=one.run.id[:-1] + ("1" if one.run.id[-1] == "0" else "0") if other == "run" else one.run.id,
            index=one.index,
            action=call.action,
            args=("7",) if other == "args" else tuple(map(str, call.args)),
            issued=issued,
            expires=issued + timedelta(seconds=chance.choice((1, 60, 3600))),
        )
        approval = Approved(b"approval")
        approval.body, approval.manifest = body, HASH if other == "manifest" else manifest.sha256
        self.scheduler.sleep(chance.choice((0, 0, 0, 2 * SECOND, 2 * MINUTE)))
        self.auditor.counts[f"approves {other or 'it'}"] += 1
        for _ in range(chance.choice((1, 1, 2))):
            executor.approve(approval)
            if other:
                self.auditor.fail("approved", f"an approval of another {other} was taken")

    def _acknowledge(self, executor: daemon.Executor) -> None:
        waiting = executor.escalations()
        if waiting:
            executor.acknowledge(self.chance.choice(waiting).run, "seen")

    # ---- troubles --------------------------------------------------------------------------------------------------

    def mischief(self, leaf: Leaf) -> None:
        """Now and then something happens exactly while an entry is on its way to the disk."""
        chance = self.chance
        if self.calm or chance.random() > self.scenario.mischief:
            return
        delay = chance.randrange(2 * self.disk.base_ns)
        happen = chance.choice((self._command, self._command, self._command, self._trouble))
        self.scheduler.after(delay, happen)

    # ---- troubles --------------------------------------------------------------------------------------------------

    def _trouble(self) -> None:
        chance, disk, scenario = self.chance, self.disk, self.scenario
        kind = chance.choice(("crash", "crash", "disk", "full", "clock", "tamper", "slow"))
        if kind == "crash" and scenario.crash:
            self.crash()
        elif kind == "disk" and scenario.disk_faults:
            disk.fail_one_in = chance.choice((0, 0, 50, 1000))
        elif kind == "full" and scenario.disk_faults:
            disk.full = True
            self.scheduler.after(chance.randrange(1, 30) * scenario.gap_ns, self._free)
        elif kind == "slow":
            disk.slow_one_in = chance.choice((0, 0, 20, 100))
        elif kind == "clock" and scenario.clock_jumps:
            self.jumped_ns = self.scheduler.now
            self.wall_offset_ns += chance.choice((-1, 1)) * chance.choice((SECOND, MINUTE, 1440 * MINUTE))
        elif kind == "tamper" and chance.random() < 0.2:
            self.kernel.tampered = True
            self.scheduler.after(30 * SECOND, self._mend)

    def _free(self) -> None:
        self.disk.full = False

    def _mend(self) -> None:
        self.kernel.tampered = False

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        """No more events and no more faults: what was begun ends, then the executor closes."""
        self.calm = True
        self.disk.full = self.kernel.tampered = False
        self.halt = None
        self.disk.fail_one_in = self.disk.slow_one_in = 0
        until = self.scheduler.now + CALM_NS
        closing: Task | None = None
        while self.scheduler.now < until:
            if not self.scheduler.turn():
                break
            self._look()
            executor, process = self.executor, self.process
            settled = executor is None or self.scheduler.now > until - CALM_NS // 4
            if closing is None and executor is not None and settled and executor.failure is None:
                closing = self.scheduler.spawn(
                    process,
                    "the end",
                    lambda e=executor, p=process: self._close(e, p, "the end"),  # type: ignore[misc]
                )
            if closing is not None and closing.done:
                break
        stuck = [task.name for task in self._commands if not task.done and not task.process.dead]
        if closing is not None and not closing.done:
            stuck.append("close")
        if stuck:
            raise BrokenError("ends", f"{CALM_NS // MINUTE} minutes after the last event still waiting: {stuck}")
        if not self.process.dead:
            self._end_of(self.process)


def daemon_number(name: str) -> int:
    from pointcall_runbook.vocabulary import channel

    return channel(name).number


# ---- the simulated parts where the executor's modules look for them --------------------------------------------------


class _Time:
    def __init__(self, machine: Machine) -> None:
        self._machine, self._scheduler = machine, machine.scheduler

    def monotonic_ns(self) -> int:
        self._scheduler.preempt()
        return self._scheduler.now

    def monotonic(self) -> float:
        return self.monotonic_ns() / 1e9

    def time_ns(self) -> int:
        return int(self._machine.wall.timestamp() * 1000) * MILLISECOND


def _refused(check: str, want: str, got: str) -> RefusedError:
    return RefusedError(Verdict((Check(check, "fail", want, got, "", ""),)))


def _check_manifest(machine: Machine) -> Callable[..., Any]:
    def check_spec(
        signatures: tuple[Signature, ...],
        _files: Any,
        *,
        at: datetime,
        highest_sequence: int | None,
        highest_digest: str | None,
        **_: Any,
    ) -> Admitted:
        machine.scheduler.preempt()
        chosen = signatures[0].spec
        manifest = chosen.manifest
        if chosen.refused:
            raise _refused(chosen.refused, "a signer of the policy", "another")
        if at >= manifest.predicate.expires or at < manifest.predicate.not_before:
            raise _refused("manifest.expires", "valid", str(at))
        if highest_sequence is not None and manifest.sequence < highest_sequence:
            raise _refused("manifest.sequence", f">= {highest_sequence}", str(manifest.sequence))
        if highest_sequence == manifest.sequence and highest_digest != manifest.sha256:
            raise _refused("manifest.fork", str(highest_digest), manifest.sha256)
        return Admitted(chosen)

    return check_spec


def _verify_approval(machine: Machine) -> Callable[..., Any]:
    def verify(bundle: Approved, *, manifest: str, at: datetime, **_: Any) -> Any:
        machine.scheduler.preempt()
        if bundle.manifest != manifest:
            raise VerifyError("the approval is for something else", id="approval.other")
        if not bundle.body.issued - timedelta(minutes=5) <= at < bundle.body.expires:
            raise VerifyError("the approval does not hold now", id="approval.time")
        by = SimpleNamespace(identity="anna", issuer="lab")
        return SimpleNamespace(body=bundle.body, by=by, sha256=HASH)

    return verify


def _observed_performed(machine: Machine, real: Callable[..., Any]) -> Callable[..., Any]:
    def performed(act: Any, action: Any, world: Any) -> Any:
        machine.scheduler.alive()
        machine.auditor.begins(action)
        try:
            done = real(act, action, world)
        finally:
            machine.auditor.ended(action)
        machine.auditor.performed(action, done)
        return done

    return performed


def _observed_apply(machine: Machine, real: Callable[..., Any]) -> Callable[..., Any]:
    def apply(journal: Any, run: Any, act: Any, action: Any) -> Any:
        task = machine.scheduler.current
        assert task is not None
        mode = machine.mode_of(machine.spec_of(run.epoch.manifest).manifest.runbook(run.runbook.name))
        task.local["run"] = (run.id, act.index, mode)
        try:
            return real(journal, run, act, action)
        finally:
            task.local.pop("run", None)

    return apply


def _observed_step(machine: Machine, real: Callable[..., Any]) -> Callable[..., Any]:
    def observed(state: Any, happening: Any) -> Any:
        after, effects = real(state, happening)
        machine.auditor.stepped(state, happening, effects)
        return after, effects

    return observed


class _Runners:
    """The module `wasm`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def Runner(self, name: str, info: Any) -> Any:
        found = next(s for s in reversed(self._machine.specs) if name in s.modules and s.modules[name].info is info)
        inner, machine = Runner(self._machine, found, name), self._machine
        trapped = False

        def decide(event: str, args: tuple[int, ...]) -> Any:
            nonlocal trapped
            if trapped:
                machine.auditor.fail("quarantine", name)
            try:
                return inner.decide(event, args)
            except Trap:
                trapped = True
                raise

        return SimpleNamespace(decide=decide)

    def engine_settings(self) -> dict[str, str]:
        return {"wasmtime": "interpreter"}

    def engine_digest(self) -> str:
        return HASH


KIND_OF = {cls: kind for kind, cls in entry.BODIES.items()}


def _sealed(
    body: entry.Body, *, at: datetime, ktime_ns: int, epoch: str, run: str | None = None, salt: bytes
) -> tuple[Leaf, None]:
    return Leaf(KIND_OF[type(body)], run, dict(body.__dict__), epoch, at), None


class _Entry:
    """The module `entry`, where an entry is not turned into bytes."""

    sealed = staticmethod(_sealed)

    def __getattr__(self, name: str) -> Any:
        return getattr(entry, name)


def _over(real: ModuleType, simulated: Any) -> ModuleType:
    """A simulated module; what it lacks is the real module's."""
    made = ModuleType(real.__name__)
    vars(made).update(vars(real))
    vars(made).update({name: getattr(simulated, name) for name in dir(simulated) if not name.startswith("_")})
    return made


@contextlib.contextmanager
def installed(machine: Machine) -> Iterator[None]:
    """The executor's modules on this machine; everything as it was at the end."""
    scheduler, descriptors = machine.scheduler, machine.descriptors
    verdict = Verdict((), "emulated")
    evidence = SimpleNamespace(encode=lambda: b"evidence", platform="snp", sha256=HASH)
    trust = SimpleNamespace(
        policy=SimpleNamespace(raw=b"policy", sha256=HASH, may_approve=True),
        trusted_root=b"root",
        trusted_root_sha256=HASH,
        roots=None,
    )

    def open_journal(path: Path, *, origin: str) -> Journal:
        scheduler.alive()
        assert scheduler.current is not None
        machine.journal = Journal(machine.disk, scheduler, scheduler.current.process, machine.auditor.durable)
        machine.journal.on_submit = submitted
        return machine.journal

    def submitted(leaf: Leaf) -> None:
        machine.auditor.submitted(leaf)
        machine.mischief(leaf)

    def attest(*_: Any, **__: Any) -> Any:
        scheduler.preempt()
        return SimpleNamespace(keys=Keys(next(machine._epochs)), nonce=b"", evidence=evidence, verdict=verdict)

    def opening(attested: Any, *_: Any, previous: str | None, **__: Any) -> Leaf:
        return Leaf("epoch-open", None, {"previous": previous}, attested.keys.id)

    simulated = {
        "time": _Time(machine),
        "threading": threads.Threading(scheduler),
        "select": threads.Select(descriptors),
        "os": threads.Os(scheduler, descriptors),
    }
    changes: list[tuple[Any, str, Any]] = [
        (module, name, _over(vars(module)[name], stand_in))
        for module in DOORS
        for name, stand_in in simulated.items()
        if isinstance(vars(module).get(name), ModuleType)
    ]
    shell: dict[str, Any] = {
        "datetime": SimpleNamespace(now=lambda _zone: machine.wall, fromisoformat=datetime.fromisoformat),
        "forget_code": lambda: None,  # of this process: it would be read anew for each simulated one
        "Future": lambda: threads.Future(scheduler),
        "ThreadPoolExecutor": lambda size, **how: threads.Pool(scheduler, size, **how),
        "Journal": SimpleNamespace(open=open_journal),
        "BOOT_ID": Path("/nonexistent/boot_id"),
        "load_trust": lambda _folder: trust,
        "check_manifest": _check_manifest(machine),
        "admit": lambda candidate, _verdict: candidate,
        "attest": attest,
        "opening": opening,
        "wasm": _Runners(machine),
        "halted": lambda _folder: machine.halt,
        "read_notices": lambda _folder: (),
        "verify_notices": lambda *_, **__: (),
        "verify_approval": _verify_approval(machine),
        "standing": SimpleNamespace(  # no log is lost here
            FILE="", MAX_REASON_CHARS=1000, Standing=SimpleNamespace, read=lambda _folder: None, keep=lambda *_: None
        ),
        "probes": SimpleNamespace(pending=lambda _folder: [], taken=lambda _folder: None),
        "performed": _observed_performed(machine, acting.performed),
        "apply": _observed_apply(machine, acting.apply),
        "step": _observed_step(machine, runs.step),
    }
    for name, stand_in in shell.items():
        places = [module for module in SHELL if name in vars(module)]
        assert places, f"no module of the shell knows {name}"
        changes += [(module, name, stand_in) for module in places]
    changes += [
        (recorder, "datetime", shell["datetime"]),
        (recorder, "entry", _Entry()),
        (recorder, "Checkpoint", SimpleNamespace(parse=lambda note: note)),
        (run, "Receipt", SimulatedReceipt),
    ]
    before = [(where, name, vars(where)[name]) for where, name, _ in changes]
    interval = sys.getswitchinterval()
    try:
        for where, name, value in changes:
            setattr(where, name, value)
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
        sys.setswitchinterval(interval)
