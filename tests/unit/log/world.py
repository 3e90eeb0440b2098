"""A small world for the tests of this room: an emulated node that armed one runbook and recovered one service.

Everything is real (compiled module, manifest signed with a pinned key, emulated evidence, journal); only the daemon is
missing. Keys are made when the tests run.
"""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest import entry, run_id
from pointcall_attest.binding import report_data
from pointcall_attest.dsse import PAYLOAD_TYPE, pae
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.manifest import (
    Grants,
    Manifest,
    Predicate,
    ReferenceValues,
    Runbook,
    Sensor,
    build_statement,
)
from pointcall_attest.pack_check import Trust
from pointcall_attest.receipt import (
    Acted,
    AttestationPart,
    CallPart,
    DecisionPart,
    Engine,
    GuardPart,
    Inputs,
    Receipt,
    RunbookPart,
    RunPart,
    Signer,
    Timeline,
    TimePart,
    Trigger,
)
from pointcall_attest.sealing import Opening
from pointcall_attest.trust import Roots
from pointcall_executor.journal import Journal
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_keys.node import EpochKeys
from pointcall_runbook import compile_source
from pointcall_runbook.interpreter import Interpreter
from pointcall_runbook.vocabulary import Address, CircuitOpened, digest, service, slots

NOW = datetime.now(UTC)
ORIGIN = "pointcall.dev/log/test"
HEX = "ab" * 32
BLOB = b"a loader blob"
ENGINE = Engine(name="interpreter", version="1", config=HEX)
SOURCE = """
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook, seconds


@runbook
def on_circuit_opened(e: CircuitOpened) -> Decision:
    if e.restarts < 3:
        return [Recreate(service=e.service, grace=seconds(2))]
    return []
"""


@functools.cache
def module() -> bytes:
    """The runbook of this world."""
    return compile_source(SOURCE).wasm


@functools.cache
def signing_key() -> ec.EllipticCurvePrivateKey:
    """Who signs the manifest."""
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def platform() -> EmulatedPlatform:
    """One emulated machine for the whole session: its RSA keys take half a second."""
    return EmulatedPlatform.open(platform_folder(), clock=lambda: NOW)


@functools.cache
def platform_folder() -> Path:
    """Where the keys of that machine lie; `tee/` of a state folder is a copy of it."""
    folder = Path(tempfile.mkdtemp(prefix="pointcall-test-tee-"))
    atexit.register(shutil.rmtree, folder)
    return folder


def provision(state: Path) -> None:
    """Trust folder and platform keys, as a node has them."""
    (state / "trust" / "emulated").mkdir(parents=True)
    (state / "trust" / "policy.json").write_bytes(policy_bytes())
    (state / "trust" / "trusted_root.json").write_bytes(b"{}")
    (state / "trust" / "emulated" / "root.der").write_bytes(platform().root_der)
    shutil.copytree(platform_folder(), state / "tee")


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def policy_bytes() -> bytes:
    """A trust policy that accepts the signing key and emulated evidence."""
    key = {"name": "tests", "public_key": base64.b64encode(spki(signing_key())).decode()}
    tee = {"allow_emulated": True}
    return json.dumps({"format": "pointcall-trust-policy/v1", "keys": [key], "tee": tee}).encode()


def signed(payload: bytes, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """The payload in a bundle of a long-lived key."""
    key = key or signing_key()
    sig = base64.b64encode(key.sign(pae(payload), ec.ECDSA(hashes.SHA256()))).decode()
    hint = base64.b64encode(hashlib.sha256(spki(key)).digest()).decode()
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": hint}},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": sig}],
            },
        }
    ).encode()


def manifest(**over: object) -> Manifest:
    """The manifest of this world; `over` replaces parts of its predicate."""
    files = {"web.wasm": module(), "breaker.blob": BLOB}
    parts: dict[str, object] = {
        "format": "pointcall-manifest/v1",
        "name": "test",
        "sequence": 1,
        "previous": None,
        "not_before": NOW - timedelta(days=1),
        "expires": NOW + timedelta(days=1),
        "vocabulary": digest(),
        "runbooks": (
            Runbook(
                name="web",
                version=1,
                module="web.wasm",
                events=("CircuitOpened",),
                grants=Grants(actions=("recreate",), services=()),
            ),
        ),
        "sensors": (Sensor(name="breaker", blob="breaker.blob"),),
        "reference_values": ReferenceValues(snp=(platform().measurement,)),
    }
    return Manifest.parse(build_statement(files, Predicate.model_validate(parts | over)))


def trust() -> Trust:
    return Trust(policy_bytes(), b"{}", Roots.of([platform().root_der]))


@dataclass
class Node:
    """A journal in a folder, with an open epoch."""

    journal: Journal
    keys: EpochKeys
    evidence: EvidenceBundle
    manifest: Manifest
    clock_ns: int = 1_000

    @classmethod
    def boot(cls, folder: Path, *, previous: EpochKeys | None = None, over: dict[str, object] | None = None) -> Node:
        """Open the journal, keep all content, open an epoch."""
        journal = Journal.open(folder / "journal.db", origin=ORIGIN)
        return cls.epoch(journal, previous=previous, over=over)

    @classmethod
    def epoch(
        cls, journal: Journal, *, previous: EpochKeys | None = None, over: dict[str, object] | None = None
    ) -> Node:
        """A new epoch in a journal."""
        keys, nonce, armed = EpochKeys.generate(), b"n" * 32, manifest()
        policy = policy_bytes()
        bound = report_data(bytes.fromhex(armed.sha256), hashlib.sha256(policy).digest(), keys.spki, nonce)
        evidence = platform().evidence(bound)
        bundles = [journal.put_blob(signed(armed.payload))]
        for content in (evidence.encode(), armed.payload, policy, b"{}", module(), BLOB):
            journal.put_blob(content)
        body = {
            "node": "test",
            "platform": "snp",
            "tier": "emulated",
            "evidence": evidence.sha256,
            "nonce": nonce.hex(),
            "public_key": keys.public_key,
            "checkpoint_key": str(keys.verifier(ORIGIN)),
            "manifest": armed.sha256,
            "bundles": tuple(bundles),
            "policy": hashlib.sha256(policy).hexdigest(),
            "trusted_root": hashlib.sha256(b"{}").hexdigest(),
            "sequence": 1,
            "previous_epoch": previous.id if previous else None,
            "executor": "0.1.0",
            "engine": {},
            "verdict": {},
        }
        node = cls(journal, keys, evidence, armed)
        node.append(entry.EpochOpen.model_validate(body | (over or {})))
        return node

    def append(self, body: entry.Body, run: str | None = None) -> int:
        self.clock_ns += 1
        leaf, opening = self.leaf(body, run)
        return self.journal.append(leaf, opening)

    def leaf(self, body: entry.Body, run: str | None = None) -> tuple[bytes, Opening | None]:
        """The leaf of an entry and its opening, sealed as the recorder does it."""
        at, salt = NOW, os.urandom(32)
        payload, opening = entry.sealed(body, at=at, ktime_ns=self.clock_ns, epoch=self.keys.id, run=run, salt=salt)
        return self.keys.sign(payload), opening

    def run(self, number: int = 0, change: Callable[[Receipt], Receipt] = lambda r: r) -> str:
        """One whole run: intent, outcome, receipt. `change` may spoil the receipt before it is signed."""
        run = run_id.run_id(int(NOW.timestamp() * 1000), number.to_bytes(10))
        self.append(entry.Intent(action="recreate", target="service/web", args={}, grant="recreate:web"), run)
        self.append(
            entry.OutcomeBody(
                action="recreate", target="service/web", outcome="applied", detail={}, postcondition="ok", undo=None
            ),
            run,
        )
        made = change(receipt(run, number, self, intent=self.journal.size - 2))
        payload, opening = made.sealed(os.urandom(32))
        self.journal.append(self.keys.sign(payload), opening)
        return run

    def checkpoint(self) -> None:
        self.journal.checkpoint(self.keys.sign_checkpoint, 0.0, force=True)


def event(number: int = 0) -> CircuitOpened:
    return CircuitOpened(
        at=1_000 + number,
        address=Address.parse("127.0.0.1"),
        port=8080,
        failures=5,
        reopened=False,
        opens=1,
        service=service("web"),
        restarts=number % 5,
    )


def receipt(run: str, number: int, node: Node, *, intent: int | None) -> Receipt:
    """The receipt of a run of this world."""
    return _receipt(run, number, node.keys.id, node.manifest.sha256, node.evidence.sha256, intent)


def unsigned_receipt(epoch: str) -> Receipt:
    """A receipt of no node, for parsers."""
    return _receipt(run_id.run_id(1, bytes(10)), 0, epoch, HEX, HEX, None)


def _receipt(run: str, number: int, epoch: str, manifest_sha256: str, evidence: str, intent: int | None) -> Receipt:
    seen = event(number)
    values = slots(seen)
    decided = Interpreter(module()).run("CircuitOpened", values)
    calls = tuple(CallPart(action=c.action, args=c.args) for c in decided.calls)
    acted = [
        Acted(
            index=i,
            action=c.action,
            target="service/web",
            args={"grace": "2000000000"},
            guard=GuardPart(outcome="permit", check="", why=""),
            intent=intent,
            outcome="applied",
            detail={"pid": 12},
            undo=None,
            started_ns=5,
            ended_ns=9,
        )
        for i, c in enumerate(calls)
    ]
    return Receipt(
        run=RunPart(id=run, node="test", epoch=epoch, number=number, mode="enforce"),
        runbook=RunbookPart(
            name="web",
            version="1",
            module=hashlib.sha256(module()).hexdigest(),
            manifest=manifest_sha256,
            signers=(Signer(issuer="key", identity=hashlib.sha256(spki(signing_key())).hexdigest()),),
        ),
        trigger=Trigger(event="CircuitOpened", sensor="breaker", blob=hashlib.sha256(BLOB).hexdigest(), at_ns=seen.at),
        inputs=Inputs(
            abi="rb1",
            handler="decide_CircuitOpened",
            values=values,
            fields={"port": "8080"},
            engine=ENGINE,
            fuel_limit=Interpreter(module()).info.handlers["CircuitOpened"].fuel_bound + 1,
        ),
        decision=DecisionPart(calls=calls, fuel_used=decided.fuel, trap=None),
        actions=tuple(acted),
        attestation=AttestationPart(tier="emulated", platform="snp", evidence=evidence),
        timeline_ns=Timeline(event=1, received=2, decided=3, intent=4, applied=5, confirmed=9),
        time=TimePart(started=NOW, boot_id="boot"),
    )
