"""The name of a run: 26 characters of Crockford base32 (a ULID), sortable by time. Made from values, not clocks.

Spec: docs/spec/receipt.md section 2.
"""

from __future__ import annotations

import re
from typing import Final

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
PATTERN: Final = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"
_RUN_ID = re.compile(PATTERN)


def run_id(unix_ms: int, chance: bytes) -> str:
    """The id of a run that began at `unix_ms` (48 bits); `chance` is 10 random bytes."""
    assert 0 <= unix_ms < 2**48, "a run id has 48 bits of time"
    assert len(chance) == 10, "a run id has 80 bits of chance"
    number = unix_ms << 80 | int.from_bytes(chance)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def is_run_id(text: str) -> bool:
    """Whether `text` is a run id in its one form."""
    return _RUN_ID.fullmatch(text) is not None
