"""The cgroups of one service: a v2 folder always, and a v1 memory folder on hybrid hosts where a limit is declared.

A service is destroyed by killing its cgroup, so that nothing it forked survives. A recreated service gets a new folder
and so a new id; events of the old one cannot be mistaken for the new one's.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.cgroup import MOUNTS, Cgroup, find_root

REMOVE_SECONDS: Final = 5.0  # how long a killed cgroup may take to become empty


def v1_mount(controller: str, mounts: str | None = None) -> Path | None:
    """Where a v1 controller is mounted; None on a pure v2 host. `mounts` is the text of /proc/self/mounts."""
    for line in (MOUNTS.read_text() if mounts is None else mounts).splitlines():
        fields = line.split()
        if len(fields) >= 4 and fields[2] == "cgroup" and controller in fields[3].split(","):
            return Path(fields[1])
    return None


class ServiceGroups:
    """The folders of one service below the executor's parent folder."""

    def __init__(self, relative: str) -> None:
        self._relative = relative
        self._main = Cgroup(find_root() / relative)
        self._memory: Path | None = None

    def create(self, *, memory_bytes: int | None = None) -> int:
        """Make the folders empty and new; the v2 cgroup's id."""
        self.destroy()
        self._main.path.mkdir(parents=True)
        if memory_bytes is not None:
            self._limit_memory(memory_bytes)
        return self._main.id

    def _limit_memory(self, limit: int) -> None:
        """On a pure v2 host in the same folder, on a hybrid host in the v1 memory hierarchy."""
        v1 = v1_mount("memory")
        if v1 is not None:
            self._memory = v1 / self._relative
            self._memory.mkdir(parents=True, exist_ok=True)
            (self._memory / "memory.limit_in_bytes").write_text(str(limit))
            return
        root = find_root()
        for parent in reversed(self._main.path.relative_to(root).parents):
            control = root / parent / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
        (self._main.path / "memory.max").write_text(str(limit))
        (self._main.path / "memory.swap.max").write_text("0")

    def open_procs(self) -> list[int]:
        """Descriptors of cgroup.procs in every folder; a process that writes 0 into them joins. The caller closes."""
        folders = [self._main.path, *([self._memory] if self._memory else [])]
        return [os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in folders]

    def kill(self) -> None:
        """SIGKILL to everything in the cgroup at once."""
        if self._main.path.exists():
            self._main.kill()

    def destroy(self) -> None:
        """Kill what is left and remove the folders. Nothing there is no error."""
        if self._main.path.exists():
            self._main.kill()
            _remove(self._main.path)
        if self._memory is not None:
            _remove(self._memory)
            self._memory = None


def destroy_leftovers(parent: str, name: str) -> None:
    """Kill and remove what an earlier executor left of a service: every folder `<name>.<n>` below `parent`."""
    for root in filter(None, (find_root(), v1_mount("memory"))):
        for folder in sorted((root / parent).glob(f"{name}.*")):
            if folder.name.removeprefix(f"{name}.").isdecimal() and folder.is_dir():
                Cgroup(folder).kill()
                _remove(folder)


def remove_empty(relative: str) -> None:
    """Remove a folder and its parents from both hierarchies as far as nothing lives in them."""
    for root in filter(None, (find_root(), v1_mount("memory"))):
        folder = root / relative
        with contextlib.suppress(OSError):
            while folder != root:
                folder.rmdir()
                folder = folder.parent


def _remove(folder: Path) -> None:
    """rmdir works once the last task is gone; tasks of a killed cgroup take a moment. Looks often: recovery waits."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.0003)
