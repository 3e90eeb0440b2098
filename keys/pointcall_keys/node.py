"""The keys of one epoch of a node: P-256 for entries, Ed25519 for checkpoints. In memory only, replaced often.

Forward security: the old keys sign the close of their epoch, which names the next ones, and are wiped; who takes the
node later cannot write its past. The evidence binds the P-256 key, the epoch-open entry binds the Ed25519 key.
Never on disk. Spec: docs/spec/journal.md section 4.
"""

from __future__ import annotations

import base64
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pointcall_attest import dsse, entry
from pointcall_attest.log import checkpoint


class EpochKeys:
    """Both private keys of an epoch. Using them after `wipe` is our bug: AssertionError."""

    def __init__(self, receipts: ec.EllipticCurvePrivateKey, checkpoints: Ed25519PrivateKey) -> None:
        self._receipts: ec.EllipticCurvePrivateKey | None = receipts
        self._checkpoints: Ed25519PrivateKey | None = checkpoints
        self._checkpoint_public = checkpoints.public_key().public_bytes_raw()
        self.spki = dsse.spki(receipts.public_key())
        self.id = dsse.keyid_of(self.spki)

    @classmethod
    def generate(cls) -> EpochKeys:
        """New keys from the system's randomness."""
        return cls(ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate())

    @property
    def public_key(self) -> str:
        """The SPKI in base64, as the epoch-open entry carries it."""
        return base64.b64encode(self.spki).decode()

    @property
    def wiped(self) -> bool:
        return self._receipts is None

    def verifier(self, origin: str) -> checkpoint.Verifier:
        """The key that checkpoints of this epoch are checked with; `str()` of it goes into the epoch-open entry."""
        return checkpoint.Verifier(origin, checkpoint.LOG, self._checkpoint_public)

    def sign(self, payload: bytes) -> bytes:
        """The leaf for an entry's payload."""
        assert self._receipts is not None, "these keys were wiped"
        return dsse.sign(payload, self._receipts, keyid=self.id)

    def sign_checkpoint(self, origin: str, size: int, root: bytes) -> bytes:
        """A checkpoint of the log. Only the journal calls this: it alone knows what was signed before."""
        assert self._checkpoints is not None, "these keys were wiped"
        return checkpoint.sign(origin, size, root, self._checkpoints)

    def certify_next(self, following: EpochKeys | None, *, reason: str, at: datetime, ktime_ns: int) -> bytes:
        """The epoch-close leaf: this key vouches for the next one, or for none at the end."""
        body = entry.EpochClose(reason=reason, next=following.id if following else None)
        return self.sign(entry.payload(body, at=at, ktime_ns=ktime_ns, epoch=self.id))

    def wipe(self) -> None:
        """Drop both private keys; OpenSSL clears their memory when the last reference goes. May be called twice."""
        self._receipts = self._checkpoints = None
