"""Refusals of the kernel room. Outside input and a missing kernel feature raise one of these; a bug raises
AssertionError. Ids are in docs/checks.md."""

from __future__ import annotations

from pointcall_runbook.errors import PointcallError


class KernelError(PointcallError):
    """Base: the kernel, or what was to be loaded into it, said no."""

    id = "kernel.error"


class BlobError(KernelError):
    """The bytes are not a blob. Nothing of them was loaded."""

    id = "kernel.blob.malformed"


class LoadError(KernelError):
    """The kernel refused the programs. `log` is the verifier's own text, empty where it said nothing."""

    id = "kernel.load"

    def __init__(self, message: str, *, log: str = "", id: str | None = None, got: str = "", hint: str = "") -> None:
        super().__init__(message, id=id, want="every program of the blob accepted", got=got, hint=hint)
        self.log = log


class CircuitError(KernelError):
    """A destination cannot be armed, or a circuit cannot be commanded."""

    id = "kernel.circuit"
