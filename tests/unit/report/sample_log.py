"""A log for tests: real signatures, real receipts, a real checkpoint, made in memory from a story told in calls.

Times start at START and move by hand; keys are new in every process. What it writes is what the executor writes, in the
same types, so a change of a format fails here first.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pointcall_attest import dsse, entry, receipt
from pointcall_attest.entry import Body, Entry, Kind, parse_entry
from pointcall_attest.log import checkpoint as note
from pointcall_attest.log.proof import Proof
from pointcall_attest.log.tree import Tree
from pointcall_attest.run_id import run_id
from pointcall_attest.verdict import Check, Tier, Verdict
from pointcall_runbook import vocabulary as v

START = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
BOOT_NS = 5_000_000_000_000
ORIGIN = "pointcall.dev/log/node-7"
CHECKED = Verdict(
    (
        Check.of("snp.signature", True, expected="a VCEK signature", observed="valid", spec="AMD 56860, 7.1"),
        Check.of("snp.measurement", True, expected="9f2a", observed="9f2a", spec="AMD 56860, table 23"),
        Check.skipped("snp.crl", "no CRL in the bundle"),
    ),
    tier="emulated",
    platform="snp",
)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def circuit_opened(port: int = 5432) -> v.CircuitOpened:
    return v.CircuitOpened(
        at=BOOT_NS,
        address=v.Address.parse("127.0.0.1"),
        port=port,
        failures=3,
        reopened=False,
        opens=1,
        service=v.service("db"),
        restarts=0,
    )


class SampleLog:
    """Entries of one node, in order. Also the Reader that the API and the report need."""

    def __init__(
        self,
        *,
        tier: Tier = "emulated",
        verdict: Verdict = CHECKED,
        open_epoch: bool = True,
        start: datetime = START,
        manifest: str = digest("manifest"),
        bundles: tuple[str, ...] = (digest("bundle"),),
        module: str = digest("module"),
    ) -> None:
        self._start, self._manifest, self._bundles, self._module = start, manifest, bundles, module
        self.log: list[Entry] = []
        self.signed: list[note.Checkpoint] = []
        self._tree = Tree()
        self._tier: Tier = tier
        self.verdict = verdict
        self._clock_s = 0.0
        self._number = 0
        self.key, self.note_key = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        if open_epoch:
            self.open_epoch()

    @property
    def spki(self) -> bytes:
        return dsse.spki(self.key.public_key())

    @property
    def epoch(self) -> str:
        return dsse.keyid_of(self.spki)

    @property
    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._clock_s)

    @property
    def ktime_ns(self) -> int:
        return BOOT_NS + int(self._clock_s * 1e9)

    @property
    def size(self) -> int:
        return len(self.log)

    def entries(
        self, kind: Kind | None = None, run: str | None = None, start: int = 0, limit: int = 1000
    ) -> list[Entry]:
        found = [e for e in self.log[start:] if kind in (None, e.kind) and run in (None, e.run)]
        return found[:limit]

    def sleep(self, seconds: float) -> None:
        self._clock_s += seconds

    def append(self, body: Body, run: str | None = None) -> Entry:
        return self._leaf(entry.payload(body, at=self.now, ktime_ns=self.ktime_ns, epoch=self.epoch, run=run))

    def _leaf(self, payload: bytes) -> Entry:
        made = parse_entry(len(self.log), dsse.sign(payload, self.key, keyid=self.epoch))
        self.log.append(made)
        self._tree.add(made.leaf_hash)
        self.sleep(0.001)
        return made

    def checkpoint(self) -> note.Checkpoint:
        text = note.sign(ORIGIN, self._tree.size, self._tree.root(), self.note_key)
        self.signed.append(note.Checkpoint.parse(text))
        return self.signed[-1]

    def head(self) -> note.Checkpoint | None:
        return self.signed[-1] if self.signed else None

    def proof(self, index: int, head: note.Checkpoint) -> Proof:
        return Proof(index, tuple(self._tree.inclusion(index, head.size)), head)

    def vkey(self) -> str:
        return str(note.Verifier(ORIGIN, note.LOG, self.note_key.public_key().public_bytes_raw()))

    def open_epoch(self, previous: str | None = None) -> Entry:
        return self.append(
            entry.EpochOpen(
                node="node-7",
                platform="snp",
                tier=self._tier,
                evidence=digest("evidence"),
                nonce=digest("nonce"),
                public_key=base64.b64encode(self.spki).decode(),
                checkpoint_key=self.vkey(),
                manifest=self._manifest,
                bundles=self._bundles,
                policy=digest("policy"),
                trusted_root=digest("root"),
                sequence=3,
                previous_epoch=previous,
                executor="0.1.0",
                engine={"name": "wasmtime", "version": "50.0.1"},
                verdict=self.verdict.as_dict(),
            )
        )

    def next_epoch(self) -> Entry:
        """Close this epoch in favour of a new key, and open the new one."""
        old, key = self.epoch, ec.generate_private_key(ec.SECP256R1())
        following = dsse.keyid_of(dsse.spki(key.public_key()))
        self.append(entry.EpochClose(reason="15 minutes", next=following))
        self.key = key
        return self.open_epoch(previous=old)

    def refuse(self, check: str = "manifest.expired") -> Entry:
        return self.append(
            entry.Refusal(
                check=check,
                what="manifest edge-recovery",
                want="not after 2026-11-22",
                got="2026-11-23",
                hint="sign a newer manifest",
            )
        )

    def recover(
        self,
        *,
        mode: Any = "enforce",
        outcome: Any = "applied",
        refused_by: str = "",
        detail: Mapping[str, Any] | None = None,
        event: v.Event | None = None,
        actions: Sequence[v.Action] | None = None,
        intent: bool = True,
        confirmed: bool = True,
        fuel: int = 41,
    ) -> Entry:
        """One run: an event, a decision, intents, outcomes and the receipt."""
        event = event or circuit_opened()
        decided = actions if actions is not None else (v.Recreate(service=v.service("db"), grace=0),)
        name = run_id(int(self.now.timestamp() * 1000), self._number.to_bytes(10))
        began_ns, started = self.ktime_ns, self.now
        acted = [self._act(name, n, a, mode, outcome, refused_by, detail or {}, intent) for n, a in enumerate(decided)]
        did = any(a.outcome in ("applied", "unconfirmed") for a in acted)
        made = receipt.Receipt(
            run=receipt.RunPart(id=name, node="node-7", epoch=self.epoch, number=self._number, mode=mode),
            runbook=receipt.RunbookPart(
                name="refusing-dependency",
                version="1.0.0",
                module=self._module,
                manifest=self._manifest,
                signers=(receipt.Signer(issuer="https://ci.example", identity="release@ci.example"),),
            ),
            trigger=receipt.Trigger(event=type(event).__name__, sensor="breaker", blob=digest("blob"), at_ns=began_ns),
            inputs=receipt.Inputs(
                abi="rb1",
                handler=f"decide_{type(event).__name__}",
                values=v.slots(event),
                fields={f.name: str(getattr(event, f.name)) for f in v.fields(type(event))},
                engine=receipt.Engine(name="wasmtime", version="50.0.1", config=digest("engine")),
                fuel_limit=60,
            ),
            decision=receipt.DecisionPart(
                calls=tuple(receipt.CallPart(action=c.action, args=c.args) for c in map(v.Call.of, decided)),
                fuel_used=fuel,
                trap=None,
            ),
            actions=tuple(acted),
            attestation=receipt.AttestationPart(tier=self._tier, platform="snp", evidence=digest("evidence")),
            timeline_ns=receipt.Timeline(
                event=began_ns,
                received=began_ns + 41_000,
                decided=began_ns + 48_000,
                intent=began_ns + 310_000 if any(a.intent is not None for a in acted) else None,
                applied=began_ns + 3_300_000 if did else None,
                confirmed=began_ns + 3_900_000 if did and confirmed else None,
            ),
            time=receipt.TimePart(started=started, boot_id="0f7d9c1e-5a52-4c0e-9a3f-1d2f5a7c9b10"),
        )
        self._number += 1
        return self._leaf(made.payload())

    def _act(
        self,
        id: str,
        n: int,
        action: v.Action,
        mode: str,
        outcome: Any,
        refused_by: str,
        detail: Mapping[str, Any],
        intent: bool,
    ) -> receipt.Acted:
        name, target, at = v.capability(type(action)), "service/db", self.ktime_ns
        refused, monitored = bool(refused_by), mode == "monitor"
        outcome = "refused" if refused else "monitored" if monitored else outcome
        index = None
        if not refused and not monitored:
            if intent:
                index = self.append(
                    entry.Intent(action=name, target=target, args={"grace": "0"}, grant="services: db"), id
                ).index
            self.append(
                entry.OutcomeBody(
                    action=name,
                    target=target,
                    outcome=outcome,
                    detail=dict(detail),
                    postcondition="port 5432 accepts",
                    undo=None,
                ),
                id,
            )
        return receipt.Acted(
            index=n,
            action=name,
            target=target,
            args={"grace": "0"},
            guard=receipt.GuardPart(
                outcome="refuse" if refused else "permit", check=refused_by, why="2 of 2 tokens used" * refused
            ),
            intent=index,
            outcome=outcome,
            detail=dict(detail),
            undo=None,
            started_ns=None if refused else at,
            ended_ns=None if refused else at + 3_000_000,
        )
