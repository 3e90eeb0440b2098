"""The questions that a control may put to the log, each answered by counting. One function a question, one table.

An answer never guesses: nothing to count is `no data`, which is not the same as `not satisfied`. New questions are new
rows; controls.toml refers to them by id. Spec: docs/spec/report.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pointcall_attest.entry import Entry
from pointcall_attest.receipt import Acted, Receipt
from pointcall_attest.report.model import Answer
from pointcall_attest.report.population import Examined
from pointcall_attest.verdict import Tier

MAX_FAILING: Final = 100  # leaf indices that one answer names


@dataclass(frozen=True)
class Facts:
    """What questions are asked about: the entries, their receipts, what the report found itself, and the replays."""

    entries: Sequence[Entry]
    receipts: Mapping[int, Receipt]
    examined: Examined
    replays: Mapping[str, bool]
    accepted: Mapping[int, Tier | None]  # epoch-open that was appraised -> the tier of its evidence, None: refused
    witnesses: int = 0
    by_kind: Mapping[str, Sequence[Entry]] = field(default_factory=dict)

    def of(self, kind: str) -> Sequence[Entry]:
        return self.by_kind.get(kind, ())


Held = Mapping[int, bool]  # leaf index -> whether it held there


def _own_check(id: str) -> Callable[[Facts], Held]:
    def held(facts: Facts) -> Held:
        """Every entry shares the fate of the check, so that the population is the whole log."""
        (outcome,) = (c.outcome for c in facts.examined.checks if c.id == id)
        return {} if outcome == "not-checked" else {e.index: outcome == "pass" for e in facts.entries}

    return held


def _signed(facts: Facts) -> Held:
    return {e.index: e.index not in facts.examined.unsigned for e in facts.entries}


def _vouched(facts: Facts) -> Held:
    return {e.index: e.index not in facts.examined.unvouched for e in facts.of("epoch-open")}


def _received(facts: Facts) -> Held:
    return {e.index: e.index not in facts.examined.without_receipt for e in facts.of("intent")}


def _attested(facts: Facts) -> Held:
    """What the node itself recorded about its evidence counts for nothing here."""
    tiers = {e.epoch: facts.accepted[e.index] for e in facts.of("epoch-open") if e.index in facts.accepted}
    return {i: tiers[r.run.epoch] is not None for i, r in facts.receipts.items() if r.run.epoch in tiers}


def _hardware(facts: Facts) -> Held:
    return {i: tier == "hardware" for i, tier in facts.accepted.items()}


def _runbook_signed(facts: Facts) -> Held:
    armed = {(e.epoch, e.body["manifest"]) for e in facts.of("epoch-open")}
    opened = _opened(facts)
    return {i: bool(r.runbook.signers) and (r.run.epoch, r.runbook.manifest) in armed for i, r in opened.items()}


def _opened(facts: Facts) -> Mapping[int, Receipt]:
    """The receipts whose names and inputs were not erased since: of the others nothing is asked about these."""
    closed = {e.index for e in facts.of("receipt") if e.closed}
    return {i: r for i, r in facts.receipts.items() if i not in closed}


def _content(facts: Facts) -> Held:
    return {
        i: all((r.trigger.event, r.trigger.sensor, r.run.node, r.runbook.name, r.runbook.signers))
        for i, r in _opened(facts).items()
    }


def _timed(facts: Facts) -> Held:
    def ordered(r: Receipt) -> bool:
        steps = (r.timeline_ns.event, r.timeline_ns.received, r.timeline_ns.decided)
        return bool(r.time.boot_id) and list(steps) == sorted(steps)

    return {i: ordered(r) for i, r in facts.receipts.items()}


def _guarded(facts: Facts) -> Held:
    def held(a: Acted) -> bool:
        return (a.guard.outcome == "refuse") == (a.outcome == "refused")

    return {i: all(map(held, r.actions)) for i, r in facts.receipts.items() if r.actions}


def _intended(facts: Facts) -> Held:
    """Only actions that do not end by themselves need a durable intent first (docs/spec/journal.md)."""
    intents = {e.index: e for e in facts.of("intent")}

    def held(index: int, run: str, a: Acted) -> bool:
        intent = intents.get(-1 if a.intent is None else a.intent)
        return intent is not None and intent.run == run and intent.index < index and intent.body["action"] == a.action

    lasting = {i: [a for a in r.actions if _tried(a) and a.action in LASTING] for i, r in facts.receipts.items()}
    return {i: all(held(i, facts.receipts[i].run.id, a) for a in acted) for i, acted in lasting.items() if acted}


LASTING: Final = frozenset({"recreate", "kill", "kill_connections", "freeze", "thaw"})


def _tried(a: Acted) -> bool:
    return a.outcome in ("applied", "failed", "unconfirmed")


def _confirmed(facts: Facts) -> Held:
    acted = {i: [a for a in r.actions if a.action == "recreate" and _tried(a)] for i, r in facts.receipts.items()}
    return {i: all(a.outcome == "applied" for a in those) for i, those in acted.items() if those}


def _recreated(facts: Facts) -> Held:
    """The vocabulary has no action that changes a service in place: what can fail here is the recreation itself."""
    acted = {i: [a for a in r.actions if a.action == "recreate" and _tried(a)] for i, r in facts.receipts.items()}
    return {i: all(a.outcome != "failed" for a in those) for i, those in acted.items() if those}


def _replayed(facts: Facts) -> Held:
    return {i: facts.replays[r.run.id] for i, r in facts.receipts.items() if r.run.id in facts.replays}


def _reasoned(facts: Facts) -> Held:
    return {e.index: bool(e.body["check"] and e.body["what"]) for e in facts.of("refusal")}


def _nothing_lost(facts: Facts) -> Held:
    lossy = {e.epoch for e in facts.of("lost") if e.body["count"]}
    return {e.index: e.epoch not in lossy for e in facts.of("epoch-open")}


def _accesses(facts: Facts) -> Held:
    return {e.index: True for e in facts.of("access")}


def _proposals(facts: Facts) -> Held:
    return {e.index: bool(e.body["checks"]) for e in facts.of("proposal")}


def _witnessed(facts: Facts) -> Held:
    return {0: True} if facts.witnesses else {}


QUERIES: Final[Mapping[str, tuple[str, Callable[[Facts], Held]]]] = {
    "log.complete": (
        "no entry is missing: number and root are those of the signed checkpoint",
        _own_check("report.root"),
    ),
    "log.signed": ("each entry is signed by the key of its epoch", _signed),
    "log.witnessed": ("the checkpoint is cosigned by a witness elsewhere", _witnessed),
    "epochs.vouched": ("each key follows one that vouched for it, or none", _vouched),
    "epochs.hardware": ("each key is bound to accepted evidence of real hardware", _hardware),
    "runs.received": ("each intent belongs to a run with a receipt", _received),
    "runs.attested": ("each run happened under a key with accepted evidence", _attested),
    "runs.signed": ("each run was decided by a runbook of the signed manifest that was armed", _runbook_signed),
    "runs.content": ("each receipt says what, when, where, which source, whose authority, what outcome", _content),
    "runs.timed": ("each receipt has wall and monotonic times, in order, and the boot they count from", _timed),
    "runs.replayed": ("each decision was made again from its inputs and is identical", _replayed),
    "actions.guarded": ("each action has a decision of the guard, and what it refused was not done", _guarded),
    "actions.intended": ("each lasting action has an intent that was durable before it", _intended),
    "recovery.confirmed": ("each recovery of a service met its post-condition", _confirmed),
    "recovery.recreated": ("each recovery recreated the service from its declared, hashed state", _recreated),
    "refusals.reasoned": ("each refusal names the check that refused and what it was about", _reasoned),
    "loss.none": ("no epoch lost an event between kernel and log", _nothing_lost),
    "access.recorded": ("reads of the log are themselves in the log", _accesses),
    "proposals.checked": ("each proposal was examined before anyone saw it", _proposals),
}


def ask(facts: Facts) -> tuple[Answer, ...]:
    """Every question once, in the order of the table."""
    return tuple(_answer(name, question, held(facts)) for name, (question, held) in QUERIES.items())


def _answer(id: str, question: str, held: Held) -> Answer:
    failing = tuple(sorted(i for i, good in held.items() if not good))
    return Answer(id, question, len(held), len(held) - len(failing), failing[:MAX_FAILING])
