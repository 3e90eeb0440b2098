"""Pressure-stall triggers: the kernel wakes us when tasks of a cgroup waited too long for CPU, memory or IO. No BPF.

On a hybrid machine a cgroup has its own pressure files in the v2 tree where PSI is on. Without CAP_SYS_RESOURCE the
window must be a multiple of 2 s. Spec: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.cgroup import by_id, find_root
from pointcall_executor.kernel.errors import KernelError
from pointcall_runbook.vocabulary import Resource

FILES: Final = {Resource.CPU: "cpu.pressure", Resource.MEMORY: "memory.pressure", Resource.IO: "io.pressure"}
WINDOW_MIN_NS: Final = 500_000_000  # the kernel's own bounds
WINDOW_MAX_NS: Final = 10_000_000_000
WINDOW_NS: Final = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Pressure:
    """A trigger fired: tasks of the cgroup stalled for `stalled_ns` in all within the last `window_ns`."""

    resource: Resource
    cgroup: int
    stalled_ns: int
    window_ns: int


class PressureTrigger:
    """One trigger on one cgroup and resource. It lives as long as its descriptor."""

    def __init__(self, cgroup: Path, resource: Resource, *, stalled_ns: int, window_ns: int = WINDOW_NS) -> None:
        """KernelError where the kernel has no PSI or refuses the window."""
        check_window(stalled_ns, window_ns)
        self.what = Pressure(resource, cgroup.stat().st_ino, stalled_ns, window_ns)
        request = f"some {stalled_ns // 1000} {window_ns // 1000}\0".encode()
        try:
            self._fd = os.open(cgroup / FILES[resource], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _refused("this cgroup has no pressure file", error) from None
        try:
            os.write(self._fd, request)
            self._samples = [(time.monotonic_ns(), self._total_ns())]
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
        return self.measured() if poll.poll(timeout_s * 1000) else None

    def sample(self) -> None:
        """Remember the stall so far; called a few times a window, it makes `measured` exact."""
        now_ns = time.monotonic_ns()
        self._samples.append((now_ns, self._total_ns()))
        while len(self._samples) > 2 and self._samples[1][0] <= now_ns - self.what.window_ns:
            self._samples.pop(0)

    def measured(self) -> Pressure:
        """The stall in the last window; at least the threshold, since the kernel says that it was reached."""
        self.sample()
        stalled = min(self._samples[-1][1] - self._samples[0][1], self.what.window_ns)
        return replace(self.what, stalled_ns=max(stalled, self.what.stalled_ns))

    def close(self) -> None:
        os.close(self._fd)

    def _total_ns(self) -> int:
        """All stall time of the cgroup since it was made, from `some ... total=<microseconds>`."""
        first = os.pread(self._fd, 4096, 0).split(b"\n")[0]
        return int(first.rpartition(b"total=")[2]) * 1000


class PressureWatch:
    """The same triggers on every watched cgroup. `stalls`: ns within `window_ns` for each resource that matters."""

    def __init__(self, stalls: Mapping[Resource, int], window_ns: int = WINDOW_NS) -> None:
        for stalled_ns in stalls.values():
            check_window(stalled_ns, window_ns)
        self._stalls, self._window_ns = stalls, window_ns
        self._lock = threading.Lock()
        self._epoll, self._stop = select.epoll(), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._triggers: dict[int, PressureTrigger] = {}  # by descriptor

    @property
    def measures(self) -> bool:
        """Whether a trigger is wanted at all: without one there is nothing to sample."""
        return bool(self._stalls)

    def watch(self, cgroup_id: int) -> None:
        """Set the triggers. KernelError where the cgroup is gone or the kernel refuses."""
        if not self._stalls:
            return
        path = by_id(cgroup_id).path
        for resource, stalled_ns in self._stalls.items():
            trigger = PressureTrigger(path, resource, stalled_ns=stalled_ns, window_ns=self._window_ns)
            with self._lock:
                self._triggers[trigger.fileno()] = trigger
                self._epoll.register(trigger.fileno(), select.EPOLLPRI)

    def unwatch(self, cgroup_id: int) -> None:
        """Take them off. Twice does no harm."""
        with self._lock:
            for fd in [fd for fd, trigger in self._triggers.items() if trigger.what.cgroup == cgroup_id]:
                self._drop(fd)

    def wait(self, timeout_s: float) -> list[Pressure]:
        """What fired within the time; returns at once when something does, or when it is interrupted."""
        ready = self._epoll.poll(timeout_s)
        found = []
        with self._lock:
            for fd, mask in ready:
                trigger = self._triggers.get(fd)
                if trigger is None:
                    continue  # interrupted, or taken off meanwhile
                if mask & (select.EPOLLERR | select.EPOLLHUP):
                    self._drop(fd)  # its cgroup is gone
                    continue
                with contextlib.suppress(OSError):
                    found.append(trigger.measured())
            for trigger in self._triggers.values():
                with contextlib.suppress(OSError):  # its cgroup is going; poll says so next
                    trigger.sample()
        return found

    def interrupt(self) -> None:
        """Let `wait` return at once, now and whenever it is called again."""
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Take all off."""
        with self._lock:
            for fd in list(self._triggers):
                self._drop(fd)
            self._epoll.close()
            os.close(self._stop)

    def _drop(self, fd: int) -> None:
        self._epoll.unregister(fd)
        self._triggers.pop(fd).close()


def check_window(stalled_ns: int, window_ns: int) -> None:
    """ValueError outside the kernel's own bounds."""
    if not (0 < stalled_ns <= window_ns and WINDOW_MIN_NS <= window_ns <= WINDOW_MAX_NS):
        raise ValueError(f"stall {stalled_ns} ns in a window of {window_ns} ns")


def probe_pressure(window_ns: int) -> None:
    """Set a trigger on the root and take it off again. KernelError where the kernel or our rights do not allow it."""
    PressureTrigger(find_root(), Resource.CPU, stalled_ns=window_ns, window_ns=window_ns).close()


def _refused(message: str, error: OSError) -> KernelError:
    return KernelError(
        message, id="kernel.pressure", want="PSI, and a window of a multiple of 2 s", got=error.strerror or "",
        hint="without CAP_SYS_RESOURCE other windows are refused; psi=0 on the kernel's command line turns PSI off",
    )  # fmt: skip
