"""One entry of the log: leaf bytes <-> Entry, and the body of every kind.

An entry is a DSSE envelope over an in-toto statement; its kind says what the body is. Receipts are entries with a
predicate type of their own (receipt.py). Nothing here checks a signature: an Entry is well-formed, not authentic.
Spec: docs/spec/journal.md section 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field

from pointcall_attest import canonical, dsse, sealing, statement
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.tree import leaf_hash
from pointcall_attest.receipt import RECEIPT_TYPE, Receipt, subject_digest
from pointcall_attest.run_id import is_run_id
from pointcall_attest.sealing import SEALED, SEALED_KINDS, Opening
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

ENTRY_TYPE: Final = "https://pointcall.dev/entry/v1"
Kind = Literal[
    "epoch-open",
    "intent",
    "outcome",
    "receipt",
    "refusal",
    "lost",
    "config",
    "proposal",
    "access",
    "prune",
    "erase",
    "epoch-close",
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
MAX_ERASED: Final = 256  # commitments that one erase entry names: 16 kB; more take several


class Body(Part):
    """Base of all bodies; the class is the kind."""


class EpochOpen(Body):
    """A key begins to work: what it is bound to, and what is armed. `public_key` is the SPKI in base64."""

    node: Text
    platform: Text
    tier: Tier
    evidence: Sha256
    nonce: Sha256
    public_key: Annotated[str, Field(max_length=200)]
    checkpoint_key: Annotated[str, Field(max_length=400)]
    manifest: Sha256
    bundles: Annotated[tuple[Sha256, ...], Listed]
    policy: Sha256
    trusted_root: Sha256
    sequence: Count
    previous_epoch: Sha256 | None
    executor: Text
    engine: Detail
    verdict: Detail


class Intent(Body):
    """An action is about to be tried."""

    action: Text
    target: Text
    args: dict[Text, Text]
    grant: Text


class OutcomeBody(Body):
    """What became of an action."""

    action: Text
    target: Text
    outcome: Literal["applied", "refused", "failed", "unconfirmed", "monitored"]
    detail: Detail
    postcondition: Text
    undo: Text | None


class Refusal(Body):
    """Something was not armed, not decided or not done."""

    check: Text
    what: Text
    want: Text
    got: Text
    hint: Text


class Lost(Body):
    """Events that a sensor could not deliver: exactly this many."""

    sensor: Text
    count: Count


class Config(Body):
    """A setting of the executor changed."""

    what: Text
    detail: Detail


class ProposalBody(Body):
    """An agent or a person proposed a runbook."""

    id: Text
    name: Text
    sha256: Sha256
    author: Text
    state: Text
    checks: Detail


class Access(Body):
    """Who read what, counted."""

    role: Text
    method: Text
    count: Count


class Prune(Body):
    """Entries below `minimum` need no longer be served; their hashes stay. `retention_days`: all were older than that;
    None in entries that state no retention."""

    minimum: Count
    reason: Text
    retention_days: Count | None = None


class Erase(Body):
    """Clear texts were deleted: those behind these commitments, and all of entries below `below`. The leaves stay."""

    commitments: Annotated[tuple[Sha256, ...], Listed, Field(max_length=MAX_ERASED)]
    reason: Text
    below: Count = 0

    def covers(self, entry: Entry) -> bool:
        """Whether it says that the clear text of this entry was deleted."""
        return entry.index < self.below or entry.commitment in self.commitments


class EpochClose(Body):
    """The last entry of a key: the next one that it vouches for, or null."""

    reason: Text
    next: Sha256 | None


BODIES: Final[Mapping[Kind, type[Body]]] = {
    "epoch-open": EpochOpen,
    "intent": Intent,
    "outcome": OutcomeBody,
    "refusal": Refusal,
    "lost": Lost,
    "config": Config,
    "proposal": ProposalBody,
    "access": Access,
    "prune": Prune,
    "erase": Erase,
    "epoch-close": EpochClose,
}
_KIND_OF: Final[Mapping[type[Body], Kind]] = {body: kind for kind, body in BODIES.items()}
assert {*BODIES, "receipt"} == set(KINDS)


@dataclass(frozen=True, slots=True)
class Entry:
    """A well-formed entry. For a receipt `body` is its predicate; `subject` is the digest that the statement claims.

    `body` is whole where the entry is in clear or was opened; where it is sealed and there is no opening,
    `sealing.HIDDEN` and nothing stand in the personal places. `leaf` is what was signed.
    """

    index: int
    kind: Kind
    run: str | None
    at: datetime
    ktime_ns: int
    epoch: str
    body: Mapping[str, Any]
    leaf_hash: bytes
    raw: bytes
    subject: str
    leaf: Mapping[str, Any]
    opening: Opening | None = None

    @property
    def commitment(self) -> str | None:
        """What the personal parts are sealed under (hex); None for an entry that has none, or has them in clear."""
        found = self.leaf.get(SEALED)
        return None if found is None else str(found)

    @property
    def closed(self) -> bool:
        """Whether the personal parts are not at hand: erased, or not given."""
        return self.commitment is not None and self.opening is None

    def without_opening(self) -> Entry:
        """The same entry as somebody reads it who has the leaf only."""
        return self if self.opening is None else parse_entry(self.index, self.raw)

    @property
    def subject_holds(self) -> bool:
        """Whether the subject digest is that of the leaf (of inputs and decision, for a receipt)."""
        digest = subject_digest if self.kind == "receipt" else canonical.digest
        return digest(self.leaf) == self.subject

    def typed(self) -> Body:
        """The body as its type. AssertionError for a receipt: use `receipt()`."""
        return BODIES[self.kind].model_validate(self.body)

    def receipt(self) -> Receipt:
        """The receipt. AssertionError for any other kind."""
        assert self.kind == "receipt", f"entry {self.index} is a {self.kind}"
        return Receipt.model_validate(self.body)


def payload(body: Body, *, at: datetime, ktime_ns: int, epoch: str, run: str | None = None) -> bytes:
    """The statement of an entry in clear, to be signed by the epoch key. `ktime_ns` is CLOCK_MONOTONIC."""
    kind = _KIND_OF[type(body)]
    return _encoded(kind, body.model_dump(mode="json"), at, ktime_ns, epoch, run)


def sealed(
    body: Body, *, at: datetime, ktime_ns: int, epoch: str, run: str | None = None, salt: bytes
) -> tuple[bytes, Opening | None]:
    """The same with the personal parts under a commitment, and what opens it; None for a kind that has none."""
    kind, data = _KIND_OF[type(body)], body.model_dump(mode="json")
    if kind not in SEALED_KINDS:
        return _encoded(kind, data, at, ktime_ns, epoch, run), None
    leaf, opening = sealing.seal(kind, data, salt)
    return _encoded(kind, leaf, at, ktime_ns, epoch, run), opening


def _encoded(kind: str, data: dict[str, Any], at: datetime, ktime_ns: int, epoch: str, run: str | None) -> bytes:
    body = canonical.dumps(data, depth=2)  # once, and the rest by hand: an action waits for this
    assert run is None or is_run_id(run), f"{run!r} is no run id"
    about = "null" if run is None else f'"{run}"'
    head = f'{{"at":"{statement.rfc3339(at)}","body":'
    tail = f',"epoch":"{epoch}","kind":"{kind}","ktime_ns":"{ktime_ns}","run":{about}}}'
    predicate = head.encode() + body + tail.encode()
    return statement.around(predicate, ENTRY_TYPE, f"entry/{kind}", hashlib.sha256(body).hexdigest())


class _Predicate(Part):
    kind: Literal[tuple(BODIES)]  # type: ignore[valid-type]
    at: Moment
    ktime_ns: Int64
    epoch: Sha256
    run: RunId | None
    body: dict[str, Any]


def parse_entry(index: int, raw: bytes, opening: Opening | None = None) -> Entry:
    """MalformedError `dsse.*`, `json.*`, `statement.form`, `entry.form`, `entry.opening` or `receipt.form`.

    Also where the epoch that the payload names is not the key that the envelope names. `opening` opens a sealed entry.
    """
    envelope = dsse.parse(raw)
    form = statement.parse(envelope.payload)
    read = _receipt if form.predicate_type == RECEIPT_TYPE else _entry
    found = read(index, raw, form, opening)
    if opening is not None and found.commitment is None:
        raise MalformedError(f"entry {index} has nothing to open", id="entry.opening", want="no opening", got="one")
    if found.epoch != envelope.keyid:
        raise MalformedError(
            f"entry {index} names another epoch than its key", id="entry.form", want=envelope.keyid, got=found.epoch
        )
    return found


Outline = tuple[Kind, str | None]  # kind and run of an entry: what a journal files it under


def outline_of(body: Body, run: str | None) -> Outline:
    """What `outline` would find in the leaf of this body."""
    return _KIND_OF[type(body)], run


def outline(raw: bytes) -> Outline:
    """Kind and run of an entry that was just built: what a journal files it under, four times as fast as `parse_entry`.

    MalformedError for what is no envelope or names no kind; whether every part has its form is not looked at.
    """
    try:
        form = json.loads(dsse.parse(raw).payload)
        if form["predicateType"] == RECEIPT_TYPE:
            return "receipt", _run_id(form["predicate"]["run"]["id"])
        kind, run = form["predicate"]["kind"], form["predicate"]["run"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedError("not a log entry", id="entry.form", got=repr(error)[:120]) from None
    if form["predicateType"] != ENTRY_TYPE or kind not in BODIES:
        raise MalformedError("not a log entry", id="entry.form", want=ENTRY_TYPE, got=str(kind)[:80])
    return kind, None if run is None else _run_id(run)


def _run_id(text: object) -> str:
    if not isinstance(text, str) or not is_run_id(text):
        raise MalformedError("not a run id", id="entry.form", got=str(text)[:80])
    return text


def _entry(index: int, raw: bytes, form: Statement, opening: Opening | None) -> Entry:
    if form.predicate_type != ENTRY_TYPE:
        raise MalformedError("not a log entry", id="entry.form", want=ENTRY_TYPE, got=form.predicate_type[:80])
    outer = checked(_Predicate, form.predicate, "entry.form")
    body = outer.body
    if SEALED in body and outer.kind in SEALED_KINDS:
        body = sealing.unseal(outer.kind, body, opening)
    checked(BODIES[outer.kind], body, "entry.form")
    if form.subject != f"entry/{outer.kind}":
        raise MalformedError("the subject is of another kind", id="entry.form", want=outer.kind, got=form.subject[:80])
    return Entry(
        index,
        outer.kind,
        outer.run,
        outer.at,
        outer.ktime_ns,
        outer.epoch,
        body,
        leaf_hash(raw),
        raw,
        form.sha256,
        outer.body,
        opening,
    )


def _receipt(index: int, raw: bytes, form: Statement, opening: Opening | None) -> Entry:
    leaf = form.predicate
    body = sealing.unseal("receipt", leaf, opening) if SEALED in leaf else leaf
    receipt = Receipt.of(replace(form, predicate=body))
    return Entry(
        index,
        "receipt",
        receipt.run.id,
        receipt.time.started,
        receipt.trigger.at_ns,
        receipt.run.epoch,
        body,
        leaf_hash(raw),
        raw,
        form.sha256,
        leaf,
        opening,
    )
