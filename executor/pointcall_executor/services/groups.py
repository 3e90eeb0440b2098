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

from pointcall_executor.kernel import cgroup

REMOVE_SECONDS: Final = 5.0  # how long a killed cgroup may take to become empty


class ServiceGroups:
    """The folders of one service below the executor's parent folder."""

    def __init__(self, relative: str) -> None:
        self._v2 = cgroup.v2_root() / relative
        self._memory: Path | None = None
        self._relative = relative

    def create(self, *, memory_bytes: int | None = None) -> int:
        """Make the folders empty and new; the v2 cgroup's id."""
        self.destroy()
        self._v2.mkdir(parents=True)
        if memory_bytes is not None:
            self._limit_memory(memory_bytes)
        return self._v2.stat().st_ino

    def _limit_memory(self, limit: int) -> None:
        """On a pure v2 host in the same folder, on a hybrid host in the v1 memory hierarchy."""
        v1 = cgroup.v1_mount("memory")
        if v1 is None:
            for parent in reversed(self._v2.relative_to(cgroup.v2_root()).parents):
                (cgroup.v2_root() / parent / "cgroup.subtree_control").write_text("+memory")
            (self._v2 / "memory.max").write_text(str(limit))
            (self._v2 / "memory.swap.max").write_text("0")
            return
        self._memory = v1 / self._relative
        self._memory.mkdir(parents=True, exist_ok=True)
        (self._memory / "memory.limit_in_bytes").write_text(str(limit))

    def open_procs(self) -> list[int]:
        """Descriptors of cgroup.procs in every folder; a process that writes 0 into them joins. The caller closes."""
        folders = [self._v2, *([self._memory] if self._memory else [])]
        return [os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in folders]

    def kill(self) -> None:
        """SIGKILL to everything in the cgroup at once."""
        with contextlib.suppress(FileNotFoundError):
            (self._v2 / "cgroup.kill").write_text("1")

    def destroy(self) -> None:
        """Kill what is left and remove the folders. Nothing there is no error."""
        for folder in filter(None, (self._v2, self._memory)):
            if folder.exists():
                self.kill()
                _remove(folder)
        self._memory = None


def _remove(folder: Path) -> None:
    """rmdir works once the last task is gone; tasks of a killed cgroup take a moment."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.0005)
        else:
            return
