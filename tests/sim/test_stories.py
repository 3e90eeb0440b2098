"""The shortest story of what the simulation has found in the executor and what is repaired.

Each runs the real executor on a machine where nothing happens but what the story says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from pointcall_executor import daemon
from pointcall_executor.core import guard
from pointcall_executor.core.event import CircuitEvent, Destination, Kind, encode
from pointcall_executor.core.guard import GuardState, Request, Rules
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.watch import Watch
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address, Recreate, Service
from tests.sim import runbooks, services
from tests.sim.disk import Leaf
from tests.sim.findings import KNOWN
from tests.sim.machine import Machine, Scenario, bundle, installed
from tests.sim.runbooks import Spec, modules
from tests.sim.scheduler import MILLISECOND, MINUTE, SECOND


@dataclasses.dataclass(frozen=True)
class Declared:
    """As much of a declaration as the simulated services look at."""

    name: str
    sha256: str


API = Declared("api", "a" * 64)
QUIET = Scenario(gap_ns=10**15, operator_ns=10**18, fault_ns=10**18, death_ns=10**18)


class Story:
    """A machine with one service `api`, one runbook that recreates it when it ends, and commands in their order."""

    def __init__(self, book: str = "recreate-at-once", **scenario: Any) -> None:
        self.book = book
        self.machine = Machine(1, KNOWN, dataclasses.replace(QUIET, **scenario))
        machine = self.machine
        machine.town = runbooks.Town({"api": (("10.0.0.1", 80),)})
        machine.disk.base_ns = 10 * MILLISECOND
        machine.kernel.ring_size = 4
        machine.destinations = []
        self.temper = services.Temper(start_ns=MILLISECOND, fail_one_in=10**9, hang_one_in=10**9, flap_one_in=10**9)
        declare = machine.declare

        def calm(name: str, number: int, declaration: str) -> services.Running:
            held = declare(name, number, declaration)
            held.temper = self.temper
            return held

        machine.declare = calm  # type: ignore[method-assign]

    def spec(self, sequence: int = 1, name: str = "recreate-at-once", declaration: str = "") -> Spec:
        chance = random.Random(sequence)
        made = runbooks.spec(chance, self.machine.town, sequence, sequence, self.machine.wall)
        book = next(m for m in modules() if m.name == name)
        body = made.manifest.predicate.model_dump(mode="json")
        body["expires"] = "2027-11-23T00:00:00Z"
        body["runbooks"] = [
            {
                "name": book.name,
                "version": 1,
                "module": "m.wasm",
                "events": [e for e in book.info.handlers if e in runbooks.HANDLED],
                "grants": {
                    "actions": list(book.info.capabilities),
                    "services": ["api"],
                    "channels": ["ops"],
                    "networks": ["10.0.0.0/8"],
                },
                "limits": {"per_minute": 600, "burst": 100},
            }
        ]
        body["sensors"] = [{"name": n, "blob": f"{n}.blob"} for n in ("breaker", "lifecycle")]
        body["guard"] = {"max_actions_per_minute": 6000, "storm_events_per_minute": 100_000, "healthy_delay_seconds": 1}
        predicate = type(made.manifest.predicate).model_validate_json(runbooks._json(body))
        subjects = {"m.wasm": book.sha256} | dict.fromkeys(("breaker.blob", "lifecycle.blob"), "0" * 64)
        manifest = dataclasses.replace(made.manifest, predicate=predicate, subjects=subjects)
        declared = {"api": dataclasses.replace(API, sha256=declaration)} if declaration else {"api": API}
        chosen = dataclasses.replace(
            made, manifest=manifest, modules={book.name: book}, declarations=declared, refused=""
        )
        self.machine.specs.append(chosen)
        self.machine._by_digest[manifest.sha256] = chosen
        return chosen

    def play(self, *acts: Callable[[daemon.Executor], None], for_s: float = 30) -> Machine:
        """Start, arm, let the commands follow each other in a task, and look until the time is over."""
        machine = self.machine
        first = self.spec(name=self.book)
        with installed(machine):
            machine._start()
            machine.specs[:] = [first]
            machine.chance.random = lambda: 0.5  # type: ignore[method-assign]
            self._until(lambda: machine.executor is not None and machine.executor.admitted is not None)
            executor, process = machine.executor, machine.process
            assert executor is not None

            def operator() -> None:
                for act in acts:
                    with contextlib.suppress(PointcallError):
                        act(executor)

            machine.scheduler.spawn(process, "operator", operator)
            end = machine.scheduler.now + int(for_s * SECOND)
            self._until(lambda: machine.scheduler.now > end)
            machine._look()
        return machine

    def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            assert self.machine.scheduler.turn(), "nothing happens any more"
            self.machine._look()

    def die(self, times: int = 1) -> Callable[[daemon.Executor], None]:
        """The service ends; with more than one record of it."""

        def act(_: daemon.Executor) -> None:
            (held,) = [s for s in self.machine.services.values() if s.up]
            event = services.exit_of(held, self.machine.scheduler.now)
            held.up = False
            for _ in range(times):
                self.machine.kernel.exited(event)

        return act

    def opened(self, times: int = 1) -> Callable[[daemon.Executor], None]:
        """The circuit of the service opens; with more than one record of it."""

        def act(_: daemon.Executor) -> None:
            kernel = self.machine.kernel
            here = Destination(Address.parse("10.0.0.1"), 80)
            event = CircuitEvent(Kind.CIRCUIT_OPENED, self.machine.scheduler.now, here, 5, 111, 0, 0)
            for _ in range(times):
                for held in kernel.breakers:
                    kernel.emit(held.ring, held.holders, encode(event))

        return act

    def close(self, executor: daemon.Executor) -> None:
        self.machine._close(executor, self.machine.process, "enough")

    def sleep(self, ns: int) -> Callable[[daemon.Executor], None]:
        return lambda _executor: self.machine.scheduler.sleep(ns)


def test_without_trouble_the_story_is_told() -> None:
    story = Story()
    machine = story.play(story.die(), story.sleep(5 * SECOND), story.die(), story.sleep(SECOND), story.close)
    assert machine.auditor.counts["began recreate"] == 2
    assert machine.auditor.counts["receipt"] == 2


def test_nothing_begins_after_disarm_has_returned() -> None:
    story = Story()
    story.play(story.die(), story.sleep(MILLISECOND), lambda executor: executor.disarm("enough"))


def test_nothing_begins_after_pause_has_returned() -> None:
    story = Story()

    def pause(executor: daemon.Executor) -> None:
        story.machine.auditor.pausing = story.machine.scheduler.now + MINUTE
        executor.pause("looking", 60)

    story.play(story.die(), story.sleep(MILLISECOND), pause)


def test_nothing_begins_after_the_journal_has_failed() -> None:
    story = Story("hold-and-retry")

    def fill(executor: daemon.Executor) -> None:
        story.machine.disk.full = True
        executor.resume("somebody asks, and is told that the disk is full")

    story.play(fill, story.opened())


def test_what_was_lost_just_before_a_disarming_is_counted() -> None:
    story = Story()
    story.play(
        story.sleep(SECOND),
        story.opened(10),
        lambda executor: executor.disarm("enough"),
        story.sleep(SECOND),
        story.close,
    )


def test_what_is_lost_while_a_sensor_is_taken_off_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    story, real = Story(), Watch.count_lost
    lost: list[int] = []

    def count(self: Watch, sensors: Any) -> None:
        real(self, sensors)
        if lost:
            assert story.machine.executor is not None
            story.die(10)(story.machine.executor)  # just after the last look, if anybody still sees it

    def disarm(executor: daemon.Executor) -> None:
        lost.append(10)
        executor.disarm("enough")
        lost.clear()

    monkeypatch.setattr(Watch, "count_lost", count)
    story.play(story.sleep(SECOND), disarm, story.sleep(SECOND), story.close)


def test_a_takeover_that_cannot_pin_leaves_what_is_armed_in_service(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(pin=True)
    refused, taken = story.spec(2), story.spec(3)
    here = Address.parse("10.0.0.1")
    until: list[int] = []

    def cannot_pin(executor: daemon.Executor) -> None:
        executor.trip(here, 80, MINUTE, "by hand")
        with monkeypatch.context() as patch:
            patch.setattr(story.machine, "no_pins", lambda: True)
            patch.setattr(story.machine, "other_constants", lambda: True)
            with pytest.raises(KernelError):
                executor.arm(bundle(refused))

    def look(executor: daemon.Executor) -> None:
        assert executor.session is not None
        until.append(executor.session.sensors.forced_until(here, 80))

    def arm(executor: daemon.Executor) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(story.machine, "other_constants", lambda: True)
            executor.arm(bundle(taken))

    story.play(cannot_pin, look, arm, look, story.sleep(SECOND))
    assert until[0] == until[1] > 0
    assert story.machine.executor is not None
    assert story.machine.executor.admitted is not None
    assert story.machine.executor.admitted.manifest.sequence == 3


def test_what_a_pinned_breaker_lost_is_counted_once() -> None:
    story = Story(pin=True)
    takeover = story.spec(2)
    story.play(
        story.opened(10), story.sleep(SECOND), lambda executor: executor.arm(bundle(takeover)), story.sleep(SECOND)
    )


def test_two_takeovers_in_a_row_count_what_was_lost_before_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(pin=True)
    second, third = story.spec(2), story.spec(3)

    def look_no_more(_executor: daemon.Executor) -> None:
        monkeypatch.setattr(daemon, "TICK_SECONDS", 3600.0)

    def twice(executor: daemon.Executor) -> None:
        executor.arm(bundle(second))
        with monkeypatch.context() as patch:
            patch.setattr(story.machine, "other_constants", lambda: True)
            executor.arm(bundle(third))
        monkeypatch.undo()

    look = story.sleep(SECOND)
    story.play(story.opened(10), look, look_no_more, look, twice, look)


def test_a_service_that_never_recovers_is_left_alone_for_ten_minutes_in_the_end() -> None:
    grant = guard.Grant(frozenset({"recreate"}), frozenset({1}))
    limits, rules, state, now = guard.Limits(600, 100), Rules(), GuardState(), 10**15
    for _ in range(40):
        now += max(guard.flap_ns(state, 1, now, rules), SECOND)
        request = Request("book", "run", Recreate(Service(1)), "enforce", grant, limits, now)
        state = guard.ended(guard.permitted(state, request, rules), "run", Recreate(Service(1)))
    assert guard.flap_ns(state, 1, now, rules) == rules.flap_max_ns


def test_what_a_failed_arming_puts_back_is_left_alone_meanwhile() -> None:
    story = Story()
    other = story.spec(2, declaration="b" * 64)

    def arm(executor: daemon.Executor) -> None:
        story.temper.start_ns = SECOND
        story.temper.ready_deadline_ns = 2 * SECOND
        declare = story.machine.declare

        def hanging(name: str, number: int, declaration: str) -> services.Running:
            held = declare(name, number, declaration)
            if declaration == "b" * 64:
                held.temper = dataclasses.replace(story.temper, hang_one_in=1)
            return held

        story.machine.declare = hanging  # type: ignore[method-assign]
        executor.arm(bundle(other))

    def dies_while_it_starts() -> None:
        machine = story.machine
        starting = [s.own for s in machine.held if s.own]
        for held in (h for own in starting for h in own.values() if h.cgroup_id and not h.up):
            machine.kernel.exited(services.exit_of(held, machine.scheduler.now))

    for tenth in range(100):
        story.machine.scheduler.after(tenth * SECOND // 10, dies_while_it_starts)
    story.play(arm)


def test_a_pause_outlives_a_crash() -> None:
    story = Story()

    def pause(executor: daemon.Executor) -> None:
        story.machine.auditor.pausing = story.machine.scheduler.now + MINUTE
        executor.pause("looking", 60)

    story.machine.scheduler.after(15 * SECOND, lambda: story.die()(None))  # type: ignore[arg-type]
    story.play(pause, story.sleep(SECOND), lambda _: story.machine.scheduler.after(0, story.machine.crash), for_s=30)


def test_an_intent_is_closed_however_long_the_log_is() -> None:
    story = Story()
    entries = story.machine.disk.entries
    body = {"action": "recreate", "target": "api", "outcome": "applied"}
    kinds = ["intent", *["refusal"] * 10, "outcome", *["refusal"] * 4085, "intent"]
    story.machine.auditor.epoch = "0" * 64
    for kind in kinds:
        leaf = Leaf(kind, None, body, "0" * 64, index=len(entries))
        story.machine.disk.keep([leaf])
        story.machine.auditor.durable(leaf)
    story.play(for_s=1)


def test_closing_waits_for_an_action_however_long_it_takes() -> None:
    story = Story()

    def hang(_: daemon.Executor) -> None:
        story.temper.hang_one_in, story.temper.ready_deadline_ns = 1, 150 * SECOND

    story.play(hang, story.die(), story.sleep(SECOND), story.close, for_s=400)


def test_nothing_is_armed_while_the_executor_closes() -> None:
    story = Story()
    slow, after = story.spec(2, declaration="b" * 64), story.spec(3, declaration="c" * 64)
    machine = story.machine

    def operator(command: Callable[[daemon.Executor], Any], delay_ns: int) -> None:
        executor, process = machine.executor, machine.process
        assert executor is not None

        def work() -> None:
            machine.scheduler.sleep(delay_ns)
            with contextlib.suppress(PointcallError):
                command(executor)

        machine.scheduler.spawn(process, "another operator", work)

    def three_at_once(executor: daemon.Executor) -> None:
        story.temper.start_ns = SECOND
        operator(lambda e: e.arm(bundle(slow)), 0)
        operator(story.close, SECOND // 2)
        operator(lambda e: e.arm(bundle(after)), SECOND * 3 // 4)

    story.play(three_at_once)
    assert all(leaf.body.get("grant") != "manifest" for leaf in machine.disk.entries if leaf.index > closed(machine))


def closed(machine: Machine) -> int:
    """Where the log says that the executor was disarmed for its end."""
    return max(leaf.index for leaf in machine.disk.entries if leaf.body.get("what") == "disarmed")
