"""Who read what, counted: the source of `access` log entries.

One entry for each call would let a reader fill the log, so calls are counted for each caller and method, and written as
counts. Nothing is lost: what was not drained yet is drained at the end.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from pointcall_executor.api.roles import METHODS


@dataclass(frozen=True, slots=True)
class Access:
    """Calls of one caller to one method since the last drain: the body of an `access` entry.

    `role` is the caller's name: the role of a socket, or a SPIFFE ID. The method of calls that were not permitted ends
    in ` (denied)`.
    """

    role: str
    method: str
    count: int


class Accesses:
    """The counters of one server. A method that is not in the table counts as `unknown`: its name is the caller's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, caller: str, method: str, *, denied: bool) -> None:
        name = method.removeprefix("/") if method in METHODS else "unknown"
        with self._lock:
            self._counts[caller, name + " (denied)" * denied] += 1

    def drain(self) -> tuple[Access, ...]:
        """Everything counted since the last drain, in a stable order."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return tuple(Access(role, method, n) for (role, method), n in sorted(counts.items()))
