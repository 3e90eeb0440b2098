"""A session: one admitted manifest as running things, and where its services are. Replaced whole, never patched.

Not here: how one comes to be (sessions.py), how it takes over from another (daemon.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from pointcall_attest.admission import Admitted
from pointcall_attest.errors import MalformedError
from pointcall_executor.actions.world import Channels
from pointcall_executor.core.step import Armed
from pointcall_executor.core.trigger import Topology
from pointcall_executor.epoch import Trust
from pointcall_executor.node import RunningServices, Sensors
from pointcall_executor.wasm import Runner
from pointcall_runbook.vocabulary import channel

MAX_FILES: Final = 1024  # a manifest names at most 512 subjects
MAX_FOLDER_BYTES: Final = 64 * 1024 * 1024
LEFT_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest as it travels: its signature bundles and the files that it names. Nothing in it is trusted."""

    signatures: tuple[bytes, ...]
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """`*.sigstore.json` beside a folder `files` that mirrors the subjects' names. OSError, or MalformedError
        `manifest.folder` where there is far more than a manifest could name."""
        paths = sorted(folder.glob("*.sigstore.json"))
        base = folder / "files"
        named = [p for p in sorted(base.rglob("*")) if p.is_file() and not p.is_symlink()]
        size = sum(p.stat().st_size for p in (*paths, *named))
        if len(paths) + len(named) > MAX_FILES or size > MAX_FOLDER_BYTES:
            want = f"at most {MAX_FILES} files and {MAX_FOLDER_BYTES} bytes"
            got = f"{len(paths) + len(named)} files, {size} bytes"
            raise MalformedError("this is no manifest's folder", id="manifest.folder", want=want, got=got)
        files = {str(p.relative_to(base)): p.read_bytes() for p in named}
        return cls(tuple(p.read_bytes() for p in paths), files)


@dataclass(slots=True)
class Session:
    """What one manifest needs, running. `topology` is replaced whole; readers take it once."""

    bundle: Bundle
    trust: Trust
    admitted: Admitted
    admitted_at: datetime  # when it was admitted first, and the same moment by CLOCK_MONOTONIC
    admitted_ns: int
    armed: Armed
    runners: dict[str, Runner]
    sensors: Sensors
    attached_ns: int  # CLOCK_MONOTONIC: what happens from then on, they see
    channels: Channels
    topology: Topology
    services: RunningServices = field(init=False)
    _moving: threading.Lock = field(default_factory=threading.Lock)
    _left: dict[int, int] = field(default_factory=dict)  # cgroups that services had before, the last of them

    @property
    def channel_numbers(self) -> tuple[int, ...]:
        """Every declared channel."""
        return tuple(channel(c.name).number for c in self.admitted.manifest.channels)

    def judged_at(self, now: datetime, now_ns: int) -> datetime:
        """When it is judged again: now, but no earlier than what has passed since it was admitted.

        A clock that is set back revives nothing that has expired, and undoes nothing that was admitted.
        """
        return max(now, self.admitted_at + timedelta(microseconds=(now_ns - self.admitted_ns) // 1000))

    def moved(self, number: int, cgroup_id: int) -> None:
        """A service got a new cgroup (0: lost its old one). Called before anything runs in it, from any thread."""
        with self._moving:
            for old, owner in self.topology.cgroups.items():
                if owner == number:
                    self.sensors.unwatch(old)
                    self._left[old] = owner
                    if len(self._left) > LEFT_MAX:
                        del self._left[next(iter(self._left))]
            self.topology = self.topology.moved(number, cgroup_id)
            if cgroup_id:
                self.sensors.watch(cgroup_id, self.topology.names[number])

    def owner(self, cgroup_id: int) -> str:
        """The declared service that runs in this cgroup or did, "" for none."""
        topology = self.topology
        number = topology.cgroups.get(cgroup_id) or self._left.get(cgroup_id, 0)
        return topology.names.get(number, "")
