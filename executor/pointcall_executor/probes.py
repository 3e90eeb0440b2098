"""Unmeasured probes in the log: what ran beside the signed programs, when, and the digest of its source.

With a running executor the entry is made at once, through its API. Without one a line goes into the state folder, and
the next executor makes the entry when it starts. Who can write the state folder can leave such a line out; what the
log says is true, what it does not say is not proven.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

FILE: Final = "probes.jsonl"
MAX_PENDING: Final = 1000  # lines that the next executor takes over; more is somebody's mistake


def note(state_dir: Path, body: dict[str, str]) -> None:
    """Leave a line for the next executor, on disk when this returns. OSError where the folder cannot be written."""
    state_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(state_dir / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, (json.dumps(body) + "\n").encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def pending(state_dir: Path) -> list[dict[str, str]]:
    """The lines that wait, oldest first; one that is no line of ours is given as it is, cut."""
    try:
        lines = (state_dir / FILE).read_text(errors="replace").splitlines()[:MAX_PENDING]
    except FileNotFoundError:
        return []
    return [_parsed(line) for line in lines if line.strip()]


def taken(state_dir: Path) -> None:
    """They are in the log now."""
    (state_dir / FILE).unlink(missing_ok=True)


def _parsed(line: str) -> dict[str, str]:
    try:
        found = json.loads(line)
        return {str(key)[:100]: str(value)[:500] for key, value in found.items()}
    except (ValueError, AttributeError):
        return {"what": "unreadable", "line": ascii(line)[:500]}
