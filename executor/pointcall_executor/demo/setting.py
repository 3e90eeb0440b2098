"""What the demo needs before its story begins: a port, a declared service, a manifest, a trust folder.

Everything lies in the state folder. Nothing is armed or signed here.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pointcall_keys.recovery_manifest import RecoveryManifest

SERVICE: Final = "api"
IDENTITY: Final = "https://git.example/acme/runbooks/.ci/sign.yml@refs/heads/main"
RUNBOOKS: Final = ("refusing-dependency", "oom-recreate")
SENSORS: Final = ("breaker", "lifecycle")
PORTS: Final = range(18000, 28000)  # below the ephemeral range: a probe there could connect to itself
MEMORY_BYTES: Final = 64 << 20
THRESHOLD: Final = 5


def library() -> Path:
    """The runbooks that we ship: beside the package in a wheel, in the room above it in a checkout."""
    inside = Path(str(resources.files("pointcall_runbook"))) / "library"
    return inside if inside.is_dir() else inside.parent.parent / "library"


def free_port(chance: random.Random) -> int:
    """A port on loopback that nobody listens on now."""
    while True:
        port = chance.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def declaration(port: int) -> dict[str, Any]:
    """The declared state of the demo's service: this very interpreter and one script, both by digest."""
    program = Path(sys.executable).resolve()
    script = Path(str(resources.files("pointcall_executor.demo"))) / "service.py"
    return {
        "format": "pointcall-service/v1",
        "name": SERVICE,
        "kind": "process",
        "process": {
            "argv": [str(program), "-I", "-S", str(script), str(port)],
            "files": [{"path": str(p), "sha256": _sha256(p)} for p in (program, script)],
            "limits": {"memory_bytes": MEMORY_BYTES},
            "stop": {"signal": "TERM", "grace_ms": 200},
            "ready": {"tcp": f"127.0.0.1:{port}", "timeout_ms": 5000},
        },
    }


def recovery_manifest(port: int, measurement: str, policy_sha256: str) -> RecoveryManifest:
    """What an SRE would write as manifest.yaml."""
    loopback = "127.0.0.1/32"
    grants = {"services": [SERVICE], "channels": ["ops"]}
    spec = {
        "runbooks": [
            {
                "name": RUNBOOKS[0],
                "source": f"library/{RUNBOOKS[0]}",
                "grants": grants | {"actions": ["recreate", "notify"], "networks": [loopback]},
            },
            {
                "name": RUNBOOKS[1],
                "source": f"library/{RUNBOOKS[1]}",
                "grants": grants | {"actions": ["recreate", "notify"]},
            },
        ],
        "sensors": [{"name": "breaker", "params": {"threshold": THRESHOLD}}, {"name": "lifecycle"}],
        "services": [
            {
                "name": SERVICE,
                "declaration": f"{SERVICE}.json",
                "listen": [{"address": "127.0.0.1", "port": port}],
            }
        ],
        "channels": [{"name": "ops", "kind": "log"}],
        "referenceValues": {"snp": [measurement]},
        "policySha256": policy_sha256,
        "validDays": 1,
    }
    body = {
        "apiVersion": "pointcall.dev/v1",
        "kind": "RecoveryManifest",
        "metadata": {"name": "demo"},
        "spec": spec,
    }
    return RecoveryManifest.parse(body)


@dataclass(frozen=True, slots=True)
class Sources:
    """The folder that `assemble` reads: runbook sources and the service declaration."""

    folder: Path

    @classmethod
    def write(cls, folder: Path, port: int) -> Sources:
        shutil.rmtree(folder, ignore_errors=True)
        for name in RUNBOOKS:
            shutil.copytree(library() / name, folder / "library" / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / f"{SERVICE}.json").write_text(json.dumps(declaration(port), indent=2))
        return cls(folder)


def stand_ins(folder: Path, blobs: Path) -> Path:
    """Where the demo takes its BPF blobs from when nothing is loaded: the built ones, or stand-ins that say so."""
    if all((blobs / f"{name}.blob").exists() for name in SENSORS):
        return blobs
    folder.mkdir(parents=True, exist_ok=True)
    for name in SENSORS:
        (folder / f"{name}.blob").write_bytes(f"no BPF object {name} was built on this machine\n".encode())
    return folder


def trust_policy(issuer: str, trusted_root: bytes) -> bytes:
    """The trust policy of the demo's node: one signer, one root, and emulation, which the demo asks for by name."""
    policy = {
        "format": "pointcall-trust-policy/v1",
        "trusted_root_sha256": hashlib.sha256(trusted_root).hexdigest(),
        "signers": [{"issuer": issuer, "identity": IDENTITY}],
        "tee": {"allow_emulated": True},
    }
    return json.dumps(policy, indent=2).encode()
