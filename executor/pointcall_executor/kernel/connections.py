"""Kill established connections to one destination, where the kernel has bpf_sock_destroy (since 6.5).

The application sees ECONNABORTED, the peer a reset. Only connections of this thread's network namespace are reached.
Spec: docs/spec/kernel-abi.md section 7.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Mapping
from typing import Final

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import KEY, normalised
from pointcall_executor.kernel.kernel_object import KernelObject

TARGET: Final = struct.Struct("<32sQQ")  # struct kill_target


class ConnectionKiller(KernelObject):
    """The loaded iterator. May be called from any thread: the target is a slot in a map, so one waits for the other."""

    def __init__(self, blob: Blob, *, constants: Mapping[str, int] | None = None) -> None:
        super().__init__(blob, constants=constants)
        self._lock = threading.Lock()

    def kill(self, destination: Destination) -> int:
        """Destroy every established TCP connection to the destination; returns how many."""
        to = normalised(destination)
        assert to.protocol == 6, "UDP has no connections to kill"
        key = KEY.pack(to.address.packed, to.netns, to.port, to.protocol)
        with self._lock:
            self._maps["target"].set(bytes(4), TARGET.pack(key, 0, 0))
            self._walk()
            raw = self._maps["target"].get(bytes(4))
        assert raw is not None
        return int(TARGET.unpack(raw)[1])

    def _walk(self) -> None:
        link = bpf.link_create(self._alive.programs["pc_kill"], 0, bpf.AttachType.TRACE_ITER)
        try:
            walk = bpf.iter_create(link)
        finally:
            os.close(link)
        try:
            while os.read(walk, 4096):
                pass
        finally:
            os.close(walk)
