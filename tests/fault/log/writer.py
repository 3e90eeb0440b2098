"""The writer under test: a journal that appends without pause and prints the index of every entry once it is durable.

usage: python -m tests.fault.log.writer JOURNAL full|normal [exclusive]
`normal` is the negative control: it acknowledges before the disk has it. `exclusive` works without shared memory.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

from pointcall_attest import entry
from pointcall_executor.journal import Journal
from pointcall_keys.node import EpochKeys

ORIGIN = "pointcall.dev/log/power"
CHECKPOINT_EVERY = 16


class Weak(sqlite3.Connection):
    """Does not wait for the disk."""

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        return super().execute(sql.replace("synchronous = full", "synchronous = normal"), *args)  # type: ignore[arg-type]


class Exclusive(sqlite3.Connection):
    """Needs no shared memory file."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.execute("pragma locking_mode = exclusive")


class WeakExclusive(Exclusive, Weak):
    """Both."""


CONNECTIONS = {
    ("full", False): sqlite3.Connection,
    ("full", True): Exclusive,
    ("normal", False): Weak,
    ("normal", True): WeakExclusive,
}


def main() -> None:
    path, sync, *exclusive = sys.argv[1:]
    journal = Journal.open(Path(path), origin=ORIGIN, connection=CONNECTIONS[sync, bool(exclusive)])
    keys, count = EpochKeys.generate(), 0
    while True:
        count += 1
        body = entry.Config(what="filler", detail={"filler": "x" * 1200, "count": count})
        payload, opening = entry.sealed(body, at=datetime.now(UTC), ktime_ns=count, epoch=keys.id, salt=os.urandom(32))
        os.write(1, b"%d\n" % journal.append(keys.sign(payload), opening))
        if count % CHECKPOINT_EVERY == 0:
            note = journal.checkpoint(keys.sign_checkpoint, float(count), force=True)
            assert note is not None
            os.write(1, b"c%d\n" % int(note.split(b"\n")[1]))


if __name__ == "__main__":
    main()
