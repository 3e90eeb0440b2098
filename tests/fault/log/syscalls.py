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
from types import TracebackType

from tests.fault.log.power import ROOT, acknowledged, size_on_disk

CALLS = ("openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "unlink", "read", "pread64")
FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
STOPPED = (0, 3, -9)  # whole, stopped by itself, killed


class Teller:
    """The process that imports everything once and forks a fresh one for each life."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fault.log.story"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Teller:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(timeout=30)

    def trace(self, journal: Path, acks: Path, *options: str) -> tuple[int, str]:
        """One life under strace: how it ended, and its calls. Only calls on the journal's own files count."""
        names = [str(journal) + suffix for suffix in ("", "-wal", "-shm", "-journal", ".lock")]
        paths = [word for name in (*names, str(journal.parent)) for word in ("-P", name)]
        calls = acks.with_name("calls")
        pid = self._ask(json.dumps({"journal": str(journal), "acks": str(acks)}))
        command = ["strace", "-f", "-o", str(calls), *paths, *options, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            attached = strace.stderr.readline()
            ended = self._ask("")  # also where strace is not there: nobody is left waiting
            said = attached + strace.stderr.read()
        assert attached.endswith("attached\n"), said
        return ended, calls.read_text(errors="replace")

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def counted(teller: Teller, folder: Path) -> dict[str, int]:
    """How often a whole life makes each call."""
    ended, calls = teller.trace(folder / "dry.db", folder / "acks", "-e", "trace=" + ",".join(CALLS))
    assert ended == 0, calls[-500:]
    return dict(collections.Counter(re.findall(r"^\d+ +(\w+)\(", calls, re.MULTILINE)))


def faults(counts: dict[str, int], every: int) -> Iterator[tuple[str, str, int]]:
    """(call, fault, which one); `every` skips all but each n-th call."""
    for call, count in counts.items():
        for fault in FAULTS:
            if fault == "error=ENOSPC" and call not in ("openat", "write", "pwrite64", "ftruncate"):
                continue
            yield from ((call, fault, at) for at in range(1, count + 1, every))


def survives(teller: Teller, folder: Path, call: str, fault: str, at: int) -> str | None:
    """What went wrong, or None."""
    journal, acks = folder / f"{call}-{fault[-4:]}-{at}.db", folder / "acks"
    ended, calls = teller.trace(journal, acks, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={at}")
    if ended not in STOPPED:
        return f"{call} {fault} #{at}: exit {ended}: {calls[-300:]}"
    last, checkpoint = acknowledged(acks)
    size = size_on_disk(journal, exclusive=False)
    if size < 0 or size <= last or size < checkpoint:
        return f"{call} {fault} #{at}: {size} on disk, {last} and checkpoint {checkpoint} acknowledged"
    return None


def run(folder: Path, every: int) -> tuple[int, list[str]]:
    """How many faults were injected, and what went wrong."""
    with Teller() as teller:
        cases = list(faults(counted(teller, folder), every))
        wrong = [text for case in cases if (text := survives(teller, folder, *case)) is not None]
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
