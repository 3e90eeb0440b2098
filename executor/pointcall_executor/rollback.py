"""Back to a declared state that was armed here before: found in the journal by digest, proposed as the next manifest.

An older manifest is never armed again, or whoever controls the disk could bring back what was withdrawn. So its content
becomes a successor of the armed one, with the next sequence, and is signed and admitted like any other; every file is
the one that was armed then, by digest. Nothing is decided, signed or armed here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass

from pointcall_attest.entry import EpochOpen
from pointcall_attest.manifest import Manifest, build_statement
from pointcall_executor.epoch import NOTHING
from pointcall_executor.journal_reader import JournalReader
from pointcall_keys.assemble import Assembled
from pointcall_runbook.errors import PointcallError

PAGE = 1000  # entries read at once


class RollbackError(PointcallError):
    """There is no such earlier state."""

    id = "rollback.error"


@dataclass(frozen=True, slots=True)
class WasArmed:
    """A manifest that was armed here: since the epoch that entry `index` opened, again if it was before."""

    sha256: str
    sequence: int
    index: int


def armed_before(reader: JournalReader) -> tuple[WasArmed, ...]:
    """Every time that another manifest was armed, oldest first; the last one is armed now, or was when it stopped."""
    found: list[WasArmed] = []
    start = 0
    while entries := reader.entries("epoch-open", start=start, limit=PAGE):
        for entry in entries:
            body = EpochOpen.model_validate(entry.body)
            if body.manifest != NOTHING and (not found or found[-1].sha256 != body.manifest):
                found.append(WasArmed(body.manifest, body.sequence, entry.index))
        start = entries[-1].index + 1
    return tuple(found)


def last_good(history: Iterable[WasArmed]) -> WasArmed:
    """The one that was armed before the one that is armed now. RollbackError `rollback.none` if there is none."""
    rows = list(history)
    if len(rows) < 2:
        raise RollbackError(
            "nothing else was armed here before", id="rollback.none", want="an earlier manifest",
            got=rows[0].sha256 if rows else "none at all", hint="name one by its digest, or build it from its sources",
        )  # fmt: skip
    return rows[-2]


def restore(reader: JournalReader, sha256: str) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest and all its files as they were armed, by the digest of its payload (hex), each compared with its own.

    RollbackError `rollback.unknown` if it was never armed here: being in the journal is not enough. JournalError
    `journal.no_blob` if a part was pruned, DamagedError if it changed.
    """
    if sha256 not in {row.sha256 for row in armed_before(reader)}:
        hint = "`pointcall log list` shows the epochs; only what was armed here can be restored"
        raise RollbackError("no such manifest was armed here", id="rollback.unknown", got=sha256[:64], hint=hint)
    manifest = Manifest.parse(reader.blob(sha256))
    return manifest, {name: reader.blob(digest) for name, digest in manifest.subjects.items()}


def successor(
    reader: JournalReader, sha256: str, current: Manifest, *, not_before: dt.datetime, expires: dt.datetime
) -> Assembled:
    """The statement to sign, so that `current` is replaced by what `sha256` declared, and its files."""
    earlier, files = restore(reader, sha256)
    over = {
        "sequence": current.sequence + 1,
        "previous": current.sha256,
        "not_before": not_before,
        "expires": expires,
        # What was withdrawn since then stays withdrawn.
        "revoked": tuple(sorted({*earlier.predicate.revoked, *current.predicate.revoked})),
    }
    return Assembled(build_statement(files, earlier.predicate.model_copy(update=over)), files)
