"""Sending metrics and traces over OTLP/HTTP, where the setting `otlp` names a collector. Imported only then.

Bounded: the SDK's queue of spans has an end, what does not fit is dropped there, and a collector that is away costs
nothing but its data. Nothing waits for it, neither the loop nor the end of the executor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    MetricExporter,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.export import Metric as Measured
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from pointcall_executor import VERSION
from pointcall_executor.telemetry.latencies import BOUNDS_NS, Latencies
from pointcall_executor.telemetry.metrics import COUNTED, Metrics
from pointcall_executor.telemetry.table import BUCKETS, METRICS, STORAGE, Metric
from pointcall_executor.telemetry.traces import RunIds, Traces

SCOPE: Final = "pointcall"
TIMEOUT_S: Final = 5
SPANS_MAX: Final = 2048  # waiting; a run has about five
EXPORT_MS: Final = 15_000  # between two exports of metrics
END_S: Final = 1.0  # for the last export

log = logging.getLogger(__name__)


class Otlp:
    """The two pipelines. `traces` takes runs; metrics are read from `metrics` by the SDK's own thread."""

    def __init__(
        self,
        endpoint: str,
        node: str,
        metrics: Metrics,
        spans: SpanExporter | None = None,
        measured: MetricExporter | None = None,
    ) -> None:
        """`endpoint` is the collector's base URL. `spans` and `measured` replace what is sent over the network."""
        resource = Resource.create(
            {"service.name": "pointcall", "service.version": VERSION, "service.instance.id": node}
        )
        ids = RunIds()
        self._tracing = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        spans = spans or OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=TIMEOUT_S)
        self._tracing.add_span_processor(
            BatchSpanProcessor(spans, max_queue_size=SPANS_MAX, schedule_delay_millis=1000)
        )
        self.traces = Traces(self._tracing, ids, VERSION)
        measured = measured or OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=TIMEOUT_S)
        reader = _Reader(measured, metrics.latencies)
        histogram = ExplicitBucketHistogramAggregation(BUCKETS)
        views = [View(instrument_name=r.name, aggregation=histogram) for r in METRICS if r.kind == "histogram"]
        self._metering = MeterProvider([reader], resource=resource, views=views, shutdown_on_exit=False)
        _mirror(metrics, self._metering.get_meter(SCOPE, VERSION))

    def flush(self, timeout_s: float) -> None:
        """Send what waits, as far as the time allows."""
        self._tracing.force_flush(int(timeout_s * 1000))
        self._metering.force_flush(timeout_s * 1000)

    def stop(self) -> None:
        """The last export, at most `END_S`; a collector that is away does not hold up the end."""

        def end() -> None:
            self._tracing.shutdown()
            self._metering.shutdown(END_S * 1000)

        ending = threading.Thread(target=end, name="otlp-end", daemon=True)
        ending.start()
        ending.join(END_S)


class _Reader(PeriodicExportingMetricReader):
    """Adds the histograms that the kernel keeps: the SDK has no instrument for what was counted elsewhere."""

    def __init__(self, measured: MetricExporter, latencies: Latencies) -> None:
        self._latencies = latencies
        super().__init__(measured, export_interval_millis=EXPORT_MS)

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        try:
            metrics_data = _with_storage(metrics_data, self._latencies)
        except Exception:  # it would end the thread that exports
            log.exception("storage")
        super()._receive_metrics(metrics_data, timeout_millis, **kwargs)


def _with_storage(found: MetricsData, latencies: Latencies) -> MetricsData:
    """Beside our other metrics."""
    now_ns = time.time_ns()
    points = [
        _point(labels._asdict(), counts, latencies.began_ns, now_ns) for labels, counts in latencies.counts().items()
    ]
    if not points:
        return found
    row = next(row for row in METRICS if row.name == STORAGE)
    storage = Measured(row.name, row.help, row.unit, Histogram(points, AggregationTemporality.CUMULATIVE))
    (resource,) = found.resource_metrics
    scopes = [
        replace(scope, metrics=[*scope.metrics, storage]) if scope.scope.name == SCOPE else scope
        for scope in resource.scope_metrics
    ]
    return replace(found, resource_metrics=[replace(resource, scope_metrics=scopes)])


def _point(labels: dict[str, str], counts: Sequence[int], began_ns: int, now_ns: int) -> HistogramDataPoint:
    """Without sum, least and most: the kernel keeps none, and the protocol lets them be absent."""
    absent: Any = None
    bounds = [ns / 1e9 for ns in BOUNDS_NS]
    return HistogramDataPoint(labels, began_ns, now_ns, sum(counts), absent, counts, bounds, absent, absent)


def _mirror(metrics: Metrics, meter: Any) -> None:
    """Every row of the table as an instrument that reads the same values."""
    histograms = {}
    for row in METRICS:
        if row.name == STORAGE:
            continue
        if row.kind == "histogram":
            histograms[row.name] = meter.create_histogram(row.name, row.unit, row.help)
        elif row.kind == "counter":
            meter.create_observable_counter(row.name, [_reader(metrics, row)], row.unit, row.help)
        else:
            meter.create_observable_gauge(row.name, [_reader(metrics, row)], row.unit, row.help)
    metrics.on_seconds = lambda name, seconds, labels: histograms[name].record(seconds, labels)


def _reader(metrics: Metrics, row: Metric) -> Any:
    def read(_: CallbackOptions) -> Iterable[Observation]:
        samples = metrics.counted(row.name) if row.name in COUNTED else metrics.values().get(row.name, [])
        return [Observation(value, labels) for labels, value in samples]

    return read
