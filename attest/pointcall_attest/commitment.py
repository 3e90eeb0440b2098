"""Salted commitments: what stands in an entry in place of a command line, an address or free text.

The leaf holds only the commitment; text and salt lie beside the log. Deleting them erases the text, while every proof
stays valid; who has text and salt can show that they are what was committed to. Without the salt nobody can guess
even a short text.
Spec: docs/spec/journal.md section 7.
"""

from __future__ import annotations

import hmac
from typing import Final

SALT_BYTES: Final = 32
_DOMAIN: Final = b"pointcall/commitment/v1\0"


def commit(text: str, salt: bytes) -> str:
    """The commitment (hex): HMAC-SHA-256 of the text, keyed with 32 random bytes that are used once."""
    assert len(salt) == SALT_BYTES, "a salt has 32 bytes"
    return hmac.digest(salt, _DOMAIN + text.encode(), "sha256").hex()


def opens(commitment: str, text: str, salt: bytes) -> bool:
    """Whether this text and salt are what was committed to."""
    return len(salt) == SALT_BYTES and hmac.compare_digest(commit(text, salt), commitment)
