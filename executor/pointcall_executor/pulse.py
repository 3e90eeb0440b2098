"""The pulse: whether the core's loop really turns, seen from outside by its counter of turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

STUCK_SECONDS: Final = 5.0  # without a turn of the loop; it turns at least four times a second


class Pulse:
    """Whether the core's loop turns: its counter must move. Thread-safe; asking costs nothing."""

    def __init__(
        self, beats: Callable[[], int], failed: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._beats, self._failed, self._clock = beats, failed, clock
        self._lock = threading.Lock()
        self._last, self._moved_at = beats(), clock()

    def alive(self, within_s: float = STUCK_SECONDS) -> bool:
        """True if the loop turned since it was last asked, or in the last `within_s`."""
        if self._failed():
            return False
        with self._lock:
            beats, now = self._beats(), self._clock()
            if beats != self._last:
                self._last, self._moved_at = beats, now
            return now - self._moved_at < within_s

    def moved(self) -> bool:
        """True if the loop turned since this was last asked."""
        if self._failed():
            return False
        with self._lock:
            beats = self._beats()
            turned = beats != self._last
            if turned:
                self._last, self._moved_at = beats, self._clock()
            return turned
