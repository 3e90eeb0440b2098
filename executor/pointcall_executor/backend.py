"""The executor as its API sees it: every method of `api.backend.Backend`, each one call into the daemon.

What an operator does by hand is logged like what a runbook does: intent, then outcome, without a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pointcall_attest import entry
from pointcall_attest.errors import RefusedError
from pointcall_attest.model import instant
from pointcall_executor import VERSION, retention
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.api.accesses import Access
from pointcall_executor.api.backend import (
    ArmAnswer,
    ArmedRunbook,
    CircuitState,
    ControlAnswer,
    Evidence,
    NodeStatus,
    ServiceState,
)
from pointcall_executor.daemon import Executor
from pointcall_executor.epoch import NOTHING
from pointcall_executor.journal import Journal
from pointcall_executor.retention import Retained
from pointcall_executor.session import Bundle
from pointcall_runbook.vocabulary import Address, service


class ExecutorBackend:
    """Adapts one running executor."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def reader(self) -> Journal:
        return self._executor.journal

    def inbox(self) -> Inbox:
        return Inbox(self._executor.state_dir / "proposals")

    def now(self) -> datetime:
        return datetime.now(UTC)

    def _state(self) -> tuple[str, str]:
        executor = self._executor
        if executor.failure is not None:
            return "failed", str(executor.failure)
        if executor.admitted is None:
            return "disarmed", ""
        paused = executor.state.guard.paused
        return ("paused", paused) if paused else ("armed", "")

    def status(self) -> NodeStatus:
        executor, admitted = self._executor, self._executor.admitted
        state, reason = self._state()
        attested, manifest = executor.attested, admitted.manifest if admitted else None
        journal = executor.journal
        return NodeStatus(
            node=executor.config.node,
            state=state,
            reason=reason,
            executor=VERSION,
            boot_id=executor.boot_id,
            epoch=attested.keys.id,
            platform=attested.evidence.platform,
            tier=attested.verdict.tier,
            manifest=manifest.name if manifest else "",
            sequence=manifest.sequence if manifest else 0,
            manifest_sha256=manifest.sha256 if manifest else "",
            policy_sha256=executor.trust.policy.sha256,
            expires=instant(manifest.predicate.expires) if manifest else "",
            signers=tuple(s.identity for s in admitted.signed.signers) if admitted else (),
            runbooks=self._runbooks(),
            services=self._services(),
            circuits=self._circuits(),
            tree_size=journal.size,
            runs=journal.count("receipt"),
            refusals=journal.count("refusal"),
            lost_events=executor.lost_events,
        )

    def _runbooks(self) -> tuple[ArmedRunbook, ...]:
        admitted, armed = self._executor.admitted, self._executor.state.armed
        if admitted is None or armed is None:
            return ()
        infos = admitted.modules
        return tuple(
            ArmedRunbook(
                b.name, b.version, b.mode, tuple(sorted(b.events)), infos[b.name].capabilities, infos[b.name].fuel_bound
            )
            for b in armed.runbooks
        )

    def _services(self) -> tuple[ServiceState, ...]:
        executor = self._executor
        history, now_ns = executor.state.guard.history, executor.now_ns()
        return tuple(
            ServiceState(
                name,
                "process",
                "running" if running else "stopped",
                history.count(("restart", service(name).number), now_ns),
            )
            for name, running in executor.running_services().items()
        )

    def _circuits(self) -> tuple[CircuitState, ...]:
        return tuple(
            CircuitState(str(c.destination.address), c.destination.port, c.state.name.lower(), c.refused)
            for c in self._executor.circuits()
        )

    def evidence(self, nonce: bytes) -> Evidence:
        executor = self._executor
        bundle, attested, trust, admitted = executor.fresh_evidence(nonce)
        manifest = admitted.manifest if admitted else None
        head = executor.journal.head()
        return Evidence(
            bundle=bundle.encode(),
            nonce=nonce,
            epoch_spki=attested.keys.spki,
            manifest_sha256=bytes.fromhex(manifest.sha256 if manifest else NOTHING),
            policy_sha256=bytes.fromhex(trust.policy.sha256),
            tier=attested.verdict.tier,
            sequence=manifest.sequence if manifest else 0,
            checkpoint=head.text.decode() if head else "",
        )

    def arm(self, bundles: Sequence[bytes], files: Mapping[str, bytes]) -> ArmAnswer:
        try:
            admitted = self._executor.arm(Bundle(tuple(bundles), files))
        except RefusedError as refusal:
            return ArmAnswer(False, "", refusal.verdict)
        return ArmAnswer(True, admitted.manifest.sha256, admitted.verdict)

    def _answer(self, detail: str) -> ControlAnswer:
        return ControlAnswer(self._state()[0], detail)

    def disarm(self, reason: str) -> ControlAnswer:
        self._executor.disarm(reason)
        return self._answer("nothing is armed; the declared services go on running")

    def pause(self, reason: str, seconds: int) -> ControlAnswer:
        self._executor.pause(reason, seconds)
        return self._answer(f"no action for {seconds} s; the breaker in the kernel goes on")

    def resume(self, reason: str) -> ControlAnswer:
        self._executor.resume(reason)
        return self._answer("actions are performed again")

    def trip_circuit(self, address: str, port: int, seconds: int, reason: str) -> ControlAnswer:
        self._executor.trip(Address.parse(address), port, seconds * 1_000_000_000, reason)
        return self._answer(f"connects to {address}:{port} are refused for {seconds} s")

    def release_circuit(self, address: str, port: int, reason: str) -> ControlAnswer:
        self._executor.release(Address.parse(address), port, reason)
        return self._answer(f"the circuit to {address}:{port} is closed")

    def prune_log(self, minimum: int | None, retention_days: int | None, reason: str) -> Retained:
        executor = self._executor
        days = executor.config.retention_days if retention_days is None else retention_days
        return retention.prune(executor.recorder, minimum, days, reason, datetime.now(UTC))

    def erase_log(self, what: Sequence[str], older_than_days: int | None, reason: str) -> Retained:
        return retention.erase(self._executor.recorder, what, older_than_days, reason, datetime.now(UTC))

    def proposed(self, body: Mapping[str, Any]) -> None:
        self._executor.record(entry.ProposalBody(**body))

    def accessed(self, accesses: Sequence[Access]) -> None:
        for access in accesses:
            self._executor.record(entry.Access(role=access.role, method=access.method, count=access.count))
