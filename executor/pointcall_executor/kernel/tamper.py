"""Keeps others from swapping the program behind a BPF link or taking a link off, where the kernel grants LSM programs.

While it is loaded only the executor can do either, to any link of the machine. What it cannot keep out is root that
kills the executor, or a kernel that is not to be trusted. Spec: docs/spec/kernel-abi.md section 11.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.kernel_object import KernelObject, does_not_attach


class TamperGuard(KernelObject):
    """The loaded LSM program."""

    def __init__(self, blob: Blob, *, constants: Mapping[str, int] | None = None) -> None:
        super().__init__(blob, constants=dict(constants or {}) | {"executor": os.getpid()})

    def attach(self) -> None:
        """From now on. Twice does no harm."""
        for program in self.blob.programs:
            if program.name not in self._links:
                try:
                    self._links[program.name] = bpf.raw_tracepoint_open(self._alive.programs[program.name])
                except OSError as error:
                    raise does_not_attach(program.name, program.section, error) from None

    def denied(self) -> int:
        """How often somebody tried."""
        raw = self._maps["denied"].get(bytes(4))
        assert raw is not None
        return int.from_bytes(raw, "little")
