"""A thread that looks after what no ring reports: pressure triggers, circuits that stay open, the end of learning.

It makes records of the same 56 bytes as the rings, and a descriptor says when there are some. Nothing is decided here.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Final

PERIOD_SECONDS: Final = 0.25

Look = Callable[[float], list[bytes]]  # waits at most so many seconds


class Lookout:
    """Runs `look` over and over until it is closed. What `look` raises ends the thread, and `drain` raises it again."""

    def __init__(self, look: Look, interrupt: Callable[[], None]) -> None:
        """`interrupt` makes a waiting `look` return."""
        self._look, self._interrupt = look, interrupt
        self._records: collections.deque[bytes] = collections.deque()
        self._failure: BaseException | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def fileno(self) -> int:
        """Readable when there is something to drain."""
        return self._wake

    def drain(self) -> list[bytes]:
        """All records so far, oldest first. Never blocks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        if self._failure is not None:
            raise self._failure
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._records.popleft())
        return found

    def close(self) -> None:
        """End the thread. Twice does no harm."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._interrupt()
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                records = self._look(PERIOD_SECONDS)
                if records:
                    self._records.extend(records)
                    os.eventfd_write(self._wake, 1)
        except BaseException as error:
            self._failure = error
            os.eventfd_write(self._wake, 1)
