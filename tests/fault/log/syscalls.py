"""Every file system call of a short journal life fails once: EIO, ENOSPC, or the process is killed at it (strace).

After each, what was acknowledged must be on disk in a log that verifies, or the journal must not have been made at all.
usage: python -m tests.fault.log.syscalls [--every N] [--dir FOLDER]     needs: strace
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fault.log.power import ROOT, acknowledged, size_on_disk

CALLS = ("openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "unlink", "read", "pread64")
FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
STOPPED = (0, 3, -9, 137)  # whole, stopped by itself, killed


def trace(journal: Path, acks: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    """The story under strace; only calls on the journal's own files count."""
    names = [str(journal) + suffix for suffix in ("", "-wal", "-shm", "-journal", ".lock")]
    paths = [word for name in names for word in ("-P", name)]
    command = ["strace", "-f", "-qq", *paths, "-P", str(journal.parent), *options]
    with acks.open("wb") as out:
        words = [*command, sys.executable, "-m", "tests.fault.log.story", str(journal)]
        return subprocess.run(words, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, check=False)


def counted(folder: Path) -> dict[str, int]:
    """How often a whole life makes each call."""
    done = trace(folder / "dry.db", folder / "acks", "-e", "trace=" + ",".join(CALLS))
    assert done.returncode == 0, done.stderr[-500:]
    found = re.findall(rb"^(?:\[pid +\d+\] )?(\w+)\(", done.stderr, re.MULTILINE)
    return dict(collections.Counter(name.decode() for name in found))


def faults(counts: dict[str, int], every: int) -> Iterator[tuple[str, str, int]]:
    """(call, fault, which one); `every` skips all but each n-th call."""
    for call, count in counts.items():
        for fault in FAULTS:
            if fault == "error=ENOSPC" and call not in ("openat", "write", "pwrite64", "ftruncate"):
                continue
            yield from ((call, fault, at) for at in range(1, count + 1, every))


def survives(folder: Path, call: str, fault: str, at: int) -> str | None:
    """What went wrong, or None."""
    journal, acks = folder / f"{call}-{fault[-4:]}-{at}.db", folder / "acks"
    inject = f"inject={call}:{fault}:when={at}"
    done = trace(journal, acks, "-e", f"trace={call}", "-e", inject)
    if done.returncode not in STOPPED:
        return f"{call} {fault} #{at}: exit {done.returncode}: {done.stderr[-300:].decode(errors='replace')}"
    last, checkpoint = acknowledged(acks)
    size = size_on_disk(journal, exclusive=False)
    if size < 0 or size <= last or size < checkpoint:
        return f"{call} {fault} #{at}: {size} on disk, {last} and checkpoint {checkpoint} acknowledged"
    return None


def run(folder: Path, every: int) -> tuple[int, list[str]]:
    """How many faults were injected, and what went wrong."""
    cases = list(faults(counted(folder), every))
    wrong = [text for case in cases if (text := survives(folder, *case)) is not None]
    return len(cases), wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.log.syscalls")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--dir", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        injected, wrong = run(Path(name), args.every)
    sys.stdout.write(json.dumps({"injected": injected, "wrong": wrong}) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
