"""Slow and failing storage: block and FUSE requests, ext4 fsync, files by trampolines. One sensor for four blobs.

It reports; nothing on the path of a system call. Histograms stay in the kernel and are read on demand. Spec:
docs/spec/kernel-abi.md section 8.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.sensor import Sensor
from pointcall_runbook.vocabulary import Operation

BLOBS: Final = ("storage", "fuse", "fsync", "vfs")
BUCKETS: Final = 32
UNIT_NS: Final = 1024  # what the kernel counts in: a shift instead of a division
KEY: Final = struct.Struct("<QII")  # struct pc_latency_key
VALUE: Final = struct.Struct(f"<7Q{BUCKETS}Q")  # struct pc_latency


@dataclass(frozen=True, slots=True)
class Histogram:
    """All operations since loading. `buckets[n]`: how many took 2^n to 2^(n+1) units of 1,024 ns, the end not included;
    the first also has what took less, the last what took more."""

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
        """One a cgroup, device and operation that was seen; at most 4,096: of more those used longest ago are
        gone, and begin anew. One may come twice while others make room."""
        with self.latencies() as kept:
            yield from kept.histograms()

    def latencies(self) -> LatencyMap:
        """The same, for who reads while this sensor may be closed."""
        return LatencyMap(self._maps["latencies"].fd)


class LatencyMap:
    """A sensor's map by a descriptor of its own."""

    def __init__(self, fd: int) -> None:
        self._map = Map(os.dup(fd))

    def histograms(self) -> Iterator[Histogram]:
        """As StorageSensor.histograms: about 10 us each."""
        for key, value in self._map.items():
            cgroup, device, operation = KEY.unpack(key)
            _since, _count, _slow, _longest, _errors, _fired, total, *buckets = VALUE.unpack(value)
            yield Histogram(cgroup, device, Operation(operation), total, tuple(buckets))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._map.fd)
