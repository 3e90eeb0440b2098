"""Checking a whole journal: every entry, signature, epoch, checkpoint and blob. Reads only; the result is a verdict.

It says whether the log is whole and signed by its own epochs. Whether those keys belong to attested hardware is
checked per run (`pointcall verify`). Spec: docs/spec/journal.md section 6.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest import dsse
from pointcall_attest.entry import Entry, EpochClose, EpochOpen
from pointcall_attest.errors import AttestError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import Checkpoint, Verifier
from pointcall_attest.log.tree import Tree
from pointcall_attest.verdict import Check, Verdict
from pointcall_executor.journal_reader import DamagedError, JournalReader

SPEC: Final = "docs/spec/journal.md"
MAX_SHOWN: Final = 5  # of many wrong entries the message names the first


@dataclass(slots=True)
class _Walk:
    """What one pass over all entries found."""

    tree: Tree = field(default_factory=Tree)
    keys: dict[str, ec.EllipticCurvePublicKey] = field(default_factory=dict)
    verifiers: dict[bytes, Verifier] = field(default_factory=dict)
    closed: dict[str, str | None] = field(default_factory=dict)  # epoch -> the epoch that it vouched for
    damaged: list[str] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    epochs: list[str] = field(default_factory=list)

    def see(self, entry: Entry) -> None:
        """Check one entry by itself and in its place."""
        self.tree.add(entry.leaf_hash)
        if not entry.subject_holds:
            self.subjects.append(_name(entry))
        if entry.kind == "epoch-open":
            self._open(entry)
        if entry.epoch in self.closed:
            self.epochs.append(f"{_name(entry)} follows the close of its epoch")
        if not _signed(entry, self.keys.get(entry.epoch)):
            self.unsigned.append(_name(entry))
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
            self.epochs.append(f"{_name(entry)} carries no key")
            return
        if dsse.keyid_of(spki) != entry.epoch or entry.epoch in self.keys:
            self.epochs.append(f"{_name(entry)} carries another key than its own")
            return
        vouched = self.closed.get(body.previous_epoch) if body.previous_epoch else None
        if body.previous_epoch in self.closed and vouched != entry.epoch:
            self.epochs.append(f"{_name(entry)} is not the epoch that the one before vouched for")
        self.keys[entry.epoch] = key
        self.verifiers[verifier.key_id] = verifier


def check_journal(reader: JournalReader) -> Verdict:
    """The verdict on everything in a journal. Never raises for what is in it."""
    walk = _Walk()
    try:
        for entry in _entries(reader):
            walk.see(entry)
    except DamagedError as error:
        walk.damaged.append(f"{error.message}: want {error.want[:80]}, got {error.got[:80]}")
    return Verdict(
        (
            _none("journal.entries", walk.damaged, f"{walk.tree.size} entries as they were written"),
            _none("entry.subject", walk.subjects, "subject digests of the bodies"),
            _none("entry.signature", walk.unsigned, f"{walk.tree.size} entries signed by {len(walk.keys)} epochs"),
            _none("log.epochs", walk.epochs, "each epoch opens once, and ends where it says"),
            _signed_heads(reader, walk),
            _none("journal.blobs", list(_blobs(reader)), "content with the digest of its name"),
        )
    )


def _entries(reader: JournalReader) -> Iterator[Entry]:
    start, size = 0, reader.size
    while start < size:
        page = reader.entries(start=start)
        for entry in page:
            if entry.index != start:
                raise DamagedError(f"entry {start} is missing", want=str(start), got=str(entry.index))
            start += 1
            yield entry


def _signed(entry: Entry, key: ec.EllipticCurvePublicKey | None) -> bool:
    if key is None:
        return False
    try:
        dsse.verify(dsse.parse(entry.raw), key)
    except AttestError:
        return False
    return True


def _signed_heads(reader: JournalReader, walk: _Walk) -> Check:
    if walk.damaged:
        return Check.skipped("log.checkpoint", "the entries are damaged", spec=SPEC)
    try:
        wrong = [text for checkpoint in reader.checkpoints() for text in _checkpoint(checkpoint, walk, reader.origin)]
    except DamagedError as error:
        wrong = [f"{error.message}: want {error.want[:80]}, got {error.got[:80]}"]
    return _none("log.checkpoint", wrong, "checkpoints of this tree by its epochs")


def _checkpoint(checkpoint: Checkpoint, walk: _Walk, origin: str) -> Iterator[str]:
    key = next((walk.verifiers[s.key_id] for s in checkpoint.signatures if s.key_id in walk.verifiers), None)
    if checkpoint.size > walk.tree.size or walk.tree.root(checkpoint.size) != checkpoint.root:
        yield f"size {checkpoint.size} has another root, or is beyond the end"
    if checkpoint.origin != origin:
        yield f"size {checkpoint.size} is of {checkpoint.origin}"
    try:
        if key is None or checkpoints.verify(checkpoint, key) is not checkpoint:
            yield f"size {checkpoint.size} is signed by no epoch of this log"
    except AttestError as error:
        yield f"size {checkpoint.size}: {error.message}"


def _blobs(reader: JournalReader) -> Iterator[str]:
    for sha256 in reader.blobs():
        try:
            reader.blob(sha256)
        except DamagedError:
            yield sha256


def _name(entry: Entry) -> str:
    return f"entry {entry.index} ({entry.kind})"


def _none(id: str, wrong: list[str], want: str) -> Check:
    more = f" and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
    got = "; ".join(wrong[:MAX_SHOWN]) + more
    return Check.of(id, not wrong, expected=want, observed=got or want, spec=SPEC)
