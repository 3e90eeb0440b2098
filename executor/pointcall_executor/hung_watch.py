"""When to look at the operations of storage that are in flight, and what was known of them. On the lookout's thread.

Not here: what hung means (core/hung.py), how the kernel tells what is in flight (kernel/storage.py).
"""

from __future__ import annotations

from typing import Final, Protocol

from pointcall_executor.core.event import Source, StorageEvent
from pointcall_executor.core.hung import InFlight, Known, look

LOOKS: Final = 6  # within the limit: what hangs is reported a sixth later at most
PERIOD_MIN_NS: Final = 250_000_000  # as often as the lookout looks at anything
PERIOD_MAX_NS: Final = 10_000_000_000


class Storage(Protocol):
    """A sensor of storage."""

    def in_flight(self, before_ns: int) -> list[InFlight]: ...


class HungWatch:
    """One sensor. What goes on for `limit_ns` is hung; it looks every sixth of that, within 0.25 s and 10 s."""

    def __init__(self, sensor: Storage, source: Source, limit_ns: int) -> None:
        self._sensor, self._source, self._limit_ns = sensor, source, limit_ns
        self._period_ns = min(max(limit_ns // LOOKS, PERIOD_MIN_NS), PERIOD_MAX_NS)
        self._known: Known = {}
        self._next_ns = 0

    def due_ns(self, now_ns: int) -> int:
        """How long from now the next look may wait."""
        return max(self._next_ns - now_ns, 0)

    def look(self, now_ns: int) -> list[StorageEvent]:
        """What is to be reported now; nothing where it is not time to look."""
        if now_ns < self._next_ns:
            return []
        self._next_ns = now_ns + self._period_ns
        in_flight = self._sensor.in_flight(now_ns - self._limit_ns + 1)
        self._known, reports = look(self._known, in_flight, now_ns, self._limit_ns, self._source)
        return reports
