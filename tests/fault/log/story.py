"""A short life of a journal for fault injection: entries, content, checkpoints, a roll, erase, prune. Prints
what it was told.

usage: python -m tests.fault.log.story
It imports everything once and forks a fresh process for each line on standard input: {"journal": ..., "acks": ...}. It
answers with the number of the process, which lives once another line comes, and with how it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from pointcall_attest import entry
from pointcall_attest.sealing import Opening
from pointcall_executor.journal import Journal, JournalError
from pointcall_keys.node import EpochKeys
from tests.fault.log.writer import ORIGIN

ENTRIES = 4
PR_SET_PTRACER = 0x59616D61


def main() -> int:
    """In a child: 0 for a whole life, 3 where the journal refused to start or stopped by itself."""
    while line := sys.stdin.readline():
        order = json.loads(line)
        go, ready = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(ready)
            return _child(order, go)
        os.close(go)
        _say(pid)
        sys.stdin.readline()
        os.close(ready)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return 0


def _say(number: int) -> None:
    print(number, flush=True)


def _child(order: dict[str, str], go: int) -> int:
    """Whoever traces it attaches before it lives; it ends as any interpreter does."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))
    acks = os.open(order["acks"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(acks, 1)
    os.close(acks)
    os.read(go, 1)
    os.close(go)
    try:
        _live(Path(order["journal"]))
    except JournalError:
        return 3
    return 0


def _live(path: Path) -> None:
    journal, keys, now = Journal.open(path, origin=ORIGIN), EpochKeys.generate(), datetime.now(UTC)
    for count in range(ENTRIES):
        leaf, opening = _leaf(keys, entry.Config(what="filler", detail={"count": count}))
        os.write(1, b"%d\n" % journal.append(leaf, opening))
    journal.put_blob(b"evidence")
    journal.raise_sequence("m", 1, "a" * 64)
    _checkpoint(journal, keys)
    following = EpochKeys.generate()
    os.write(1, b"%d\n" % journal.append(keys.certify_next(following, reason="roll", at=now, ktime_ns=9)))
    _checkpoint(journal, keys)
    leaf, opening = _leaf(keys, entry.Erase(commitments=(str(journal.entry(3).commitment),), reason="asked"))
    os.write(1, b"%d\n" % journal.erase(leaf, opening, indices=[3]))
    leaf, opening = _leaf(keys, entry.Prune(minimum=2, reason="old", retention_days=1))
    os.write(1, b"%d\n" % journal.prune(leaf, opening))
    journal.forget()
    keys.wipe()
    journal.close()


def _leaf(keys: EpochKeys, body: entry.Body) -> tuple[bytes, Opening | None]:
    payload, opening = entry.sealed(body, at=datetime.now(UTC), ktime_ns=1, epoch=keys.id, salt=os.urandom(32))
    return keys.sign(payload), opening


def _checkpoint(journal: Journal, keys: EpochKeys) -> None:
    note = journal.checkpoint(keys.sign_checkpoint, 0.0, force=True)
    assert note is not None
    os.write(1, b"c%d\n" % int(note.split(b"\n")[1]))


if __name__ == "__main__":
    sys.exit(main())
