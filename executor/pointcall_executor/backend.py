"""The executor as its API sees it: every method of `api.backend.Backend`, each one call into the daemon.

What an operator does by hand is logged like what a runbook does: intent, then outcome, without a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from pointcall_attest import entry
from pointcall_attest.errors import RefusedError
from pointcall_attest.manifest import Manifest
from pointcall_attest.model import instant
from pointcall_attest.printable import shown
from pointcall_executor import VERSION, feed, retention
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.api.accesses import Access
from pointcall_executor.api.backend import (
    ArmAnswer,
    ArmedRunbook,
    Called,
    CircuitState,
    ControlAnswer,
    DrillReport,
    DrillRequest,
    Evidence,
    HeldBack,
    LogCopy,
    NodeStatus,
    ServiceState,
    Waiting,
)
from pointcall_executor.arming import PROTOCOLS, names_of
from pointcall_executor.core import breaker
from pointcall_executor.core.guard import Target
from pointcall_executor.daemon import Executor
from pointcall_executor.epoch import NOTHING
from pointcall_executor.feed import Changes, FeedPage
from pointcall_executor.halt import halted
from pointcall_executor.journal import Journal
from pointcall_executor.retention import Retained
from pointcall_executor.services.listening import listening
from pointcall_executor.session import Bundle
from pointcall_executor.shipping import Gauge
from pointcall_runbook.vocabulary import Address, service

Heard = TypeVar("Heard")
_PROTOCOL_NAMES: Final = {number: name for name, number in PROTOCOLS.items()}


def both(first: Callable[[Heard], None], second: Callable[[Heard], None]) -> Callable[[Heard], None]:
    """One observer of two."""

    def heard(thing: Heard) -> None:
        first(thing)
        second(thing)

    return heard


class ExecutorBackend:
    """Adapts one running executor."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._begun_ns = executor.now_ns()
        self._changes = Changes(os.urandom(8).hex(), lambda ns: time.time_ns() - time.monotonic_ns() + ns)
        executor.on_record = both(executor.on_record, self._changes.noted)
        self.shipped: Callable[[], Mapping[str, Gauge]] = dict  # set where the log leaves the node

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
            if (held := halted(executor.state_dir)) is not None:
                return "disarmed", f"halted: {held.reason}"
            by_hand = executor.disarmed_by_hand
            return "disarmed", f"a person disarmed it: {by_hand}" if by_hand else ""
        paused = executor.state.guard.paused
        return ("paused", paused) if paused else ("armed", "")

    def status(self) -> NodeStatus:
        executor, admitted = self._executor, self._executor.admitted
        state, reason = self._state()
        attested, manifest = executor.attested, admitted.manifest if admitted else None
        journal, waiting = executor.journal, self.waiting()
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
            ready=self.ready(),
            paused_left_ms=self._left_ms(executor.paused_until_ns),
            storm_left_ms=self._left_ms(executor.state.guard.storm_until_ns),
            in_flight=self._in_flight(),
            epoch_age_ms=self._age_ms(executor.epoch_opened_ns),
            journal_bytes=_size_of(journal.path),
            signed_size=head.size if (head := journal.head()) else 0,
            programs=len(executor.programs()),
            checked_age_ms=self._age_ms(executor.checked_ns) if executor.checked_ns else 0,
            beats=executor.beats,
            uptime_ms=self._age_ms(self._begun_ns),
            copies=tuple(_copy(name, gauge) for name, gauge in self.shipped().items() if gauge.configured),
            mode=executor.config.mode,
            epoch_life_ms=executor.config.epoch_minutes * 60_000,
            evidence_left_ms=self._left_ms(executor.evidence_until_ns),
            held_back=waiting.held_back,
            called=waiting.called,
        )

    def ready(self) -> bool:
        """Whether something is armed and the executor runs. A pause does not end it: what is armed stays armed."""
        return not self.unready()

    def unready(self) -> str:
        """Why not, for whoever asks, so without a word of a person's; empty where it is ready."""
        executor = self._executor
        if executor.failure is not None:
            return "failed"
        if executor.admitted is not None:
            return ""
        if halted(executor.state_dir) is not None:
            return "halted"
        return "disarmed by a person" if executor.disarmed_by_hand else "nothing is armed"

    def _left_ms(self, until_ns: int) -> int:
        return max(0, until_ns - self._executor.now_ns()) // 1_000_000

    def _age_ms(self, since_ns: int) -> int:
        return max(0, self._executor.now_ns() - since_ns) // 1_000_000

    def _in_flight(self) -> tuple[str, ...]:
        """What the guard keeps for running actions, in words."""
        admitted = self._executor.admitted
        names = names_of(admitted.manifest) if admitted else {}
        return tuple(_words(target, names) for target in self._executor.state.guard.busy)

    def _runbooks(self) -> tuple[ArmedRunbook, ...]:
        admitted, armed = self._executor.admitted, self._executor.state.armed
        if admitted is None or armed is None:
            return ()
        infos, asked = admitted.modules, {b.name for b in armed.runbooks}
        watching = self._executor.config.mode == "monitor"
        return tuple(
            ArmedRunbook(
                b.name,
                str(b.version),
                "monitor" if watching else b.mode,
                tuple(sorted(b.events)),
                infos[b.name].capabilities,
                infos[b.name].fuel_bound,
                "armed" if b.name in asked else "quarantined",
            )
            for b in admitted.manifest.runbooks
        )

    def _services(self) -> tuple[ServiceState, ...]:
        executor, admitted = self._executor, self._executor.admitted_last
        history, now_ns = executor.state.guard.history, executor.now_ns()
        declared = {s.name: s for s in admitted.manifest.services} if admitted else {}
        kinds = {name: s.kind for name, s in declared.items()}
        found = []
        for name, pid in executor.running_services().items():
            kind = kinds.get(name, "process")
            state = _word(kind, pid)
            restarts = history.count(("restart", service(name).number), now_ns)
            health = _health(state, declared[name].listen if name in declared else ())
            found.append(ServiceState(name, kind, state, restarts, pid, health))
        return tuple(found)

    def _circuits(self) -> tuple[CircuitState, ...]:
        session, now_us = self._executor.session, self._executor.now_ns() // 1000
        if session is None:
            return ()
        topology, params = session.topology, _params(session.admitted.manifest)
        return tuple(
            CircuitState(
                str(c.destination.address),
                c.destination.port,
                c.state.name.lower(),
                c.refused,
                topology.names.get(topology.listening(c.destination), ""),
                breaker.left_us(c.word, params, now_us) // 1000,
                c.failures,
                c.opened,
                c.watch_only,
                _PROTOCOL_NAMES[c.destination.protocol],
            )
            for c in self._executor.circuits()
        )

    def events(self, cursor: str, last: int) -> FeedPage:
        return feed.page(self._executor.journal, self._changes, cursor, last)

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
        return self._answer("nothing is armed until a person arms; the declared services go on running")

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

    def approve(self, bundle: bytes) -> ControlAnswer:
        run = self._executor.approve(bundle)
        return self._answer(f"the runbook decides again about the event of {run}; this one call may pass")

    def acknowledge(self, run: str, reason: str) -> ControlAnswer:
        self._executor.acknowledge(run, reason)
        return self._answer(f"nobody is called again because of {run}")

    def waiting(self) -> Waiting:
        executor, now_ns = self._executor, self._executor.now_ns()
        held_back = tuple(
            HeldBack(
                run=asked.run.id,
                index=asked.index,
                runbook=asked.run.runbook.name,
                action=asked.run.acts[asked.index].call.action,
                args=tuple(map(str, asked.run.acts[asked.index].call.args)),
                target=asked.run.acts[asked.index].target,
                event=type(asked.run.event).__name__,
                age_seconds=(now_ns - asked.at_ns) // 1_000_000_000,
                manifest_sha256=asked.run.epoch.manifest,
                node=executor.config.node,
            )
            for asked in executor.asked()
        )
        return Waiting(held_back, tuple(Called(e.run, e.code) for e in executor.escalations()))

    def begin_drill(self, request: DrillRequest) -> DrillReport:
        return self._executor.drills.begin(request)

    def end_drill(self, id: str) -> DrillReport:
        return self._executor.drills.end(id)

    def record_probe(self, name: str, sha256: str, what: str, reason: str) -> ControlAnswer:
        body = {"name": name, "sha256": sha256, "measured": "no", "reason": reason}
        self._executor.record(entry.Config(what=f"unmeasured probe {what}", detail={**body}))
        return self._answer(f"unmeasured probe {what}: it is in the log")

    def prune_log(self, minimum: int | None, retention_days: int | None, reason: str) -> Retained:
        executor = self._executor
        days = retention.agreed(executor.config.retention_days, retention_days)
        return retention.prune(executor.recorder, minimum, days, reason, datetime.now(UTC))

    def erase_log(self, what: Sequence[str], older_than_days: int | None, reason: str) -> Retained:
        return retention.erase(self._executor.recorder, what, older_than_days, reason, datetime.now(UTC))

    def proposed(self, body: Mapping[str, Any]) -> None:
        self._executor.record(entry.ProposalBody(**body))

    def accessed(self, accesses: Sequence[Access]) -> None:
        for access in accesses:
            self._executor.record(entry.Access(role=access.role, method=access.method, count=access.count))


def _size_of(database: Path) -> int:
    """Bytes of the journal with what SQLite keeps beside it."""
    parts = (Path(f"{database}{end}") for end in ("", "-wal", "-shm"))
    return sum(p.stat().st_size for p in parts if p.exists())


def _words(target: Target, names: Mapping[int, str]) -> str:
    kind, *rest = target
    if kind in ("service", "channel") and rest:
        return f"{kind} {names.get(int(rest[0]), rest[0])}"
    return " ".join((str(kind), ":".join(map(str, rest)))).strip()


def _word(kind: str, pid: int) -> str:
    """What becomes of it elsewhere is not known here: who asks for the status must not wait for a cluster."""
    return "elsewhere" if kind == "kubernetes" else "running" if pid else "stopped"


def _health(state: str, places: Iterable[Any]) -> str:
    """What a look from outside says: whether every declared TCP address accepts."""
    if state != "running":
        return state
    wanted = [(Address.parse(p.address), p.port) for p in places if p.protocol == "tcp"]
    if not wanted:
        return "running"
    return "accepting" if all(listening(*place) for place in wanted) else "not accepting"


def _params(manifest: Manifest) -> breaker.Params:
    """The breaker's constants as the manifest sets them."""
    known = breaker.Params.__dataclass_fields__
    values = {k: v for s in manifest.sensors if s.name == "breaker" for k, v in s.params.items() if k in known}
    return breaker.Params(**values)


def _copy(name: str, gauge: Gauge) -> LogCopy:
    return LogCopy(
        name, gauge.covered, gauge.behind, int(gauge.behind_s * 1000), gauge.failures, shown(gauge.last_error, 200)
    )
