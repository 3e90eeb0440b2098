"""A token bucket for each role, so that one caller cannot make the executor busy. Not the guard's bucket: that one
limits actions, and lies in core. Time comes in as a value."""

from __future__ import annotations

import threading


class Bucket:
    """Holds at most `burst` tokens and gains `rate` a second. Safe to use from many threads."""

    def __init__(self, rate: int, burst: int, now_ns: int) -> None:
        self._rate, self._burst = rate, burst
        self._nano_tokens = burst * 1_000_000_000
        self._at_ns = now_ns
        self._lock = threading.Lock()

    def take(self, cost: int, now_ns: int) -> bool:
        """Take `cost` tokens, or nothing and False. A clock that steps back gains nothing."""
        with self._lock:
            gained = max(0, now_ns - self._at_ns) * self._rate
            self._at_ns = max(self._at_ns, now_ns)
            self._nano_tokens = min(self._burst * 1_000_000_000, self._nano_tokens + gained)
            if self._nano_tokens < cost * 1_000_000_000:
                return False
            self._nano_tokens -= cost * 1_000_000_000
            return True
