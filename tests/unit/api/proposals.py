"""Proposals for tests, as if they had been examined."""

from __future__ import annotations

import hashlib
from typing import Any

from pointcall_executor.agent_api.examination import Capability, CheckRow, Difference
from pointcall_executor.agent_api.proposal import Proposal

RUN = "01M83PPH010000000000000000"


def proposal(source: str = "x = 1\n", rationale: str = "Because.", **over: Any) -> Proposal:
    parts: dict[str, Any] = {
        "id": "p-" + "0" * 24,
        "name": "cache-breaker",
        "author": "agent-1",
        "submitted": "2026-11-23T08:00:00Z",
        "state": "open",
        "rationale": rationale,
        "source": source,
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "module_sha256": "a" * 64,
        "checks": (CheckRow(id="proposal.compiles", outcome="pass"),),
        "capabilities": (Capability(event="CircuitOpened", actions=("recreate",), fuel_bound=59),),
        "simulated": 1,
        "differences": (
            Difference(
                run=RUN,
                event="CircuitOpened",
                fields={"port": "5432"},
                recorded_runbook="refusing-dependency",
                recorded=("recreate(service=db, grace=0)",),
                proposed=(),
                same=False,
                case={"name": f"run {RUN}", "event": "CircuitOpened", "fields": {"port": 5432}, "calls": []},
            ),
        ),
    }
    return Proposal(**(parts | over))
