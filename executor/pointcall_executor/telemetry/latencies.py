"""How long operations on storage took, by declared service: the kernel's histograms as series that never fall.

They are read when somebody asks, never on the loop. The kernel begins anew with each session and knows cgroups, not
services: here what came since the last look is added up. Spec: docs/spec/metrics.md.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from pointcall_executor.kernel.storage import BUCKETS, UNIT_NS, Histogram
from pointcall_executor.session import Session
from pointcall_runbook.vocabulary import Operation

FRESH_SECONDS: Final = 0.5
FIRST_NS: Final = 2**14  # faster than this is fast enough for any storage
LAST_NS: Final = 2**34
BOUNDS_NS: Final = tuple(
    end for end in (2 ** (number + 1) * UNIT_NS for number in range(BUCKETS)) if FIRST_NS <= end <= LAST_NS
)
SERIES_MAX: Final = 512  # of the first so many everything is told; of the others not the device
NODE: Final = "(node)"  # no name of a service has brackets
OTHER: Final = "(other)"

# Kernel bucket -> the one of ours that holds it.
_PLACES: Final = tuple(sum(bound < 2 ** (number + 1) * UNIT_NS for bound in BOUNDS_NS) for number in range(BUCKETS))
_Key = tuple[str, int, int, Operation]


class Labels(NamedTuple):
    """Of one series, as they are shown."""

    sensor: str
    service: str
    device: str
    operation: str


@dataclass(slots=True)
class _Seen:
    """What the kernel had at the last look, and whose it is."""

    buckets: tuple[int, ...]
    service: str


class Latencies:
    """Thread-safe. `session` is asked at most twice a second, and only when somebody reads."""

    def __init__(self, session: Callable[[], Session | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._clock = session, clock
        self.began_ns = time.time_ns()
        self._reading = threading.Lock()
        self._read_at = -1e9
        self._of = 0  # when the session was attached that `_seen` is about
        self._seen: dict[_Key, _Seen] = {}
        self._counts: dict[Labels, list[int]] = {}

    def counts(self) -> Mapping[Labels, tuple[int, ...]]:
        """How many took less than each of `BOUNDS_NS` and not less than the one before it, and at last all others."""
        with self._reading:
            if self._clock() - self._read_at >= FRESH_SECONDS:
                self._read_at = self._clock()
                self._look()
            return {labels: tuple(counts) for labels, counts in self._counts.items()}

    def below(self) -> Mapping[Labels, tuple[int, ...]]:
        """How many took less than each of `BOUNDS_NS`, and at last how many there were."""
        return {labels: tuple(itertools.accumulate(counts)) for labels, counts in self.counts().items()}

    def _look(self) -> None:
        session = self._session()
        if session is None:
            return
        if session.attached_ns != self._of:
            self._of, self._seen = session.attached_ns, {}
        for sensor, histograms in session.sensors.histograms().items():
            for histogram in histograms:
                self._add(session, sensor, histogram)

    def _add(self, session: Session, sensor: str, now: Histogram) -> None:
        key = (sensor, now.cgroup, now.device, now.operation)
        seen = self._seen.setdefault(key, _Seen((0,) * BUCKETS, ""))
        if now.buckets == seen.buckets:
            return
        seen.service = seen.service or session.owner(now.cgroup)  # it stays whose it was, also when that one moved on
        counts = self._series(Labels(sensor, seen.service or NODE, _device(now.device), now.operation.name.lower()))
        fell = any(count < before for count, before in zip(now.buckets, seen.buckets, strict=True))
        since = (0,) * BUCKETS if fell else seen.buckets  # the kernel forgot the entry, and began another one
        for place, count, before in zip(_PLACES, now.buckets, since, strict=True):
            counts[place] += count - before
        seen.buckets = now.buckets

    def _series(self, labels: Labels) -> list[int]:
        if labels not in self._counts and len(self._counts) >= SERIES_MAX:
            labels = labels._replace(device=OTHER)
        return self._counts.setdefault(labels, [0] * (len(BOUNDS_NS) + 1))


def _device(number: int) -> str:
    """The kernel's number as people write it."""
    return f"{number >> 20}:{number & 0xFFFFF}"
