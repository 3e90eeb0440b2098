"""REPORT_DATA: what a node's evidence vouches for, as 64 bytes. No I/O. Spec: docs/spec/evidence.md, Binding."""

from __future__ import annotations

import hashlib
from typing import Final

DOMAIN: Final = b"pointcall/binding/v1\0"
DIGEST_SIZE: Final = 32
NONCE_SIZE: Final = 32


def report_data(manifest_sha256: bytes, policy_sha256: bytes, epoch_spki: bytes, nonce: bytes) -> bytes:
    """The 64 bytes that bind manifest, trust policy, epoch key and nonce to evidence.

    SHA-512(domain || manifest digest(32) || policy digest(32) || SHA-256(SPKI DER)(32) || nonce(32)).
    Every part has a fixed size, so no two sets of parts give the same input. A wrong size is our own mistake.
    """
    assert len(manifest_sha256) == len(policy_sha256) == DIGEST_SIZE, "digests are 32 bytes"
    assert len(nonce) == NONCE_SIZE, "the nonce is 32 bytes"
    key = hashlib.sha256(epoch_spki).digest()
    return hashlib.sha512(DOMAIN + manifest_sha256 + policy_sha256 + key + nonce).digest()
