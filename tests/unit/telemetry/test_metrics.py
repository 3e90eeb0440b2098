"""Metrics: names that stay, values that are those of runs and status, and a page that says the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointcall_executor.api import backend
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.core.guard import Refusal
from pointcall_executor.telemetry import observer
from pointcall_executor.telemetry.metrics import COUNTED, Metrics, Rising
from pointcall_executor.telemetry.observer import Observer
from pointcall_executor.telemetry.table import METRICS
from pointcall_runbook.vocabulary import Address, Outcome
from tests.unit.live.night import BAD, QUIET
from tests.unit.report.sample_log import SampleLog
from tests.unit.telemetry.runs import BEGAN_NS, act, finished

PAGE = Path(__file__).resolve().parents[3] / "docs/spec/metrics.md"


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the text by name and labels, through a parser that is not ours."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def one(metrics: Metrics, name: str, **labels: str) -> float:
    return values(metrics)[name, tuple(sorted(labels.items()))]


def made(status: Any = QUIET, clock: Callable[[], float] = lambda: 0.0) -> Metrics:
    return Metrics(lambda: status, clock)


def test_the_page_has_exactly_the_rows_of_the_table() -> None:
    rows = re.findall(
        r"^\| `(pointcall_\w+)` \| (\w+) \| (.*?) ?\| `(.*?)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert [(m.name, m.kind, m.unit, m.help) for m in METRICS] == [(r[0], r[1], r[3], r[4]) for r in rows]
    assert [m.labels for m in METRICS] == [tuple(re.findall(r"`(\w+)`", row[2])) for row in rows]


def test_names_follow_the_rules_of_prometheus() -> None:
    for row in METRICS:
        assert row.name.endswith("_total") == (row.kind == "counter")
        assert row.name.endswith(("_seconds", "_timestamp_seconds")) == (row.unit == "s")
        assert row.name.endswith("_bytes") == (row.unit == "By")
    assert len({row.name for row in METRICS}) == len(METRICS)
    assert {r.name for r in METRICS} >= COUNTED


# Names and labels that others have in their alarms. Add to it; never change a row.
STABLE = """
pointcall_build_info{version} pointcall_evidence_info{platform,tier} pointcall_ready{} pointcall_state{state}
pointcall_beats_total{} pointcall_uptime_seconds{} pointcall_manifest_sequence{}
pointcall_manifest_expires_timestamp_seconds{} pointcall_runbooks{mode,state} pointcall_programs{}
pointcall_programs_checked_age_seconds{} pointcall_epoch_age_seconds{} pointcall_pause_left_seconds{}
pointcall_storm_left_seconds{} pointcall_refusals_total{check} pointcall_records_total{kind}
pointcall_records_lost_total{} pointcall_runs_total{runbook,event,mode} pointcall_traps_total{runbook}
pointcall_actions_total{action,outcome} pointcall_targets_in_flight{} pointcall_services{state}
pointcall_circuits{state} pointcall_connects_refused_total{} pointcall_receive_seconds{}
pointcall_decision_seconds{} pointcall_reaction_seconds{action} pointcall_action_seconds{action}
pointcall_run_seconds{} pointcall_log_entries{} pointcall_log_unsigned_entries{} pointcall_journal_bytes{}
pointcall_telemetry_dropped_total{what} pointcall_log_copy_entries{copy} pointcall_log_copy_behind_entries{copy}
pointcall_log_copy_behind_seconds{copy} pointcall_log_copy_failures_total{copy}
pointcall_storage_seconds{sensor,service,device,operation}
"""


def test_no_name_and_no_label_ever_changes() -> None:
    now = {f"{m.name}{{{','.join(m.labels)}}}" for m in METRICS}
    assert set(STABLE.split()) <= now


def test_every_metric_is_in_the_text_even_before_anything_happened() -> None:
    text = made().text().decode()
    assert [m.name for m in METRICS if f"# TYPE {m.name} {m.kind}" not in text.replace("_total ", "_total ")] == []
    assert "_created" not in text


def test_the_status_is_read_as_it_is() -> None:
    got = made(BAD)
    assert one(got, "pointcall_ready") == 1
    assert one(got, "pointcall_state", state="armed") == 1
    assert one(got, "pointcall_state", state="disarmed") == 0
    assert one(got, "pointcall_services", state="stopped") == 1
    assert one(got, "pointcall_circuits", state="open") == 1
    assert one(got, "pointcall_connects_refused_total") == 1840
    assert one(got, "pointcall_runbooks", mode="monitor", state="armed") == 1
    assert one(got, "pointcall_epoch_age_seconds") == 240
    assert one(got, "pointcall_manifest_expires_timestamp_seconds") == 1_798_070_400
    assert one(got, "pointcall_evidence_info", platform="snp", tier="hardware") == 1


def test_how_far_the_copies_of_the_log_are() -> None:
    late = backend.LogCopy("mirror", covered=7, behind=2, behind_ms=61_000, failures=3, error="no route")
    got = made(replace(QUIET, copies=(late,)))
    assert one(got, "pointcall_log_copy_entries", copy="mirror") == 7
    assert one(got, "pointcall_log_copy_behind_entries", copy="mirror") == 2
    assert one(got, "pointcall_log_copy_behind_seconds", copy="mirror") == 61
    assert one(got, "pointcall_log_copy_failures_total", copy="mirror") == 3
    assert one(got, "pointcall_log_copy_behind_entries", copy="witnesses") == 0


def test_one_look_at_the_status_serves_many_readers() -> None:
    looks, now = [], [0.0]

    def status() -> Any:
        looks.append(1)
        return QUIET

    metrics = Metrics(status, lambda: now[0])
    for _ in range(5):
        metrics.text()
    assert len(looks) == 1
    now[0] = 1.0
    metrics.text()
    assert len(looks) == 2


def test_a_counter_over_a_number_that_starts_anew_never_falls() -> None:
    rising = Rising()
    assert [rising.now(v) for v in (0, 5, 5, 9, 2, 3, 0, 1)] == [0, 5, 5, 9, 11, 12, 12, 13]


def test_a_run_is_counted_with_its_times() -> None:
    metrics = made()
    metrics.run(finished(act(started=3_000_000, ended=33_000_000)), BEGAN_NS + 40_000_000)
    assert one(metrics, "pointcall_runs_total", runbook="fix", event="CircuitOpened", mode="enforce") == 1
    assert one(metrics, "pointcall_actions_total", action="recreate", outcome="applied") == 1
    assert one(metrics, "pointcall_reaction_seconds_sum", action="recreate") == pytest.approx(0.003)
    assert one(metrics, "pointcall_action_seconds_sum", action="recreate") == pytest.approx(0.030)
    assert one(metrics, "pointcall_run_seconds_sum") == pytest.approx(0.040)
    assert one(metrics, "pointcall_decision_seconds_bucket", le="2e-05") == 1


def test_what_was_held_back_trapped_or_malformed_is_counted_too() -> None:
    metrics = made()
    refusal = Refusal("guard.rate", "a", "b", "c")
    metrics.run(finished(act(outcome=Outcome.REFUSED, refusal=refusal)), BEGAN_NS)
    metrics.run(finished(act(outcome=Outcome.REFUSED, known=False, name="rm -rf")), BEGAN_NS)
    metrics.run(finished(trap="fuel"), BEGAN_NS)
    assert one(metrics, "pointcall_actions_total", action="recreate", outcome="refused") == 1
    assert one(metrics, "pointcall_actions_total", action="malformed", outcome="refused") == 1
    assert one(metrics, "pointcall_traps_total", runbook="fix") == 1
    assert "rm -rf" not in metrics.text().decode()


def opened() -> CircuitEvent:
    return CircuitEvent(Kind.CIRCUIT_OPENED, BEGAN_NS, Destination(Address.parse("10.0.0.7"), 1), 5, 111, 0, 0)


def test_the_observer_counts_and_hands_on_in_order() -> None:
    log, metrics, seen = SampleLog(), made(), []
    log.refuse("guard.rate")  # before the start: not counted
    ear = Observer(metrics, log, lambda run, *_: seen.append(run.id))  # type: ignore[arg-type]
    log.refuse("guard.rate")
    log.refuse("manifest.expires")
    first, second = finished(), finished()
    second.id = "01K9RBZ0000000000000000001"
    for run in (first, second):
        ear.receipt(run)
    ear.record(opened())
    ear.look()
    ear.look()
    assert seen == [first.id, second.id]
    assert one(metrics, "pointcall_records_total", kind="circuit_opened") == 1
    assert one(metrics, "pointcall_refusals_total", check="guard.rate") == 1
    assert one(metrics, "pointcall_refusals_total", check="manifest.expires") == 1


def test_what_does_not_fit_is_counted_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "HEARD_MAX", 10)
    metrics = made()
    ear = Observer(metrics, SampleLog())  # type: ignore[arg-type]
    run = finished()
    for _ in range(25):
        ear.receipt(run)
        ear.record(opened())
    ear.look()
    assert one(metrics, "pointcall_telemetry_dropped_total", what="run") == 15
    assert one(metrics, "pointcall_telemetry_dropped_total", what="record") == 15
    assert one(metrics, "pointcall_records_total", kind="circuit_opened") == 10


def test_many_refusals_are_counted_over_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "REFUSALS_AT_ONCE", 3)
    log, metrics = SampleLog(), made()
    ear = Observer(metrics, log)  # type: ignore[arg-type]
    for _ in range(8):
        log.refuse("guard.rate")
    for _ in range(4):
        ear.look()
    assert one(metrics, "pointcall_refusals_total", check="guard.rate") == 8


def test_a_bug_in_counting_does_not_end_the_counting(caplog: pytest.LogCaptureFixture) -> None:
    metrics = made()
    ear = Observer(metrics, SampleLog(), lambda *_: 1 // 0)  # type: ignore[arg-type]
    ear.start()
    ear.receipt(finished())
    ear.record(opened())
    ear.stop()
    ear.stop()
    assert "ZeroDivisionError" in caplog.text
    assert one(metrics, "pointcall_records_total", kind="circuit_opened") == 1


def test_a_status_that_cannot_be_read_is_no_wrong_value() -> None:
    def status() -> Any:
        raise OSError("the map is gone")

    with pytest.raises(OSError, match="gone"):
        Metrics(status).text()


def test_a_session_that_starts_anew_does_not_lower_a_counter() -> None:
    now, holder = [0.0], SimpleNamespace(status=replace(QUIET, lost_events=7))
    metrics = Metrics(lambda: holder.status, lambda: now[0])
    assert one(metrics, "pointcall_records_lost_total") == 7
    holder.status, now[0] = replace(QUIET, lost_events=2), 9.0
    assert one(metrics, "pointcall_records_lost_total") == 9
