"""Drawing a sample of runs for an auditor: from everything, by the auditor's seed, the same for everybody who draws.

The order is by SHA-256 over the seed, the checkpoint's root and the leaf index, so neither side can steer it: the seed
is the auditor's, the root was signed before. Spec: docs/spec/report.md section 7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

MAX_SAMPLE: Final = 1_000  # auditors draw 20 to 30; every run of the log is in report.json anyway
MAX_SEED_BYTES: Final = 256
_DOMAIN: Final = b"pointcall/sample/v1\0"


def draw(population: Iterable[int], *, n: int, seed: str, root: bytes) -> tuple[int, ...]:
    """`n` leaf indices of the population (all of it where it has fewer), in log order.

    AssertionError for an `n` below 1, an empty seed or a root that is no digest: the CLI checks what people type.
    """
    assert 1 <= n <= MAX_SAMPLE, f"a sample of {n}"
    assert 0 < len(seed.encode()) <= MAX_SEED_BYTES, "a seed that is empty or too long"
    assert len(root) == 32, "a root has 32 bytes"
    key = _DOMAIN + hashlib.sha256(seed.encode()).digest() + root
    ranked = sorted(population, key=lambda index: hashlib.sha256(key + index.to_bytes(8)).digest())
    return tuple(sorted(ranked[:n]))
