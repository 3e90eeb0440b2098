"""Whether a report has everything, and everything in it is genuine: the checks that the report makes itself.

  (1) the entries are those of the checkpoint, none missing: their number is the tree size, their root is its root.
      Of pruned ones the leaf hashes are there, and an entry of the log says that they were pruned
  (2) the checkpoint is signed by the checkpoint key of the epoch that was open
  (3) every entry is signed by the key of its epoch, and that epoch was opened in the log before it
  (4) every key after the first was vouched for by the one before it
  (5) every run that was about to act has its receipt, or was closed as `unconfirmed` by the next executor
  (6) every key is bound by evidence that the maker of the report accepts, of the tier that the node stated

The last one needs the evidence and a trust policy; without them it is listed as not checked.
Spec: docs/spec/report.md section 3.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest import dsse
from pointcall_attest.entry import Entry, EpochClose, EpochOpen
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.log import checkpoint as note
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.verdict import Check, Verdict

MAX_NAMED: Final = 5  # entries that one check names
WITHOUT_RUN: Final = frozenset({"operator", "manifest", "kernel"})  # grants of intents that no runbook decided


@dataclass(frozen=True)
class Examined:
    """What was found: the checks, and the entries (by leaf index) that failed one of them."""

    checks: tuple[Check, ...]
    unsigned: frozenset[int]
    unvouched: frozenset[int]
    without_receipt: frozenset[int]


def examine(
    entries: Sequence[Entry],
    head: Checkpoint | None,
    appraisals: Mapping[int, Verdict],
    pruned: Mapping[int, bytes] | None = None,
) -> Examined:
    """All checks over the entries that a report covers, in order. Never raises for what the entries say.

    `pruned` are the leaf hashes of the entries that are not there any more, by index.
    """
    gone = pruned or {}
    signatures, epochs, receipts = unsigned(entries), unvouched(entries, gone), without_receipt(entries)
    checks = (
        *_complete(entries, head, gone),
        _checkpoint_signed(entries, head),
        _none("report.signatures", signatures, f"{len(entries)} entries signed by the key of their epoch"),
        _none("report.epochs", epochs, "every key vouched for by the one before"),
        _none("report.receipts", receipts, _receipts_there(entries)),
        _evidence([e for e in entries if e.kind == "epoch-open"], appraisals),
    )
    return Examined(checks, frozenset(signatures), frozenset(epochs), frozenset(receipts))


def _receipts_there(entries: Sequence[Entry]) -> str:
    cut_off = len(interrupted(entries) - {str(e.run) for e in entries if e.kind == "receipt"})
    more = f"; {cut_off} cut off by the end of the executor and closed as unconfirmed" if cut_off else ""
    return f"every run that was about to act has its receipt{more}"


def _complete(entries: Sequence[Entry], head: Checkpoint | None, pruned: Mapping[int, bytes]) -> Iterable[Check]:
    if head is None:
        yield Check.skipped("report.population", "the log has no checkpoint yet")
        yield Check.skipped("report.root", "the log has no checkpoint yet")
        return
    following = iter(entries)
    order = [i if i in pruned else next(following, None) for i in range(len(entries) + len(pruned))]
    places = [at if isinstance(at, int) else at.index if at else -1 for at in order]
    gapless = places == list(range(len(order)))
    minimum = max((int(e.body["minimum"]) for e in entries if e.kind == "prune"), default=0)
    told = all(index < minimum for index in pruned)
    yield Check.of(
        "report.population",
        gapless and told and len(order) == head.size,
        expected=f"entries 0 to {head.size - 1}, the whole tree",
        observed=f"{len(order)} entries"
        + (f", {len(pruned)} of them pruned" if pruned else "")
        + ("" if gapless else " with gaps")
        + ("" if told else ", not all by an entry that says so"),
        spec="docs/spec/report.md 3",
        hint="entries are missing: compare with the mirror",
    )
    root = Tree(pruned[at] if isinstance(at, int) else leaf_hash(at.raw) for at in order if at is not None).root()
    yield Check.of(
        "report.root",
        root == head.root,
        expected=head.root.hex(),
        observed=root.hex(),
        spec="RFC 6962 2.1",
        hint="an entry was changed, removed or moved: run `pointcall log check`",
    )


def _checkpoint_signed(entries: Sequence[Entry], head: Checkpoint | None) -> Check:
    opened = [e for e in entries if e.kind == "epoch-open"]
    if head is None or not opened:
        return Check.skipped("report.checkpoint", "no checkpoint, or no epoch was opened")
    key = str(opened[-1].body["checkpoint_key"])
    try:
        note.verify(head, note.Verifier.parse(key))
        found = ""
    except AttestError as refusal:
        found = refusal.message
    return Check.of(
        "report.checkpoint",
        not found,
        expected=f"signed by {key.split('+')[0]}",
        observed=found or "signed",
        spec="C2SP tlog-checkpoint",
        hint="the checkpoint is not of this log",
    )


def unsigned(entries: Sequence[Entry]) -> list[int]:
    """The entries that are not signed by the key of an epoch that was opened before them (or by themselves)."""
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    wrong = []
    for entry in entries:
        if entry.kind == "epoch-open":
            keys |= _opened(entry)
        if not _signed(entry, keys):
            wrong.append(entry.index)
    return wrong


def _opened(entry: Entry) -> Mapping[str, ec.EllipticCurvePublicKey]:
    """The key that an epoch-open names, if it is the key that signed it."""
    body = entry.typed()
    assert isinstance(body, EpochOpen)
    try:
        spki = base64.b64decode(body.public_key, validate=True)
        key = dsse.public_key(spki)
    except (binascii.Error, MalformedError):
        return {}
    return {entry.epoch: key} if dsse.keyid_of(spki) == entry.epoch else {}


def _signed(entry: Entry, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> bool:
    key = keys.get(entry.epoch)
    if key is None or not entry.subject_holds:
        return False
    try:
        dsse.verify(dsse.parse(entry.raw), key)
    except AttestError:
        return False
    return True


def unvouched(entries: Sequence[Entry], pruned: Container[int] = ()) -> list[int]:
    """The epoch-opens that say they follow an epoch which did not close in their favour. An executor that was killed
    closes nothing; the epoch after it must then follow nobody. A close comes right before the next opening; where it
    was pruned, nothing can be said."""
    closed: dict[str, str | None] = {}
    wrong = []
    for entry in entries:
        if entry.kind == "epoch-close":
            closing = entry.typed()
            assert isinstance(closing, EpochClose)
            closed[entry.epoch] = closing.next
        if entry.kind == "epoch-open":
            opening = entry.typed()
            assert isinstance(opening, EpochOpen)
            if entry.index - 1 in pruned:
                continue
            if opening.previous_epoch is not None and closed.get(opening.previous_epoch) != entry.epoch:
                wrong.append(entry.index)
    return wrong


def without_receipt(entries: Sequence[Entry]) -> list[int]:
    """The intents of runs without a receipt, of earlier epochs: a run of the epoch that is open may still go on."""
    received = {e.run for e in entries if e.kind == "receipt"} | interrupted(entries)
    current = next((e.epoch for e in reversed(entries) if e.kind == "epoch-open"), None)
    return [e.index for e in entries if _of_a_run(e) and e.run not in received and e.epoch != current]


def interrupted(entries: Sequence[Entry]) -> set[str]:
    """Runs that the end of an executor cut off, and that the next one closed as `unconfirmed`: nobody knows more."""
    began = {e.run: e.epoch for e in entries if e.kind == "intent"}
    closed = (e for e in entries if e.kind == "outcome" and e.body["outcome"] == "unconfirmed" and e.run is not None)
    return {str(e.run) for e in closed if e.run in began and began[e.run] != e.epoch}


def _of_a_run(entry: Entry) -> bool:
    """Whether it is a run's intent; what an operator does, and what arming starts, belongs to none."""
    return entry.kind == "intent" and not (entry.run is None and entry.body["grant"] in WITHOUT_RUN)


def _evidence(opened: Sequence[Entry], appraisals: Mapping[int, Verdict]) -> Check:
    missing = [e.index for e in opened if e.index not in appraisals]
    if missing or not opened:
        why = (
            f"no evidence, or no trust policy, for {len(missing)} of {len(opened)} epochs: pointcall report --trust DIR"
        )
        return Check.skipped("report.evidence", why, spec="docs/spec/report.md 3")
    own = {e.index: appraisals[e.index] for e in opened}
    wrong = [e.index for e in opened if not own[e.index].passed or own[e.index].tier != e.body["tier"]]
    return _none("report.evidence", wrong, f"evidence of {len(opened)} epochs accepted, of the tier that was stated")


def _none(id: str, wrong: Sequence[int], want: str) -> Check:
    named = ", ".join(map(str, wrong[:MAX_NAMED])) + (
        f" and {len(wrong) - MAX_NAMED} more" if wrong[MAX_NAMED:] else ""
    )
    return Check.of(
        id,
        not wrong,
        expected=want,
        observed=f"not so: entry {named}" if wrong else want,
        spec="docs/spec/report.md 3",
        hint="`pointcall log show` prints an entry",
    )
