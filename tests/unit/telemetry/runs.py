"""Finished runs for tests of telemetry, made without an executor."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from pointcall_attest.receipt import Engine
from pointcall_executor.core.guard import Grant, Refusal
from pointcall_executor.core.step import Runbook
from pointcall_executor.run import Act, Epoch, Run
from pointcall_runbook.vocabulary import Address, Call, CircuitOpened, Outcome, Recreate, Service, slots

BEGAN_NS: Final = 5_000_000_000_000
RUN_ID: Final = "01K9RBZ0000000000000000000"
BOOK: Final = Runbook("fix", "1", "a" * 64, frozenset({"CircuitOpened"}), Grant(), "enforce")
EPOCH: Final = Epoch(
    "node-7", "e" * 64, "f" * 64, (), "emulated", "snp", "d" * 64,
    Engine(name="wasmtime", version="1", config="c" * 64), {"breaker": "b" * 64}, "boot", {7: "api"},
)  # fmt: skip


def act(
    *,
    outcome: Outcome = Outcome.APPLIED,
    started: int | None = None,
    ended: int | None = None,
    refusal: Refusal | None = None,
    known: bool = True,
    name: str = "recreate",
) -> Act:
    """One act; times are after the event."""
    action = Recreate(Service(7))
    made = Act(
        0, Call(name, (7, 0)) if not known else Call.of(action), action if known else None, refusal, "api", outcome
    )
    made.started_ns = None if started is None else BEGAN_NS + started
    made.ended_ns = None if ended is None else BEGAN_NS + ended
    if started is not None:
        made.intent, made.intent_ns = 17, BEGAN_NS + started - 1_000
    return made


def finished(*acts: Act, trap: str | None = None) -> Run:
    """A run over an opened circuit."""
    event = CircuitOpened(BEGAN_NS, Address.parse("10.0.0.7"), 5432, 5, False, 1, Service(7), 0)
    session: Any = None
    return Run(
        id=RUN_ID, number=0, runbook=BOOK, event=event, subject="x", sensor="breaker", args=slots(event), fuel_limit=60,
        started=datetime(2026, 11, 23, tzinfo=UTC), event_ns=BEGAN_NS, received_ns=BEGAN_NS + 41_000, session=session,
        epoch=EPOCH, generation=0, decided_ns=BEGAN_NS + 48_000, fuel_used=41, trap=trap, acts=list(acts),
        receipt_index=99,
    )  # fmt: skip
