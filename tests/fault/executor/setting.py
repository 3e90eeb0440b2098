"""An installation whose executor is killed: prepared once, copied for every label, and who tells stories."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from tests.fault.executor import story
from tests.lab import Lab

ROOT = Path(__file__).parents[3]
GRANTS = {
    "actions": ["recreate", "notify", "open_circuit", "remember"],
    "services": ["api"],
    "channels": ["ops"],
    "networks": ["127.0.0.0/8"],
}


def manifest(declaration: str, guard: Mapping[str, int]) -> dict[str, Any]:
    limits = {"perMinute": 600, "burst": 100}
    return {
        "runbooks": [{"name": "fix", "source": "fix", "grants": GRANTS, "limits": limits}],
        "sensors": [{"name": "breaker"}, {"name": "lifecycle"}],
        "services": [
            {"name": "api", "declaration": declaration, "listen": [{"address": "127.0.0.1", "port": story.PORT}]}
        ],
        "channels": [{"name": "ops", "kind": "log"}],
        "guard": dict(guard),
    }


def prepare(
    lab: Lab,
    *,
    program: list[str] | None = None,
    blobs: Path | None = None,
    guard: Mapping[str, int] = MappingProxyType({}),
    **process: Any,
) -> Path:
    """Two signed manifests in the lab's state folder, sequence 1 and 3; the folder."""
    argv = program or [str(Path("/bin/true").resolve())]
    files = [{"path": p, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in argv if p.startswith("/")]
    lab.runbook("fix", story.RUNBOOK)
    body = manifest(lab.declare("api", {"argv": argv, "files": files} | process), guard)
    for sequence in (1, 3):
        assembled = lab.assemble(body, sequence, blobs=blobs)
        folder = lab.state / f"manifest-{sequence}"
        assembled.write(folder)
        (folder / "manifest.sigstore.json").write_bytes(lab.sign(assembled).signatures[0])
    return lab.state


class Teller:
    """The process that imports everything once and forks a fresh one for each story."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "tests.fault.executor.story"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Teller:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=30)

    def tell(self, state: Path, act: str, label: str = "", **order: Any) -> int:
        """Run one story to its end; how it ended: 0, 1 with `error.txt`, or the negative number of a signal."""
        body = (
            {"short": False, "kernel": False, "pin": False} | order | {"state": str(state), "act": act, "label": label}
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return int(json.loads(answer)["status"])


def copy(prepared: Path, state: Path) -> Path:
    shutil.copytree(prepared, state, symlinks=True, ignore=shutil.ignore_patterns("journal.db*", "truth.jsonl"))
    return state


def why(state: Path) -> str:
    error = state / "error.txt"
    return error.read_text() if error.exists() else "it says nothing"
