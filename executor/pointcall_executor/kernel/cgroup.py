"""Control groups v2: find the tree, create, fill, freeze, kill and remove one. No controllers, no limits.

Both layouts work: a v2-only machine and a hybrid one, where v2 is mounted beside v1 (often .../unified).
Spec: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pointcall_executor.kernel.errors import KernelError

MOUNTS: Final = Path("/proc/self/mounts")
_REMOVE_TRIES: Final = 200  # x 5 ms: a killed task leaves its cgroup a moment after the signal
_GOING: Final = (errno.ENOENT, errno.ENODEV)  # somebody else removes it at this moment


def find_root(mounts: str | None = None) -> Path:
    """Where the v2 tree is mounted. `mounts` is the text of /proc/self/mounts. KernelError where there is none."""
    text = MOUNTS.read_text() if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[2] == "cgroup2":
            return Path(fields[1].encode().decode("unicode_escape"))
    raise KernelError(
        "no cgroup v2 tree is mounted",
        id="kernel.cgroup.absent",
        want="a mount of type cgroup2",
        got="none",
        hint="mount -t cgroup2 none /sys/fs/cgroup/unified",
    )


def own() -> Cgroup:
    """The cgroup of this process."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return Cgroup(find_root() / line[3:].strip("/"))
    return Cgroup(find_root())


def by_id(cgroup_id: int) -> Cgroup:
    """The cgroup with this v2 id. KernelError `kernel.cgroup.gone` where there is none (any more)."""
    todo = [find_root()]
    if todo[0].stat().st_ino == cgroup_id:
        return Cgroup(todo[0])
    while todo:
        try:
            folders = [entry for entry in os.scandir(todo.pop()) if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # removed meanwhile, or somebody else's
        for folder in folders:
            if folder.inode() == cgroup_id:
                return Cgroup(Path(folder.path))
        todo += [Path(folder.path) for folder in folders]
    raise KernelError("there is no such cgroup", id="kernel.cgroup.gone", want="a living cgroup", got=str(cgroup_id))


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One folder of the v2 tree."""

    path: Path

    @classmethod
    def create(cls, name: str, parent: Path | None = None) -> Self:
        """Make `name` below `parent` (the root of the tree unless given); one that exists is taken as it is."""
        assert ".." not in Path(name).parts
        assert not Path(name).is_absolute()
        path = (parent or find_root()) / name
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @property
    def id(self) -> int:
        """What bpf_get_current_cgroup_id and our events call it."""
        return self.path.stat().st_ino

    @property
    def level(self) -> int:
        """Depth below the root, 0 for the root itself. KernelError where the folder is not in the v2 tree."""
        root = find_root()
        if not self.path.is_relative_to(root):
            raise KernelError(
                f"{self.path.name} is not a cgroup", id="kernel.cgroup.outside", want=f"a folder below {root}",
                got=str(self.path), hint="on a hybrid machine the v2 tree is often /sys/fs/cgroup/unified",
            )  # fmt: skip
        return len(self.path.relative_to(root).parts)

    def add(self, pid: int) -> None:
        """Move a process here with all its threads; 0 is the caller."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> tuple[int, ...]:
        """Processes here and below."""
        found: list[int] = []
        for procs in sorted(self.path.rglob("cgroup.procs")):
            try:
                found += map(int, procs.read_text().split())
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
        return tuple(found)

    def populated(self) -> bool:
        """Whether a process lives here or below."""
        fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)  # plainly: recovery waits for it
        try:
            return b"populated 1" in os.read(fd, 256)
        finally:
            os.close(fd)

    def freeze(self, frozen: bool = True) -> None:
        """Stop every task here and below, or let them go on. The kernel does it in its own time."""
        (self.path / "cgroup.freeze").write_text("1" if frozen else "0")

    def kill(self) -> None:
        """SIGKILL to every task here and below, also to one that is being born."""
        switch = self.path / "cgroup.kill"  # since 5.14
        if switch.exists():
            switch.write_text("1")
            return
        for _ in range(_REMOVE_TRIES):
            pids = self.pids()
            if not pids:
                return
            _signal_all(pids)

    def remove(self) -> None:
        """Kill what is left, wait until it is gone, and remove the folder with all below. Twice does no harm."""
        for _ in range(_REMOVE_TRIES):
            if not self.path.exists():
                return
            try:
                if self.populated():
                    self.kill()
            except OSError as error:
                if error.errno not in _GOING:
                    raise
            if self._rmdir():
                return
            time.sleep(0.005)
        raise KernelError(
            f"cgroup {self.path.name} does not become empty",
            id="kernel.cgroup.busy",
            want="no process",
            got=f"pids {self.pids()[:8]}",
            hint="a task in uninterruptible sleep cannot be killed; look at /proc/PID/stack",
        )

    def _rmdir(self) -> bool:
        try:
            folders = sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True)
            for folder in (*folders, self.path):
                folder.rmdir()
        except OSError as error:
            if error.errno in _GOING:
                return not self.path.exists()
            if error.errno == errno.EBUSY:
                return False
            raise
        return True


def _signal_all(pids: tuple[int, ...]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
