"""Slow and failing storage: block and FUSE requests, ext4 fsync, files by trampolines. One sensor for four blobs.

It reports; nothing on the path of a system call. Histograms stay in the kernel and are read on demand. Spec:
docs/spec/kernel-abi.md section 8.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from pointcall_executor.core.hung import InFlight, What
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.sensor import Sensor
from pointcall_runbook.vocabulary import Operation

BLOBS: Final = ("storage", "fuse", "fsync", "vfs")
BUCKETS: Final = 32
UNIT_NS: Final = 1024  # what the kernel counts in: a shift instead of a division
KEY: Final = struct.Struct("<QII")  # struct pc_latency_key
VALUE: Final = struct.Struct(f"<7Q{BUCKETS}Q")  # struct pc_latency
STARTED: Final = struct.Struct("<QQII")  # struct pc_started
QUESTION: Final = struct.Struct("<QQ")  # struct pc_question


class Answer(enum.IntEnum):
    """enum pc_answer: whether an operation still goes on."""

    ENDED = 0
    GOES_ON = 1
    THREAD_LIVES = 2  # nothing else is known about it


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

    _missed = _doubtful_ns = 0

    @property
    def tells_in_flight(self) -> bool:
        """Whether its object is one that `in_flight` can ask: those before bpf/operation.h are not."""
        return any(program.name == "pc_still" for program in self.blob.programs)

    def histograms(self) -> Iterator[Histogram]:
        """One a cgroup, device and operation that was seen; at most 4,096: of more those used longest ago are
        gone, and begin anew. One may come twice while others make room."""
        with self.latencies() as kept:
            yield from kept.histograms()

    def in_flight(self, before_ns: int) -> list[InFlight]:
        """The operations that have begun and not ended, at most 10,240. About those that began before `before_ns` the
        kernel is asked: one that ended unseen is forgotten, one that may have is left out."""
        if not self._links:
            return []  # no end is seen any more
        old, found = [], []
        for key, value in self._maps["in_flight"].batch():
            at_ns, cgroup, device, operation = STARTED.unpack(value)
            each = InFlight(What(cgroup, device, Operation(operation)), at_ns)
            if at_ns >= before_ns:
                found.append(each)
            else:
                old.append((self._still(key, at_ns), each))
        doubtful_ns = self._doubtful()
        found += [e for a, e in old if a is Answer.GOES_ON or (a is Answer.THREAD_LIVES and e.since_ns > doubtful_ns)]
        return found

    def _still(self, key: bytes, at_ns: int) -> Answer:
        result, _ = bpf.prog_run(self._alive.programs["pc_still"], key + at_ns.to_bytes(8, "little"))
        return Answer(result)

    def _doubtful(self) -> int:
        """Until when (CLOCK_MONOTONIC) the kernel has skipped ends, as far as we know; 0: it never has."""
        ends = [fd for name, fd in self._alive.programs.items() if name.endswith("_exit")]
        missed = sum(bpf.program_info(fd).missed for fd in ends)
        if missed != self._missed:
            self._missed, self._doubtful_ns = missed, time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return self._doubtful_ns

    def detach(self) -> None:
        """What goes on ends unseen."""
        super().detach()
        self._doubtful_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

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
