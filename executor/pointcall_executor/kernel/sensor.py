"""What every kernel sensor shares: a loaded blob, its links, its ring and its exact loss. Subclasses add meaning.

A sensor owns all its descriptors. When it is closed, or its process dies, everything leaves the kernel, unless it was
pinned.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pointcall_executor.kernel import bpf, pins
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.kernel_object import CGROUP_ATTACH, KernelObject, Loader, does_not_attach
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.pins import Pinned, adopt
from pointcall_executor.kernel.ring import Ring

COUNTERS: Final = struct.Struct("<QQ")  # struct pointcall_counters


class Sensor(KernelObject):
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
        self._cgroup = cgroup
        loaded, links = (None, {}) if pinned is None else adopt(blob, pinned, constants or {})
        super().__init__(blob, constants=constants, loader=loader, loaded=loaded)
        self._links = links
        try:
            self.ring = Ring(self._maps["events"].fd)
        except KernelError:
            super().close()
            raise

    def attach(self) -> None:
        """Attach every program that attaches. Twice does no harm. LoadError names the one that is refused."""
        for program in self.blob.programs:
            if program.name not in self._links and program.section != "syscall":
                self._links[program.name] = self._attach(program.name, program.section)

    def lost(self) -> int:
        """Records that found the ring full, exact, since loading."""
        return self._counters()[1]

    def sent(self) -> int:
        """Records that reached the ring, exact, since loading."""
        return self._counters()[0]

    def pin(self, folder: Path) -> Pinned:
        """Let it outlive this process: everything is pinned below `folder` in a bpf file system.

        Keep the returned value: only with it can the sensor be adopted. `pins.unpin` ends it.
        """
        pins.pin(folder, self._alive, self._links)
        return Pinned(folder, self.identity())

    def close(self) -> None:
        """Detach and free everything. Twice does no harm."""
        if self._loaded is not None:
            self.ring.close()
        super().close()

    def _counters(self) -> tuple[int, int]:
        raw = self._maps["counters"].get(bytes(4))
        assert raw is not None
        events, lost = COUNTERS.unpack(raw)
        return events, lost

    def _attach(self, name: str, section: str) -> int:
        if section in CGROUP_ATTACH:
            assert self._cgroup is not None, "a gate needs a cgroup"
            return self._attach_cgroup(name, section, self._cgroup)
        try:
            return bpf.raw_tracepoint_open(self._alive.programs[name])
        except OSError as error:
            raise does_not_attach(name, section, error) from None
