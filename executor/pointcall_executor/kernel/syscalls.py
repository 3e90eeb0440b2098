"""System-call anomalies of watched cgroups: learn, arm, report. Only on request.

Attached, it makes every system call of the machine about 100 ns slower, and another 100 ns in a watched cgroup. Learn
over several runs of the service: a call that is merely rare is novel as well. Spec: docs/spec/kernel-abi.md section 10.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.sensor import Sensor

CALLS: Final = 512
VALUE: Final = struct.Struct(f"<7Q{CALLS // 64}Q")  # struct habits


@dataclass(frozen=True, slots=True)
class Habits:
    """What a cgroup has been seen to call. `calls`: numbers of the machine's own table."""

    total: int
    armed: bool
    novel: int
    calls: frozenset[int]


class SyscallSensor(Sensor):
    """Constants: window_ns, error_min, error_percent."""

    def learn(self, cgroup_id: int, known: frozenset[int] = frozenset()) -> None:
        """Watch this cgroup and remember its calls; `known` are those of earlier runs. Errors are reported at once."""
        self._put(cgroup_id, Habits(0, False, 0, known))

    def arm(self, cgroup_id: int) -> None:
        """From now on a call that was not seen so far is reported, once each."""
        habits = self.habits(cgroup_id)
        self._put(cgroup_id, Habits(habits.total, True, habits.novel, habits.calls))

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
        seen = frozenset(n for n in range(CALLS) if words[n // 64] >> n % 64 & 1)
        return Habits(total, bool(armed), novel, seen)

    def _put(self, cgroup_id: int, habits: Habits) -> None:
        words = [sum(1 << n % 64 for n in habits.calls if n // 64 == word) for word in range(CALLS // 64)]
        raw = VALUE.pack(0, 0, 0, 0, habits.total, habits.armed, habits.novel, *words)
        self._maps["watched"].set(struct.pack("<Q", cgroup_id), raw)
