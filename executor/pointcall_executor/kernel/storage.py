"""Slow and failing storage: block and FUSE requests, ext4 fsync, files by trampolines. One sensor for four blobs.

It reports; nothing on the path of a system call. Histograms stay in the kernel and are read on demand. Spec:
docs/spec/kernel-abi.md section 8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pointcall_executor.kernel.sensor import Sensor
from pointcall_runbook.vocabulary import Operation

BLOBS: Final = ("storage", "fuse", "fsync", "vfs")
BUCKETS: Final = 32
KEY: Final = struct.Struct("<QII")  # struct pc_latency_key
VALUE: Final = struct.Struct(f"<7Q{BUCKETS}Q")  # struct pc_latency


@dataclass(frozen=True, slots=True)
class Histogram:
    """All operations since loading. `buckets[n]`: how many took 2^n to 2^(n+1) microseconds (of 1,024 ns)."""

    cgroup: int
    device: int  # major << 20 | minor
    operation: Operation
    total: int
    buckets: tuple[int, ...]

    def below_us(self, share: float) -> int:
        """An upper bound, in microseconds of 1,024 ns, under which this share of the operations stayed."""
        seen = 0
        for number, count in enumerate(self.buckets):
            seen += count
            if seen >= share * self.total:
                return int(2 ** (number + 1))
        return int(2**BUCKETS)


class StorageSensor(Sensor):
    """Constants: slow_ns, stall_ns, window_ns, slow_min, slow_percent, error_min."""

    def histograms(self) -> Iterator[Histogram]:
        """One a cgroup, device and operation that was seen; at most 4,096, nothing is evicted."""
        for key, value in self._maps["latencies"].items():
            cgroup, device, operation = KEY.unpack(key)
            _since, _count, _slow, _longest, _errors, _fired, total, *buckets = VALUE.unpack(value)
            yield Histogram(cgroup, device, Operation(operation), total, tuple(buckets))
