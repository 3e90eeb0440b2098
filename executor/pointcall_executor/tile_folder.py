"""The tile directory on disk: extended from the journal, checkpoint last, so that a reader never sees a promise unkept.

Derived, not trusted: delete it and it is made again. Serve it with any static web server. Spec: docs/spec/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pointcall_attest.log import tiles
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import Tree, verify_consistency
from pointcall_executor.durable import write_whole
from pointcall_executor.journal_reader import JournalError, damaged


class Source(Protocol):
    """A log to be written: the journal, or a copy of it in a mirror."""

    def head(self) -> Checkpoint | None: ...
    def tree(self) -> Tree: ...
    def raws(self, first: int, end: int) -> Sequence[bytes]: ...


def extend(folder: Path, source: Source) -> tuple[int, int]:
    """Bring the folder to the latest checkpoint of the log: (tiles written, entries). May be called again any time.

    JournalError `journal.no_checkpoint` before the first one; DamagedError where the folder holds another log.
    """
    head = source.head()
    if head is None:
        raise JournalError("there is no checkpoint yet", id="journal.no_checkpoint", hint="run the executor first")
    tree = source.tree()
    since = _size_of(folder, tree, head)
    written = 0
    for path, raw in tiles.files(tree, _entries(source), head.size, since=since):
        write_whole(folder / path, raw, mode=0o644)
        written += 1
    if since != head.size:
        write_whole(folder / tiles.CHECKPOINT_PATH, head.text, mode=0o644)
    return written, head.size


def _size_of(folder: Path, tree: Tree, head: Checkpoint) -> int:
    """How far the folder is; it must be a prefix of this log."""
    path = folder / tiles.CHECKPOINT_PATH
    if not path.exists():
        return 0
    old = Checkpoint.parse(path.read_bytes())
    grown = old.origin == head.origin and old.size <= head.size
    if not grown or not verify_consistency(
        old.size, head.size, old.root, head.root, tree.consistency(old.size, head.size)
    ):
        raise damaged(
            f"the tile directory {folder}", want=f"a prefix of {head.origin}", got=f"{old.origin}, {old.size}"
        )
    return old.size


def _entries(source: Source) -> tiles.Entries:
    def read(first: int, end: int) -> Sequence[bytes]:
        found = source.raws(first, end)
        if len(found) != end - first:
            raise JournalError(
                "entries of this tile were pruned", id="journal.pruned", want=f"{first} to {end}", got=str(len(found))
            )
        return found

    return read
