"""A backend that does nothing but remember what it was asked: what the API passes on, and what it never reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pointcall_attest.verdict import Check, Verdict
from pointcall_executor import feed
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.api import backend
from pointcall_executor.api.accesses import Access
from pointcall_executor.retention import Retained
from pointcall_runbook.errors import PointcallError
from tests.unit.report.sample_log import BOOT_NS, CHECKED, START, SampleLog

STATUS = backend.NodeStatus(
    node="node-7",
    state="armed",
    reason="",
    executor="0.1.0",
    boot_id="b",
    epoch="e" * 64,
    platform="snp",
    tier="emulated",
    manifest="edge-recovery",
    sequence=3,
    manifest_sha256="a" * 64,
    policy_sha256="b" * 64,
    expires="2026-12-01T00:00:00Z",
    signers=("release@ci.example",),
    runbooks=(backend.ArmedRunbook("refusing-dependency", "1.0.0", "enforce", ("CircuitOpened",), ("recreate",), 59),),
    services=(backend.ServiceState("db", "process", "running", 1),),
    circuits=(backend.CircuitState("127.0.0.1", 5432, "closed", 17),),
    tree_size=9,
    runs=2,
    refusals=1,
    lost_events=0,
    ready=True,
    copies=(backend.LogCopy("mirror", 7, 2, 61_000, 3, "no route"),),
)


class FakeBackend:
    def __init__(self, directory: Path, log: SampleLog | None = None) -> None:
        self.log = log or SampleLog()
        self.asked: list[tuple[Any, ...]] = []
        self.proposals: list[Mapping[str, Any]] = []
        self.accesses: list[Access] = []
        self.time = START
        self.changes = feed.Changes("0123456789abcdef", lambda ns: int(START.timestamp() * 1e9) + ns - BOOT_NS)
        self.refuse_with: Exception | None = None
        self._inbox = Inbox(directory / "proposals")

    def reader(self) -> SampleLog:
        return self.log

    def inbox(self) -> Inbox:
        return self._inbox

    def now(self) -> datetime:
        return self.time

    def status(self) -> backend.NodeStatus:
        if self.refuse_with is not None:
            raise self.refuse_with
        return STATUS

    def events(self, cursor: str, last: int) -> feed.FeedPage:
        return feed.page(self.log, self.changes, cursor, last)

    def evidence(self, nonce: bytes) -> backend.Evidence:
        self.asked.append(("evidence", nonce))
        return backend.Evidence(b"{}", nonce, b"spki", b"m" * 32, b"p" * 32, "emulated", 3, "note")

    def arm(self, bundles: Sequence[bytes], files: Mapping[str, bytes]) -> backend.ArmAnswer:
        self.asked.append(("arm", tuple(bundles), dict(files)))
        if not bundles:
            failed = Check.of("manifest.unsigned", False, expected="a bundle", observed="none", hint="sign it")
            return backend.ArmAnswer(armed=False, manifest_sha256="", verdict=Verdict((failed,)))
        return backend.ArmAnswer(armed=True, manifest_sha256="a" * 64, verdict=CHECKED)

    def _control(self, *asked: Any) -> backend.ControlAnswer:
        self.asked.append(asked)
        return backend.ControlAnswer(state="armed", detail=f"{asked[0]} done")

    def disarm(self, reason: str) -> backend.ControlAnswer:
        return self._control("disarm", reason)

    def pause(self, reason: str, seconds: int) -> backend.ControlAnswer:
        return self._control("pause", reason, seconds)

    def resume(self, reason: str) -> backend.ControlAnswer:
        return self._control("resume", reason)

    def trip_circuit(self, address: str, port: int, seconds: int, reason: str) -> backend.ControlAnswer:
        return self._control("trip", address, port, seconds, reason)

    def release_circuit(self, address: str, port: int, reason: str) -> backend.ControlAnswer:
        if port == 9:
            raise PointcallError("no such circuit", id="circuit.unknown", got=f"{address}:{port}")
        return self._control("release", address, port, reason)

    def approve(self, bundle: bytes) -> backend.ControlAnswer:
        return self._control("approve", bundle)

    def acknowledge(self, run: str, reason: str) -> backend.ControlAnswer:
        return self._control("acknowledge", run, reason)

    def waiting(self) -> backend.Waiting:
        held = backend.HeldBack("r", 0, "fix", "recreate", ("1", "0"), "db", "OomKilled", 3, "a" * 64, "node.local")
        return backend.Waiting((held,), (backend.Called("r", 7),))

    def begin_drill(self, request: backend.DrillRequest) -> backend.DrillReport:
        self._control("drill", request.service, request.reason)
        return backend.DrillReport("d-1", "running")

    def end_drill(self, id: str) -> backend.DrillReport:
        runs = (backend.DrillRun("01R", "CircuitOpened", "fix"),)
        return backend.DrillReport(id, "ended", "asked for", True, {"refused": 3}, {"refused": 3}, runs)

    def record_probe(self, name: str, sha256: str, what: str, reason: str) -> backend.ControlAnswer:
        return self._control("probe", name, sha256, what, reason)

    def prune_log(self, minimum: int | None, retention_days: int | None, reason: str) -> Retained:
        self.asked.append(("prune", minimum, retention_days, reason))
        return Retained(minimum or 0, 1, retention_days or 400, (), (7,))

    def erase_log(self, what: Sequence[str], older_than_days: int | None, reason: str) -> Retained:
        self.asked.append(("erase", tuple(what), older_than_days, reason))
        return Retained(0, 0, 0, (3, 4), (7,))

    def proposed(self, body: Mapping[str, Any]) -> None:
        self.proposals.append(body)

    def accessed(self, accesses: Sequence[Access]) -> None:
        self.accesses.extend(accesses)
