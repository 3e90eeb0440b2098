"""Pressure-stall triggers: the kernel wakes us when tasks of a cgroup waited too long for CPU, memory or IO. No BPF.

On a hybrid machine a cgroup has its own pressure files in the v2 tree where PSI is on. Without CAP_SYS_RESOURCE the
window must be a multiple of 2 s. Spec: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.errors import KernelError
from pointcall_runbook.vocabulary import Resource

FILES: Final = {Resource.CPU: "cpu.pressure", Resource.MEMORY: "memory.pressure", Resource.IO: "io.pressure"}
WINDOW_MIN_NS: Final = 500_000_000  # the kernel's own bounds
WINDOW_MAX_NS: Final = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Pressure:
    """A trigger fired: at least one task stalled for `stalled_ns` in all within `window_ns`."""

    resource: Resource
    cgroup: int
    stalled_ns: int
    window_ns: int


class PressureTrigger:
    """One trigger on one cgroup and resource. It lives as long as its descriptor."""

    def __init__(self, cgroup: Path, resource: Resource, *, stalled_ns: int, window_ns: int = 2_000_000_000) -> None:
        """KernelError where the kernel has no PSI or refuses the window."""
        if not (0 < stalled_ns <= window_ns and WINDOW_MIN_NS <= window_ns <= WINDOW_MAX_NS):
            raise ValueError(f"stall {stalled_ns} ns in a window of {window_ns} ns")
        self.what = Pressure(resource, cgroup.stat().st_ino, stalled_ns, window_ns)
        request = f"some {stalled_ns // 1000} {window_ns // 1000}\0".encode()
        try:
            self._fd = os.open(cgroup / FILES[resource], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _refused("this cgroup has no pressure file", error) from None
        try:
            os.write(self._fd, request)
        except OSError as error:
            os.close(self._fd)
            raise _refused("the kernel refused the trigger", error) from None

    def fileno(self) -> int:
        """For poll and epoll: POLLPRI when it fires, at most once a window."""
        return self._fd

    def wait(self, timeout_s: float) -> Pressure | None:
        """What fired within the time, or None."""
        poll = select.poll()
        poll.register(self._fd, select.POLLPRI)
        return self.what if poll.poll(timeout_s * 1000) else None

    def close(self) -> None:
        os.close(self._fd)


def _refused(message: str, error: OSError) -> KernelError:
    return KernelError(
        message, id="kernel.pressure", want="PSI, and a window of a multiple of 2 s", got=error.strerror or "",
        hint="without CAP_SYS_RESOURCE other windows are refused; psi=0 on the kernel's command line turns PSI off",
    )  # fmt: skip
