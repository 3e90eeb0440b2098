"""One trace for each run: event, decision, actions and receipt as spans, at the run's own times.

The trace id is the run id (both are 128 bits), so a trace leads to its receipt and back without a table. Monotonic
times become wall-clock times with one offset a run, taken when the run is heard of: a step of the wall clock moves a
whole trace and never bends one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import Tracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode

from pointcall_executor.run import Act, Run, readable
from pointcall_runbook.vocabulary import Outcome

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_BAD: Final = (Outcome.FAILED, Outcome.UNCONFIRMED)


def trace_id_of(run_id: str) -> int:
    """The 128 bits of a run id: Crockford base32."""
    number = 0
    for character in run_id:
        number = number << 5 | _ALPHABET.index(character)
    return number


class RunIds(IdGenerator):
    """Gives the trace id that was set; span ids are drawn. For one thread."""

    def __init__(self) -> None:
        self.trace_id = 1
        self._chance = random.Random()  # noqa: S311 - ids, not secrets

    def generate_span_id(self) -> int:
        return self._chance.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        return self.trace_id


class Traces:
    """Makes the spans of finished runs. Called from one thread."""

    def __init__(self, provider: TracerProvider, ids: RunIds, version: str) -> None:
        self._ids = ids
        self._tracer: Tracer = provider.get_tracer("pointcall", version)  # type: ignore[assignment]

    def run(self, run: Run, durable_ns: int, offset_ns: int) -> None:
        """Emit the trace of a finished run. `offset_ns` makes wall-clock times of monotonic ones."""
        self._ids.trace_id = trace_id_of(run.id)
        root = self._tracer.start_span(
            f"run {run.runbook.name}", kind=SpanKind.INTERNAL, start_time=run.event_ns + offset_ns,
            context=trace.set_span_in_context(trace.INVALID_SPAN), attributes=_of_run(run),
        )  # fmt: skip
        within = trace.set_span_in_context(root)

        def span(name: str, begin_ns: int, end_ns: int, attributes: Mapping[str, Any]) -> Any:
            made = self._tracer.start_span(name, within, start_time=begin_ns + offset_ns, attributes=dict(attributes))
            made.end(max(begin_ns, end_ns) + offset_ns)
            return made

        fields = {f"pointcall.event.{k}": v for k, v in readable(run.event, run.epoch.names).items()}
        span("event", run.event_ns, run.received_ns, {"pointcall.sensor": run.sensor} | fields)
        fuel = {"pointcall.fuel.used": run.fuel_used, "pointcall.fuel.limit": run.fuel_limit}
        span("decision", run.received_ns, run.decided_ns, fuel)
        for act in run.acts:
            self._act(act, run, within, offset_ns)
        acted_ns = max((a.ended_ns for a in run.acts if a.ended_ns is not None), default=run.decided_ns)
        span("receipt", acted_ns, durable_ns, {"pointcall.receipt.index": run.receipt_index or 0})
        if run.trap is not None or any(a.outcome in _BAD for a in run.acts):
            root.set_status(Status(StatusCode.ERROR, run.trap or "an action failed"))
        root.end(durable_ns + offset_ns)

    def _act(self, act: Act, run: Run, within: Any, offset_ns: int) -> None:
        begin_ns = act.started_ns if act.started_ns is not None else run.decided_ns
        end_ns = act.ended_ns if act.ended_ns is not None else begin_ns
        outcome = act.outcome.name.lower() if act.outcome is not None else "refused"
        attributes = {"pointcall.action": act.call.action, "pointcall.target": act.target, "pointcall.outcome": outcome}
        if act.refusal is not None:
            attributes |= {"pointcall.guard.check": act.refusal.rule, "pointcall.guard.hint": act.refusal.hint}
        made = self._tracer.start_span(
            f"action {act.call.action}", within, start_time=begin_ns + offset_ns, attributes=attributes
        )
        if act.intent_ns is not None:
            made.add_event("intent is durable", {"pointcall.intent.index": act.intent or 0}, act.intent_ns + offset_ns)
        if act.outcome in _BAD:
            made.set_status(Status(StatusCode.ERROR, outcome))
        made.end(max(begin_ns, end_ns) + offset_ns)


def _of_run(run: Run) -> dict[str, Any]:
    return {
        "pointcall.run": run.id,
        "pointcall.runbook": run.runbook.name,
        "pointcall.runbook.version": run.runbook.version,
        "pointcall.mode": run.runbook.mode,
        "pointcall.event": type(run.event).__name__,
        "pointcall.manifest": run.epoch.manifest,
        "pointcall.epoch": run.epoch.key,
        "pointcall.tier": run.epoch.tier,
    }
