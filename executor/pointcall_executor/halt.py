"""The kill switch: a file that holds the node still. It needs nothing of a running executor, and outlives every one.

Where the file is, nothing is armed and nothing acts, also after a restart, until a person clears it. An executor that
runs sees it within a quarter of a second; one that is stuck is killed, and what it has in the kernel goes with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pointcall_attest.model import instant
from pointcall_executor.durable import write_whole
from pointcall_runbook.errors import PointcallError

FILE: Final = "halt.json"
RUNNING: Final = "executor.json"  # below run/: which process is the executor
MAX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Halt:
    """Why the node is held still, and since when (as its clock said)."""

    reason: str
    since: str


def halted(state: Path) -> Halt | None:
    """The halt that is in force. A file that cannot be read holds the node still as well."""
    try:
        fd = os.open(f"{state}/{FILE}", os.O_RDONLY | os.O_NONBLOCK)  # asked four times a second: nothing that is dear
    except FileNotFoundError:
        return None
    except OSError as error:
        return Halt(f"{FILE} cannot be read: {error}", "")
    try:
        raw = os.read(fd, MAX_BYTES)
    except OSError as error:
        return Halt(f"{FILE} cannot be read: {error}", "")
    finally:
        os.close(fd)
    try:
        body = json.loads(raw)
        return Halt(str(body["reason"]), str(body["since"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Halt(f"{FILE} cannot be understood", "")


def halt(state: Path, reason: str, at: datetime) -> None:
    """Hold the node still from now on. OSError where the file cannot be made durable."""
    write_whole(state / FILE, json.dumps({"reason": reason, "since": instant(at)}).encode())


def clear(state: Path) -> bool:
    """End the halt; False where there was none."""
    with contextlib.suppress(FileNotFoundError):
        (state / FILE).unlink()
        return True
    return False


def _started(pid: int) -> str:
    """When the process was started, in clock ticks since boot: pids are used again, these are not."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class RunningError(PointcallError):
    """Another executor of this state folder is alive."""

    id = "executor.running"


def announce(state: Path) -> None:
    """This process is the executor of this state folder. RunningError where another one is: it would be out of the kill
    switch's reach if this one took its place there, and then ended for the journal's lock."""
    folder = state / "run"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    pid = os.getpid()
    if (other := _alive(state)) is not None:
        os.close(other.fd)
        if other.pid != pid:
            raise RunningError(
                "an executor of this state folder runs", want="one executor", got=f"process {other.pid}, {state}",
                hint="pointcall status; systemctl restart pointcall ends it and starts another",
            )  # fmt: skip
    write_whole(folder / RUNNING, json.dumps({"pid": pid, "started": _started(pid)}).encode())


@dataclass(frozen=True, slots=True)
class _Announced:
    """A process that announced itself and has not ended; `fd` is its pidfd, to be closed."""

    pid: int
    fd: int


def _announcement(state: Path) -> tuple[int, str, int]:
    """Who announced itself, when it was started, and whose word that is: the account that owns the file. OSError,
    ValueError and the like where nobody did. The folder is the executor's own, and who reads may be root."""
    fd = os.open(state / "run" / RUNNING, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("no regular file")
        body = json.loads(os.read(fd, MAX_BYTES))
    finally:
        os.close(fd)
    return int(body["pid"]), str(body["started"]), about.st_uid


def _account(pid: int) -> int:
    """Which account a process runs as. OSError, ValueError where it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next((line for line in lines if line.startswith("Uid:")), "").split()[1])


def _alive(state: Path) -> _Announced | None:
    """Nobody's word is taken for a process of another account: it could be any one of the node."""
    try:
        pid, started, owner = _announcement(state)
        fd = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    try:
        if _started(pid) == started and _account(pid) == owner and not _ended(fd, 0):
            return _Announced(pid, fd)
    except (OSError, ValueError, IndexError):  # it has ended meanwhile
        pass
    os.close(fd)
    return None


def _ended(fd: int, within: float) -> bool:
    """Whether all its threads end within so many seconds, also where nobody waits for it."""
    ended = select.poll()
    ended.register(fd, select.POLLIN)
    return bool(ended.poll(within * 1000))


def kill_executor(state: Path, *, within: float) -> str:
    """Kill the executor of this folder if it has not let go by itself `within` seconds; what was done, in words.

    It lets go by removing nothing: only its end, or its own word over the API, shows. So the caller asks first.
    """
    found = _alive(state)
    if found is None:
        return "no executor runs"
    try:
        signal.pidfd_send_signal(found.fd, signal.SIGKILL)
        if not _ended(found.fd, within):
            return f"executor {found.pid} was killed and has not ended yet"
        return f"executor {found.pid} was killed"
    except ProcessLookupError:
        return "no executor runs"
    finally:
        os.close(found.fd)


def now() -> datetime:
    """Wall-clock time: the shell's own."""
    return datetime.now(UTC)
