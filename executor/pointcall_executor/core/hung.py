"""Operations of storage that do not end: (what was known, those in flight now) -> (what is known, reports). Pure.

One is hung when it has gone on for longer than a limit. There is one report for each cgroup, device and operation, and
again each time the limit passes once more while it lasts. What ended is not our business: the kernel judges that.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pointcall_executor.core.event import Kind, Source, StorageEvent
from pointcall_runbook.vocabulary import Operation


@dataclass(frozen=True, slots=True)
class What:
    """Who does what where."""

    cgroup: int  # 0 where the kernel does not say who asked
    device: int  # major << 20 | minor
    operation: Operation


@dataclass(frozen=True, slots=True)
class InFlight:
    """One operation that has begun and not ended. `since_ns`: CLOCK_MONOTONIC."""

    what: What
    since_ns: int


Known = Mapping[What, int]  # what is hung, and when it was reported last


def look(
    known: Known, in_flight: Iterable[InFlight], now_ns: int, limit_ns: int, source: Source
) -> tuple[Known, list[StorageEvent]]:
    """What is known after this look, and one event for each that is to be reported now."""
    ages: dict[What, list[int]] = collections.defaultdict(list)
    for operation in in_flight:
        ages[operation.what].append(now_ns - operation.since_ns)
    after: dict[What, int] = {}
    reports = []
    for what, each in ages.items():
        longest = max(each)
        if longest < limit_ns:
            continue
        reported_ns = known.get(what)
        if reported_ns is None or now_ns - reported_ns >= limit_ns:
            slow = sum(age >= limit_ns for age in each)
            reports.append(_report(what, now_ns, len(each), slow, longest, source))
            reported_ns = now_ns
        after[what] = reported_ns
    return after, reports


def _report(what: What, now_ns: int, operations: int, slow: int, longest_ns: int, source: Source) -> StorageEvent:
    return StorageEvent(
        Kind.STORAGE_SLOW, now_ns, what.cgroup, what.device, what.operation, operations, slow, 0, source, longest_ns
    )
