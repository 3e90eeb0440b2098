"""A token bucket, so that one caller cannot make the executor busy. Time comes in as a value.

Not the guard's bucket: that one limits actions, and lies in core.
"""

from __future__ import annotations

import threading


class Bucket:
    """Holds at most `burst` tokens and gains one every `gain_ns` nanoseconds. Safe to use from many threads."""

    def __init__(self, burst: int, gain_ns: int, now_ns: int) -> None:
        self._full_ns, self._gain_ns = burst * gain_ns, gain_ns
        self._saved_ns = self._full_ns  # tokens are kept as the time it takes to gain them: exact, without fractions
        self._at_ns = now_ns
        self._lock = threading.Lock()

    def take(self, cost: int, now_ns: int) -> bool:
        """Take `cost` tokens, or nothing and False. A clock that steps back gains nothing."""
        with self._lock:
            self._saved_ns = min(self._full_ns, self._saved_ns + max(0, now_ns - self._at_ns))
            self._at_ns = max(self._at_ns, now_ns)
            if self._saved_ns < cost * self._gain_ns:
                return False
            self._saved_ns -= cost * self._gain_ns
            return True
