"""The metrics of table.py with their values: counted from runs and records, or read from the status when asked.

Prometheus keeps and prints them; the same values go to OpenTelemetry where that is configured (otlp.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pointcall_executor.api.backend import LogCopy, NodeStatus
from pointcall_executor.run import Run
from pointcall_executor.telemetry.latencies import BOUNDS_NS, Latencies
from pointcall_executor.telemetry.table import BUCKETS, METRICS, STORAGE, Metric

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
STATES: Final = ("armed", "paused", "disarmed", "failed")
COPIES: Final = ("witnesses", "mirror")
FRESH_SECONDS: Final = 0.5  # one look at the status serves every reader in this time

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

Sample = tuple[dict[str, str], float]
_BOUNDS: Final = (*(repr(ns / 1e9) for ns in BOUNDS_NS), "+Inf")


@dataclass(slots=True)
class Rising:
    """A counter over a number that starts anew with each arming."""

    total: float = 0
    last: float = 0

    def now(self, value: float) -> float:
        """The total after the number was seen as `value`."""
        self.total += value - self.last if value >= self.last else value
        self.last = value
        return self.total


class Metrics:
    """Thread-safe. `status` is asked at most twice a second, and only when somebody reads."""

    def __init__(
        self,
        status: Callable[[], NodeStatus],
        clock: Callable[[], float] = time.monotonic,
        latencies: Latencies | None = None,
    ) -> None:
        self._status, self._clock = status, clock
        self.latencies = latencies or Latencies(lambda: None)
        self._reading = threading.Lock()
        self._read_at = -1e9
        self._values: Mapping[str, list[Sample]] = {}
        self._lost, self._refused = Rising(), Rising()
        self.registry = CollectorRegistry(auto_describe=False)
        self._counted: dict[str, Any] = {}
        self.on_seconds: Callable[[str, float, dict[str, str]], None] = lambda _name, _seconds, _labels: None
        for row in METRICS:
            if row.name == STORAGE:
                continue
            if row.kind == "histogram":
                self._counted[row.name] = Histogram(
                    row.name, row.help, row.labels, buckets=BUCKETS, registry=self.registry
                )
            elif row.name in COUNTED:
                self._counted[row.name] = Counter(row.name, row.help, row.labels, registry=self.registry)
        self.registry.register(_Read(self))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counted[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def seconds(self, name: str, ns: int, **labels: str) -> None:
        """Add a time to a histogram; clocks of two CPUs may differ by a little, so below zero is zero."""
        value = max(0, ns) / 1e9
        histogram = self._counted[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)
        self.on_seconds(name, value, labels)

    def run(self, run: Run, durable_ns: int) -> None:
        """Count a finished run. `durable_ns`: when its receipt was on disk."""
        event = type(run.event).__name__
        self.count("pointcall_runs_total", runbook=run.runbook.name, event=event, mode=run.runbook.mode)
        if run.trap is not None:
            self.count("pointcall_traps_total", runbook=run.runbook.name)
        self.seconds("pointcall_receive_seconds", run.received_ns - run.event_ns)
        self.seconds("pointcall_decision_seconds", run.decided_ns - run.received_ns)
        self.seconds("pointcall_run_seconds", durable_ns - run.event_ns)
        for act in run.acts:
            action = act.call.action if act.action is not None else "malformed"  # a wrong module's name is not ours
            outcome = act.outcome.name.lower() if act.outcome is not None else "refused"
            self.count("pointcall_actions_total", action=action, outcome=outcome)
            if act.started_ns is not None and act.ended_ns is not None:
                self.seconds("pointcall_reaction_seconds", act.started_ns - run.event_ns, action=action)
                self.seconds("pointcall_action_seconds", act.ended_ns - act.started_ns, action=action)

    def counted(self, name: str) -> list[Sample]:
        """The samples of a counter that is counted here."""
        return [(s.labels, s.value) for f in self._counted[name].collect() for s in f.samples if s.name == name]

    def text(self) -> bytes:
        """Everything in the Prometheus text format."""
        return generate_latest(self.registry)

    def values(self) -> Mapping[str, list[Sample]]:
        """Name -> samples of everything that is read from the status. The last ones where it cannot be asked now."""
        with self._reading:
            if self._clock() - self._read_at >= FRESH_SECONDS:
                self._read_at = self._clock()
                self._values = self._of(self._status())
            return self._values

    def _of(self, status: NodeStatus) -> Mapping[str, list[Sample]]:
        read = Readings()
        read.put("pointcall_build_info", 1, version=status.executor)
        read.put("pointcall_evidence_info", 1, platform=status.platform, tier=status.tier)
        read.put("pointcall_ready", status.ready)
        for state in STATES:
            read.put("pointcall_state", status.state == state, state=state)
        read.put("pointcall_beats_total", status.beats)
        read.put("pointcall_uptime_seconds", status.uptime_ms / 1000)
        read.put("pointcall_manifest_sequence", status.sequence)
        read.put("pointcall_manifest_expires_timestamp_seconds", _unix(status.expires))
        for mode in ("enforce", "monitor"):
            for state in ("armed", "quarantined"):
                books = [b for b in status.runbooks if (b.mode, b.state) == (mode, state)]
                read.put("pointcall_runbooks", len(books), mode=mode, state=state)
        read.put("pointcall_programs", status.programs)
        read.put("pointcall_programs_checked_age_seconds", status.checked_age_ms / 1000)
        read.put("pointcall_epoch_age_seconds", status.epoch_age_ms / 1000)
        read.put("pointcall_pause_left_seconds", status.paused_left_ms / 1000)
        read.put("pointcall_storm_left_seconds", status.storm_left_ms / 1000)
        read.put("pointcall_records_lost_total", self._lost.now(status.lost_events))
        read.put("pointcall_targets_in_flight", len(status.in_flight))
        for state in ("running", "stopped", "elsewhere"):
            read.put("pointcall_services", sum(s.state == state for s in status.services), state=state)
        for state in ("closed", "open", "half", "forced"):
            read.put("pointcall_circuits", sum(c.state == state for c in status.circuits), state=state)
        read.put("pointcall_connects_refused_total", self._refused.now(_turned_away(status)))
        read.put("pointcall_log_entries", status.tree_size)
        read.put("pointcall_log_unsigned_entries", max(0, status.tree_size - status.signed_size))
        read.put("pointcall_journal_bytes", status.journal_bytes)
        for name in COPIES:  # every series is there from the start, so that an alarm can be about it
            copy = next((c for c in status.copies if c.name == name), LogCopy(name, 0, 0))
            read.put("pointcall_log_copy_entries", copy.covered, copy=name)
            read.put("pointcall_log_copy_behind_entries", copy.behind, copy=name)
            read.put("pointcall_log_copy_behind_seconds", copy.behind_ms / 1000, copy=name)
            read.put("pointcall_log_copy_failures_total", copy.failures, copy=name)
        return read.found


# Counters that this module counts itself; all other counters are read from the status.
COUNTED: Final = frozenset(
    {
        "pointcall_refusals_total",
        "pointcall_records_total",
        "pointcall_runs_total",
        "pointcall_traps_total",
        "pointcall_actions_total",
        "pointcall_telemetry_dropped_total",
    }
)


@dataclass(slots=True)
class Readings:
    """Samples by name, as they are read."""

    found: dict[str, list[Sample]] = field(default_factory=dict)

    def put(self, name: str, value: float, **labels: str) -> None:
        self.found.setdefault(name, []).append((labels, float(value)))


class _Read:
    """What Prometheus asks for the metrics that are read, not counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        values = self._metrics.values()
        for row in METRICS:
            if row.name in values:
                yield _family(row, values[row.name])
            elif row.name == STORAGE:
                yield _histogram(row, self._metrics.latencies)


def _family(row: Metric, samples: list[Sample]) -> Any:
    make = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = make(row.name, row.help, labels=row.labels)
    for labels, value in samples:
        family.add_metric([labels[name] for name in row.labels], value)
    return family


def _histogram(row: Metric, latencies: Latencies) -> Any:
    """Without `_sum`, since the kernel keeps none; then the format wants no `_count` either: it is the last bucket."""
    family = HistogramMetricFamily(row.name, row.help, labels=row.labels)
    for labels, below in latencies.below().items():
        family.add_metric(labels, list(zip(_BOUNDS, below, strict=True)), None)
    return family


def _turned_away(status: NodeStatus) -> int:
    return sum(c.refused for c in status.circuits if not c.watch_only)


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
