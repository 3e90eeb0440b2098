"""Drills: faults that the armed manifest allows, written down before they begin, and guaranteed to end.

What may be rehearsed is signed like everything else: the sensor `drill` of the manifest says which faults and for how
long, and a fault goes only to declared services and destinations that the guard does not protect. Connects, packets:
the kernel keeps the end. A slow file: two processes of its own keep it. A kill is over at once. A drill also ends when
the executor disarms or dies. Spec: docs/spec/kernel-abi.md section 12.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pointcall_attest import entry
from pointcall_executor.api.backend import DrillReport, DrillRequest, DrillRun
from pointcall_executor.arming import PROTOCOLS
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.cgroup import by_id
from pointcall_executor.kernel.drill import Fault, Observed, expected
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.slow_file import Slowed, SlowFile
from pointcall_executor.sensor_params import split
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address, service

if TYPE_CHECKING:
    from pointcall_executor.daemon import Executor
    from pointcall_executor.session import Session

SECOND_NS: Final = 1_000_000_000
GATE: Final = "the gate"


class DrillError(PointcallError):
    """A drill was refused; nothing was injected."""

    id = "drill.denied"


@dataclass(slots=True)
class _Running:
    """The drill that runs now."""

    id: str
    request: DrillRequest
    session: Session
    fault: Fault | None
    first_entry: int
    timer: threading.Timer
    slow: SlowFile | None = None
    killed: int = 0


@dataclass(slots=True)
class Drills:
    """The drills of one executor, one at a time."""

    executor: Executor
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _running: _Running | None = None
    _reports: dict[str, DrillReport] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def begin(self, request: DrillRequest) -> DrillReport:
        """Check, write down, inject. DrillError or KernelError says why not; then nothing is injected."""
        with self.executor.refusing(f"drill {request.service}".strip()), self._lock:
            session = self.executor.session
            if session is None:
                raise DrillError("nothing is armed", id="drill.undeclared", want="an armed manifest", got="none")
            if self._running is not None:
                raise DrillError("another drill runs", id="drill.busy", want="one at a time", got=self._running.id)
            self.executor.require_not_halted()
            self.executor.require_not_paused()
            _permitted(session, request)
            _target(session, request)
            id_ = f"{os.urandom(4).hex()}-{next(self._numbers)}"
            first = self.executor.record(entry.Config(what="drill begins", detail={"id": id_, **_detail(request)}))
            timer = threading.Timer(request.seconds, self._over, (id_,))
            timer.daemon = True
            self._running = _Running(id_, request, session, _fault(request), first, timer)
            try:
                self._inject(self._running)
            except BaseException:
                self.end(id_, "it could not be injected")
                raise
            timer.start()
            return DrillReport(id_, "running")

    def end(self, id_: str, why: str = "asked for") -> DrillReport:
        """End it now, if it still runs, and say what was due and what was seen. DrillError `drill.unknown`."""
        with self._lock:
            running = self._running
            if running is None or running.id != id_:
                if id_ in self._reports:
                    return self._reports[id_]
                raise DrillError("no such drill", id="drill.unknown", want="the id that it began with", got=id_[:60])
            self._running = None
            running.timer.cancel()
            observed = Observed()
            slowed = running.slow.end() if running.slow is not None else Slowed()
            if running.fault is not None:
                with contextlib.suppress(KernelError):  # the session ended meanwhile, and the fault with it
                    observed = running.session.sensors.end_drill()
            report = self._report(running, observed, slowed, why)
            self.executor.record(entry.Config(what="drill ended", detail={"id": id_, **_told(report)}))
            self._reports = {id_: report}  # the last one
            return report

    def close(self, why: str = "the executor stops") -> None:
        """End what runs. Twice without harm."""
        with self._lock:
            if self._running is not None:
                self.end(self._running.id, why)

    def disarmed(self, session: Session) -> None:
        """What this session allowed ends with it. Called on the loop, which waits for no file and no process."""
        running = self._running
        if running is None or running.session is session:
            self._end_beside(session, "what allowed it is not armed any more")

    def paused(self) -> None:
        """While nothing may recover, nothing is rehearsed. Called on the loop, as `disarmed`."""
        session = self.executor.session
        if session is not None:
            self._end_beside(session, "the executor is paused")

    def _end_beside(self, session: Session, why: str) -> None:
        threading.Thread(target=self._ended_with, args=(session, why), name="drill", daemon=True).start()

    def _ended_with(self, session: Session, why: str) -> None:
        with self._lock, contextlib.suppress(PointcallError):
            if self._running is not None and self._running.session is session:
                self.end(self._running.id, why)

    def _over(self, id_: str) -> None:
        with contextlib.suppress(PointcallError):
            self.end(id_, "its time is over")

    def _inject(self, running: _Running) -> None:
        request, session = running.request, running.session
        if running.fault is not None:
            until_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + request.seconds * SECOND_NS
            session.sensors.begin_drill(_cgroup(session, request.service), running.fault, until_ns)
        if request.slow_file:
            path, delay_s = Path(request.slow_file), request.slow_ms / 1000
            running.slow = self.executor.slow_file(path, delay_s, request.seconds)
        if request.kill:
            with self.executor.beginning(session):
                by_id(_cgroup(session, request.service)).kill()
            running.killed = 1

    def _report(self, running: _Running, observed: Observed, slowed: Slowed, why: str) -> DrillReport:
        due: dict[str, int] = {}
        seen: dict[str, int] = {}
        if running.fault is not None:
            refused, lost = expected(running.fault, observed.attempts, observed.packets)
            late = observed.packets - lost if running.fault.delay_us else 0
            due = {"refused": refused, "lost": lost, "delayed": late}
            seen = {"refused": observed.refused, "lost": observed.lost, "delayed": observed.delayed}
        if running.request.kill:
            due["killed"], seen["killed"] = 1, running.killed
        if running.slow is not None:
            due["slowed"], seen["slowed"] = slowed
        counts = {"connects": observed.attempts, "packets": observed.packets, "after": observed.after}
        receipts = self.executor.journal.entries(kind="receipt", start=running.first_entry)
        runs = tuple(
            DrillRun(r.run.id, r.trigger.event, r.runbook.name) for r in (found.receipt() for found in receipts)
        )
        return DrillReport(running.id, "ended", why, due == seen, due, {**counts, **seen}, runs)


def _permitted(session: Session, request: DrillRequest) -> None:
    """What the signed manifest allows, and no more."""
    sensor = next((s for s in session.admitted.manifest.sensors if s.name == "drill"), None)
    if sensor is None:
        raise DrillError(
            "the armed manifest allows no drill", id="drill.undeclared", want="a sensor `drill`", got="none",
            hint="declare it with the faults that may be rehearsed, and sign again",
        )  # fmt: skip
    _, allowed = split(sensor)
    wanted = {
        "refuse": request.first or request.refuse_ppm,
        "lose": request.lose_ppm,
        "delay": request.delay_us,
        "kill": request.kill,
        "slow_file": request.slow_file,
    }
    asked = [name for name, value in wanted.items() if value]
    denied = [name for name in asked if not allowed[name]]
    if denied or not asked:
        raise DrillError(
            "the armed manifest does not allow this drill", id="drill.denied", got=", ".join(denied) or "no fault",
            want=", ".join(name for name in wanted if allowed[name]) or "nothing is allowed",
        )  # fmt: skip
    if not 1 <= request.seconds <= allowed["seconds_max"]:
        raise DrillError(
            "the drill is too long", id="drill.denied", want=f"1..{allowed['seconds_max']} s", got=str(request.seconds)
        )


def _target(session: Session, request: DrillRequest) -> None:
    """Only what is declared, and what the guard does not protect."""
    manifest, rules = session.admitted.manifest, session.armed.rules
    names = {s.name for s in manifest.services}
    if (request.service and request.service not in names) or (request.kill and not request.service):
        raise _no_target("a declared service", request.service or "none")
    if request.service and service(request.service).number in rules.never_touch_services:
        raise _no_target("a service that is not on guard.never_touch", request.service)
    if request.slow_file and not _belongs(session, request):
        raise _no_target("a declared file of the service, or one below its directory", request.slow_file)
    if _fault(request) is None:
        return
    places: dict[tuple[str, int, str], str] = {
        (str(Address.parse(p.address)), p.port, p.protocol): s.name for s in manifest.services for p in s.listen
    }
    where = (request.address, request.port, request.protocol)
    owner = places.get((str(_address(request)), request.port, request.protocol))
    if owner is None or service(owner).number in rules.never_touch_services:
        raise _no_target("a declared destination that may be touched", ":".join(map(str, where)))


def _belongs(session: Session, request: DrillRequest) -> bool:
    declaration = session.admitted.declarations.get(request.service)
    if declaration is None or declaration.kind != "process":
        return False
    path = Path(request.slow_file)
    folder = Path(declaration.process.directory)
    if os.path.normpath(path) != request.slow_file:
        return False
    if path in {Path(f.path) for f in declaration.process.files}:
        return True
    # A link on the way, which the service itself may have made, would lead out of its directory.
    inside = path.resolve().is_relative_to(folder.resolve()) and path.resolve().name == path.name
    return folder != Path("/") and path.is_relative_to(folder) and inside and not path.is_symlink()


def _no_target(want: str, got: str) -> DrillError:
    return DrillError("a drill goes only to what the manifest declares", id="drill.target", want=want, got=got[:200])


def _address(request: DrillRequest) -> Address:
    try:
        return Address.parse(request.address)
    except ValueError:
        raise _no_target("an address", request.address) from None


def _fault(request: DrillRequest) -> Fault | None:
    if not (request.first or request.refuse_ppm or request.lose_ppm or request.delay_us):
        return None
    protocol = PROTOCOLS.get(request.protocol, 0)
    try:
        to = Destination(_address(request), request.port, 0, protocol)
        return Fault(
            to, request.seed, request.first, request.refuse_ppm, request.refuse_errno, request.lose_ppm,
            request.delay_us,
        )  # fmt: skip
    except ValueError as error:
        raise DrillError("this drill makes no sense", id="drill.denied", got=str(error)) from None


def _cgroup(session: Session, name: str) -> int:
    """The cgroup of a service, 0 for the gate. DrillError where the service does not run."""
    if not name:
        return 0
    number = service(name).number
    for cgroup_id, owner in session.topology.cgroups.items():
        if owner == number:
            return cgroup_id
    raise _no_target("a service that runs", name)


def _detail(request: DrillRequest) -> dict[str, str]:
    rows = {name: getattr(request, name) for name in DrillRequest.__dataclass_fields__}
    return {name: str(value) for name, value in rows.items() if value} | {"service": request.service or GATE}


def _told(report: DrillReport) -> Mapping[str, str]:
    due = {f"due {name}": str(value) for name, value in report.expected.items()}
    seen = {f"seen {name}": str(value) for name, value in report.observed.items()}
    runs = " ".join(run.run for run in report.runs[:16])
    return {**due, **seen, "why": report.ended_by, "as expected": str(report.as_expected).lower(), "runs": runs}
