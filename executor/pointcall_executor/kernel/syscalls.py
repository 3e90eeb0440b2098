"""System-call anomalies of watched cgroups: learn, arm, report. Only on request.

Attached, it makes every system call of the machine about 100 ns slower, and another 100 ns in a watched cgroup. Learn
over several runs of the service: a call that is merely rare is novel as well. Spec: docs/spec/kernel-abi.md section 10.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.sensor import Sensor

CALLS: Final = 512
VALUE: Final = struct.Struct(f"<7Q{2 * CALLS // 64}Q")  # struct habits


@dataclass(frozen=True, slots=True)
class Habits:
    """What a cgroup has been seen to call, by numbers of the machine's own table. `calls`: what was learned; `unknown`:
    what was reported. `armed_ns`: from when on a new one is reported (CLOCK_MONOTONIC), 0: never."""

    total: int
    armed_ns: int
    novel: int
    calls: frozenset[int]
    unknown: frozenset[int] = frozenset()


class SyscallSensor(Sensor):
    """Constants: window_ns, error_min, error_percent."""

    def learn(self, cgroup_id: int, known: frozenset[int] = frozenset(), *, until_ns: int = 0) -> None:
        """Watch this cgroup and remember its calls; `known` are those of earlier runs. Errors are reported at once.

        From `until_ns` on (CLOCK_MONOTONIC; 0: never) a call that was not seen so far is reported, once each: the
        kernel itself ends the learning.
        """
        self._put(cgroup_id, Habits(0, until_ns, 0, known))

    def arm(self, cgroup_id: int) -> None:
        """End the learning now. A call that is new at this very moment may be reported, although it was seen."""
        habits = self.habits(cgroup_id)
        self._put(cgroup_id, replace(habits, armed_ns=1))

    def forget(self, cgroup_id: int) -> None:
        """Do not watch it any more. Twice does no harm."""
        self._maps["watched"].delete(struct.pack("<Q", cgroup_id))

    def habits(self, cgroup_id: int) -> Habits:
        """What was seen so far. KernelError where the cgroup is not watched."""
        raw = self._maps["watched"].get(struct.pack("<Q", cgroup_id))
        if raw is None:
            raise KernelError(
                "the cgroup is not watched", id="kernel.syscalls.absent", want="a cgroup after learn()",
                got=str(cgroup_id),
            )  # fmt: skip
        _since, _calls, _errors, _fired, total, armed, novel, *words = VALUE.unpack(raw)
        seen, reported = (frozenset(_numbers(part)) for part in (words[: CALLS // 64], words[CALLS // 64 :]))
        return Habits(total, armed, novel, seen, reported)

    def _put(self, cgroup_id: int, habits: Habits) -> None:
        words = (*_words(habits.calls), *_words(habits.unknown))
        raw = VALUE.pack(0, 0, 0, 0, habits.total, habits.armed_ns, habits.novel, *words)
        self._maps["watched"].set(struct.pack("<Q", cgroup_id), raw)


def _numbers(words: Sequence[int]) -> Iterator[int]:
    return (n for n in range(CALLS) if words[n // 64] >> n % 64 & 1)


def _words(numbers: Collection[int]) -> list[int]:
    return [sum(1 << n % 64 for n in numbers if n // 64 == word) for word in range(CALLS // 64)]
