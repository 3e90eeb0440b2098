"""The scheduler: simulated time, and tasks that take turns as the seed says. One thread of the machine; no real clock.

A task is a greenlet that belongs to a process. It runs until it waits; who runs next is the earliest in time, and among
those of the same time the seed decides. A killed process never runs again: each of its tasks is unwound, and whatever
it still tries on its way (a write, an action) raises `Killed` before it has any effect.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
FOREVER = 1 << 62


class Killed(BaseException):
    """The process of this task was killed."""


class Process:
    """What dies together on `kill -9`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.tasks: list[Task] = []
        self.uncaught: BaseException | None = None


class Task:
    """A thread of a simulated process."""

    __slots__ = ("done", "finished", "green", "local", "name", "process", "token", "waiting", "woken")

    def __init__(self, process: Process, name: str) -> None:
        self.process, self.name = process, name
        self.green: greenlet | None = None
        self.token = 0  # a wake-up that was meant for an earlier wait is stale
        self.woken = self.done = self.waiting = False
        self.finished: list[Task] = []  # who joins it
        self.local: dict[str, Any] = {}


class Scheduler:
    """Time, chance and who is running."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = self.random.randrange(10, 10**6) * SECOND
        self.current: Task | None = None
        self.preempt_one_in = 0  # 0: tasks change only where they wait
        self._hub = getcurrent()
        self._heap: list[tuple[int, float, int, Task | Callable[[], None], int]] = []
        self._order = itertools.count()

    # ---- for the world ---------------------------------------------------------------------------------------------

    def at(self, when_ns: int, happen: Callable[[], None]) -> None:
        """Let something happen at a time (or now, if that is past). It does not wait."""
        heapq.heappush(self._heap, (max(when_ns, self.now), self.random.random(), next(self._order), happen, 0))

    def after(self, delay_ns: int, happen: Callable[[], None]) -> None:
        self.at(self.now + delay_ns, happen)

    def spawn(self, process: Process, name: str, work: Callable[[], Any]) -> Task:
        """A new task; it begins when its turn comes."""
        task = Task(process, name)

        def body() -> None:
            try:
                if not process.dead:
                    work()
            except Killed:
                pass
            except BaseException as error:
                process.uncaught = process.uncaught or error
            task.done = True
            for waiter in task.finished:
                self.wake(waiter)

        task.green = greenlet(body, self._hub)
        process.tasks.append(task)
        self._resume_at(self.now, task)
        return task

    def kill(self, process: Process) -> None:
        """As SIGKILL does. From within one of its own tasks it raises Killed."""
        process.dead = True
        own = self.current
        for task in process.tasks:
            if task is not own and task.green is not None and not task.done:
                self._end(task)
        process.tasks = [own] if own is not None and own.process is process else []
        if process.tasks:
            raise Killed

    def _end(self, task: Task) -> None:
        assert task.green is not None
        before, self.current = self.current, task
        if task.green:  # it began
            parent, task.green.parent = task.green.parent, getcurrent()
            task.green.throw(Killed)
            assert task.green.dead, f"{task.name} goes on after a kill"
            del parent
        task.done = True
        self.current = before

    def turn(self) -> bool:
        """Let the next thing happen. False: nothing is left."""
        while self._heap:
            when, _, _, what, token = heapq.heappop(self._heap)
            if isinstance(what, Task):
                if what.done or what.token != token:
                    continue
                self.now = when
                self._switch(what)
            else:
                self.now = when
                what()
            return True
        return False

    def _switch(self, task: Task) -> None:
        assert task.green is not None
        task.waiting = False
        self.current = task
        task.green.switch()
        self.current = None
        if task.done and task in task.process.tasks:
            task.process.tasks.remove(task)

    def _resume_at(self, when_ns: int, task: Task) -> None:
        heapq.heappush(self._heap, (when_ns, self.random.random(), next(self._order), task, task.token))

    # ---- for tasks -------------------------------------------------------------------------------------------------

    def alive(self) -> None:
        """Killed, if the running task's process is dead. Called before every effect."""
        if self.current is not None and self.current.process.dead:
            raise Killed

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until somebody wakes this task (True) or the time is over (False)."""
        task = self.current
        assert task is not None, "only a task can wait"
        if task.process.dead:
            raise Killed
        task.token += 1
        task.woken, task.waiting = False, True
        if timeout_ns is not None:
            self._resume_at(self.now + max(timeout_ns, 0), task)
        self._hub.switch()
        if task.process.dead:
            raise Killed
        return task.woken

    def wake(self, task: Task) -> None:
        """Let a waiting task go on, at this time."""
        if task.waiting and not task.woken and not task.done:
            task.woken = True
            task.token += 1
            self._resume_at(self.now, task)

    def sleep(self, duration_ns: int) -> None:
        self.wait(duration_ns)

    def preempt(self) -> None:
        """A moment at which another task may run."""
        task = self.current
        if task is None:
            return
        if task.process.dead:
            raise Killed
        if self.preempt_one_in and self.random.random() * self.preempt_one_in < 1:
            self.wait(0)
