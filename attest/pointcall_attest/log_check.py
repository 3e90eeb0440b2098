"""Checking a whole log: every entry, signature and epoch in one pass, and its checkpoint. Pure; gives a verdict.

It says whether the log is whole, signed by its own epochs, a growth of what was seen before, and witnessed. Whether
those epochs ran on attested hardware is checked per run (pack_check.py). Spec: docs/spec/log.md section 6.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest import dsse
from pointcall_attest.entry import Entry, EpochClose, EpochOpen, parse_entry
from pointcall_attest.errors import AttestError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log import tiles
from pointcall_attest.log.checkpoint import Checkpoint, Verifier
from pointcall_attest.log.tree import Tree
from pointcall_attest.log.witness import WitnessPolicy
from pointcall_attest.verdict import Check, Verdict

SPEC: Final = "docs/spec/log.md"
MAX_SHOWN: Final = 5  # of many wrong entries the message names the first


@dataclass(slots=True)
class Walk:
    """What one pass over all entries found."""

    tree: Tree = field(default_factory=Tree)
    keys: dict[str, ec.EllipticCurvePublicKey] = field(default_factory=dict)
    verifiers: dict[bytes, Verifier] = field(default_factory=dict)
    closed: dict[str, str | None] = field(default_factory=dict)  # epoch -> the epoch that it vouched for
    unsigned: list[str] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    epochs: list[str] = field(default_factory=list)

    def see(self, entry: Entry) -> None:
        """Check one entry by itself and in its place."""
        self.tree.add(entry.leaf_hash)
        if not entry.subject_holds:
            self.subjects.append(name_of(entry))
        if entry.kind == "epoch-open":
            self._open(entry)
        if entry.epoch in self.closed:
            self.epochs.append(f"{name_of(entry)} follows the close of its epoch")
        if not _signed(entry, self.keys.get(entry.epoch)):
            self.unsigned.append(name_of(entry))
        elif entry.kind == "epoch-close":
            body = entry.typed()
            assert isinstance(body, EpochClose)
            self.closed[entry.epoch] = body.next

    def _open(self, entry: Entry) -> None:
        body = entry.typed()
        assert isinstance(body, EpochOpen)
        try:
            spki = base64.b64decode(body.public_key, validate=True)
            key, verifier = dsse.public_key(spki), Verifier.parse(body.checkpoint_key)
        except (AttestError, ValueError):
            self.epochs.append(f"{name_of(entry)} carries no key")
            return
        if dsse.keyid_of(spki) != entry.epoch or entry.epoch in self.keys:
            self.epochs.append(f"{name_of(entry)} carries another key than its own")
            return
        vouched = self.closed.get(body.previous_epoch) if body.previous_epoch else None
        if body.previous_epoch in self.closed and vouched != entry.epoch:
            self.epochs.append(f"{name_of(entry)} is not the epoch that the one before vouched for")
        self.keys[entry.epoch] = key
        self.verifiers[verifier.key_id] = verifier

    def checks(self) -> tuple[Check, ...]:
        """What the pass found."""
        return (
            none_wrong("entry.subject", self.subjects, "subject digests of the bodies"),
            none_wrong("entry.signature", self.unsigned, f"{self.tree.size} entries signed by {len(self.keys)} epochs"),
            none_wrong("log.epochs", self.epochs, "each epoch opens once, and ends where it says"),
        )

    def objections(self, checkpoint: Checkpoint, origin: str) -> Iterator[str]:
        """What is wrong with a checkpoint of this log."""
        key = next((self.verifiers[s.key_id] for s in checkpoint.signatures if s.key_id in self.verifiers), None)
        if checkpoint.size > self.tree.size or self.tree.root(checkpoint.size) != checkpoint.root:
            yield f"size {checkpoint.size} has another root, or is beyond the end"
        if checkpoint.origin != origin:
            yield f"size {checkpoint.size} is of {checkpoint.origin}"
        try:
            if key is None or checkpoints.verify(checkpoint, key) is not checkpoint:
                yield f"size {checkpoint.size} is signed by no epoch of this log"
        except AttestError as error:
            yield f"size {checkpoint.size}: {error.message}"


def check_tiles(
    lookup: tiles.Lookup, *, since: Checkpoint | None = None, policy: WitnessPolicy | None = None
) -> Verdict:
    """The verdict on a tile directory. `since` is a checkpoint that was seen before, `policy` says whose cosignatures
    are asked for; both are listed as not checked without it. Never raises for what the directory holds; `lookup` gives
    a file's bytes, and KeyError or OSError for one that is not there.
    """
    walk, broken = Walk(), []
    try:
        note = Checkpoint.parse(lookup(tiles.CHECKPOINT_PATH))
        for index, raw in enumerate(tiles.read_all(lookup, note)):
            walk.see(parse_entry(index, raw))
    except (AttestError, KeyError, OSError) as error:
        broken.append(str(error).split("\n")[0][:200])
        return Verdict((none_wrong("log.tiles", broken, "a whole tile directory"),))
    return Verdict(
        (
            none_wrong("log.tiles", broken, f"{walk.tree.size} entries under one root"),
            *walk.checks(),
            none_wrong(
                "log.checkpoint", list(walk.objections(note, note.origin)), "a checkpoint of an epoch of this log"
            ),
            grown(walk.tree, note, since),
            witnessed(note, policy),
        )
    )


def grown(tree: Tree, note: Checkpoint, since: Checkpoint | None) -> Check:
    """Whether the tree under this checkpoint contains the tree of an earlier one."""
    if since is None:
        return Check.skipped("log.consistency", "no earlier checkpoint was given", spec=SPEC)
    grown = since.origin == note.origin and since.size <= note.size and tree.root(since.size) == since.root
    want = f"a growth of {since.origin} at {since.size}"
    return Check.of("log.consistency", grown, expected=want, observed=f"{note.origin} at {note.size}", spec=SPEC)


def witnessed(note: Checkpoint, policy: WitnessPolicy | None) -> Check:
    """Whether enough witnesses signed this checkpoint."""
    if policy is None:
        return Check.skipped("log.witnesses", "no witness policy was given", spec=SPEC)
    signers = ", ".join(f"{name} at {at}" for name, at in policy.signers(note).items()) or "nobody"
    return Check.of("log.witnesses", policy.met_by(note), expected=str(policy.quorum), observed=signers, spec=SPEC)


def _signed(entry: Entry, key: ec.EllipticCurvePublicKey | None) -> bool:
    if key is None:
        return False
    try:
        dsse.verify(dsse.parse(entry.raw), key)
    except AttestError:
        return False
    return True


def name_of(entry: Entry) -> str:
    """How a message names an entry."""
    return f"entry {entry.index} ({entry.kind})"


def none_wrong(id: str, wrong: Sequence[str], want: str) -> Check:
    """Passes where nothing is wrong; `want` says what there should be."""
    more = f" and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
    got = "; ".join(wrong[:MAX_SHOWN]) + more
    return Check.of(id, not wrong, expected=want, observed=got or want, spec=SPEC)
