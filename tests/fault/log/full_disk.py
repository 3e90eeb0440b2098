"""A journal on a disk that fills up: it stops, nothing acknowledged is lost, and it goes on once there is room again.

usage: unshare -m python -m tests.fault.log.full_disk FOLDER     mounts a small tmpfs there, for itself only
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from pointcall_attest import entry
from pointcall_executor.journal import Journal, JournalError, StorageError
from pointcall_executor.journal_check import check_journal
from pointcall_keys.node import EpochKeys
from tests.fault.log.writer import ORIGIN

SIZE = "4m"
FILLER_BYTES = 1 << 20


def main() -> int:
    folder = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    filler, path, keys = folder / "filler", folder / "journal.db", EpochKeys.generate()
    filler.write_bytes(bytes(FILLER_BYTES))
    journal, acknowledged, refused = Journal.open(path, origin=ORIGIN), 0, []
    while not refused:
        try:
            assert journal.append(_leaf(keys, acknowledged)) == acknowledged
            acknowledged += 1
        except JournalError as error:
            refused.append(type(error))
    for call in (lambda: journal.append(_leaf(keys, 0)), lambda: journal.put_blob(b"x")):
        try:
            call()
        except JournalError as error:
            refused.append(type(error))
    journal.close()
    filler.unlink()
    again = Journal.open(path, origin=ORIGIN)
    size = again.size
    more = again.append(_leaf(keys, size))
    wrong = {c.id for c in check_journal(again).failed} - {"entry.signature"}  # no epoch is opened here
    again.close()
    stopped = [error is StorageError for error in refused]
    print(json.dumps({"acknowledged": acknowledged, "size": size, "more": more, "stopped": stopped, "wrong": [*wrong]}))
    return 0


def _leaf(keys: EpochKeys, count: int) -> bytes:
    body = entry.Config(what="filler", detail={"filler": "x" * 2000, "count": count})
    return keys.sign(entry.payload(body, at=datetime.now(UTC), ktime_ns=count, epoch=keys.id))


if __name__ == "__main__":
    sys.exit(main())
