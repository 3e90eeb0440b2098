"""What an executor writes down of a service that it started, so that the next executor can prove that it is the same.

Trust: not trusted. Who can write here can stop the node from adopting or starting a service, or name another process,
which ends only where its cgroup is called as the service's (elsewhere.py). A process is adopted only if the kernel says
that it was born when the record says, that it is in a cgroup of that service with that id, and that its program has the
digest that is declared now.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.model import Name, Sha256, Strict
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.services.managed import ServiceError

FILE: Final = "running.json"
MAX_RECORD_BYTES: Final = 4096
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD: Final = 19  # of /proc/PID/stat after the command: starttime, field 22 of proc(5)
_CHANGING: Final = threading.Lock()  # two declarations of one name, an old and a new one, share a folder

Number = Annotated[int, Field(ge=1, le=2**63 - 1)]
Pid = Annotated[int, Field(ge=1, le=2**31 - 1)]  # a number that the kernel can be asked for


class RunRecord(Strict):
    """One running instance."""

    format: Literal["pointcall-running/v1"] = "pointcall-running/v1"
    boot: Annotated[str, Field(min_length=1, max_length=64)]
    name: Name
    declaration: Sha256
    pid: Pid
    born: Number  # clock ticks after boot
    cgroup: Annotated[str, Field(min_length=1, max_length=400)]  # below the root of the v2 tree
    cgroup_id: Number
    device: Annotated[int, Field(ge=0, le=2**63 - 1)]  # of the program, as executed
    inode: Number
    spawner: Pid
    spawner_born: Number


def boot_id() -> str:
    """Pids, cgroups and birth times mean nothing after another boot."""
    return _BOOT.read_text().strip()


def born(pid: int) -> int:
    """When a process was born, in clock ticks after boot; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[_START_FIELD])


def write(folder: Path, record: RunRecord) -> None:
    """All or nothing. Not synced: after a power cut there is nothing to adopt."""
    new = folder / f"{FILE}.new"
    new.write_text(record.model_dump_json())
    with _CHANGING:
        new.replace(folder / FILE)


def read(folder: Path) -> RunRecord | None:
    """None if there is none, or if it is not one."""
    try:
        with (folder / FILE).open("rb") as file:
            return RunRecord.model_validate_json(file.read(MAX_RECORD_BYTES))
    except (OSError, ValidationError):
        return None


def forget(folder: Path, cgroup_id: int) -> None:
    """Remove the record of the instance in that cgroup. That of another one, in the same folder, stays."""
    with _CHANGING:
        record = read(folder)
        if record is not None and record.cgroup_id == cgroup_id:
            (folder / FILE).unlink(missing_ok=True)


def program_of(pid: int) -> int:
    """A descriptor of the very file that a process executes. OSError, also where it has privileges that we lack."""
    return os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)


def disproved(
    record: RunRecord, declaration: ServiceDeclaration, parent: str, program: Callable[[int], int] = program_of
) -> str:
    """Empty if the process of the record runs and is the declared service; otherwise what speaks against it.

    The caller holds a pidfd of `record.pid` that it opened before, and sees afterwards that it still runs: so the pid
    was not another's meanwhile. `program` opens what a pid executes.
    """
    process = declaration.process
    prefix, number = f"{parent}/{declaration.name}.", record.cgroup.rpartition(".")[2]
    if record.boot != boot_id():
        return "the machine was booted since"
    if (record.name, record.declaration) != (declaration.name, declaration.sha256):
        return "it was declared otherwise"
    if record.cgroup != prefix + number or not number.isdecimal():
        return f"{record.cgroup} is no cgroup of this service"
    if born(record.pid) != record.born:
        return "its process is not the one that was started"
    try:
        if f"0::/{record.cgroup}" not in Path(f"/proc/{record.pid}/cgroup").read_text().splitlines():
            return "its process is in another cgroup"
        if (find_root() / record.cgroup).stat().st_ino != record.cgroup_id:
            return "its cgroup is another one"
        return _other_program(record, {f.path: f.sha256 for f in process.files}[process.argv[0]], program)
    except (OSError, ServiceError) as error:
        return f"it cannot be looked at: {error}"


def _other_program(record: RunRecord, sha256: str, program: Callable[[int], int]) -> str:
    """The program that the kernel runs, by identity and by content."""
    with os.fdopen(program(record.pid), "rb") as file:
        about = os.fstat(file.fileno())
        if (about.st_dev, about.st_ino) != (record.device, record.inode):
            return "it runs another program"
        got = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if got == sha256 else f"its program has the digest {got}"
