"""The thread beside the rings: its records come out, its failure is not silent, it ends at once."""

from __future__ import annotations

import os
import select
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.manifest import Sensor
from pointcall_executor.arming import ArmingError
from pointcall_executor.core.event import Kind, Source, StorageEvent, decode
from pointcall_executor.kernel.blob import Blob, Program
from pointcall_executor.kernel.lookout import PERIOD_SECONDS, Lookout
from pointcall_executor.kernel.pressure import Pressure
from pointcall_executor.kernel.storage import StorageSensor
from pointcall_executor.sensors import CALM_SECONDS, KernelSensors
from pointcall_runbook.vocabulary import Operation


class Look:
    """A look that waits until it is told, as the real one does."""

    def __init__(self, *answers: list[bytes] | Exception) -> None:
        self.answers, self._stop = list(answers), threading.Event()

    def __call__(self, timeout_s: float) -> list[bytes]:
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self._stop.wait(60)
        return []

    def interrupt(self) -> None:
        self._stop.set()


def until_readable(lookout: Lookout) -> None:
    assert select.select([lookout], [], [], 5)[0]


def test_records_come_out_once_in_order() -> None:
    look = Look([b"a", b"b"], [], [b"c"])
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    found: list[bytes] = []
    while len(found) < 3:
        until_readable(lookout)
        found += lookout.drain()
    assert found == [b"a", b"b", b"c"]
    assert lookout.drain() == []
    assert select.select([lookout], [], [], 0)[0] == []
    lookout.close()


def test_a_failure_is_raised_where_it_is_drained() -> None:
    look = Look(OSError(5, "broken"))
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    until_readable(lookout)
    with pytest.raises(OSError, match="broken"):
        lookout.drain()
    lookout.close()


def test_it_ends_at_once_and_leaves_no_descriptor() -> None:
    look = Look()
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    fd, start = lookout.fileno(), time.monotonic()
    lookout.close()
    lookout.close()
    assert time.monotonic() - start < 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_one_that_never_started_can_be_closed() -> None:
    look = Look()
    Lookout(look, look.interrupt).close()


class Waited:
    """A pressure watch that only notes how long it should wait."""

    def __init__(self, *, measures: bool) -> None:
        self.measures, self.seconds = measures, list[float]()

    def wait(self, seconds: float) -> list[Pressure]:
        self.seconds.append(seconds)
        return []


@pytest.mark.parametrize(
    ("known", "stuck_ns", "measures", "calm"),
    [
        ({}, 60_000_000_000, False, True),
        ({"a circuit": "open"}, 60_000_000_000, False, False),
        ({}, 500_000_000, False, False),
        ({}, 0, True, False),
        ({}, 60_000_000_000, True, False),
    ],
)
def test_circuits_are_looked_at_rarely_only_while_none_is_open(
    known: Any, stuck_ns: int, measures: bool, calm: bool
) -> None:
    sensors, waited = KernelSensors.__new__(KernelSensors), Waited(measures=measures)
    sensors._pressure, sensors._stuck, sensors._stuck_ns = waited, known, stuck_ns  # type: ignore[assignment]
    sensors._objects, sensors._hung = {}, []
    assert sensors._look(PERIOD_SECONDS) == []
    assert waited.seconds == [CALM_SECONDS if calm else PERIOD_SECONDS]


class Due:
    """A sensor of storage that is to be looked at after so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def due_ns(self, _now_ns: int) -> int:
        return int(self.seconds * 1e9)

    def look(self, _now_ns: int) -> list[StorageEvent]:
        return [TOLD]


TOLD = StorageEvent(Kind.STORAGE_SLOW, 9, 7, 8 << 20, Operation.READ, 1, 1, 0, Source.FUSE, 70)


@pytest.mark.parametrize(
    ("stuck_ns", "measures", "waits"),
    [(0, False, 10.0), (60_000_000_000, False, CALM_SECONDS), (0, True, PERIOD_SECONDS)],
)
def test_storage_alone_wakes_nobody_before_it_is_due_and_what_it_says_comes_out(
    stuck_ns: int, measures: bool, waits: float
) -> None:
    sensors, waited = KernelSensors.__new__(KernelSensors), Waited(measures=measures)
    sensors._pressure, sensors._stuck, sensors._stuck_ns = waited, {}, stuck_ns  # type: ignore[assignment]
    sensors._objects, sensors._hung = {}, [Due(10.0), Due(10.5)]  # type: ignore[list-item]
    assert [decode(raw) for raw in sensors._look(PERIOD_SECONDS)] == [TOLD, TOLD]
    assert waited.seconds == [waits]


@pytest.mark.parametrize(
    ("programs", "params", "watched"),
    [(("pc_fuse_end", "pc_still"), {}, 1), (("pc_fuse_end",), {}, 0), (("pc_fuse_end",), {"hung_ms": 0}, 0)],
)
def test_storage_of_an_older_manifest_goes_on_without_being_asked_what_hangs(
    programs: tuple[str, ...], params: dict[str, int], watched: int
) -> None:
    """Its map has other entries: to look there would end the executor, just when something hangs."""
    assert len(loaded(programs, params)._hung) == watched


def test_what_cannot_be_asked_what_hangs_is_refused_where_the_manifest_wants_it() -> None:
    with pytest.raises(ArmingError) as refusal:
        loaded(("pc_fuse_end",), {"hung_ms": 60_000})
    assert refusal.value.id == "arm.sensor-param"


def loaded(programs: tuple[str, ...], params: dict[str, int]) -> KernelSensors:
    made = StorageSensor.__new__(StorageSensor)
    made.blob = Blob("fuse", (), tuple(Program(name, "") for name in programs), b"", (), b"", b"")
    sensors = KernelSensors.__new__(KernelSensors)
    sensors._objects, sensors._hung = {}, []
    sensors._loading = SimpleNamespace(loaded=lambda *_: made)  # type: ignore[assignment]
    sensors._load(Sensor(name="fuse", blob="0" * 64, params=params), {"0" * 64: b""})
    return sensors
