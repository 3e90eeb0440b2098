"""What recovery must not wait for: removing old cgroups, getting the next instance ready. One thread, in order of time.

A chore that fails has failed: it may be done again by whoever needs it. None is lost at the end that somebody needs:
the next executor removes what it finds.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final

from pointcall_runbook.errors import PointcallError

FINISH_SECONDS: Final = 10.0


class Chores:
    """Thread-safe. The thread begins with the first chore."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._hurried = self._busy = 0
        self._thread: threading.Thread | None = None

    def later(self, seconds: float, chore: Callable[[], None]) -> None:
        """Do it in `seconds` at the earliest."""
        mine = time.monotonic() + seconds, next(self._numbers), chore
        with self._changed:
            heapq.heappush(self._waiting, mine)
            if self._thread is None or not self._thread.is_alive():  # it ends by a bug only, which it then shows
                self._thread = threading.Thread(target=self._work, name="chores", daemon=True)
                self._thread.start()
            if self._waiting[0] is mine or self._hurried:  # else the thread waits for an earlier one anyway
                self._changed.notify_all()

    def finish(self, seconds: float = FINISH_SECONDS) -> bool:
        """Do everything now; whether nothing is left."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._waiting and not self._busy, seconds)
            finally:
                self._hurried -= 1

    def _next(self) -> Callable[[], None]:
        with self._changed:
            while True:
                wait = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if self._waiting and (self._hurried or (wait is not None and wait <= 0)):
                    self._busy = 1
                    return heapq.heappop(self._waiting)[2]
                self._changed.wait(wait)

    def _work(self) -> None:
        while True:
            chore = self._next()
            try:
                with contextlib.suppress(OSError, PointcallError):
                    chore()
            finally:
                with self._changed:
                    self._busy = 0
                    self._changed.notify_all()


CHORES: Final = Chores()
