"""What every kernel sensor shares: a loaded blob, its links, its ring and its exact loss. Subclasses add meaning.

A sensor owns all its descriptors. When it is closed, or its process dies, everything leaves the kernel, unless it was
pinned.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pointcall_executor.kernel import bpf, identity, pins
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import KernelError, LoadError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.loader import Loaded, load
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.pins import Pinned, adopt
from pointcall_executor.kernel.ring import Ring

COUNTERS: Final = struct.Struct("<QQ")  # struct pointcall_counters
CGROUP_ATTACH: Final[Mapping[str, bpf.AttachType]] = {
    "cgroup/connect4": bpf.AttachType.CGROUP_INET4_CONNECT,
    "cgroup/connect6": bpf.AttachType.CGROUP_INET6_CONNECT,
    "cgroup/sendmsg4": bpf.AttachType.CGROUP_UDP4_SENDMSG,
    "cgroup/sendmsg6": bpf.AttachType.CGROUP_UDP6_SENDMSG,
}
Loader = Callable[[Blob, Mapping[str, int] | None], Loaded]


class Sensor:
    """One loaded object. `cgroup` is where its gate programs attach; None for an object that has none.

    With `pinned` nothing is loaded: the sensor of an earlier process is taken up again, or KernelError says why not.
    """

    def __init__(
        self,
        blob: Blob,
        *,
        constants: Mapping[str, int] | None = None,
        cgroup: Path | None = None,
        pinned: Pinned | None = None,
        loader: Loader = load,
    ) -> None:
        self.blob, self._cgroup = blob, cgroup
        self._links: dict[str, int] = {}
        self._loaded: Loaded | None
        if pinned is None:
            self._loaded = loader(blob, constants)
        else:
            self._loaded, self._links = adopt(blob, pinned, constants or {})
        self._maps = {name: Map(fd) for name, fd in self._loaded.maps.items()}
        try:
            self.ring = Ring(self._maps["events"].fd)
        except KernelError:
            self.detach()
            self._loaded.close()
            raise

    def attach(self) -> None:
        """Attach every program that attaches. Twice does no harm. LoadError names the one that is refused."""
        for program in self.blob.programs:
            if program.name not in self._links and program.section != "syscall":
                self._links[program.name] = self._attach(program.name, program.section)

    def detach(self) -> None:
        """Stop seeing and refusing; maps, counters and the ring stay."""
        while self._links:
            os.close(self._links.popitem()[1])

    def lost(self) -> int:
        """Records that found the ring full, exact, since loading."""
        return self._counters()[1]

    def sent(self) -> int:
        """Records that reached the ring, exact, since loading."""
        return self._counters()[0]

    def programs(self) -> list[tuple[str, int, str]]:
        """(name, kernel id, tag) of every loaded program, as the kernel reports them now."""
        infos = ((name, bpf.program_info(fd)) for name, fd in self._alive.programs.items())
        return [(name, info.id, info.tag) for name, info in infos]

    def identity(self) -> Identity:
        """What the kernel says that this sensor is now: record it when arming."""
        return identity.read(self.blob.sha256, self._alive, self._links)

    def recheck(self, expected: Identity) -> list[str]:
        """What is no longer as recorded, one plain line each: a swapped program, a link that was taken off."""
        return identity.differences(expected, self.identity())

    def pin(self, folder: Path) -> Pinned:
        """Let it outlive this process: everything is pinned below `folder` in a bpf file system.

        Keep the returned value: only with it can the sensor be adopted. `pins.unpin` ends it.
        """
        pins.pin(folder, self._alive, self._links)
        return Pinned(folder, self.identity())

    def close(self) -> None:
        """Detach and free everything. Twice does no harm."""
        if self._loaded is None:
            return
        self.detach()
        self.ring.close()
        self._loaded.close()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _alive(self) -> Loaded:
        assert self._loaded is not None, "the sensor is closed"
        return self._loaded

    def _counters(self) -> tuple[int, int]:
        raw = self._maps["counters"].get(bytes(4))
        assert raw is not None
        events, lost = COUNTERS.unpack(raw)
        return events, lost

    def _attach(self, name: str, section: str) -> int:
        fd = self._alive.programs[name]
        try:
            if section in CGROUP_ATTACH:
                return self._attach_cgroup(fd, CGROUP_ATTACH[section])
            return bpf.raw_tracepoint_open(fd)
        except OSError as error:
            raise LoadError(
                f"{name} does not attach to {section}",
                id="kernel.attach",
                got=str(error.strerror),
                hint="another program may hold the cgroup exclusively: bpftool cgroup tree",
            ) from None

    def _attach_cgroup(self, fd: int, kind: bpf.AttachType) -> int:
        assert self._cgroup is not None, "a gate needs a cgroup"
        target = os.open(self._cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return bpf.link_create(fd, target, kind)
        finally:
            os.close(target)
