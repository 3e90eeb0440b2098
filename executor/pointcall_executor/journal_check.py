"""Checking a whole journal: what is stored against what is signed. Reads only; the result is a verdict.

The pass over entries is that of any log (pointcall_attest.log_check); here come the columns, pruned entries, stored
checkpoints, clear texts and blobs. Spec: docs/spec/journal.md section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pointcall_attest.entry import Entry, Erase
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.witness import WitnessPolicy
from pointcall_attest.log_check import SPEC, Walk, grown, name_of, none_wrong, witnessed
from pointcall_attest.verdict import Check, Verdict
from pointcall_executor.journal_reader import DamagedError, JournalReader


def check_journal(reader: JournalReader) -> Verdict:
    """The verdict on everything in a journal. Never raises for what is in it."""
    walk, damaged, pruned, texts = Walk(), [], 0, _Texts()
    try:
        for entry in _entries(reader):
            if isinstance(entry, Entry):
                walk.see(entry)
                texts.see(entry)
            else:
                walk.tree.add(entry)
                pruned += 1
    except DamagedError as error:
        damaged.append(f"{error.message}: want {error.want[:80]}, got {error.got[:80]}")
    whole = f"{walk.tree.size} entries as they were written, {pruned} of them pruned"
    heads = Check.skipped("log.checkpoint", "the entries are damaged", spec=SPEC) if damaged else _heads(reader, walk)
    blobs = none_wrong("journal.blobs", list(_blobs(reader)), "content with the digest of its name")
    return Verdict((none_wrong("journal.entries", damaged, whole), *walk.checks(), heads, texts.check(reader), blobs))


def check_growth(reader: JournalReader, since: Checkpoint | None, policy: WitnessPolicy | None) -> tuple[Check, Check]:
    """Whether the log has grown from a checkpoint that was seen before, and whether enough witnesses signed it: the
    latest checkpoint that they signed counts. Without the one or the other its check is listed as not made."""
    head, cosigned = reader.head(), [note for note, _ in reader.cosigned()]
    tree, signed = reader.tree(), [c for c in cosigned if policy is not None and policy.met_by(c)]
    best = signed[-1] if signed else cosigned[-1] if cosigned else head
    if head is None or best is None:
        none = "there is no checkpoint yet"
        return Check.skipped("log.consistency", none, spec=SPEC), Check.skipped("log.witnesses", none, spec=SPEC)
    if best.size > tree.size or tree.root(best.size) != best.root:
        return grown(tree, head, since), none_wrong(
            "log.witnesses", ["a cosigned checkpoint of another tree"], "one of it"
        )
    return grown(tree, head, since), witnessed(best, policy)


@dataclass(slots=True)
class _Texts:
    """Which entries are sealed without a clear text, and what erase entries say about that."""

    closed: list[Entry] = field(default_factory=list)
    erased: list[Erase] = field(default_factory=list)
    opened: int = 0

    def see(self, entry: Entry) -> None:
        self.opened += entry.opening is not None
        if entry.closed:
            self.closed.append(entry)
        if entry.kind == "erase":
            body = entry.typed()
            assert isinstance(body, Erase)
            self.erased.append(body)

    def check(self, reader: JournalReader) -> Check:
        wrong = [name_of(e) for e in self.closed if not any(body.covers(e) for body in self.erased)]
        wrong += [f"a text beside entry {i}, which was pruned" for i in reader.stray_openings()]
        whole = f"{self.opened} clear texts as they were committed to, {len(self.closed)} erased by an entry"
        return none_wrong("journal.openings", wrong, whole)


def _entries(reader: JournalReader) -> Iterator[Entry | bytes]:
    """Every entry in order; for a pruned one the leaf hash that is left of it."""
    at, size, minimum, tree = 0, reader.size, reader.minimum, reader.tree()
    while at < size:
        page = reader.entries(start=at)
        for entry in page:
            yield from (tree.leaf(i) for i in range(at, min(entry.index, minimum)))
            at = max(at, min(entry.index, minimum))
            if entry.index != at:
                raise DamagedError(f"entry {at} is missing", want=str(at), got=str(entry.index))
            at += 1
            yield entry
        if not page:
            yield from (tree.leaf(i) for i in range(at, min(size, minimum)))
            if size > minimum:
                raise DamagedError(f"entry {max(at, minimum)} is missing", want=str(size), got=str(at))
            return


def _heads(reader: JournalReader, walk: Walk) -> Check:
    try:
        wrong = [text for note in reader.checkpoints() for text in walk.objections(note, reader.origin)]
    except DamagedError as error:
        wrong = [f"{error.message}: want {error.want[:80]}, got {error.got[:80]}"]
    return none_wrong("log.checkpoint", wrong, "checkpoints of this tree by its epochs")


def _blobs(reader: JournalReader) -> Iterator[str]:
    for sha256 in reader.blobs():
        try:
            reader.blob(sha256)
        except DamagedError:
            yield sha256
