"""Traces as a collector gets them: in memory, and over HTTP from a real exporter to a listener of the test."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("opentelemetry.sdk", reason="the extra `telemetry` is not installed")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pointcall_attest.run_id import run_id
from pointcall_executor.core.guard import Refusal
from pointcall_executor.telemetry.latencies import BOUNDS_NS, NODE, Latencies
from pointcall_executor.telemetry.metrics import Metrics
from pointcall_executor.telemetry.otlp import Otlp
from pointcall_executor.telemetry.table import METRICS
from pointcall_executor.telemetry.traces import trace_id_of
from pointcall_runbook.vocabulary import Outcome
from tests.unit.live.night import QUIET
from tests.unit.telemetry.runs import BEGAN_NS, RUN_ID, act, finished
from tests.unit.telemetry.test_latencies import Node

OFFSET_NS = 1_700_000_000_000_000_000


class Collector:
    """Takes what OTLP/HTTP sends."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


class NoMetrics(MetricExporter):
    """For tests of spans alone."""

    def export(self, metrics_data: Any, timeout_millis: float = 0, **_: Any) -> Any:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        """Nothing is open."""


def spans_of(*runs: Any, durable_ns: int = BEGAN_NS + 40_000_000) -> list[Any]:
    kept = InMemorySpanExporter()
    otlp = Otlp("", "node-7", Metrics(lambda: QUIET), kept, NoMetrics())
    try:
        for run in runs:
            otlp.traces.run(run, durable_ns, OFFSET_NS)
        otlp.flush(5)
    finally:
        otlp.stop()
    return list(kept.get_finished_spans())


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_the_trace_id_is_the_run_id(unix_ms: int, chance: bytes) -> None:
    assert trace_id_of(run_id(unix_ms, chance)) == unix_ms << 80 | int.from_bytes(chance)


def test_a_run_is_one_trace_at_its_own_times() -> None:
    spans = {s.name: s for s in spans_of(finished(act(started=3_000_000, ended=33_000_000)))}
    assert set(spans) == {"run fix", "event", "decision", "action recreate", "receipt"}
    root = spans["run fix"]
    assert {s.context.trace_id for s in spans.values()} == {trace_id_of(RUN_ID)}
    assert root.parent is None
    assert all(s.parent.span_id == root.context.span_id for n, s in spans.items() if n != "run fix")
    times = {n: (s.start_time - OFFSET_NS - BEGAN_NS, s.end_time - OFFSET_NS - BEGAN_NS) for n, s in spans.items()}
    assert times == {
        "run fix": (0, 40_000_000),
        "event": (0, 41_000),
        "decision": (41_000, 48_000),
        "action recreate": (3_000_000, 33_000_000),
        "receipt": (33_000_000, 40_000_000),
    }
    assert spans["event"].attributes["pointcall.event.service"] == "api"
    assert spans["receipt"].attributes["pointcall.receipt.index"] == 99
    assert spans["action recreate"].attributes["pointcall.outcome"] == "applied"
    (intent,) = spans["action recreate"].events
    assert intent.timestamp == OFFSET_NS + BEGAN_NS + 3_000_000 - 1_000
    assert root.resource.attributes["service.instance.id"] == "node-7"


def test_failures_traps_and_refusals_are_seen() -> None:
    failed = {s.name: s for s in spans_of(finished(act(outcome=Outcome.FAILED, started=1, ended=2)))}
    assert failed["run fix"].status.status_code is failed["action recreate"].status.status_code is StatusCode.ERROR
    trapped = {s.name: s for s in spans_of(finished(trap="fuel"))}
    assert trapped["run fix"].status.description == "fuel"
    held = {
        s.name: s
        for s in spans_of(finished(act(outcome=Outcome.REFUSED, refusal=Refusal("guard.rate", "a", "b", "c"))))
    }
    assert held["action recreate"].attributes["pointcall.guard.check"] == "guard.rate"
    assert held["run fix"].status.status_code is StatusCode.UNSET


def test_traces_and_metrics_reach_a_collector(collector: Collector) -> None:
    metrics = Metrics(lambda: QUIET)
    otlp = Otlp(collector.url, "node-7", metrics)
    run = finished(act(started=3_000_000, ended=33_000_000))
    metrics.run(run, BEGAN_NS + 40_000_000)
    otlp.traces.run(run, BEGAN_NS + 40_000_000, OFFSET_NS)
    otlp.flush(10)
    otlp.stop()
    traces = [ExportTraceServiceRequest.FromString(b) for p, b in collector.got if p == "/v1/traces"]
    names = [s.name for t in traces for r in t.resource_spans for scope in r.scope_spans for s in scope.spans]
    assert sorted(names) == ["action recreate", "decision", "event", "receipt", "run fix"]
    sent = [ExportMetricsServiceRequest.FromString(b) for p, b in collector.got if p == "/v1/metrics"]
    found = {m.name: m for r in sent[0].resource_metrics for scope in r.scope_metrics for m in scope.metrics}
    units = {m.name: m.unit for m in METRICS}
    assert {n: m.unit for n, m in found.items()}.items() <= units.items()
    assert found["pointcall_runs_total"].sum.data_points[0].as_double == 1
    assert found["pointcall_ready"].gauge.data_points[0].as_double == 1
    assert found["pointcall_run_seconds"].histogram.data_points[0].sum == pytest.approx(0.04)


def test_what_the_kernel_counted_reaches_a_collector_without_a_sum(collector: Collector) -> None:
    node = Node()
    node.kernel.took(3_000_000, 3_000_000, 20 * 10**9, cgroup=5)
    otlp = Otlp(collector.url, "node-7", Metrics(lambda: QUIET, latencies=node.latencies))
    otlp.flush(10)
    otlp.stop()
    sent = [ExportMetricsServiceRequest.FromString(b) for p, b in collector.got if p == "/v1/metrics"]
    found = {m.name: m for r in sent[0].resource_metrics for scope in r.scope_metrics for m in scope.metrics}
    assert {"pointcall_storage_seconds", "pointcall_ready", "pointcall_log_entries"} <= set(found)
    storage = found["pointcall_storage_seconds"]
    (point,) = storage.histogram.data_points
    assert (storage.unit, storage.histogram.aggregation_temporality) == ("s", 2)  # cumulative
    assert {a.key: a.value.string_value for a in point.attributes} == {
        "sensor": "storage", "service": NODE, "device": "8:0", "operation": "read",
    }  # fmt: skip
    assert list(point.explicit_bounds) == [ns / 1e9 for ns in BOUNDS_NS]
    assert [point.bucket_counts[n] for n in (8, 21)] == [2, 1]
    assert point.count == sum(point.bucket_counts) == 3
    assert not point.HasField("sum")
    assert not point.HasField("max")
    assert point.start_time_unix_nano < point.time_unix_nano


def test_storage_that_cannot_be_read_does_not_end_the_exports(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    def no_session() -> Any:
        raise OSError("no descriptor is left")

    otlp = Otlp(collector.url, "node-7", Metrics(lambda: QUIET, latencies=Latencies(no_session)))
    otlp.flush(10)
    otlp.stop()
    assert "no descriptor is left" in caplog.text
    assert "/v1/metrics" in {path for path, _ in collector.got}


def test_a_collector_that_is_away_holds_nobody_up(collector: Collector) -> None:
    collector.stop()
    collector.__init__()  # type: ignore[misc]  # so that the fixture has something to stop
    otlp = Otlp("http://127.0.0.1:9", "node-7", Metrics(lambda: QUIET))
    begin = time.monotonic()
    for _ in range(5000):  # twice what may wait
        otlp.traces.run(finished(), BEGAN_NS, OFFSET_NS)
    handed_on = time.monotonic() - begin
    otlp.stop()
    assert handed_on < 20  # five thousand runs: a hang would be the exporter's timeouts
    assert time.monotonic() - begin - handed_on < 10


def test_without_the_setting_no_library_is_loaded_and_no_connection_is_made() -> None:
    program = """
import sys
connected = []
names = ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda name, args: connected.append(args) if name in names else None)
from types import SimpleNamespace
from pointcall_executor.config import Config
from pointcall_executor.telemetry.station import Station
from tests.unit.live.night import QUIET
from tests.unit.report.sample_log import SampleLog
executor = SimpleNamespace(
    journal=SampleLog(), on_receipt=lambda r: None, on_record=lambda r: None, beats=0, failure=None,
    session=None,
)
station = Station(executor, SimpleNamespace(status=lambda: QUIET), Config())
station.stop()
unread = station.metrics is None and "prometheus_client" not in sys.modules
ready = SimpleNamespace(status=lambda: QUIET, unready=str)
station = Station(executor, ready, Config(http="127.0.0.1:0"))
station.metrics.text()
station.stop()
print(unread, [m for m in sys.modules if m.startswith("opentelemetry.sdk")], connected)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.stdout == "True [] []\n", done.stdout + done.stderr
