"""What the emulated platform measures: a digest, shaped like a launch digest, over what the executor really is.

Files of the installed packages and the Wasm engine's library. It is computed by the software that it measures and so
proves nothing against its owner; it makes a wrong reference value visible. Spec: docs/spec/evidence.md, Measurements.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

PACKAGES: Final = ("pointcall_runbook", "pointcall_attest", "pointcall_keys", "pointcall_executor")
ENGINE: Final = "wasmtime"
DOMAIN: Final = b"pointcall/emulated-launch/v1\0"


@cache
def executor_measurement() -> bytes:
    """48 bytes: SHA-384 over (package, path, SHA-384 of the file) of every measured file, in sorted order."""
    total = hashlib.sha384(DOMAIN)
    for package in (*PACKAGES, ENGINE):
        for name, path in sorted(_files(package)):
            digest = hashlib.sha384(path.read_bytes()).digest()
            for part in (package.encode(), name.encode(), digest):
                total.update(len(part).to_bytes(4, "big") + part)
    return total.digest()


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """Files of a package by their path inside it; compiled caches are not part of what was installed."""
    spec = importlib.util.find_spec(package)
    for folder in map(Path, (spec.submodule_search_locations if spec else None) or ()):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(folder).as_posix(), path
