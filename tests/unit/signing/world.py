"""One good manifest, signed by a private Sigstore, and a trust policy that accepts it. Tests change one thing."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pointcall_attest import canonical
from pointcall_attest.admission import Candidate, check_manifest
from pointcall_attest.manifest import PREDICATE_TYPE, STATEMENT_TYPE
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.verdict import Check, Verdict
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_keys.signer import sign_statement
from pointcall_runbook import vocabulary
from tests.unit.signing.rb1 import module

ALICE = "https://ci.example/acme/runbooks/sign.yml@refs/heads/main"
BOB = "https://ci.example/acme/runbooks/approve.yml@refs/heads/main"
# When verifiers in these tests look: after every signature that the run makes, however long it takes to get there.
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)


def z(at: dt.datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def declaration(name: str = "db", **process: Any) -> bytes:
    body = {"argv": ["/usr/bin/db"], "files": [{"path": "/usr/bin/db", "sha256": "ab" * 32}]} | process
    return json.dumps({"format": "pointcall-service/v1", "name": name, "kind": "process", "process": body}).encode()


def files() -> dict[str, bytes]:
    return {
        "modules/restart.wasm": module(),
        "blobs/lifecycle.blob": b"blob",
        "services/db.json": declaration(),
    }


def runbook(**over: Any) -> dict[str, Any]:
    grants = {"actions": ["recreate"], "services": ["db"], "channels": [], "networks": []}
    row = {"name": "restart", "version": 1, "module": "modules/restart.wasm", "events": ["ProcessExited"]}
    return row | {"grants": grants, "parameters": {}, "mode": "enforce"} | over


def service(**over: Any) -> dict[str, Any]:
    digest = sha256(declaration())
    row = {"name": "db", "kind": "process", "declaration": "services/db.json", "digest": digest}
    return row | {"listen": [{"address": "127.0.0.1", "port": 5432, "protocol": "tcp"}]} | over


def predicate(**over: Any) -> dict[str, Any]:
    """The good predicate, with some of its fields replaced."""
    return {
        "format": "pointcall-manifest/v1",
        "name": "edge",
        "sequence": 7,
        "previous": None,
        "not_before": z(NOW - DAY),
        "expires": z(NOW + 90 * DAY),
        "vocabulary": vocabulary.digest(),
        "runbooks": [runbook()],
        "sensors": [{"name": "lifecycle", "blob": "blobs/lifecycle.blob", "params": {}}],
        "services": [service()],
        "channels": [{"name": "oncall", "kind": "log", "address": ""}],
        "guard": {"max_actions_per_minute": 10},
        "reference_values": {"snp": ["cd" * 48], "tdx": []},
        "min_executor": "0.1.0",
    } | over


def statement(parts: Mapping[str, bytes] | None = None, **over: Any) -> bytes:
    subjects = [
        {"name": n, "digest": {"sha256": sha256(c)}} for n, c in sorted((files() if parts is None else parts).items())
    ]
    body = {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE}
    return canonical.dumps(body | {"predicate": predicate(**over)})


EVIDENCE = tuple(Check(name, "pass") for name in ("snp.signature", "tee.report_data", "tee.measurement"))
TEE = Verdict(EVIDENCE, tier="hardware", platform="snp")


@dataclasses.dataclass(frozen=True)
class World:
    """The instance that signs, and short words for what every test does."""

    sigstore: PrivateSigstore

    def sign(self, payload: bytes, who: str = ALICE, rekor: int = 2, **claims: Any) -> bytes:
        config = self.sigstore.trust_config(2 if rekor == 2 else 1)
        return sign_statement(payload, trust_config=config, token=self.sigstore.token(who, **claims))

    def policy(self, **over: Any) -> TrustPolicy:
        body = {
            "format": "pointcall-trust-policy/v1",
            "trusted_root_sha256": sha256(self.sigstore.trusted_root()),
            "signers": [{"issuer": self.sigstore.issuer, "identity": ALICE}],
        }
        return TrustPolicy.parse(json.dumps(body | over).encode())

    def signer(self, identity: str, **over: Any) -> dict[str, Any]:
        return {"issuer": self.sigstore.issuer, "identity": identity} | over

    def check(self, bundles: Sequence[bytes], parts: Mapping[str, bytes] | None = None, **over: Any) -> Candidate:
        given: dict[str, Any] = {
            "policy": self.policy(),
            "trusted_root": self.sigstore.trusted_root(),
            "at": NOW,
            "highest_sequence": 5,
            "executor_version": "0.1.0",
            "in_process": True,
        }
        return check_manifest(bundles, files() if parts is None else parts, **(given | over))
