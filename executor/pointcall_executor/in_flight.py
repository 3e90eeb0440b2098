"""The runs in flight: decided, their receipt not yet durable. Counts them, bounds them, and waits for their end."""

from __future__ import annotations

import threading
from typing import Final

from pointcall_executor.loop import Loop

RUNS_MAX: Final = 1024  # beyond, events wait in the kernel's rings, where what finds no room is counted


class InFlight:
    """Thread-safe. A change of session or epoch waits for `ended_within`, with the loop held."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._idle = threading.Condition()
        self.count = 0

    def full(self) -> bool:
        """Whether too many runs have no receipt yet."""
        return self.count >= RUNS_MAX

    def take_off(self) -> None:
        """One more is decided."""
        with self._idle:
            self.count += 1

    def land(self) -> None:
        """The receipt of one is durable, or never will be. The loop is woken where there is room again."""
        with self._idle:
            self.count -= 1
            room = self.count == RUNS_MAX - 1
            self._idle.notify_all()
        if room:
            self._loop.wake()

    def ended_within(self, seconds: float) -> bool:
        """Wait until no run is in flight, or the loop has failed. False if it takes longer."""
        with self._idle:
            return self._idle.wait_for(lambda: self.count == 0 or self._loop.failure is not None, seconds)

    def give_up(self) -> None:
        """The loop has failed: who waits looks again."""
        with self._idle:
            self._idle.notify_all()
