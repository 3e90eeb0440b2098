"""The executor: the shell around the pure core. It waits for kernel records and performs what the core says.

One loop thread owns the core's state and every decision. Kernel leases are applied on it at once; actions that need a
durable intent run on a small pool, one at a time for each target (the guard sees to that). Everything that happened
goes into the journal; if the journal fails, the executor disarms and stops: what cannot be recorded must not be done.

Trust: who can write the state folder can stop the node, not forge a receipt; who can write the trust folder can arm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import itertools
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, assert_never

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_attest.admission import Admitted, admit, check_manifest
from pointcall_attest.binding import report_data
from pointcall_attest.errors import RefusedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.receipt import Engine, Signer
from pointcall_attest.run_id import run_id
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor import VERSION, wasm
from pointcall_executor.actions import KERNEL_LEASES, REGISTRY, WITHOUT_INTENT
from pointcall_executor.actions.world import Channels, Done, World
from pointcall_executor.arming import armed_of, names_of, topology_of
from pointcall_executor.config import Config, ConfigError
from pointcall_executor.core import guard
from pointcall_executor.core.event import decode
from pointcall_executor.core.step import (
    Armed,
    Decide,
    Decided,
    Effect,
    Ended,
    Happened,
    Input,
    Perform,
    Refuse,
    State,
    Withhold,
    step,
)
from pointcall_executor.core.trigger import Topology, notice
from pointcall_executor.epoch import NOTHING, Attested, Trust, attest, opening
from pointcall_executor.journal import Journal
from pointcall_executor.kernel.breaker import CircuitState
from pointcall_executor.node import Node, RunningServices, Sensors
from pointcall_executor.run import Act, Epoch, Run, arguments, grant_of
from pointcall_executor.tee.platform import Platform
from pointcall_keys.node import EpochKeys
from pointcall_runbook.decision import Trap
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import (
    MAX_ACTIONS,
    Action,
    Address,
    Again,
    Call,
    CloseCircuit,
    OpenCircuit,
    Outcome,
    Remember,
    Service,
    Timer,
    capability,
)

TICK_SECONDS: Final = 0.25
SWITCH_SECONDS: Final = 0.0002  # how long a thread that signs or writes may keep the loop from deciding
ACTION_THREADS: Final = 4  # actions on different targets at once; more would only hide a storm
RECHECK_NS: Final = 10_000_000_000  # between two looks at whether the kernel still runs what was armed
TIMERS_MAX: Final = 1024  # pending `Again`s; a module that asks for more is refused
ARMED: Final = "armed"  # the node has one sequence, whatever the manifest is called
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class StoppedError(PointcallError):
    """The executor has stopped, on purpose or because its journal failed."""

    id = "executor.stopped"


def load_trust(folder: Path) -> Trust:
    """What the node was provisioned with. OSError where it is missing, MalformedError where it is wrong."""
    root = (folder / "trusted_root.json").read_bytes()
    policy = TrustPolicy.parse((folder / "policy.json").read_bytes())
    return Trust(policy, root, hashlib.sha256(root).hexdigest(), Roots.open(folder))


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest as it travels: its signature bundles and the files that it names."""

    signatures: tuple[bytes, ...]
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """`*.sigstore.json` beside a folder `files` that mirrors the subjects' names."""
        signatures = tuple(p.read_bytes() for p in sorted(folder.glob("*.sigstore.json")))
        base = folder / "files"
        files = {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}
        return cls(signatures, files)


@dataclass(slots=True)
class _Session:
    """What is armed now, as running things. Replaced whole when another manifest is armed."""

    admitted: Admitted
    sensors: Sensors
    services: RunningServices
    channels: Channels
    runners: dict[str, wasm.Runner]


class Executor:
    """One executor on one node. Methods may be called from any thread; `close` ends it."""

    def __init__(self, state_dir: Path, config: Config, platform: Platform, node: Node) -> None:
        self.state_dir, self.config, self._platform, self._node = state_dir, config, platform, node
        self.origin = f"pointcall.dev/log/{config.node}"
        self.trust = load_trust(state_dir / "trust")
        self.journal = Journal.open(state_dir / "journal.db", origin=self.origin)
        self.state = State()
        self._topology = Topology()
        self._session: _Session | None = None
        self._attested: Attested | None = None
        self._epoch: Epoch | None = None
        self._engine = Engine(
            name="wasmtime", version=str(wasm.engine_settings()["wasmtime"]), config=wasm.engine_digest()
        )
        self.boot_id = BOOT_ID.read_text().strip() if BOOT_ID.exists() else "unknown"
        self._numbers = itertools.count()
        self._timers: list[tuple[int, int, str, str, int]] = []
        self._lost: dict[str, int] = {}
        self._unobserved: list[Future[int]] = []
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._pool = ThreadPoolExecutor(ACTION_THREADS, thread_name_prefix="action")
        self._arming = threading.Lock()
        self._stopping = False
        self._epoch_due_ns = 0
        self.failure: BaseException | None = None
        self._runs: dict[str, Run] = {}
        self._preparing: _Session | None = None
        self._stopped: _Session | None = None
        self._moving = threading.Lock()
        self._closed = False
        self._random = b""
        self._tick_due_ns = self._checkpoint_due_ns = self._paused_until_ns = self._recheck_due_ns = 0
        self.on_receipt: Callable[[Run], None] = lambda _run: None
        sys.setswitchinterval(SWITCH_SECONDS)
        self._open_epoch(None, (), reason="boot")
        self._thread = threading.Thread(target=self._loop, name="core", daemon=True)
        self._thread.start()

    # ---- epochs ----------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> EpochKeys:
        """The keys of the running epoch."""
        assert self._attested is not None
        return self._attested.keys

    @property
    def verdict(self) -> Verdict:
        """What the node's own evidence is worth."""
        assert self._attested is not None
        return self._attested.verdict

    @property
    def attested(self) -> Attested:
        assert self._attested is not None
        return self._attested

    @property
    def admitted(self) -> Admitted | None:
        return self._session.admitted if self._session else None

    def _attest(self, manifest: Any) -> Attested:
        return attest(self._platform, self.trust, manifest, nonce=os.urandom(32), at=datetime.now(UTC))

    def _open_epoch(
        self, admitted: Admitted | None, bundles: Sequence[bytes], *, reason: str, attested: Attested | None = None
    ) -> None:
        """Close the running epoch, open the next: the old key names the new one and is wiped."""
        manifest = admitted.manifest if admitted else None
        new = attested or self._attest(manifest)
        old = self._attested
        stored = tuple(self.journal.put_blob(b) for b in bundles)
        self.journal.put_blob(new.evidence.encode())
        self.journal.put_blob(self.trust.policy.raw)
        self.journal.put_blob(self.trust.trusted_root)
        if old is not None:
            at = datetime.now(UTC)
            self.journal.append(old.keys.certify_next(new.keys, reason=reason, at=at, ktime_ns=time.monotonic_ns()))
            self.journal.checkpoint(old.keys.sign_checkpoint, time.monotonic(), force=True)
        self.journal.append(
            opening(
                new, self.trust, manifest, stored,
                node=self.config.node, origin=self.origin, engine=self._engine,
                previous=old.keys.id if old else None, at=datetime.now(UTC), ktime_ns=time.monotonic_ns(),
            )
        )  # fmt: skip
        self._attested = new
        self._epoch = self._context(new, admitted)
        self._numbers = itertools.count()
        self._epoch_due_ns = time.monotonic_ns() + self.config.epoch_minutes * 60_000_000_000
        if old is not None:
            old.keys.wipe()

    def _context(self, attested: Attested, admitted: Admitted | None) -> Epoch | None:
        if admitted is None:
            return None
        manifest = admitted.manifest
        return Epoch(
            node=self.config.node,
            key=attested.keys.id,
            manifest=manifest.sha256,
            signers=tuple(Signer(issuer=s.issuer, identity=s.identity) for s in admitted.signed.signers),
            tier=attested.verdict.tier,
            platform=attested.evidence.platform,
            evidence=attested.evidence.sha256,
            engine=self._engine,
            blobs={s.name: manifest.subjects[s.blob] for s in manifest.sensors}
            | {"timer": "0" * 64, "action": "0" * 64},
            boot_id=self.boot_id,
            names=names_of(manifest),
        )

    def _entry(self, body: entry.Body, run: str | None = None) -> bytes:
        now = datetime.now(UTC)
        return self.keys.sign(entry.payload(body, at=now, ktime_ns=time.monotonic_ns(), epoch=self.keys.id, run=run))

    def _checkpoint(self, keys: EpochKeys) -> None:
        if not keys.wiped:
            self.journal.checkpoint(keys.sign_checkpoint, time.monotonic())

    # ---- arming ----------------------------------------------------------------------------------------------------

    def arm(self, bundle: Bundle) -> Admitted:
        """Verify, attest, admit and arm. A refusal leaves everything as it was and is an entry of the log.

        RefusedError carries every check; ArmingError, ServiceError and KernelError say what this node cannot do.
        """
        with self._arming:
            try:
                return self._arm(bundle)
            except RefusedError as refusal:
                for check in refusal.verdict.failed:
                    self.record(_refusal(check.id, "manifest", check.expected, check.observed, check.hint))
                raise
            except PointcallError as refusal:
                self.record(_refusal(refusal.id, "manifest", refusal.want, refusal.got, refusal.hint))
                raise

    def _refused(self, run: str, check: str, what: str, want: str, got: str, hint: str) -> None:
        self._submit(self._entry(_refusal(check, what, want, got, hint), run))

    def _arm(self, bundle: Bundle) -> Admitted:
        candidate = check_manifest(
            bundle.signatures,
            bundle.files,
            policy=self.trust.policy,
            trusted_root=self.trust.trusted_root,
            at=datetime.now(UTC),
            highest_sequence=self.journal.highest_sequence(ARMED),
            highest_digest=self.journal.sequence_digest(ARMED),
            executor_version=VERSION,
        )
        attested = self._attest(candidate.manifest)
        admitted = admit(candidate, attested.verdict)
        armed = armed_of(admitted)
        session = self._prepare(admitted, armed)
        try:
            for content in (*admitted.files.values(), admitted.manifest.payload):
                self.journal.put_blob(content)
            self.journal.raise_sequence(ARMED, admitted.manifest.sequence, admitted.manifest.sha256)
            self._call(lambda: self._switch(session, armed, bundle, attested))
        except BaseException:
            session.sensors.detach()
            raise
        return admitted

    def _prepare(self, admitted: Admitted, armed: Armed) -> _Session:
        """Everything that can fail, before anything is replaced. Leaves nothing behind when it fails."""
        old = self._session
        runners = {
            b.name: wasm.Runner(admitted.module(b.name), admitted.modules[b.name]) for b in admitted.manifest.runbooks
        }
        for name, runner in runners.items():
            _warm(runner, admitted.modules[name])
        with self._moving:
            cgroups = self._topology.cgroups
            self._topology = replace(topology_of(admitted.manifest), cgroups=cgroups)
        sensors = self._node.sensors(admitted, armed.rules)
        services = self._node.services(admitted, old.services if old else None, self._moved)
        session = _Session(admitted, sensors, services, self._node.channels(admitted), runners)
        self._preparing = session
        try:
            services.start_all()
        except BaseException:
            sensors.detach()
            if old is None:
                services.stop_all()
            raise
        finally:
            self._preparing = None
        return session

    def _switch(self, session: _Session, armed: Armed, bundle: Bundle, attested: Attested) -> None:
        """On the loop thread: the new session is whole before the old one ends."""
        old = self._session
        self._open_epoch(session.admitted, bundle.signatures, reason="another manifest is armed", attested=attested)
        for fd in session.sensors.fds():
            self._epoll.register(fd, select.EPOLLIN)
        self._session, self._lost = session, {}
        self.state = replace(self.state, armed=armed)
        detail: dict[str, JsonValue] = {name: f"{number} {tag}" for name, number, tag in session.sensors.programs()}
        self.record(entry.Config(what="kernel programs", detail=detail))
        session.sensors.keep()
        if old is not None:
            self._drop(old.sensors, leave=True)
            old.services.stop_others(session.services)

    def _drop(self, sensors: Sensors, *, leave: bool = False) -> None:
        """Out of the loop and out of the kernel; `leave` keeps what is pinned."""
        for fd in sensors.fds():
            self._epoll.unregister(fd)
        if leave:
            sensors.leave()
        else:
            sensors.detach()

    def _recheck(self) -> None:
        """A program that was swapped or a link that was taken off: what is left cannot be trusted to protect."""
        if self._session is None:
            return
        changed = self._session.sensors.changed()
        if changed:
            want, hint = "the programs that were armed", "find out who did it; arm again"
            self._submit(self._entry(_refusal("kernel.changed", "kernel programs", want, changed[0], hint)))
            self._disarm("kernel programs changed")

    def _moved(self, number: int, cgroup_id: int) -> None:
        """A service got a new cgroup, or lost its old one. Called before anything runs in it, from any thread."""
        with self._moving:
            for old, owner in self._topology.cgroups.items():
                if owner == number:
                    self._each_sensor(functools.partial(_unwatch, old))
            self._topology = self._topology.moved(number, cgroup_id)
            if cgroup_id:
                self._each_sensor(functools.partial(_watch, cgroup_id))

    def _each_sensor(self, do: Callable[[Sensors], None]) -> None:
        for session in (self._session, self._preparing):
            if session is not None:
                do(session.sensors)

    def disarm(self, reason: str) -> None:
        """Stop acting: everything out of the kernel, nothing armed. The services go on running."""
        self._call(lambda: self._disarm(reason))

    def _disarm(self, reason: str, *, leave: bool = False) -> None:
        if self._session is None:
            return
        self._drop(self._session.sensors, leave=leave)
        self.state = replace(self.state, armed=None)
        self.record(entry.Config(what="disarmed", detail={"reason": reason}))
        self._stopped, self._session = self._session, None

    def pause(self, reason: str, seconds: int) -> None:
        """Refuse every action for so long; the breaker in the kernel goes on."""
        until_ns = time.monotonic_ns() + seconds * 1_000_000_000
        self._call(lambda: self._set_paused(reason or "no reason given", until_ns, "paused", reason))

    def resume(self, reason: str) -> None:
        """End a pause."""
        self._call(lambda: self._set_paused("", 0, "resumed", reason))

    def _set_paused(self, paused: str, until_ns: int, what: str, reason: str) -> None:
        self.state = replace(self.state, guard=replace(self.state.guard, paused=paused))
        self._paused_until_ns = until_ns
        self.record(entry.Config(what=what, detail={"reason": reason}))

    def reload(self, config: Config) -> None:
        """Take over settings that can change while running, and read the trust folder again.

        ConfigError `config.restart` where a setting needs a new process; MalformedError for a wrong trust policy.
        """
        fixed = ("node", "cgroup", "gate", "tee", "api", "pin")
        changed = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise ConfigError("a setting needs a restart", id="config.restart", got=", ".join(changed))
        trust = load_trust(self.state_dir / "trust")
        with self._arming:
            self.config, self.trust = config, trust
            self.record(entry.Config(what="settings", detail={"policy": trust.policy.sha256}))

    # ---- what an operator does by hand, and what others may look at ------------------------------------------------

    def trip(self, address: Address, port: int, hold_ns: int, reason: str) -> None:
        """Force a circuit open for `hold_ns`. ServiceError `circuit.unknown` where none is armed."""
        self._by_hand(OpenCircuit(address, port, hold_ns), reason)

    def release(self, address: Address, port: int, reason: str) -> None:
        """Close a circuit now. ServiceError `circuit.unknown` where none is armed."""
        self._by_hand(CloseCircuit(address, port), reason)

    def _by_hand(self, action: OpenCircuit | CloseCircuit, reason: str) -> None:
        if self._session is None:
            raise StoppedError("nothing is armed", id="executor.disarmed", hint="pointcall arm")
        act = Act(0, Call.of(action), action, target=self._target(action))
        self.journal.append(self._entry(_intent(act, self._names(), grant="operator")))
        act.started_ns = time.monotonic_ns()
        done = REGISTRY[act.call.action](action, self._world())
        act.outcome, act.detail = done.outcome, {**done.detail, "reason": reason}
        self.journal.append(self._entry(_outcome(act)))

    def record(self, body: entry.Body) -> int:
        """Append an entry of the running epoch; its index, once it is durable."""
        return self.journal.append(self._entry(body))

    def fresh_evidence(self, nonce: bytes) -> tuple[EvidenceBundle, EpochKeys]:
        """Evidence over the caller's nonce (32 bytes), and the keys of the running epoch that it binds."""
        manifest, keys = self.admitted.manifest if self.admitted else None, self.keys
        digest = bytes.fromhex(manifest.sha256 if manifest else NOTHING)
        bound = report_data(digest, bytes.fromhex(self.trust.policy.sha256), keys.spki, nonce)
        return self._platform.evidence(bound), keys

    def checkpoint_now(self) -> Checkpoint:
        """A checkpoint that covers everything that is in the log now."""
        note = self.journal.checkpoint(self.keys.sign_checkpoint, time.monotonic(), force=True)
        assert note is not None, "the log has its first entry since the executor started"
        return Checkpoint.parse(note)

    def programs(self) -> tuple[tuple[str, int, str], ...]:
        """(name, kernel id, tag) of every BPF program that is loaded for the armed manifest."""
        session = self._session
        return session.sensors.programs() if session else ()

    def circuits(self) -> tuple[CircuitState, ...]:
        """Every armed circuit as the kernel has it."""
        session = self._session
        return session.sensors.states() if session else ()

    def running_services(self) -> Mapping[str, int]:
        """Declared services and the pid of each, 0 where it does not run."""
        session = self._session or self._stopped
        return session.services.pids() if session else {}

    @property
    def lost_events(self) -> int:
        return sum(self._lost.values())

    @staticmethod
    def now_ns() -> int:
        """CLOCK_MONOTONIC."""
        return time.monotonic_ns()

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # the one broad except: whatever it was, nothing may act any more
            self.failure = error
            self._stopping = True
            if self._session is not None:
                with contextlib.suppress(Exception):
                    self._session.sensors.detach()
            self._drain_commands()

    def _turn(self) -> None:
        ready = self._epoll.poll(self._pause())
        received_ns = time.monotonic_ns()
        if any(fd == self._wake for fd, _ in ready):
            os.eventfd_read(self._wake)
        if self._session is not None and len(ready) > 0:
            for record in self._session.sensors.drain():
                self._record(record, received_ns)
        self._drain_commands()
        self._tick(received_ns)

    def _pause(self) -> float:
        if not self._timers:
            return TICK_SECONDS
        return max(0.0, min(TICK_SECONDS, (self._timers[0][0] - time.monotonic_ns()) / 1e9))

    def _drain_commands(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _post(self, command: Callable[[], None]) -> None:
        """Run this on the loop thread soon."""
        self._commands.put(command)
        os.eventfd_write(self._wake, 1)

    def _call(self, command: Callable[[], None]) -> None:
        """Run this on the loop thread and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            if self.failure is not None:
                done.set_exception(StoppedError("the executor has stopped", got=str(self.failure)))
                return
            try:
                command()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._post(run)
        while not done.done():
            with contextlib.suppress(TimeoutError):
                done.exception(timeout=1)
            if not self._thread.is_alive():
                self._drain_commands()
        done.result()

    def _tick(self, now_ns: int) -> None:
        while self._timers and self._timers[0][0] <= now_ns:
            self._fire(heapq.heappop(self._timers))
        if self._paused_until_ns and now_ns >= self._paused_until_ns:
            self._set_paused("", 0, "resumed", "the pause is over")
        if now_ns < self._tick_due_ns:
            return
        self._tick_due_ns = now_ns + int(TICK_SECONDS * 1e9)
        self._count_lost()
        self._watch_journal()
        if now_ns >= self._recheck_due_ns:
            self._recheck_due_ns = now_ns + RECHECK_NS
            self._recheck()
        if now_ns >= self._epoch_due_ns:
            self._roll()
        if now_ns >= self._checkpoint_due_ns:
            self._checkpoint_due_ns = now_ns + int(self.config.checkpoint_seconds * 1e9)
            self._pool.submit(self._checkpoint, self.keys)

    def roll_epoch(self) -> None:
        """A new key and fresh evidence now, for the same manifest; the old key vouches for it and is wiped."""
        self._call(self._roll)

    def _roll(self) -> None:
        if self._session is not None:
            self._open_epoch(self._session.admitted, self._session_bundles(), reason="lifetime")

    def _session_bundles(self) -> tuple[bytes, ...]:
        opened = self.journal.entries(kind="epoch-open")[-1].body
        return tuple(self.journal.blob(digest) for digest in opened["bundles"])

    def _count_lost(self) -> None:
        if self._session is None:
            return
        for sensor, count in self._session.sensors.lost().items():
            new = count - self._lost.get(sensor, 0)
            if new > 0:
                self._lost[sensor] = count
                self._submit(self._entry(entry.Lost(sensor=sensor, count=new)))

    def _submit(self, leaf: bytes) -> None:
        """Write without waiting; a failure is noticed at the next tick and stops the executor."""
        self._unobserved.append(self.journal.submit(leaf))

    def _watch_journal(self) -> None:
        done = [f for f in self._unobserved if f.done()]
        self._unobserved = [f for f in self._unobserved if not f.done()]
        for future in done:
            future.result()

    # ---- one record through to its actions -------------------------------------------------------------------------

    def _record(self, raw: bytes, received_ns: int) -> None:
        record = decode(raw)
        history, noticed = notice(record, self._topology, self.state.guard.history)
        self.state = replace(self.state, guard=replace(self.state.guard, history=history))
        if noticed.event is not None:
            happening = Happened(noticed.event, noticed.subject, received_ns)
            self._advance(happening, noticed.sensor, received_ns)

    def _advance(self, happening: Input, sensor: str, received_ns: int) -> None:
        self.state, effects = step(self.state, happening)
        for effect in effects:
            self._effect(effect, sensor, received_ns)

    def _effect(self, effect: Effect, sensor: str, received_ns: int) -> None:
        match effect:
            case Decide():
                self._decide(effect, sensor, received_ns)
            case Perform(id, index, action):
                run = self._runs[id]
                self._perform(run, run.acts[index], action)
            case Withhold(id, index, action):
                run = self._runs[id]
                self._withhold(run.acts[index], action)
            case Refuse(id, index, action, refusal):
                run = self._runs[id]
                self._refuse(run, run.acts[index], action, refusal)
            case _:
                assert_never(effect)

    def _decide(self, effect: Decide, sensor: str, received_ns: int) -> None:
        """Run the handler and let the core judge what it wants."""
        assert self._session is not None
        book, name = effect.runbook, type(effect.event).__name__
        runner = self._session.runners[book.name]
        run = Run(
            id=run_id(time.time_ns() // 1_000_000, self._chance()),
            number=next(self._numbers),
            runbook=book,
            event=effect.event,
            subject=effect.subject,
            sensor=sensor,
            args=effect.args,
            fuel_limit=self._session.admitted.modules[book.name].handlers[name].fuel_bound + 1,
            started=datetime.now(UTC),
            event_ns=effect.event.at,  # type: ignore[attr-defined]
            received_ns=received_ns,
        )
        try:
            decided = runner.decide(name, effect.args)
        except Trap as trap:
            run.decided_ns = time.monotonic_ns()
            self._quarantine(run, trap.kind, str(trap))
            return
        run.decided_ns = time.monotonic_ns()
        run.calls, run.fuel_used = decided.calls, decided.fuel
        if len(run.calls) > MAX_ACTIONS:
            self._quarantine(run, "too many actions", f"{len(run.calls)} calls, at most {MAX_ACTIONS}")
            return
        run.acts = [Act(i, call) for i, call in enumerate(run.calls)]
        self._runs[run.id] = run
        now_ns = time.monotonic_ns()
        self._advance(Decided(run.id, book, effect.subject, run.calls, now_ns), sensor, received_ns)
        self._maybe_finish(run)

    def _chance(self) -> bytes:
        """10 random bytes, drawn in advance: a system call here would give up the interpreter lock at a bad time."""
        if len(self._random) < 10:
            self._random = os.urandom(4096)
        drawn, self._random = self._random[:10], self._random[10:]
        return drawn

    def _quarantine(self, run: Run, kind: str, got: str) -> None:
        """A module that traps is not asked again until another manifest is armed."""
        run.trap, run.calls = kind, ()
        armed = self.state.armed
        if armed is not None:
            kept = tuple(r for r in armed.runbooks if r.name != run.runbook.name)
            self.state = replace(self.state, armed=replace(armed, runbooks=kept))
        want = "a decision within its proven bound"
        hint = "arm a manifest with a fixed module"
        self._refused(run.id, "runbook.quarantined", run.runbook.name, want, got, hint)
        self._maybe_finish(run)

    def _withhold(self, act: Act, action: Action) -> None:
        act.action, act.target, act.outcome = action, self._target(action), Outcome.MONITORED

    def _refuse(self, run: Run, act: Act, action: Action | None, refusal: guard.Refusal) -> None:
        act.action, act.refusal, act.outcome = action, refusal, Outcome.REFUSED
        act.target = self._target(action) if action else ""
        what = f"{act.call.action} {act.target}"
        self._refused(run.id, refusal.rule, what, refusal.want, refusal.got, refusal.hint)

    def _target(self, action: Action) -> str:
        """What an action is about, in words."""
        target = guard.target_of(action)
        if target[0] == "service":
            return self._topology.names.get(int(target[1]), str(target[1]))
        return ":".join(str(part) for part in target[1:]) or str(target[0])

    # ---- actions ---------------------------------------------------------------------------------------------------

    def _perform(self, run: Run, act: Act, action: Action) -> None:
        act.action, act.target = action, self._target(action)
        name = capability(type(action))
        if isinstance(action, Remember | Again):
            self._built_in(run, act, action)
        elif name in KERNEL_LEASES or name in WITHOUT_INTENT:
            self._apply(run, act, action)
            self._ended(run, act)
        else:
            self._pool.submit(self._durable, run, act, action)

    def _built_in(self, run: Run, act: Act, action: Remember | Again) -> None:
        """The core's own actions: `remember` is done by the step itself, `again` is a timer here."""
        act.started_ns = act.ended_ns = time.monotonic_ns()
        act.outcome = Outcome.APPLIED
        if isinstance(action, Again):
            if len(self._timers) >= TIMERS_MAX:
                act.outcome, act.detail = Outcome.FAILED, {"error": f"more than {TIMERS_MAX} timers"}
                return
            number = getattr(run.event, "service", Service(0)).number
            due = act.started_ns + action.after
            heapq.heappush(self._timers, (due, action.tag, run.runbook.name, run.subject, number))

    def _fire(self, timer: tuple[int, int, str, str, int]) -> None:
        due_ns, tag, book, subject, number = timer
        restarts = self.state.guard.history.count(("restart", number), due_ns)
        event = Timer(due_ns, tag, Service(number), restarts)
        now_ns = time.monotonic_ns()
        self._advance(Happened(event, subject, now_ns, only=book), "timer", now_ns)

    def _names(self) -> Mapping[int, str]:
        return self._epoch.names if self._epoch else {}

    def _world(self) -> World:
        session = self._session or self._stopped
        assert session is not None
        return World(session.services, session.sensors, session.channels, time.monotonic_ns())

    def _apply(self, run: Run, act: Act, action: Action) -> None:
        """Do it, and keep what became of it. What the system refuses is an outcome, not an exception."""
        act.started_ns = time.monotonic_ns()
        try:
            done = REGISTRY[act.call.action](action, self._world())
        except (PointcallError, OSError) as error:
            detail = error.as_dict() if isinstance(error, PointcallError) else {"message": str(error)}
            done = Done(Outcome.FAILED, act.target, {"error": detail})
        act.ended_ns = time.monotonic_ns()
        act.outcome, act.target, act.detail = done.outcome, done.target, done.detail
        act.undo, act.postcondition = done.undo, done.postcondition

    def _durable(self, run: Run, act: Act, action: Action) -> None:
        """On the pool: the intent is on disk before anything is done."""
        try:
            act.intent = self.journal.append(self._entry(_intent(act, self._names()), run.id))
            act.intent_ns = time.monotonic_ns()
            self._apply(run, act, action)
        except BaseException as error:
            self._post(lambda error=error: self._fail(error))  # type: ignore[misc]
            return
        self._post(lambda: self._ended(run, act))

    def _fail(self, error: BaseException) -> None:
        raise error

    def _ended(self, run: Run, act: Act) -> None:
        """On the loop thread: free the target, let the runbook go on, finish the run when all its actions ended."""
        assert act.action is not None
        assert act.outcome is not None
        now_ns = time.monotonic_ns()
        self._advance(Ended(run.id, run.runbook, run.subject, act.action, act.outcome, now_ns), "action", now_ns)
        self._maybe_finish(run)

    def _maybe_finish(self, run: Run) -> None:
        if run.finished and not run.closing:
            run.closing = True
            self._runs.pop(run.id, None)
            self._pool.submit(self._finish, run, self._epoch, self.keys)

    def _finish(self, run: Run, epoch: Epoch | None, keys: EpochKeys) -> None:
        """On the pool: what is not yet recorded of the run, then its receipt."""
        try:
            assert epoch is not None, "a run without an armed epoch"
            for act in run.acts:
                if act.action is None or act.outcome in (Outcome.REFUSED, Outcome.MONITORED):
                    continue
                if act.intent is None and act.call.action in KERNEL_LEASES:
                    act.intent = self.journal.append(self._entry(_intent(act, self._names()), run.id))
                self.journal.submit(self._entry(_outcome(act), run.id))
            run.receipt_index = self.journal.append(keys.sign(run.receipt(epoch).payload()))
        except BaseException as error:
            self._post(lambda error=error: self._fail(error))  # type: ignore[misc]
            return
        self.on_receipt(run)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, *, stop_services: bool = False, reason: str = "stopped") -> None:
        """Disarm, let running actions end, close the epoch. `stop_services`: also destroy the declared services."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            with contextlib.suppress(PointcallError):
                self._call(lambda: self._disarm(reason, leave=self.config.pin))
        self._pool.shutdown(wait=True)
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        session = self._session or self._stopped
        if stop_services and session is not None:
            session.services.stop_all()
        self._node.shutdown()
        self._close_epoch(reason)
        self.journal.close()
        self._epoll.close()
        os.close(self._wake)

    def _close_epoch(self, reason: str) -> None:
        if self.failure is not None:
            return
        leaf = self.keys.certify_next(None, reason=reason, at=datetime.now(UTC), ktime_ns=time.monotonic_ns())
        self.journal.append(leaf)
        self.journal.checkpoint(self.keys.sign_checkpoint, time.monotonic(), force=True)
        self.keys.wipe()


def _warm(runner: wasm.Runner, info: ModuleInfo) -> None:
    """Decide once about nothing, so that the first real decision is as fast as the others. A module has no effects."""
    for handler in info.handlers.values():
        with contextlib.suppress(Trap):
            runner.decide(handler.event, (0,) * handler.arity)


def _watch(cgroup_id: int, sensors: Sensors) -> None:
    sensors.watch(cgroup_id)


def _unwatch(cgroup_id: int, sensors: Sensors) -> None:
    sensors.unwatch(cgroup_id)


def _refusal(check: str, what: str, want: str, got: str, hint: str) -> entry.Refusal:
    """An entry's texts are bounded; what was wanted or found may be long."""
    return entry.Refusal(check=check, what=what[:1000], want=want[:1000], got=got[:1000], hint=hint[:1000])


def _intent(act: Act, names: Mapping[int, str], grant: str = "") -> entry.Intent:
    args = arguments(act, names)
    return entry.Intent(action=act.call.action, target=act.target, args=args, grant=grant or grant_of(act))


def _outcome(act: Act) -> entry.OutcomeBody:
    assert act.outcome is not None
    return entry.OutcomeBody(
        action=act.call.action,
        target=act.target,
        outcome=act.outcome.name.lower(),  # type: ignore[arg-type]
        detail=dict(act.detail),
        postcondition=act.postcondition,
        undo=act.undo,
    )
