"""What tests of services share: real declarations of small programs, a parent cgroup of this run, patience."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.kernel.cgroup import find_root

needs_cgroups = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(find_root(), os.W_OK), reason="needs root and a writable cgroup v2 tree"
)

LISTEN = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True: listener.accept()[0].close()
"""
SLEEP = "import time; time.sleep(600)"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process(folder: Path, source: str, *words: str, name: str = "svc", **over: Any) -> ServiceDeclaration:
    """A declared Python program."""
    script, program = folder / f"{name}.py", Path(sys.executable).resolve()
    script.write_text(source)
    body: dict[str, Any] = {
        "argv": [str(program), "-I", "-S", str(script), *words],
        "files": [{"path": str(p), "sha256": sha256(p)} for p in (program, script)],
        "directory": str(folder),
    }
    return declared("process", name, body | over)


def declared(kind: str, name: str, body: dict[str, Any]) -> ServiceDeclaration:
    return ServiceDeclaration.parse(
        json.dumps({"format": "pointcall-service/v1", "name": name, "kind": kind, kind: body}).encode()
    )


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def remove_spawners(parent: str) -> None:
    """The cgroups of spawners below `parent` that were killed, which nobody removes for a minute."""
    for path in find_root().glob(f"{parent}-spawner.*"):
        wait_for(lambda path=path: _removed(path))


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its spawner has not ended yet
        return False
    return True
