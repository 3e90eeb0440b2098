"""Runs as a reader sees them: typed fields of receipts, with every foreign text escaped and capped.

Reading only: this room gets a `Reader` and has no other way to the journal. A Run is a view for people and agents; what
an auditor verifies are the bytes of the receipt itself. Spec: docs/spec/api.md section 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pointcall_attest.entry import Entry, Kind
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.proof import Proof
from pointcall_attest.printable import shown
from pointcall_attest.receipt import Acted, Receipt
from pointcall_attest.run_id import is_run_id
from pointcall_executor.agent_api.errors import NotFoundError, RequestError

MAX_PAGE: Final = 100
DEFAULT_PAGE: Final = 25
MAX_CASES: Final = 200  # recorded events that a proposal is simulated on
WINDOW: Final = 512  # entries looked through at once when reading backwards; a run has about four
MAX_PAIRS: Final = 32  # of one mapping; the largest real one has 9
_STEPS: Final = ("event", "received", "decided", "intent", "applied", "confirmed")


class Reader(Protocol):
    """What this room needs of the journal; JournalReader has it."""

    @property
    def size(self) -> int:
        """How many entries there are."""

    def entries(
        self, kind: Kind | None = None, run: str | None = None, start: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        """Entries from index `start` on, oldest first, at most `limit`."""

    def head(self) -> Checkpoint | None:
        """The newest checkpoint."""

    def proof(self, index: int, checkpoint: Checkpoint) -> Proof:
        """The place of an entry under a checkpoint that covers it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a decision, raw."""

    action: str
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Action:
    """What became of one call. Times are CLOCK_MONOTONIC ns, 0 where it did not start."""

    index: int
    action: str
    target: str
    args: Mapping[str, str]
    guard: str
    guard_check: str
    why: str
    outcome: str
    detail: Mapping[str, str]
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `fields` are the event's, readable; `timeline_ns` has the steps that happened."""

    id: str
    node: str
    epoch: str
    mode: str
    runbook: str
    runbook_version: str
    module_sha256: str
    manifest_sha256: str
    event: str
    sensor: str
    fields: Mapping[str, str]
    decision: tuple[Call, ...]
    fuel_used: int
    fuel_limit: int
    trap: str
    actions: tuple[Action, ...]
    timeline_ns: Mapping[str, int]
    tier: str
    platform: str
    started: str
    receipt_index: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of runs; `next` is the token of the page after it, empty on the last one."""

    runs: tuple[Run, ...]
    next: str


def page(reader: Reader, *, size: int, token: str) -> Page:
    """Newest runs first. RequestError for a size above MAX_PAGE or a token that no page gave."""
    if not 0 <= size <= MAX_PAGE:
        raise RequestError("the page is too large", id="api.page", want=f"at most {MAX_PAGE}", got=str(size))
    size = size or DEFAULT_PAGE
    found = newest(reader, before=_before(token), limit=size + 1)
    runs = tuple(run(e) for e in found[:size])
    return Page(runs, str(found[size - 1].index) if len(found) > size else "")


def newest(reader: Reader, *, before: int | None, limit: int) -> list[Entry]:
    """Receipts with an index below `before` (None: all), newest first. The journal is read backwards in windows."""
    end = reader.size if before is None else min(before, reader.size)
    found: list[Entry] = []
    while end > 0 and len(found) < limit:
        start = max(0, end - WINDOW)
        window = reader.entries("receipt", start=start, limit=WINDOW)
        found += [e for e in reversed(window) if e.index < end]
        end = start
    return found[:limit]


def _before(token: str) -> int | None:
    if not token:
        return None
    if not (token.isascii() and token.isdecimal() and len(token) <= 18):
        raise RequestError(
            "that is no page token", id="api.page", want="the token of the page before", got=shown(token, 40)
        )
    return int(token)


def find(reader: Reader, run_id: str) -> Entry:
    """The receipt of a run. RequestError for an id that is none; NotFoundError where there is no receipt."""
    if not is_run_id(run_id):
        raise RequestError("that is no run id", id="api.run-id", want="26 characters, base32", got=shown(run_id, 40))
    found = reader.entries("receipt", run_id, limit=1)
    if not found:
        raise NotFoundError("no receipt of that run", got=run_id, hint="a run that still goes on has none yet")
    return found[0]


def proof(reader: Reader, entry: Entry) -> bytes:
    """The entry's C2SP tlog-proof under the newest checkpoint, or nothing while no checkpoint covers it."""
    head = reader.head()
    if head is None or entry.index >= head.size:
        return b""
    return reader.proof(entry.index, head).encode()


def run(entry: Entry) -> Run:
    """The view of one receipt entry."""
    receipt = entry.receipt()
    return Run(
        id=receipt.run.id,
        node=shown(receipt.run.node),
        epoch=receipt.run.epoch,
        mode=receipt.run.mode,
        runbook=shown(receipt.runbook.name),
        runbook_version=shown(receipt.runbook.version),
        module_sha256=receipt.runbook.module,
        manifest_sha256=receipt.runbook.manifest,
        event=shown(receipt.trigger.event),
        sensor=shown(receipt.trigger.sensor),
        fields=_pairs(receipt.inputs.fields),
        decision=tuple(Call(shown(c.action), c.args) for c in receipt.decision.calls),
        fuel_used=receipt.decision.fuel_used,
        fuel_limit=receipt.inputs.fuel_limit,
        trap=shown(receipt.decision.trap or ""),
        actions=tuple(_action(a) for a in receipt.actions),
        timeline_ns=_timeline(receipt),
        tier=receipt.attestation.tier,
        platform=shown(receipt.attestation.platform),
        started=receipt.time.started.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        receipt_index=entry.index,
    )


def _action(acted: Acted) -> Action:
    return Action(
        index=acted.index,
        action=shown(acted.action),
        target=shown(acted.target),
        args=_pairs(acted.args),
        guard=acted.guard.outcome,
        guard_check=shown(acted.guard.check),
        why=shown(acted.guard.why),
        outcome=acted.outcome,
        detail=_pairs(acted.detail),
        started_ns=acted.started_ns or 0,
        ended_ns=acted.ended_ns or 0,
    )


def _timeline(receipt: Receipt) -> dict[str, int]:
    steps = ((step, getattr(receipt.timeline_ns, step)) for step in _STEPS)
    return {step: at for step, at in steps if at is not None}


def _pairs(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Names and values as escaped text; what is not text is shown as JSON. More than MAX_PAIRS are cut."""
    pairs = list(mapping.items())[:MAX_PAIRS]
    return {shown(k, 64): shown(v if isinstance(v, str) else json.dumps(v, ensure_ascii=True)) for k, v in pairs}


def cases(reader: Reader, limit: int = MAX_CASES) -> list[dict[str, Any]]:
    """The newest recorded events with what was decided then, as plain data for an examination."""
    return [_case(e.receipt()) for e in newest(reader, before=None, limit=limit) if not e.closed]


def _case(receipt: Receipt) -> dict[str, Any]:
    return {
        "run": receipt.run.id,
        "event": receipt.trigger.event,
        "runbook": shown(receipt.runbook.name),
        "fields": _pairs(receipt.inputs.fields),
        "values": [str(v) for v in receipt.inputs.values],
        "calls": [{"action": c.action, "args": [str(a) for a in c.args]} for c in receipt.decision.calls],
    }
