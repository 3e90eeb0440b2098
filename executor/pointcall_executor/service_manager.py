"""The service manager's protocol: readiness, state and watchdog as datagrams, as in sd_notify(3). No library needed.

The watchdog is fed only while the core's loop turns: a process whose loop is stuck is killed and started again, which
is safe at any point (crash-only). Without NOTIFY_SOCKET everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Final, Self

from pointcall_executor.pulse import Pulse

VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
MAX_STATUS_CHARS: Final = 200
EXTEND_SECONDS: Final = 60


class ServiceManager:
    """Our end. Sending never waits and never raises: a manager that went away is not our failure."""

    def __init__(self, address: str, watchdog_us: int) -> None:
        """`address` is a path, or a name in the abstract namespace with `@` before it; empty: nobody listens."""
        self._socket: socket.socket | None = None
        self.watchdog_us = watchdog_us
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if address:
            self._socket = _connected(f"\0{address[1:]}" if address.startswith("@") else address)

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """From the environment, which loses the variables: no child may speak for us."""
        address, us, pid = (environ.pop(name, "") for name in VARIABLES)
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(us) if ours and us.isascii() and us.isdecimal() else 0)

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(lines).encode())

    def ready(self, status: str) -> None:
        """Started, or done with reloading."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """Reading the settings and the manifest folder again; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Ending in order."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(_status(text))

    def extend(self, seconds: float) -> None:
        """Ask for more time, while starting or stopping."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    @contextlib.contextmanager
    def taking_longer(self) -> Iterator[None]:
        """Around what may take longer than the manager allows for a start: services that become ready one by one."""
        over = threading.Event()

        def ask() -> None:
            while not over.wait(EXTEND_SECONDS / 3):
                self.extend(EXTEND_SECONDS)

        asking = threading.Thread(target=ask, name="extend", daemon=True)
        if self._socket is not None:
            asking.start()
        try:
            yield
        finally:
            over.set()

    def watch(self, pulse: Pulse) -> None:
        """Feed the watchdog three times in its time, each time only if the loop turned meanwhile."""
        if self.watchdog_us and self._socket is not None and self._thread is None:
            self._thread = threading.Thread(target=self._feed, args=(pulse.moved,), name="watchdog", daemon=True)
            self._thread.start()

    def _feed(self, moved: Callable[[], bool]) -> None:
        while not self._ending.wait(self.watchdog_us / 3e6):
            if moved():
                self._send("WATCHDOG=1")

    def close(self) -> None:
        """May be called twice."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connected(address: str) -> socket.socket | None:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        found.connect(address)
    except OSError:
        found.close()
        return None
    return found


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARS]
