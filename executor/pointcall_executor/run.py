"""A run in progress: one event through to its receipt. Collects times and outcomes; makes the receipt at the end.

Not here: what happens (core/step.py), who does it (runs.py), how it is stored (journal.py).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pointcall_attest.receipt import (
    Acted,
    AttestationPart,
    CallPart,
    DecisionPart,
    Engine,
    GuardPart,
    Inputs,
    Receipt,
    RunbookPart,
    RunPart,
    Signer,
    Timeline,
    TimePart,
    Trigger,
)
from pointcall_attest.verdict import Tier
from pointcall_executor.core.guard import Refusal
from pointcall_executor.core.step import Runbook
from pointcall_runbook.vocabulary import (
    ACTIONS,
    MAX_ACTIONS,
    Action,
    Call,
    Channel,
    Event,
    Outcome,
    Service,
    capability,
    fields,
)

if TYPE_CHECKING:
    from pointcall_executor.session import Session

ReceiptOutcome = Literal["applied", "refused", "failed", "unconfirmed", "monitored"]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What every receipt of one key says alike."""

    node: str
    key: str  # sha256 hex of the SPKI
    manifest: str
    signers: tuple[Signer, ...]
    tier: Tier
    platform: str
    evidence: str
    engine: Engine
    blobs: Mapping[str, str]  # sensor -> sha256 of its blob
    boot_id: str
    names: Mapping[int, str] = field(default_factory=dict)  # of declared services and channels, by number


@dataclass(slots=True)
class Act:
    """One call of the decision and what became of it."""

    index: int
    call: Call
    action: Action | None = None
    refusal: Refusal | None = None
    target: str = ""
    outcome: Outcome | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    undo: str | None = None
    postcondition: str = ""
    intent: int | None = None
    intent_ns: int | None = None
    started_ns: int | None = None
    applied_ns: int | None = None  # it is in force; whether its post-condition holds is looked at next
    ended_ns: int | None = None
    over: bool = False  # the loop knows its outcome, and has done what follows from it


@dataclass(slots=True)
class Run:
    """One run. Filled in by runs.py as it goes; times are CLOCK_MONOTONIC ns.

    It belongs to the session and the epoch in which it was decided, and to a generation: what was decided before a
    disarming is not begun after it.
    """

    id: str
    number: int
    runbook: Runbook
    event: Event
    subject: str
    sensor: str
    args: tuple[int, ...]
    fuel_limit: int
    started: datetime
    event_ns: int
    received_ns: int
    session: Session
    epoch: Epoch
    generation: int
    decided_ns: int = 0
    calls: tuple[Call, ...] = ()
    fuel_used: int = 0
    trap: str | None = None
    acts: list[Act] = field(default_factory=list)
    closing: bool = False  # its receipt is being written
    receipt_index: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all its actions are over. An action that ends on another thread has an outcome a little earlier."""
        return all(act.over for act in self.acts)

    def receipt(self) -> Receipt:
        """The receipt of the finished run."""
        epoch = self.epoch
        assert all(act.outcome is not None for act in self.acts), f"run {self.id} has actions in flight"
        name = type(self.event).__name__
        return Receipt(
            run=RunPart(id=self.id, node=epoch.node, epoch=epoch.key, number=self.number, mode=self.runbook.mode),
            runbook=RunbookPart(
                name=self.runbook.name,
                version=self.runbook.version,
                module=self.runbook.module,
                manifest=epoch.manifest,
                signers=epoch.signers,
            ),
            trigger=Trigger(event=name, sensor=self.sensor, blob=epoch.blobs[self.sensor], at_ns=self.event_ns),
            inputs=Inputs(
                abi="rb1",
                handler=f"decide_{name}",
                values=self.args,
                fields=readable(self.event, epoch.names),
                engine=epoch.engine,
                fuel_limit=self.fuel_limit,
            ),
            decision=DecisionPart(
                calls=tuple(CallPart(action=c.action, args=c.args) for c in self.calls[:MAX_ACTIONS]),
                fuel_used=self.fuel_used,
                trap=self.trap,
            ),
            actions=tuple(_acted(act, epoch.names) for act in self.acts[:MAX_ACTIONS]),
            attestation=AttestationPart(tier=epoch.tier, platform=epoch.platform, evidence=epoch.evidence),
            timeline_ns=self._timeline(),
            time=TimePart(started=self.started, boot_id=epoch.boot_id),
        )

    def _timeline(self) -> Timeline:
        applied = [a for a in self.acts if a.outcome is Outcome.APPLIED and a.ended_ns is not None]
        first = min((a.applied_ns or a.started_ns for a in applied if a.started_ns is not None), default=None)
        return Timeline(
            event=self.event_ns,
            received=self.received_ns,
            decided=self.decided_ns,
            intent=min((a.intent_ns for a in self.acts if a.intent_ns is not None), default=None),
            applied=first,
            confirmed=max((a.ended_ns for a in applied if a.ended_ns is not None), default=None),
        )


def _acted(act: Act, names: Mapping[int, str]) -> Acted:
    refusal, outcome = act.refusal, act.outcome
    assert outcome is not None
    name: ReceiptOutcome = outcome.name.lower()  # type: ignore[assignment]
    return Acted(
        index=act.index,
        action=act.call.action,
        target=act.target,
        args=arguments(act, names),
        guard=GuardPart(
            outcome="refuse" if refusal else "permit",
            check=refusal.rule if refusal else "",
            why=f"want {refusal.want}, got {refusal.got}" if refusal else "",
        ),
        intent=act.intent,
        outcome=name,
        detail=dict(act.detail),
        undo=act.undo,
        started_ns=act.started_ns,
        ended_ns=act.ended_ns,
    )


def _text(value: object, names: Mapping[int, str]) -> str:
    match value:
        case enum.Enum():
            return value.name
        case bool():
            return str(value).lower()
        case Service(number) | Channel(number):
            return names.get(number, str(number))
        case _:
            return str(value)


def readable(thing: Event | Action, names: Mapping[int, str]) -> dict[str, str]:
    """The fields of an event or action as a person reads them; the raw values stand beside them in the receipt.

    `names` are those of services and channels by number.
    """
    return {f.name: _text(getattr(thing, f.name), names) for f in dataclasses.fields(thing)}  # type: ignore[arg-type]


def arguments(act: Act, names: Mapping[int, str]) -> dict[str, str]:
    """The arguments of one call, readable if it was well-formed."""
    if act.action is not None:
        return readable(act.action, names)
    known = ACTIONS.get(act.call.action)
    labels = [f.name for f in fields(known)] if known else []
    return {labels[i] if i < len(labels) else str(i): str(a) for i, a in enumerate(act.call.args)}


def grant_of(act: Act) -> str:
    """The grant in words, for the intent: which capability on which target."""
    assert act.action is not None
    return f"{capability(type(act.action))}:{act.target}"
