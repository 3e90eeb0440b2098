"""A whole installation in a folder: private Sigstore, emulated platform, trust, manifests and an executor.

For scenario tests and benchmarks. It uses the doors of the rooms and nothing behind them; `node` says whether services
and kernel are real.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pointcall_executor.config import Config
from pointcall_executor.daemon import Bundle, Executor
from pointcall_executor.node import Node
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_keys.assemble import Assembled, assemble
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_keys.recovery_manifest import RecoveryManifest
from pointcall_keys.signer import sign_statement

IDENTITY = "https://git.example/acme/runbooks/.ci/sign.yml@refs/heads/main"


def now() -> datetime:
    return datetime.now(UTC)


class Lab:
    """One installation. `tee` are the settings of the trust policy's `tee` part."""

    def __init__(self, folder: Path, sigstore: PrivateSigstore, tee_folder: Path, **policy: Any) -> None:
        self.state, self.sigstore = folder, sigstore
        self.platform = EmulatedPlatform.open(tee_folder, clock=now)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tee").exists():
            (folder / "tee").symlink_to(tee_folder)  # where `pointcall run` looks for the platform's keys
        self.trust = folder / "trust"
        self.trust.mkdir(parents=True, exist_ok=True)
        self.platform.register(self.trust)
        self.sources = folder / "sources"
        self.sources.mkdir(exist_ok=True)
        self.set_policy(**policy)

    def set_policy(self, **over: Any) -> None:
        """Write trust policy and trusted root; `over` replaces top-level keys."""
        root = self.sigstore.trusted_root()
        (self.trust / "trusted_root.json").write_bytes(root)
        policy: dict[str, Any] = {
            "format": "pointcall-trust-policy/v1",
            "trusted_root_sha256": hashlib.sha256(root).hexdigest(),
            "signers": [{"issuer": self.sigstore.issuer, "identity": IDENTITY}],
            "tee": {"allow_emulated": True},
        }
        (self.trust / "policy.json").write_text(json.dumps(policy | over))

    def runbook(self, name: str, source: str) -> None:
        """A runbook's source, for `source: <name>` in a spec."""
        (self.sources / name).mkdir(exist_ok=True)
        (self.sources / name / "runbook.py").write_text(source)

    def declare(self, name: str, declared: Mapping[str, Any], kind: str = "process") -> str:
        """A service declaration; the path to name in a spec."""
        body = {"format": "pointcall-service/v1", "name": name, "kind": kind, kind: dict(declared)}
        (self.sources / f"{name}.json").write_text(json.dumps(body))
        return f"{name}.json"

    def assemble(
        self, spec: Mapping[str, Any], sequence: int = 1, *, days: float = 1, blobs: Path | None = None
    ) -> Assembled:
        """A manifest over `spec`; this installation's measurement is its reference value unless the spec has others."""
        reference = {"referenceValues": {"snp": [self.platform.measurement]}}
        body = {
            "apiVersion": "pointcall.dev/v1",
            "kind": "RecoveryManifest",
            "metadata": {"name": "lab"},
            "spec": reference | dict(spec),
        }
        start = now().replace(microsecond=0) - timedelta(days=1)
        return assemble(
            RecoveryManifest.parse(body),
            self.sources,
            blobs or self.blobs(),
            sequence=sequence,
            not_before=start,
            expires=start + timedelta(days=1 + days),
        )

    def blobs(self) -> Path:
        """Stand-ins for BPF blobs: a recorded node never loads them."""
        folder = self.state / "blobs"
        folder.mkdir(exist_ok=True)
        for name in ("breaker", "lifecycle", "connections", "isolate"):
            (folder / f"{name}.blob").write_bytes(b"recorded " + name.encode())
        return folder

    def sign(self, assembled: Assembled, identity: str = IDENTITY) -> Bundle:
        token = self.sigstore.token(identity)
        bundle = sign_statement(assembled.statement, trust_config=self.sigstore.trust_config(), token=token)
        return Bundle((bundle,), assembled.files)

    @contextlib.contextmanager
    def executor(self, node: Node | None = None, **settings: Any) -> Iterator[Executor]:
        """A running executor; closed with its services at the end."""
        config = Config(**({"node": "lab", "tee": "emulated"} | settings))
        executor = Executor(self.state, config, self.platform, node or RecordedNode())
        try:
            yield executor
        finally:
            executor.close(stop_services=True)
