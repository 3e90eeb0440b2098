"""What happened lately, as counts: the facts that the host adds to an event. Pure and immutable.

A key is a short tuple such as ("restart", service number). Only the last hour counts, and only the last
`KEEP_MAX` times a key are kept (more where a limit counts further): a fact saturates there, which no sensible threshold
can tell apart.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

HOUR_NS: Final = 3_600_000_000_000
KEEP_MAX: Final = 256  # times a key
KEYS_MAX: Final = 4096  # keys; of those of the kind OPENED the one that happened longest ago is forgotten first
OPENED: Final = "opened"  # what clients tried to reach, without end; others name what is declared or was acted on

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class History:
    """Times (ns since boot) at which something happened, by key, in ascending order. Never changed in place."""

    times: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # the key that happened longest ago is the first

    def count(self, key: Key, now_ns: int, window_ns: int = HOUR_NS) -> int:
        """How often `key` happened in the window that ends now."""
        times = self.times.get(key, ())
        return bisect_right(times, now_ns) - bisect_right(times, now_ns - window_ns)

    def last(self, key: Key) -> int | None:
        times = self.times.get(key)
        return times[-1] if times else None

    def noted(self, key: Key, at_ns: int, *, keep: int = KEEP_MAX, window_ns: int = HOUR_NS) -> History:
        """This history with one more happening; at least the last `keep` times of the key are counted, in a window
        that nobody asks further back than."""
        kept = self.times.get(key, ())
        if kept and at_ns < kept[-1]:
            at_ns = kept[-1]  # two CPUs' clock readings may arrive out of order; the order of the record is kept
        first = max(bisect_right(kept, at_ns - window_ns), len(kept) - (max(keep, KEEP_MAX) - 1))
        kept = kept[first:] if first > 0 else kept
        times = self.times.copy()
        times.pop(key, None)  # and to the end: the keys stay in the order in which they last happened
        times[key] = (*kept, at_ns)
        if len(times) > KEYS_MAX:
            del times[next((old for old in times if old[0] == OPENED), next(iter(times)))]
        return History(times)
