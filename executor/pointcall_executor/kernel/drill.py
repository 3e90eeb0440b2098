"""Faults for a drill, held by the kernel: connects refused, packets lost, for one cgroup and one destination.

A drill always ends: the lease is a time in the kernel, so it ends when this process is gone, too; and it ends at once
when the injector is closed. Chance comes from a seed: `expected` draws the same numbers as bpf/drill.bpf.c. Nothing is
decided here. Spec: docs/spec/kernel-abi.md section 12.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import KEY, normalised
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.maps import Map

VALUE: Final = struct.Struct("<32sQQQIIIIQQQQQ8x")  # struct fault
LEASE_MAX_NS: Final = 600_000_000_000  # ten minutes: a drill is an exercise, not a state
MILLION: Final = 1_000_000
LOSS_SALT: Final = 0x5555555555555555
_MASK: Final = 2**64 - 1
_ATTACH: Final = {
    "cgroup/connect4": bpf.AttachType.CGROUP_INET4_CONNECT,
    "cgroup/connect6": bpf.AttachType.CGROUP_INET6_CONNECT,
    "cgroup_skb/egress": bpf.AttachType.CGROUP_INET_EGRESS,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong: the `first` connects are refused, or each by chance; packets are lost by chance. Chances are
    parts in a million."""

    destination: Destination
    seed: int
    first: int = 0
    refuse_ppm: int = 0
    refuse_errno: int = 0  # 0: EPERM
    loss_ppm: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.seed <= _MASK and 0 <= self.first <= _MASK and 0 <= self.refuse_errno <= 4095):
            raise ValueError("seed and first are unsigned 64-bit, refuse_errno at most 4095")
        if not (0 <= self.refuse_ppm <= MILLION and 0 <= self.loss_ppm <= MILLION):
            raise ValueError("a chance is at most a million parts in a million")
        if not (self.first or self.refuse_ppm or self.loss_ppm):
            raise ValueError("a fault that does nothing")


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel did. `after`: connects that came when the lease was over, and passed."""

    attempts: int
    refused: int
    packets: int
    lost: int
    after: int


class DrillInjector:
    """The loaded fault programs on one cgroup and all below it. One fault at a time."""

    def __init__(self, blob: Blob, *, cgroup: Path) -> None:
        self._loaded = load(blob)
        self._slot = Map(self._loaded.maps["faults"])
        self._links: list[int] = []
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for program in blob.programs:
                fd = self._loaded.programs[program.name]
                self._links.append(bpf.link_create(fd, target, _ATTACH[program.section]))
        except OSError:
            self.close()
            raise
        finally:
            os.close(target)

    def inject(self, fault: Fault, until_ns: int) -> None:
        """Begin, until `until_ns` (CLOCK_MONOTONIC) at the latest. KernelError where that is over ten minutes away."""
        left = until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if not 0 < left <= LEASE_MAX_NS:
            raise KernelError(
                "a drill must end within ten minutes", id="kernel.drill.lease",
                want=f"1..{LEASE_MAX_NS} ns from now", got=f"{left} ns",
            )  # fmt: skip
        to = normalised(fault.destination)
        key = KEY.pack(to.address.packed, to.netns, to.port, to.protocol)
        chances = (fault.refuse_ppm, fault.refuse_errno, fault.loss_ppm, 0)
        self._slot.set(bytes(4), VALUE.pack(key, until_ns, fault.seed, fault.first, *chances, *[0] * 5))

    def end(self) -> Observed:
        """End the fault now, and say what it did."""
        observed = self.observed()
        self._slot.set(bytes(4), bytes(VALUE.size))
        return observed

    def observed(self) -> Observed:
        raw = self._slot.get(bytes(4))
        assert raw is not None
        return Observed(*VALUE.unpack(raw)[8:])

    def close(self) -> None:
        """Take everything out of the kernel. Twice does no harm."""
        while self._links:
            os.close(self._links.pop())
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None  # type: ignore[assignment]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def expected(fault: Fault, attempts: int, packets: int = 0) -> tuple[int, int]:
    """(refused, lost) after so many attempts and packets: what `observed` must say."""
    if fault.first:
        refused = min(fault.first, attempts)
    else:
        refused = sum(_chance(fault.seed, n, fault.refuse_ppm) for n in range(attempts))
    return refused, sum(_chance(fault.seed ^ LOSS_SALT, n, fault.loss_ppm) for n in range(packets))


def _chance(seed: int, number: int, ppm: int) -> bool:
    """splitmix64, as in bpf/drill.bpf.c."""
    z = seed + (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return (z ^ z >> 31) % MILLION < ppm
