"""Kill established connections to one destination, where the kernel has bpf_sock_destroy (since 6.5).

The application sees ECONNABORTED, the peer a reset. Only connections of this thread's network namespace are reached.
Spec: docs/spec/kernel-abi.md section 7.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from typing import Final

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import KEY, normalised
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.maps import Map

TARGET: Final = struct.Struct("<32sQQ")  # struct kill_target


class ConnectionKiller:
    """The loaded iterator. One caller at a time: the target is a slot in a map."""

    def __init__(self, blob: Blob) -> None:
        self._loaded = load(blob)
        self._target = Map(self._loaded.maps["target"])

    def kill(self, destination: Destination) -> int:
        """Destroy every established TCP connection to the destination; returns how many."""
        to = normalised(destination)
        assert to.protocol == 6, "UDP has no connections to kill"
        key = KEY.pack(to.address.packed, to.netns, to.port, to.protocol)
        self._target.set(bytes(4), TARGET.pack(key, 0, 0))
        self._walk()
        raw = self._target.get(bytes(4))
        assert raw is not None
        return int(TARGET.unpack(raw)[1])

    def programs(self) -> Mapping[str, bpf.ProgramInfo]:
        return {name: bpf.program_info(fd) for name, fd in self._loaded.programs.items()}

    def close(self) -> None:
        self._loaded.close()

    def _walk(self) -> None:
        link = bpf.link_create(self._loaded.programs["pc_kill"], 0, bpf.AttachType.TRACE_ITER)
        try:
            walk = bpf.iter_create(link)
        finally:
            os.close(link)
        try:
            while os.read(walk, 4096):
                pass
        finally:
            os.close(walk)
