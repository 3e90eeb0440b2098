"""The receipt of one run: what was seen, decided, permitted and done. Typed parts <-> bytes.

A receipt is the predicate of an in-toto statement whose subject digest covers inputs and decision. What is personal in
it is sealed (sealing.py): a `Receipt` is always the whole, its statement need not be.
Not here: signing (dsse.py), the log (log/), whether it is true (pack.py), deciding again (replay.py).
Spec: docs/spec/receipt.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field

from pointcall_attest import canonical, sealing, statement
from pointcall_attest.errors import MalformedError
from pointcall_attest.sealing import SEALED, Opening
from pointcall_attest.statement import (
    Count,
    Detail,
    Int64,
    Listed,
    Moment,
    Part,
    RunId,
    Sha256,
    Statement,
    Text,
    checked,
)
from pointcall_attest.verdict import Tier
from pointcall_runbook.vocabulary import MAX_ACTIONS, Call

RECEIPT_TYPE: Final = "https://pointcall.dev/recovery-run/v1"
MAX_VALUES: Final = 64  # event slots, parameters and remembered slots of one handler; rb1 allows fewer


class RunPart(Part):
    """Which run: `number` counts the runs of this epoch from 0."""

    id: RunId
    node: Text
    epoch: Sha256
    number: Count
    mode: Literal["monitor", "enforce"]


class Signer(Part):
    """Who signed the manifest, in the words of the certificate."""

    issuer: Text
    identity: Text


class RunbookPart(Part):
    """What decided."""

    name: Text
    version: Text
    module: Sha256
    manifest: Sha256
    signers: Annotated[tuple[Signer, ...], Listed]


class Trigger(Part):
    """What started the run. `blob` is the digest of the sensor's BPF loader blob; `at_ns` is CLOCK_MONOTONIC."""

    event: Text
    sensor: Text
    blob: Sha256
    at_ns: Int64


class Engine(Part):
    """What ran the module. `config` is the digest of the engine's canonical settings."""

    name: Text
    version: Text
    config: Sha256


class Inputs(Part):
    """Everything the module could see. `values` are its i64 arguments in ABI order; `fields` are the same, readable."""

    abi: Literal["rb1"]
    handler: Text
    values: Annotated[tuple[Int64, ...], Listed, Field(max_length=MAX_VALUES)]
    fields: dict[Text, Text]
    engine: Engine
    fuel_limit: Count


class CallPart(Part):
    """One call of a decision, as it left the module."""

    action: Text
    args: Annotated[tuple[Int64, ...], Listed, Field(max_length=16)]

    def call(self) -> Call:
        return Call(self.action, self.args)


class DecisionPart(Part):
    """What the module answered."""

    calls: Annotated[tuple[CallPart, ...], Listed, Field(max_length=MAX_ACTIONS)]
    fuel_used: Count
    trap: Text | None


class GuardPart(Part):
    """Whether the guard let an action through, and which of its checks decided."""

    outcome: Literal["permit", "refuse"]
    check: Text
    why: Text


class Acted(Part):
    """What became of one call. `intent` is the leaf index of its intent; `undo` says how to take it back."""

    index: Count
    action: Text
    target: Text
    args: dict[Text, Text]
    guard: GuardPart
    intent: Count | None
    outcome: Literal["applied", "refused", "failed", "unconfirmed", "monitored"]
    detail: Detail
    undo: Text | None
    started_ns: Int64 | None
    ended_ns: Int64 | None


class AttestationPart(Part):
    """Under which evidence the epoch key works; the proof is in the epoch-open entry."""

    tier: Tier
    platform: Text
    evidence: Sha256


class Timeline(Part):
    """CLOCK_MONOTONIC ns of each step; null where the step did not happen."""

    event: Int64
    received: Int64
    decided: Int64
    intent: Int64 | None
    applied: Int64 | None
    confirmed: Int64 | None


class TimePart(Part):
    """Wall clock of the node when the run began: untrusted, for people."""

    started: Moment
    boot_id: Text


class Receipt(Part):
    """One run, whole. Build it with keyword arguments; `.sealed()` makes what the epoch key signs."""

    run: RunPart
    runbook: RunbookPart
    trigger: Trigger
    inputs: Inputs
    decision: DecisionPart
    actions: Annotated[tuple[Acted, ...], Listed, Field(max_length=MAX_ACTIONS)]
    attestation: AttestationPart
    timeline_ns: Timeline
    time: TimePart

    def sha256(self) -> str:
        """The subject digest of a receipt in clear."""
        return subject_digest(self.model_dump(mode="json", include={"inputs", "decision"}))

    def payload(self) -> bytes:
        """The canonical in-toto statement with everything in clear: the form of receipts before they were sealed."""
        return self._encoded(self.model_dump(mode="json"))

    def sealed(self, salt: bytes) -> tuple[bytes, Opening]:
        """The canonical in-toto statement with the personal parts under a commitment, and what opens it."""
        body, opening = sealing.seal("receipt", self.model_dump(mode="json"), salt)
        return self._encoded(body), opening

    def _encoded(self, body: dict[str, Any]) -> bytes:
        return statement.encode(Statement(RECEIPT_TYPE, f"run/{self.run.id}", subject_digest(body), body))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """The inverse of `payload`. MalformedError `json.*`, `statement.form` or `receipt.form`.

        The subject digest is not compared here: that is a check of its own (`receipt.subject`).
        """
        return cls.of(statement.parse(payload))

    @classmethod
    def of(cls, form: Statement) -> Self:
        """The receipt inside a statement in clear; a sealed one is opened before (entry.py)."""
        if form.predicate_type != RECEIPT_TYPE:
            raise MalformedError("not a receipt", id="receipt.form", want=RECEIPT_TYPE, got=form.predicate_type[:80])
        receipt = checked(cls, form.predicate, "receipt.form")
        if form.subject != f"run/{receipt.run.id}":
            raise MalformedError(
                "the receipt is about another run", id="receipt.form", want=f"run/{receipt.run.id}", got=form.subject
            )
        return receipt


def subject_digest(body: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over inputs and decision of a predicate in canonical JSON; where it is sealed, over the commitment
    too: so it covers everything and lets nobody guess what is hidden."""
    return canonical.digest({name: body[name] for name in ("inputs", "decision", SEALED) if name in body})
