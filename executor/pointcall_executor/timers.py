"""The timers of `again`: which runbook wants to be asked once more about what, and when. Bounded, in memory.

Owned by the loop; times are CLOCK_MONOTONIC ns. Forgotten at a restart, and with the module that asked.
"""

from __future__ import annotations

import heapq
from collections.abc import Set
from dataclasses import dataclass
from typing import Final

TIMERS_MAX: Final = 1024  # pending; a module that asks for more is refused


@dataclass(frozen=True, slots=True, order=True)
class TimerDue:
    """One of them; `service` is 0 where the event was about none."""

    due_ns: int
    tag: int
    runbook: str
    subject: str
    service: int


class Timers:
    """The soonest first."""

    def __init__(self) -> None:
        self._heap: list[TimerDue] = []

    def set(self, timer: TimerDue) -> str:
        """What speaks against it, empty if nothing does."""
        if len(self._heap) >= TIMERS_MAX:
            return f"more than {TIMERS_MAX} timers"
        heapq.heappush(self._heap, timer)
        return ""

    @property
    def next_ns(self) -> int | None:
        """When the soonest is due; None where there is none."""
        return self._heap[0].due_ns if self._heap else None

    def due(self, now_ns: int) -> bool:
        """Whether one is due now: `take` it."""
        return bool(self._heap) and self._heap[0].due_ns <= now_ns

    def take(self) -> TimerDue:
        """The soonest, once."""
        return heapq.heappop(self._heap)

    def keep(self, runbooks: Set[str]) -> None:
        """Only those of these runbooks."""
        self._heap = sorted(t for t in self._heap if t.runbook in runbooks)
