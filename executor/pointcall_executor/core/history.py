"""What happened lately, as counts: the facts that the host adds to an event. Pure and immutable.

A key is a short tuple such as ("restart", service number). Only the last hour counts, and only the last
`KEEP_MAX` times a key are kept: a fact saturates there, which no sensible threshold can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

HOUR_NS: Final = 3_600_000_000_000
KEEP_MAX: Final = 256  # times a key
KEYS_MAX: Final = 4096  # keys; the key used longest ago is forgotten first

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class History:
    """Times (ns since boot) at which something happened, by key."""

    times: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)

    def count(self, key: Key, now_ns: int, window_ns: int = HOUR_NS) -> int:
        """How often `key` happened in the window that ends now."""
        return sum(1 for at in self.times.get(key, ()) if now_ns - window_ns < at <= now_ns)

    def last(self, key: Key) -> int | None:
        times = self.times.get(key)
        return times[-1] if times else None

    def noted(self, key: Key, at_ns: int) -> History:
        """This history with one more happening."""
        kept = tuple(at for at in self.times.get(key, ()) if at_ns - HOUR_NS < at)[-(KEEP_MAX - 1) :]
        times = {k: v for k, v in self.times.items() if k != key}
        while len(times) >= KEYS_MAX:
            del times[next(iter(times))]
        times[key] = (*kept, at_ns)
        return replace(self, times=times)
