"""The story: build, sign, attest, refuse, arm, break, recover, prove. Each chapter acts for real and yields one Step.

Time and chance are taken here, at the outermost shell. What a chapter finds untrue is a DemoError and ends the story.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pointcall_attest import pack, snp
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.binding import report_data
from pointcall_attest.errors import RefusedError
from pointcall_attest.manifest import Manifest
from pointcall_attest.pack import Pack
from pointcall_attest.pack_check import Trust, verify_pack
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.receipt import Receipt
from pointcall_attest.replay import replay_all
from pointcall_attest.signature import verify_bundles
from pointcall_attest.trust import Roots
from pointcall_executor.agent_api import patch
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.api.client import ApiError
from pointcall_executor.api.client import Client as ApiClient
from pointcall_executor.api.roles import METHODS, Role
from pointcall_executor.api.server import serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import EnvironmentRefusal
from pointcall_executor.config import Config
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.daemon import Bundle, Executor
from pointcall_executor.demo import setting
from pointcall_executor.demo.narration import Step, duration
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.probe import BLOBS, Feature, probe
from pointcall_executor.node import KernelNode
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.run import Run
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_keys.assemble import Assembled, assemble
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_keys.signer import sign_statement
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import verify_module
from pointcall_runbook.vocabulary import Address

GROUP: Final = f"pointcall-demo-{os.getpid()}"
NODE: Final = "demo"
FIRST: Final = 2  # sequence of its manifest: room for an older one to be refused
PATIENCE_SECONDS: Final = 10.0  # for any one thing to happen
CONTROL: Final = tuple(m.removeprefix("/pointcall.v1.") for m, row in METHODS.items() if row.mutating)
FLIP_EVERY: Final = 61  # bytes: how densely the tamper chapter flips the receipt; a prime, so that no field is spared


class DemoError(PointcallError):
    """Something that the demo shows did not come true."""

    id = "demo.failed"


def demand(truth: bool, what: str, got: object = "") -> None:
    if not truth:
        raise DemoError(f"the demo failed: {what}", want=what, got=str(got))


def missing_features() -> list[Feature]:
    """Required kernel features that this machine has not."""
    return [f for f in probe() if f.required and not f.present]


class Client:
    """The client process and the changes of result that it reports."""

    def __init__(self, port: int, group: Cgroup) -> None:
        script = Path(str(resources.files("pointcall_executor.demo"))) / "client.py"
        command = [sys.executable, "-I", str(script), str(port), str(group.path / "cgroup.procs")]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._changes: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._changes.put(json.loads(line))

    def until(self, result: str) -> dict[str, Any]:
        """The next change to `result`; changes to other results in between are skipped."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                change = self._changes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DemoError("the client did not see what it should", want=result, got="nothing new") from None
            if change["result"] == result:
                return change

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Story:
    """The chapters in order; `tell` yields a Step for each and leaves nothing behind."""

    def __init__(self, state_dir: Path, *, real: bool, missing: list[Feature]) -> None:
        self.state, self.real, self.missing = state_dir, real, missing
        self.mark = () if real else ("RECORDED",)
        self.undo = contextlib.ExitStack()
        self.runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self.port = setting.free_port(random.SystemRandom())
        self.said: list[str] = []  # what the channel `ops` was told
        self.down_ns = 0
        self.receipts: list[Receipt] = []
        self.programs: tuple[tuple[str, int, str], ...] = ()

    def tell(self) -> Iterator[Step]:
        """Every chapter. Whatever happens, processes, cgroups and kernel programs are gone afterwards."""
        chapters: list[Callable[[], Step]] = [
            self.preflight, self.build, self.sign, self.attest, self.refuse_tampered, self.arm, self.refuse_rollback,
            *([self.serve, self.fail, self.decide, self.recover, self.out_of_memory] if self.real else [self.replayed]),
            self.record, self.verify, self.replay, self.tamper, self.agent, self.report,
        ]  # fmt: skip
        with self.undo:
            for chapter in chapters:
                begin = time.perf_counter_ns()
                step = chapter()
                took = (time.perf_counter_ns() - begin) / 1e6
                yield dataclasses.replace(step, took_ms=took, marks=(*step.marks, *self.mark))
        yield self.clean()

    # ---- before anything runs --------------------------------------------------------------------------------------

    def preflight(self) -> Step:
        figures = {"mode": "kernel" if self.real else "recorded", "missing": [f.id for f in self.missing]}
        if self.real:
            return Step("preflight", f"kernel {os.uname().release} grants every hook", figures)
        lines = tuple(f"missing: {f.id} ({f.detail}), needed for {f.needed_for}" for f in self.missing)
        return Step("preflight", "not everything is here: the same loop runs on recorded events", figures, lines)

    def build(self) -> Step:
        """Compile the runbooks and assemble the manifest, twice."""
        self._own_the_folder()
        clock = lambda: datetime.now(UTC)  # noqa: E731 - a value, given to what must not read a clock itself
        self.sigstore = self.undo.enter_context(PrivateSigstore.start(self.state / "sigstore", clock=clock))
        self.platform = EmulatedPlatform.open(self.state / "tee", clock=clock)
        trust = self.state / "trust"
        trust.mkdir(parents=True, exist_ok=True, mode=0o700)
        (trust / "policy.json").write_bytes(setting.trust_policy(self.sigstore.issuer, self.sigstore.trusted_root()))
        (trust / "trusted_root.json").write_bytes(self.sigstore.trusted_root())
        shutil.rmtree(trust / "emulated", ignore_errors=True)
        self.platform.register(trust)
        self.policy = TrustPolicy.parse((trust / "policy.json").read_bytes())
        self.sources = setting.Sources.write(self.state / "build", self.port)
        self.blobs = BLOBS if self.real else setting.stand_ins(self.state / "blobs", BLOBS)
        self.sequence = FIRST
        begin = time.perf_counter_ns()
        self.assembled = self._assemble(self.sequence)
        took = time.perf_counter_ns() - begin
        same = self._assemble(self.sequence)
        demand(same.statement == self.assembled.statement, "the same bytes twice")
        infos = {n: verify_module(f) for n, f in self.assembled.files.items() if n.endswith(".wasm")}
        lines = [
            f"{Path(name).stem}: {info.size} B, worst case {info.fuel_bound} fuel, may {', '.join(info.capabilities)}"
            for name, info in infos.items()
        ]
        figures = {
            "modules": {
                Path(n).stem: {"bytes": i.size, "fuel_bound": i.fuel_bound, "capabilities": list(i.capabilities)}
                for n, i in infos.items()
            },
            "files": len(self.assembled.files),
            "build_ms": round(took / 1e6, 2),
            "reproducible": True,
        }
        title = f"{len(infos)} runbooks compiled to pure Wasm, the same bytes twice"
        return Step("build", title, figures, tuple(lines))

    def _own_the_folder(self) -> None:
        """EnvironmentRefusal where the folder is an installation's: the demo would replace its trust by its own."""
        mark = self.state / "demo"
        if (self.state / "trust" / "policy.json").exists() and not mark.exists():
            raise EnvironmentRefusal(
                "this folder is not the demo's",
                id="demo.state",
                want="an empty folder, or one of an earlier demo",
                got=str(self.state),
                hint="pointcall demo --state-dir SOMEWHERE-ELSE",
            )
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark.touch()
        for file in self.state.glob("journal.db*"):  # the executor remembers; this demo is not the last one
            file.unlink()

    def _assemble(self, sequence: int) -> Assembled:
        now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        manifest = setting.recovery_manifest(self.port, self.platform.measurement, self.policy.sha256)
        return assemble(
            manifest,
            self.sources.folder,
            self.blobs,
            sequence=sequence,
            not_before=now,
            expires=now + timedelta(days=1),
        )

    def _signed(self, assembled: Assembled) -> Bundle:
        token = self.sigstore.token(setting.IDENTITY)
        bundle = sign_statement(assembled.statement, trust_config=self.sigstore.trust_config(), token=token)
        return Bundle((bundle,), assembled.files)

    def sign(self) -> Step:
        """Sign the manifest against the private Sigstore, and verify it with the unmodified library."""
        library = importlib.metadata.version("sigstore")
        begin = time.perf_counter_ns()
        self.bundle = self._signed(self.assembled)
        signed = time.perf_counter_ns()
        statement = verify_bundles(
            self.bundle.signatures,
            trusted_root=self.sigstore.trusted_root(),
            policy=self.policy,
            at=datetime.now(UTC),
            in_process=True,
        )
        verified = time.perf_counter_ns()
        demand(statement.payload == self.assembled.statement, "the verified payload is what was built")
        entry = json.loads(self.bundle.signatures[0])["verificationMaterial"]["tlogEntries"][0]
        (signer,) = statement.signers
        figures = {
            "sign_ms": round((signed - begin) / 1e6, 1),
            "verify_ms": round((verified - signed) / 1e6, 1),
            "identity": signer.identity,
            "issuer": signer.issuer,
            "log_size": int(entry["inclusionProof"]["treeSize"]),
            "library": f"sigstore {library}",
        }
        lines = (
            f"signed by: {signer.identity}",
            (
                f"certificate, log entry and checkpoint verified by: sigstore {library}, unmodified, "
                f"in {figures['verify_ms']} ms"
            ),
        )
        return Step(
            "sign", f"manifest {self.sequence} signed with Sigstore (private instance on loopback)", figures, lines
        )

    def attest(self) -> Step:
        """Evidence that binds the manifest; the same verifier as for hardware; refused unless the policy allows it."""
        manifest = Manifest.parse(self.assembled.statement)
        nonce, spki = os.urandom(32), os.urandom(91)
        bound = report_data(bytes.fromhex(manifest.sha256), bytes.fromhex(self.policy.sha256), spki, nonce)
        evidence = self.platform.evidence(bound)
        report = snp.parse(evidence.evidence)
        begin = time.perf_counter_ns()
        facts: dict[str, Any] = {
            "roots": Roots.open(self.state / "trust"),
            "at": datetime.now(UTC),
            "report_data": bound,
            "measurements": manifest.measurements("snp"),
        }
        verdict = appraise_bundle(evidence, policy=self.policy.tee, **facts)
        took = time.perf_counter_ns() - begin
        demand(verdict.passed, "the evidence is accepted", [c.id for c in verdict.failed])
        strict = appraise_bundle(evidence, policy=self.policy.tee.model_copy(update={"allow_emulated": False}), **facts)
        demand([c.id for c in strict.failed] == ["tee.emulated"], "emulation is refused by default", strict.failed)
        figures = {
            "tier": verdict.tier,
            "platform": verdict.platform,
            "report_bytes": len(evidence.evidence),
            "report_version": report.version,
            "checks": len(verdict.checks),
            "passed": sum(c.outcome == "pass" for c in verdict.checks),
            "verify_ms": round(took / 1e6, 2),
        }
        lines = (
            (
                f"{len(evidence.evidence)}-byte SEV-SNP report v{report.version}: {figures['passed']} checks passed in "
                f"{figures['verify_ms']} ms, chain to this installation's own root"
            ),
            "under the default policy: refused by tee.emulated",
        )
        title = "evidence binds manifest, trust policy, epoch key and nonce"
        return Step("attest", title, figures, lines, marks=(verdict.tier.upper(),))

    # ---- arming ----------------------------------------------------------------------------------------------------

    def _start_executor(self) -> None:
        gate = f"{GROUP}/clients" if self.real else ""
        config = Config(node=NODE, cgroup=f"{GROUP}/services", gate=gate, tee="emulated")
        self.node = KernelNode(config, self.state, self.said.append) if self.real else RecordedNode()
        if self.real:
            group = Cgroup.create(GROUP)
            self.undo.callback(group.remove)
            self.clients = Cgroup.create(gate)
        self.executor = Executor(self.state, config, self.platform, self.node)
        self.executor.on_receipt = self.runs.put
        self.undo.callback(self.executor.close, stop_services=True, reason="the demo is over")

    def _refused(self, bundle: Bundle) -> tuple[RefusedError, float]:
        begin = time.perf_counter_ns()
        try:
            self.executor.arm(bundle)
        except RefusedError as refusal:
            return refusal, (time.perf_counter_ns() - begin) / 1e6
        raise DemoError("the demo failed: it was armed", want="a refusal", got="armed")

    def _refusal(self, name: str, title: str, bundle: Bundle, check: str) -> Step:
        refusal, took = self._refused(bundle)
        failed = [c.id for c in refusal.verdict.failed]
        demand(failed == [check], f"refused by {check} alone", failed)
        (found,) = refusal.verdict.failed
        figures = {"check": check, "checks": len(refusal.verdict.checks), "took_ms": round(took, 1)}
        lines = (f"refused by: {check}", f"want: {found.expected[:80]}", f"got: {found.observed[:80]}")
        return Step(name, title, figures, lines)

    def refuse_tampered(self) -> Step:
        """One flipped byte in a module."""
        self._start_executor()
        name = next(n for n in self.bundle.files if n.endswith(".wasm"))
        module = bytearray(self.bundle.files[name])
        module[len(module) // 2] ^= 1
        files = {**self.bundle.files, name: bytes(module)}
        return self._refusal(
            "refuse", "one flipped bit in a module", Bundle(self.bundle.signatures, files), "subject.digest"
        )

    def arm(self) -> Step:
        begin = time.perf_counter_ns()
        admitted = self.executor.arm(self.bundle)
        took = (time.perf_counter_ns() - begin) / 1e6
        self.programs = self.executor.programs()
        figures = {
            "checks": len(admitted.verdict.checks),
            "tier": admitted.verdict.tier,
            "runbooks": [b.name for b in admitted.manifest.runbooks],
            "programs": len(self.programs),
            "took_ms": round(took, 1),
        }
        lines = (
            f"{len(admitted.verdict.checks)} checks passed: signature, dates, order, every file and module, evidence",
            f"in the kernel: {len(self.programs)} BPF programs" if self.real else "in the kernel: nothing",
        )
        return Step("arm", f"manifest {self.sequence} is armed", figures, lines, marks=(admitted.verdict.tier.upper(),))

    def refuse_rollback(self) -> Step:
        """A genuine, signed, unexpired manifest that is older than the armed one."""
        older = self._signed(self._assemble(self.sequence - 1))
        return self._refusal("rollback", "a genuine but older manifest", older, "manifest.sequence")

    # ---- the incident ----------------------------------------------------------------------------------------------

    def serve(self) -> Step:
        self.client = Client(self.port, self.clients)
        self.undo.callback(self.client.close)
        first = self.client.until("OK")
        time.sleep(0.2)
        figures = {"port": self.port, "connect_us": round(first["took_ns"] / 1e3, 1)}
        line = f"service `{setting.SERVICE}` (own cgroup, {setting.MEMORY_BYTES >> 20} MiB) on 127.0.0.1:{self.port}"
        return Step("serve", "a client connects in a loop, and all is well", figures, (line,))

    def fail(self) -> Step:
        """Kill the service. The breaker acts in the kernel before anybody decides anything."""
        pid = self.executor.running_services()[setting.SERVICE]
        self.down_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        blocked = self.client.until("EPERM")
        (circuit,) = self.executor.circuits()
        demand(blocked["before"] == "ECONNREFUSED", "refused connects came before the circuit opened", blocked)
        demand(blocked["count"] == setting.THRESHOLD, f"{setting.THRESHOLD} refused connects, none leaked", blocked)
        figures = {
            "refused_connects": blocked["count"],
            "leaked_connects": blocked["count"] - setting.THRESHOLD,
            "failing_event_to_open_us": round((circuit.t_open_ns - circuit.t_seen_ns) / 1e3, 2),
            "blocked_connect_us": round(blocked["took_ns"] / 1e3, 1),
        }
        lines = (
            f"failing event to circuit open: {duration(circuit.t_open_ns - circuit.t_seen_ns)} in the kernel",
            f"the next connect: EPERM after {duration(blocked['took_ns'])}, {figures['leaked_connects']} leaked",
        )
        title = f"killed: {blocked['count']} connects refused, then the circuit is open"
        return Step("fail", title, figures, lines)

    def _run(self) -> tuple[Run, Receipt]:
        try:
            run = self.runs.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise DemoError("the demo failed: no receipt", want="a run", got="nothing") from None
        receipt = self.executor.journal.receipt(run.id).receipt()
        self.receipts.append(receipt)
        return run, receipt

    def decide(self) -> Step:
        run, receipt = self._run()
        self.first = run.id
        demand([a.action for a in receipt.actions if a.outcome == "applied"][:1] == ["recreate"], "recreate", receipt)
        times, fuel = receipt.timeline_ns, receipt.decision.fuel_used
        demand(times.intent is not None and times.applied is not None, "the intent is durable before the action")
        figures = {
            "runbook": receipt.runbook.name,
            "event": receipt.trigger.event,
            "event_to_handler_us": round((times.received - times.event) / 1e3, 1),
            "event_to_decision_us": round((times.decided - times.event) / 1e3, 1),
            "event_to_action_us": round(((times.applied or 0) - times.event) / 1e3, 1),
            "fuel_used": fuel,
            "fuel_limit": receipt.inputs.fuel_limit,
            "actions": [a.action for a in receipt.actions],
        }
        lines = (
            (
                f"event to decision: {duration(times.decided - times.event)} (Wasm, {fuel} of at most "
                f"{receipt.inputs.fuel_limit - 1} fuel)"
            ),
            f"event to action: {duration((times.applied or 0) - times.event)} with the intent on disk first",
        )
        calls = ", ".join(f"{a.action}({a.target})" for a in receipt.actions)
        return Step("decide", f"{receipt.runbook.name} decides {calls}; the guard permits it", figures, lines)

    def recover(self) -> Step:
        back = self.client.until("OK")
        (circuit,) = self.executor.circuits()
        demand(circuit.probes == 1 and circuit.closed == 1, "exactly one probe closed the circuit", circuit)
        (recreate,) = [a for a in self.receipts[-1].actions if a.action == "recreate"]
        detail = {k: int(str(v)) for k, v in recreate.detail.items() if k.endswith("_ns")}
        up_ns = detail["spawned_ns"] + detail["ready_ns"]
        figures = {
            "down_to_client_ok_ms": round((back["at_ns"] - self.down_ns) / 1e6, 1),
            "files_verified": recreate.detail["files_verified"],
            "probes": circuit.probes,
            "refused_by_gate": circuit.refused,
            **{k.removesuffix("_ns") + "_ms": round(v / 1e6, 2) for k, v in detail.items()},
        }
        lines = (
            (
                f"destroyed and recreated: {recreate.detail['files_verified']} files verified by digest in "
                f"{duration(detail['verified_ns'])}, accepting after {duration(up_ns)}"
            ),
            f"circuit: 1 half-open probe closed it, {circuit.refused} connects were refused meanwhile",
        )
        title = f"service down to client succeeding: {duration(back['at_ns'] - self.down_ns)}"
        return Step("recover", title, figures, lines)

    def out_of_memory(self) -> Step:
        """The second incident: the kernel's OOM killer, the second runbook, and a guard that lets only one act."""
        time.sleep(1.1)  # the guard leaves a service alone for a second after it was recreated
        pid = self.executor.running_services()[setting.SERVICE]
        os.kill(pid, signal.SIGUSR1)
        receipts = [self._run()[1] for _ in range(2)]
        by_event = {r.trigger.event: r for r in receipts}
        demand(set(by_event) == {"OomKilled", "CircuitOpened"}, "an OOM kill and an opened circuit", list(by_event))
        applied = [r for r in receipts if any(a.action == "recreate" and a.outcome == "applied" for a in r.actions)]
        refused = [a.guard.check for r in receipts for a in r.actions if a.guard.outcome == "refuse"]
        demand(len(applied) == 1, "one of two runbooks acted", [r.actions for r in receipts])
        times = applied[0].timeline_ns
        self.client.until("OK")
        figures = {
            "event_to_decision_us": round((times.decided - times.event) / 1e3, 1),
            "event_to_action_us": round(((times.applied or 0) - times.event) / 1e3, 1),
            "acted": applied[0].runbook.name,
            "refused_by": refused,
        }
        lines = (
            f"{applied[0].runbook.name}: recreated it, {duration((times.applied or 0) - times.event)} after the event",
            f"the other runbook wanted the same: refused by {', '.join(refused)}",
        )
        return Step("oom", "second incident: killed by the kernel for lack of memory", figures, lines)

    def replayed(self) -> Step:
        """Without a kernel: the recorded event of an opened circuit, and everything after it for real."""
        assert isinstance(self.node, RecordedNode)
        assert self.node.current_sensors is not None
        where = Destination(Address.parse("127.0.0.1"), self.port)
        event = CircuitEvent(Kind.CIRCUIT_OPENED, time.monotonic_ns(), where, setting.THRESHOLD, 111, 0, 0)
        self.node.current_sensors.happen(event)
        step = self.decide()
        demand(("probe", str(where)) in self.node.current_sensors.commands, "the circuit may probe")
        return step

    # ---- the proof -------------------------------------------------------------------------------------------------

    def record(self) -> Step:
        head = self.executor.checkpoint_now()
        kinds = ("epoch-open", "intent", "outcome", "receipt", "refusal")
        counts = {kind: self.executor.journal.count(kind) for kind in kinds}
        figures = {"tree_size": head.size, "entries": counts, "receipt_bytes": len(self._raw_receipt())}
        lines = (
            f"entries: {', '.join(f'{n} {kind}' for kind, n in counts.items() if n)}",
            f"checkpoint: {head.size} entries, root {head.root.hex()[:16]}…",
        )
        return Step("record", "every step is signed and durable in the log", figures, lines)

    def _raw_receipt(self) -> bytes:
        return self.executor.journal.receipt(self.first).raw

    def verify(self) -> Step:
        """One receipt offline: from its signature down to the root key, every check named."""
        roots = Roots.open(self.state / "trust")
        folder = self.state / "packs" / self.first
        pack.export(self.executor.journal, self.first, roots=roots).write(folder)
        self.pack = Pack.read(folder)
        self.trust = Trust(self.policy.raw, self.sigstore.trusted_root(), roots)
        begin = time.perf_counter_ns()
        verdict = verify_pack(self.pack, trust=self.trust, in_process=True)
        took = (time.perf_counter_ns() - begin) / 1e6
        demand(verdict.passed, "the receipt verifies", [(c.id, c.observed) for c in verdict.failed])
        named = [c.id for c in verdict.checks if c.outcome == "pass"]
        figures = {"checks": len(named), "verify_ms": round(took, 1), "tier": verdict.tier, "named": named}
        own = [n for n in named if n.split(".")[0] in ("receipt", "run", "epoch", "log", "pack")]
        lines = (f"checks: {', '.join(own)}", f"and {len(named) - len(own)} of the manifest and the evidence, offline")
        title = f"{len(named)} checks from receipt to root key, offline, in {took:.0f} ms"
        return Step("verify", title, figures, lines, marks=(verdict.tier.upper(),))

    def replay(self) -> Step:
        """Decide every recorded run again with the second implementation."""
        runs = self.executor.journal.runs()
        results = replay_all(runs, self.executor.journal.blob)
        same = sum(r.identical for r in results)
        demand(same == len(runs) > 0, "every decision is identical", [r.as_dict() for r in results if not r.identical])
        figures = {"runs": len(runs), "identical": same}
        return Step("replay", f"{same} of {len(runs)} decisions identical in a second implementation", figures)

    def tamper(self) -> Step:
        """Flip bytes of the receipt, one at a time; each must be found."""
        index, raw = next((i, r) for i, r in self.pack.entries.items() if r == self._raw_receipt())
        places = range(0, len(raw), FLIP_EVERY)
        found = 0
        for place in places:
            changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
            entries = {**self.pack.entries, index: changed}
            verdict = verify_pack(dataclasses.replace(self.pack, entries=entries), trust=self.trust, in_process=True)
            found += not verdict.passed
        demand(found == len(places), "every flipped byte is found", f"{found} of {len(places)}")
        figures = {"flipped": len(places), "found": found, "receipt_bytes": len(raw)}
        return Step("tamper", f"{found} of {len(places)} flipped bytes of the receipt found", figures)

    # ---- agents and auditors ---------------------------------------------------------------------------------------

    def agent(self) -> Step:
        """An agent reads, proposes, and can do nothing else."""
        server = serve(ExecutorBackend(self.executor), self.state / "run")
        with contextlib.ExitStack() as undo:
            undo.callback(server.stop)
            client = undo.enter_context(ApiClient(server.socket(Role.AGENT)))
            runs = client.call("Runs/ListRuns", page_size=10).runs
            denied = [m for m in CONTROL if self._denied(client, m)]
            demand(len(denied) == len(CONTROL), "every mutating method refuses the agent", denied)
            source = (Path(str(resources.files("pointcall_executor.demo"))) / "proposed_runbook.py").read_text()
            proposal = client.call(
                "Proposals/SubmitProposal",
                name="refusing-dependency-gentle",
                rationale="Recreate twice an hour at most, then call a person: a third recreation rarely helps.",
                source=source,
                author="agent:demo",
            )
        demand(proposal.state == "open", "the proposal is sound", proposal)
        patch_path = self.state / "proposals" / f"{proposal.id}.patch"
        stored = Inbox(self.state / "proposals").find(proposal.id)
        assert stored is not None, "what was submitted is stored"
        patch_path.write_text(patch.render(stored, datetime.now(UTC)))
        figures = {
            "runs_read": len(runs),
            "denied": denied,
            "proposal": proposal.id,
            "capabilities": sorted({a for c in proposal.capabilities for a in c.actions}),
            "differences": len(proposal.differences),
            "patch": str(patch_path),
        }
        lines = (
            f"read: {len(runs)} runs; denied: {', '.join(m.partition('/')[2] for m in denied)}",
            (
                f"proposed: {stored.name}, compiled, verified and simulated against recorded events "
                f"({len(proposal.differences)} would decide otherwise)"
            ),
            f"as a merge request: {patch_path}",
        )
        return Step("agent", "an agent can read and propose; it cannot act", figures, lines)

    def _denied(self, client: ApiClient, method: str) -> bool:
        try:
            client.call(method)
        except ApiError as error:
            return error.status == "PERMISSION_DENIED"
        return False

    def report(self) -> Step:
        """The page for auditors and the same as JSON, written by the very command that a person would call."""
        self.executor.checkpoint_now()
        command = [sys.executable, "-m", "pointcall_executor.cli", "report", "--json", "--state-dir", str(self.state)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        demand(done.returncode == 0, "the report is written", done.stdout + done.stderr)
        said = json.loads(done.stdout)
        figures = {k: said[k] for k in ("html", "json", "entries", "complete", "tier", "runs", "refusals")}
        lines = (
            f"complete: {said['entries']} entries, proved by the tree size of the signed checkpoint",
            f"page: {said['html']}",
        )
        title = f"a compliance report: {said['runs']} runs, {said['refusals']} refusals"
        return Step("report", title, figures, lines, marks=(str(said["tier"]).upper(),))

    def clean(self) -> Step:
        """What is left of us in the kernel: nothing."""
        left = self._left()
        deadline = time.monotonic() + 2  # programs go a moment after their last descriptor
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = self._left()
        demand(not left, "nothing of ours is left", left)
        return Step("clean", "no program, link or cgroup of ours is left", {"left": 0}, marks=self.mark)

    def next_lines(self) -> tuple[str, ...]:
        """What a person may want to do next."""
        state = f"--state-dir {self.state}"
        return (
            f"read the report: {self.state / 'report' / 'report.html'}",
            f"list the log: pointcall log list {state}",
            f"verify the run: pointcall verify {self.first} --allow-emulated {state}",
            f"replay everything: pointcall replay --all {state}",
        )

    def _left(self) -> list[str]:
        groups = [GROUP] if self.real and (find_root() / GROUP).exists() else []
        return groups + [f"program {name}" for name, number, _tag in self.programs if prog_exists(number)]
