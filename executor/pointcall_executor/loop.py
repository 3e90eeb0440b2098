"""The loop: one thread on which everything runs that owns the core's state. It waits for descriptors and commands.

It knows nothing of what runs on it: callables say what to do with what is ready and what is due, and what follows when
the loop has failed. Other threads reach it by commands. Whatever is raised on it ends it: that is the one broad except.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from pointcall_runbook.errors import PointcallError


class StoppedError(PointcallError):
    """The executor has stopped, on purpose or because its journal failed."""

    id = "executor.stopped"


class Loop:
    """Made first, so that what runs on it can know it; begins with `start`."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.beats = 0  # turns: whoever watches it sees that the loop lives
        self._held = False
        self._stopping = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll, self._woken = select.epoll(), select.epoll()
        for waiting in (self._epoll, self._woken):
            waiting.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="core", daemon=True)

    def start(
        self,
        full: Callable[[], bool],
        ready: Callable[[int], None],
        turn: Callable[[int], None],
        pause: Callable[[], float],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Begin. `full`: whether there is no room for what is ready. `ready` and `turn` get the time at which the loop
        woke (CLOCK_MONOTONIC ns): `ready` where a descriptor may be readable and nothing waits, `turn` at the end of
        every turn. `pause`: how long to wait at most, in seconds. `failed`: what ended it.
        """
        self._full, self._ready, self._turn_ends, self._pause, self._failed = full, ready, turn, pause, failed
        self._thread.start()

    # ---- from other threads ----------------------------------------------------------------------------------------

    def post(self, command: Callable[[], None]) -> None:
        """Run this on the loop thread soon, unless the executor failed meanwhile."""
        self._commands.put(lambda: command() if self.failure is None else None)
        self.wake()

    def fail(self, error: BaseException) -> None:
        """What went wrong on another thread ends the loop."""

        def again() -> None:
            raise error

        self.post(again)

    def call(self, command: Callable[[], None]) -> None:
        """Run this on the loop thread and wait for it. StoppedError where the loop has ended."""
        assert threading.current_thread() is not self._thread, "the loop would wait for itself"
        done: Future[None] = Future()

        def run() -> None:
            if self.failure is not None:
                done.set_exception(StoppedError("the executor has stopped", got=str(self.failure)))
                return
            try:
                command()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(run)
        self.wake()
        while True:
            with contextlib.suppress(TimeoutError):
                done.result(timeout=1)
                return
            if not self._thread.is_alive():
                self._drain_commands()

    def wake(self) -> None:
        """Look again whether there is room, or what there is to do. Nothing once the loop is closed: the number of its
        descriptor may be another's then."""
        if (wake := self._wake) >= 0:
            os.eventfd_write(wake, 1)

    def stop(self) -> None:
        """End the thread, after the commands that are waiting; those given from now on run in `call` itself."""
        self._stopping = True
        self.wake()
        self._thread.join()

    def close(self) -> None:
        """Give back the descriptors of a loop that has stopped."""
        for waiting in (self._epoll, self._woken):
            waiting.close()
        wake, self._wake = self._wake, -1
        os.close(wake)

    # ---- on the loop thread ----------------------------------------------------------------------------------------

    def watch(self, fd: int) -> None:
        """Wait for this descriptor, too."""
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """No longer wait for it. Twice does no harm."""
        with contextlib.suppress(FileNotFoundError):
            self._epoll.unregister(fd)

    def hold(self, held: bool) -> None:
        """Whether descriptors wait, whatever is ready. Commands do not."""
        self._held = held

    def waits(self) -> bool:
        """Whether what is ready is left where it is: it is held, or there is no room."""
        return self._held or self._full()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._drain_commands()
        except BaseException as error:  # the one broad except: whatever it was, nothing may act any more
            self.failure = error
            self._failed(error)
            self._drain_commands()

    def _turn(self) -> None:
        waits = self.waits()
        waiting = self._woken if waits else self._epoll
        ready = waiting.poll(self._pause())
        woken_ns = time.monotonic_ns()
        if any(fd == self._wake for fd, _ in ready):
            os.eventfd_read(self._wake)
        if ready and not waits:
            self._ready(woken_ns)
        self._drain_commands()
        self.beats += 1
        self._turn_ends(woken_ns)

    def _drain_commands(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
