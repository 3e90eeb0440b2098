"""The ear: hears of runs on the pool and of records on the loop, and hands them on from a thread of its own.

Whoever calls in only appends to a queue with an end. What does not fit is counted, never waited for.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from pointcall_attest.entry import Entry
from pointcall_executor.core.event import KernelEvent
from pointcall_executor.journal_reader import JournalReader
from pointcall_executor.run import Run
from pointcall_executor.telemetry.metrics import Metrics

HEARD_MAX: Final = 4096  # runs or records that wait; at 4 looks a second that is 16,000 a second
LOOK_SECONDS: Final = 0.25
REFUSALS_AT_ONCE: Final = 500

log = logging.getLogger(__name__)
Heard = Callable[[Run, int, int], None]  # the run, when its receipt was durable, monotonic -> wall-clock offset


class Observer:
    """Counts what it hears into `metrics`, and shows every run to `on_run`. `stop` may be called twice."""

    def __init__(self, metrics: Metrics, journal: JournalReader, on_run: Heard | None = None) -> None:
        self._metrics, self._journal, self._on_run = metrics, journal, on_run
        self._runs: collections.deque[tuple[Run, int]] = collections.deque()
        self._records: collections.deque[str] = collections.deque()
        self._dropped: collections.Counter[str] = collections.Counter()
        self._seen = journal.size
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin to hand on."""
        self._thread.start()

    def receipt(self, run: Run) -> None:
        """A run's receipt is durable: from a thread of the pool."""
        if len(self._runs) >= HEARD_MAX:
            self._dropped["run"] += 1
        else:
            self._runs.append((run, time.monotonic_ns()))

    def record(self, record: KernelEvent) -> None:
        """A kernel record was taken: on the loop."""
        if len(self._records) >= HEARD_MAX:
            self._dropped["record"] += 1
        else:
            self._records.append(record.kind.name.lower())

    def stop(self) -> None:
        """Hand on what was heard, then end."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _listen(self) -> None:
        while not self._ending.wait(LOOK_SECONDS):
            self._look_safely()
        self._look_safely()

    def _look_safely(self) -> None:
        try:
            self.look()
        except Exception:  # a bug in counting must not end the counting, and must never reach the loop
            log.exception("telemetry")

    def look(self) -> None:
        """Hand on everything that waits."""
        offset_ns = time.time_ns() - time.monotonic_ns()
        for _ in range(len(self._records)):
            self._metrics.count("pointcall_records_total", kind=self._records.popleft())
        for _ in range(len(self._runs)):
            run, durable_ns = self._runs.popleft()
            self._metrics.run(run, durable_ns)
            if self._on_run is not None:
                self._on_run(run, durable_ns, offset_ns)
        for what in list(self._dropped):
            self._metrics.count("pointcall_telemetry_dropped_total", self._dropped.pop(what), what=what)
        self._count_refusals()

    def _count_refusals(self) -> None:
        """From the log, since that is where all of them are: the guard's, arming's, and those of a module's trap."""
        size = self._journal.size
        if size <= self._seen:
            return
        found: list[Entry] = self._journal.entries("refusal", start=self._seen, limit=REFUSALS_AT_ONCE)
        for entry in found:
            self._metrics.count("pointcall_refusals_total", check=str(entry.body["check"]))
        self._seen = found[-1].index + 1 if len(found) == REFUSALS_AT_ONCE else size
