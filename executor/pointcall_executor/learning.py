"""What services have been learned to call, so that a recreated one is not learned again, nor after a restart.

A service is known by its name and the digest of its declaration: another program is learned anew. On disk in one file
of the state folder, every few seconds where something changed: a call that was first made in the seconds before a
kill -9 may be reported later. Trust: who may write there could have a call known; so may who is root.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pointcall_executor.durable import write_whole
from pointcall_executor.kernel.syscalls import CALLS, SyscallSensor

Key = tuple[str, str]  # name, SHA-256 of its declaration

MAX_BYTES: Final = 8 * 1024 * 1024
KEYS_MAX: Final = 1024  # eight manifests of 128 services; of more the one learned first is forgotten
STALE_NS: Final = 60_000_000_000  # how much of a learning may be done again after a kill -9


class _Row(BaseModel):
    """One service, as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: Annotated[str, Field(max_length=256)]
    declaration: Annotated[str, Field(max_length=64)]
    calls: Annotated[list[Annotated[int, Field(ge=0, lt=CALLS)]], Field(max_length=CALLS)]
    left_ns: Annotated[int, Field(ge=0, lt=2**62)]  # of its learning; 0: it has ended


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    services: Annotated[list[_Row], Field(max_length=KEYS_MAX)]


@dataclass(slots=True)
class Learned:
    """System calls by service, and until when (CLOCK_MONOTONIC ns) each is learned."""

    calls: dict[Key, frozenset[int]] = field(default_factory=dict)
    until_ns: dict[Key, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, now_ns: int) -> Learned:
        """What an earlier executor kept; nothing where it kept none, or where the file is not one of these."""
        found = cls()
        try:
            with path.open("rb") as file:
                rows = _File.model_validate_json(file.read(MAX_BYTES)).services
        except (OSError, ValidationError):
            return found
        for row in rows:
            key = row.name, row.declaration
            found.calls[key], found.until_ns[key] = frozenset(row.calls), now_ns + row.left_ns
        return found

    def encode(self, now_ns: int) -> bytes:
        """The bytes of the file: for those whose learning has begun."""
        rows = [
            _Row(
                name=name,
                declaration=digest,
                calls=sorted(self.calls.get((name, digest), ())),
                left_ns=max(0, until_ns - now_ns),
            )
            for (name, digest), until_ns in list(self.until_ns.items())[-KEYS_MAX:]
        ]
        return _File(services=rows).model_dump_json().encode()


class Kept:
    """Keeps what is learned in a file, and writes it only where that says something new."""

    def __init__(self, path: Path, now_ns: int) -> None:
        self._path, self.learned = path, Learned.load(path, now_ns)
        self._written = self._state(now_ns)

    def save(self, now_ns: int) -> None:
        """Now, if it changed. A disk that refuses is tried again the next time: nothing is lost but time."""
        state = self._state(now_ns)
        if state == self._written:
            return
        with contextlib.suppress(OSError):
            write_whole(self._path, self.learned.encode(now_ns))
            self._written = state

    def _state(self, now_ns: int) -> dict[Key, tuple[frozenset[int], int]]:
        learned = self.learned
        left = {key: max(0, until_ns - now_ns) for key, until_ns in list(learned.until_ns.items())}
        return {key: (learned.calls.get(key, frozenset()), -(-ns // STALE_NS)) for key, ns in left.items()}


class Learning:
    """Feeds one sensor from what is known, and keeps what it sees."""

    def __init__(self, sensor: SyscallSensor, learned: Learned, learn_ns: int) -> None:
        self._sensor, self._learned, self._learn_ns = sensor, learned, learn_ns
        self._watched: dict[int, Key] = {}

    def watch(self, cgroup_id: int, key: Key, now_ns: int) -> None:
        """A service runs in this cgroup now. What it learned before counts, and so does the time that it took."""
        longest_ns = now_ns + self._learn_ns
        until_ns = self._learned.until_ns[key] = min(self._learned.until_ns.get(key, longest_ns), longest_ns)
        self._sensor.learn(cgroup_id, self._learned.calls.get(key, frozenset()), until_ns=until_ns)
        self._watched[cgroup_id] = key

    def refresh(self) -> None:
        """Take in what another session has kept meanwhile."""
        for cgroup_id, key in self._watched.items():
            known = self._learned.calls.get(key, frozenset()) | self._sensor.habits(cgroup_id).calls
            self._sensor.learn(cgroup_id, known, until_ns=self._learned.until_ns[key])

    def unwatch(self, cgroup_id: int) -> None:
        """It does not run there any more. Twice does no harm."""
        key = self._watched.pop(cgroup_id, None)
        if key is not None:
            self._keep(cgroup_id, key)
            self._sensor.forget(cgroup_id)

    def keep(self) -> None:
        """Keep what was seen so far: the next session goes on from there."""
        for cgroup_id, key in self._watched.items():
            self._keep(cgroup_id, key)

    def _keep(self, cgroup_id: int, key: Key) -> None:
        self._learned.calls[key] = self._learned.calls.get(key, frozenset()) | self._sensor.habits(cgroup_id).calls
