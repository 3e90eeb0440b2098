"""DSSE envelope with one ECDSA P-256 signature: bytes <-> Envelope, sign, verify. It is the leaf of the log.

The stored bytes are what is hashed and verified; there is one form only (compact canonical JSON), so no byte of a
leaf can change without changing its meaning or being refused. Keys come in as values. Not here: what a payload
says (entry.py, receipt.py) and whose key it is (the epoch: keys, pack.py). Spec: DSSE v1.0.2, docs/spec/receipt.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest.errors import MalformedError, VerifyError

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_LEAF_BYTES: Final = 65_535  # an entry of a C2SP tile bundle has a 16-bit length
MAX_PAYLOAD_BYTES: Final = 48_000  # what fits into a leaf as base64, with the signature
_MAX_SIG_BYTES: Final = 72  # the longest DER form of two 256-bit integers
_LEAF = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/]+={0,2})","payloadType":"application/vnd\.in-toto\+json",'
    rb'"signatures":\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]+={0,2})"\}\]\}'
)
_SHA256 = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Envelope:
    """A well-formed envelope. Nothing in it may be believed before `verify`."""

    payload: bytes
    keyid: str  # SHA-256 (hex) of the signer's SPKI
    sig: bytes
    raw: bytes


def pae(payload: bytes) -> bytes:
    """What is signed: the pre-authentication encoding of the in-toto payload type and the payload."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """The SubjectPublicKeyInfo (DER) of a key."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def keyid_of(spki_der: bytes) -> str:
    """The name of a key: SHA-256 (hex) of its SPKI."""
    return hashlib.sha256(spki_der).hexdigest()


def sign(payload: bytes, key: ec.EllipticCurvePrivateKey, *, keyid: str) -> bytes:
    """The leaf for a payload. AssertionError if the payload is too long: we build what we sign."""
    assert len(payload) <= MAX_PAYLOAD_BYTES, f"a payload of {len(payload)} bytes fits no leaf"
    return encode(payload, key.sign(pae(payload), _SHA256), keyid=keyid)


def encode(payload: bytes, sig: bytes, *, keyid: str) -> bytes:
    """The one form of an envelope."""
    return b'{"payload":"%s","payloadType":"%s","signatures":[{"keyid":"%s","sig":"%s"}]}' % (
        base64.b64encode(payload),
        PAYLOAD_TYPE.encode(),
        keyid.encode(),
        base64.b64encode(sig),
    )


def parse(raw: bytes) -> Envelope:
    """MalformedError `dsse.size` or `dsse.form` unless `raw` is exactly one envelope in its one form."""
    if len(raw) > MAX_LEAF_BYTES:
        raise MalformedError(
            "the envelope is too long", id="dsse.size", want=f"at most {MAX_LEAF_BYTES} bytes", got=str(len(raw))
        )
    found = _LEAF.fullmatch(raw)
    if found is None:
        raise _form("the bytes are not one compact envelope with one signature")
    payload, sig = _unbase64(found[1]), _unbase64(found[3])
    if len(sig) > _MAX_SIG_BYTES:
        raise _form(f"a signature of {len(sig)} bytes")
    return Envelope(payload, found[2].decode(), sig, raw)


def public_key(spki_der: bytes) -> ec.EllipticCurvePublicKey:
    """A P-256 public key from its SPKI. MalformedError `dsse.key` for any other key or form."""
    try:
        key = serialization.load_der_public_key(spki_der)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _key(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _key(type(key).__name__)
    if spki(key) != spki_der:
        raise _key("another encoding of the key")
    return key


def verify(envelope: Envelope, key: ec.EllipticCurvePublicKey) -> bytes:
    """The payload that `key` signed. VerifyError `dsse.signature` if it did not."""
    try:
        key.verify(envelope.sig, pae(envelope.payload), _SHA256)
    except InvalidSignature:
        raise VerifyError(
            "the envelope is not signed by this key",
            id="dsse.signature",
            want=f"a signature of {envelope.keyid}",
            got="another signature, or other bytes",
            hint="the entry was changed, or it belongs to another epoch",
        ) from None
    return envelope.payload


def _unbase64(text: bytes) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise _form(str(error)) from None
    if base64.b64encode(raw) != text:
        raise _form("base64 with bits beyond the end")
    return raw


def _form(got: str) -> MalformedError:
    return MalformedError("not a log entry", id="dsse.form", want="a canonical DSSE envelope", got=got)


def _key(got: str) -> MalformedError:
    return MalformedError("not an epoch key", id="dsse.key", want="an ECDSA P-256 key as SPKI", got=got[:120])
