"""The watch over what is armed: whether it may stay so, and what its sensors could not deliver.

Not here: what follows when it may not (daemon.py). All on the loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from pointcall_attest import entry
from pointcall_attest.model import instant
from pointcall_executor.halt import halted
from pointcall_executor.node import Sensors
from pointcall_executor.recorder import Recorder, refused
from pointcall_executor.session import Session

RECHECK_NS: Final = 10_000_000_000  # between two looks at whether the kernel still runs what was armed


class Amiss(NamedTuple):
    """Why what is armed may not stay so: a check and its words."""

    check: str
    want: str
    got: str
    hint: str


class Watch:
    """`note` is called whenever the kernel is looked at, before that. Times are CLOCK_MONOTONIC ns."""

    def __init__(self, state_dir: Path, recorder: Recorder, note: Callable[[], None]) -> None:
        self._state_dir, self._recorder, self._note = state_dir, recorder, note
        self._due_ns = 0
        self._lost: dict[str, int] = {}

    @property
    def checked_ns(self) -> int:
        """When the kernel's programs were last compared with what was armed, 0 where they were not yet."""
        return max(0, self._due_ns - RECHECK_NS)

    @property
    def lost(self) -> int:
        """Events that the sensors of this session could not deliver."""
        return sum(self._lost.values())

    def begin(self) -> None:
        """Another session: what was compared and counted before were other programs."""
        self._lost, self._due_ns = {}, 0

    def amiss(self, session: Session, now_ns: int) -> Amiss | None:
        """Whether what is armed may still be: in time, and in the kernel as it was armed."""
        held = halted(self._state_dir)
        if held is not None:
            return Amiss("executor.halted", "not halted", held.reason, "pointcall halt --clear, then arm")
        expires = session.admitted.manifest.predicate.expires
        if session.judged_at(datetime.now(UTC), time.monotonic_ns()) >= expires:
            return Amiss("manifest.expires", "still valid", instant(expires), "arm a newer manifest")
        if now_ns < self._due_ns:
            return None
        self._due_ns = now_ns + RECHECK_NS
        self._note()
        denied, hint = session.sensors.denied(), "find out who did it, then arm again"
        if denied:
            want, got = "nobody swaps or takes off a BPF link", f"{denied} attempts, all denied by the kernel"
            self._recorder.submit(refused("kernel.tamper", "the BPF links of this machine", want, got, hint))
        changed = session.sensors.changed()
        return Amiss("kernel.changed", "the programs that were armed", changed[0], hint) if changed else None

    def count_lost(self, sensors: Sensors) -> None:
        """What was lost since the last time, into the log."""
        for sensor, count in sensors.lost().items():
            new = count - self._lost.get(sensor, 0)
            if new > 0:
                self._lost[sensor] = count
                self._recorder.submit(entry.Lost(sensor=sensor, count=new))
