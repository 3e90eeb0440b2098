"""Every metric as one row: name, kind, labels, unit, meaning. docs/spec/metrics.md has the same rows (a test compares).

A name is there for good: a metric may be added, never renamed. Labels take values from closed or declared sets only, so
the number of series is bounded by the manifest; `device` alone is bounded by a number (latencies.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Seconds. The loop's own targets are 100 us and 1 ms; a recreation takes milliseconds to seconds.
BUCKETS: Final = (
    0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
    30.0,
)  # fmt: skip

STORAGE: Final = "pointcall_storage_seconds"  # the one histogram that the kernel keeps


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `unit` is a UCUM code as OpenTelemetry wants it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    unit: str
    help: str


METRICS: Final = (
    # What the executor is.
    Metric("pointcall_build_info", "gauge", ("version",), "1", "1; the version is the label"),
    Metric("pointcall_evidence_info", "gauge", ("platform", "tier"), "1", "1; what the node's own evidence is worth"),
    Metric("pointcall_ready", "gauge", (), "1", "1 while something is armed and the executor runs"),
    Metric("pointcall_state", "gauge", ("state",), "1", "1 for the state that it is in, 0 for the others"),
    Metric("pointcall_beats_total", "counter", (), "{turn}", "turns of the core's loop"),
    Metric("pointcall_uptime_seconds", "gauge", (), "s", "since the executor started"),
    # What is armed.
    Metric("pointcall_manifest_sequence", "gauge", (), "1", "sequence of the armed manifest, 0 for none"),
    Metric(
        "pointcall_manifest_expires_timestamp_seconds", "gauge", (), "s", "Unix time, 0 for none"
    ),
    Metric("pointcall_runbooks", "gauge", ("mode", "state"), "{runbook}", "armed or quarantined runbooks"),
    Metric("pointcall_programs", "gauge", (), "{program}", "BPF programs that are loaded for the armed manifest"),
    Metric("pointcall_programs_checked_age_seconds", "gauge", (), "s", "since they were compared with what was armed"),
    Metric("pointcall_epoch_age_seconds", "gauge", (), "s", "age of the receipt key and of the evidence that binds it"),
    # What is held back.
    Metric("pointcall_pause_left_seconds", "gauge", (), "s", "until a pause ends by itself, 0 for none"),
    Metric("pointcall_storm_left_seconds", "gauge", (), "s", "until actions are permitted again after a storm"),
    Metric("pointcall_refusals_total", "counter", ("check",), "{refusal}", "refusals since the start, by id"),
    # What happens.
    Metric("pointcall_records_total", "counter", ("kind",), "{record}", "kernel records that were taken, by kind"),
    Metric("pointcall_records_lost_total", "counter", (), "{record}", "kernel records that could not be delivered"),
    Metric("pointcall_runs_total", "counter", ("runbook", "event", "mode"), "{run}", "runs with a receipt"),
    Metric("pointcall_traps_total", "counter", ("runbook",), "{run}", "runs whose module trapped"),
    Metric("pointcall_actions_total", "counter", ("action", "outcome"), "{action}", "actions of runs, by outcome"),
    Metric("pointcall_targets_in_flight", "gauge", (), "{target}", "targets that an action is working on"),
    Metric("pointcall_services", "gauge", ("state",), "{service}", "declared services, by state"),
    Metric("pointcall_circuits", "gauge", ("state",), "{circuit}", "armed circuits, by state"),
    Metric(
        "pointcall_connects_refused_total", "counter", (), "{connect}",
        "connects that the gates turned away, none in mode monitor",
    ),
    # How long it takes.
    Metric("pointcall_receive_seconds", "histogram", (), "s", "from the kernel's record to the loop that takes it"),
    Metric("pointcall_decision_seconds", "histogram", (), "s", "from taking a record to the decision about it"),
    Metric("pointcall_reaction_seconds", "histogram", ("action",), "s", "from the record to the action's begin"),
    Metric("pointcall_action_seconds", "histogram", ("action",), "s", "from an action's begin to its end"),
    Metric("pointcall_run_seconds", "histogram", (), "s", "from the kernel's record to the durable receipt"),
    Metric(
        STORAGE, "histogram", ("sensor", "service", "device", "operation"), "s",
        "how long operations on storage took, as the kernel saw it",
    ),
    # The log.
    Metric("pointcall_log_entries", "gauge", (), "{entry}", "entries of the log"),
    Metric("pointcall_log_unsigned_entries", "gauge", (), "{entry}", "entries after the newest checkpoint"),
    Metric("pointcall_journal_bytes", "gauge", (), "By", "size of the journal on disk"),
    Metric("pointcall_log_copy_entries", "gauge", ("copy",), "{entry}", "entries that witnesses or the mirror have"),
    Metric("pointcall_log_copy_behind_entries", "gauge", ("copy",), "{entry}", "entries that they do not have yet"),
    Metric("pointcall_log_copy_behind_seconds", "gauge", ("copy",), "s", "since when they do not have everything"),
    Metric("pointcall_log_copy_failures_total", "counter", ("copy",), "{try}", "tries to reach them that failed"),
    # This page's own losses.
    Metric("pointcall_telemetry_dropped_total", "counter", ("what",), "{item}", "runs or records that no metric shows"),
)  # fmt: skip
