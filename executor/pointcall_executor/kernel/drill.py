"""Faults for a drill, held by the kernel: connects refused, packets lost or late, for one cgroup and one destination.

A drill always ends: the lease is a time in the kernel, so it ends when this process is gone, too; and it ends at once
when the injector is closed. Chance comes from a seed: `expected` draws the same numbers as bpf/drill.bpf.c. Nothing is
decided here. A delay needs the qdisc fq on the device; loopback has none unless it is given one. Spec:
docs/spec/kernel-abi.md section 12.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import KEY, normalised
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.kernel_object import KernelObject
from pointcall_executor.kernel.maps import Map

VALUE: Final = struct.Struct("<32sQQQIIIIQQQQQQ")  # struct fault
LEASE_MAX_NS: Final = 600_000_000_000  # ten minutes: a drill is an exercise, not a state
MILLION: Final = 1_000_000
LOSS_SALT: Final = 0x5555555555555555
_MASK: Final = 2**64 - 1
DELAY_MAX_US: Final = 5_000_000  # half of the horizon beyond which fq drops
RTM_GETQDISC, NLM_F_REQUEST_DUMP, NLMSG_ERROR, NLMSG_DONE, TCA_KIND = 38, 0x301, 2, 3, 1


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong: the `first` connects are refused, or each by chance; packets are lost by chance, or leave later.
    Chances are parts in a million."""

    destination: Destination
    seed: int
    first: int = 0
    refuse_ppm: int = 0
    refuse_errno: int = 0  # 0: EPERM
    loss_ppm: int = 0
    delay_us: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.seed <= _MASK and 0 <= self.first <= _MASK and 0 <= self.refuse_errno <= 4095):
            raise ValueError("seed and first are unsigned 64-bit, refuse_errno at most 4095")
        if not (0 <= self.refuse_ppm <= MILLION and 0 <= self.loss_ppm <= MILLION):
            raise ValueError("a chance is at most a million parts in a million")
        if not 0 <= self.delay_us <= DELAY_MAX_US:
            raise ValueError(f"a delay is at most {DELAY_MAX_US} us")
        if not (self.first or self.refuse_ppm or self.loss_ppm or self.delay_us):
            raise ValueError("a fault that does nothing")


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel did. `after`: connects that came when the lease was over, and passed."""

    attempts: int = 0
    refused: int = 0
    packets: int = 0
    lost: int = 0
    after: int = 0
    delayed: int = 0


class DrillInjector(KernelObject):
    """The loaded fault programs, on one cgroup and all below it while a fault is injected. One fault at a time.

    Its links come and go with a fault, so they are not part of its identity.
    """

    def __init__(self, blob: Blob, *, constants: Mapping[str, int] | None = None) -> None:
        super().__init__(blob, constants=constants)
        self._faults: list[int] = []

    def inject(self, cgroup: Path, fault: Fault, until_ns: int) -> None:
        """Begin, until `until_ns` (CLOCK_MONOTONIC) at the latest. KernelError where that is over ten minutes away, or
        where no device of this network namespace could delay what shall be delayed."""
        left = until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if not 0 < left <= LEASE_MAX_NS:
            raise KernelError(
                "a drill must end within ten minutes", id="kernel.drill.lease",
                want=f"1..{LEASE_MAX_NS} ns from now", got=f"{left} ns",
            )  # fmt: skip
        if fault.delay_us:
            _need_fq()
        to = normalised(fault.destination)
        key = KEY.pack(to.address.packed, to.netns, to.port, to.protocol)
        chances = (fault.refuse_ppm, fault.refuse_errno, fault.loss_ppm, fault.delay_us)
        self.detach()
        self._slot.set(bytes(4), VALUE.pack(key, until_ns, fault.seed, fault.first, *chances, *[0] * 6))
        try:
            for program in self.blob.programs:
                self._faults.append(self._attach_cgroup(program.name, program.section, cgroup))
        except KernelError:
            self.end()
            raise

    def end(self) -> Observed:
        """End the fault now, and say what it did. Twice does no harm."""
        self.detach()
        observed = self.observed()
        self._slot.set(bytes(4), bytes(VALUE.size))
        return observed

    def detach(self) -> None:
        while self._faults:
            os.close(self._faults.pop())

    def observed(self) -> Observed:
        raw = self._slot.get(bytes(4))
        assert raw is not None
        return Observed(*VALUE.unpack(raw)[8:])

    @property
    def _slot(self) -> Map:
        return self._maps["faults"]


def _need_fq() -> None:
    if "fq" not in qdiscs():
        raise KernelError(
            "nothing here can delay packets", id="kernel.drill.delay", want="a device with the qdisc fq",
            got=", ".join(sorted(qdiscs())) or "none", hint="tc qdisc replace dev DEVICE root fq",
        )  # fmt: skip


def qdiscs() -> set[str]:
    """Kinds of the queueing disciplines of this network namespace, by a dump over rtnetlink."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 0))
        sock.send(struct.pack("=IHHII", 36, RTM_GETQDISC, NLM_F_REQUEST_DUMP, 1, 0) + bytes(20))
        found: set[str] = set()
        while True:
            answer, at = sock.recv(65536), 0
            while at + 16 <= len(answer):
                size, kind = struct.unpack_from("=IH", answer, at)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return found
                found |= _kinds(answer[at + 36 : at + size])
                at += (size + 3) & ~3


def _kinds(attributes: bytes) -> set[str]:
    at, found = 0, set()
    while at + 4 <= len(attributes):
        size, kind = struct.unpack_from("=HH", attributes, at)
        if size < 4:
            break
        if kind == TCA_KIND:
            found.add(attributes[at + 4 : at + size].rstrip(b"\0").decode("ascii", "replace"))
        at += (size + 3) & ~3
    return found


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
