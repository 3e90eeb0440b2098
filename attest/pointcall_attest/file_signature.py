"""A Sigstore bundle over any file: by an identity, or by a long-lived key. What `pointcall verify-bundle` does.

It answers one question, "did this identity sign this file", with no trust policy of a node behind it; manifests go
through signature.py. The bundle is a message signature over the file, or a DSSE statement that has it as a subject.
Spec: Sigstore bundle v0.3; docs/spec/trust-policy.md, section Files.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from pointcall_attest import exact_json
from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.log_entry import Logged, verify_entry
from pointcall_attest.manifest import STATEMENT_TYPE
from pointcall_attest.signature import MAX_BUNDLE_BYTES, PAYLOAD_TYPE, open_bundle, signing_times
from pointcall_attest.timestamp_token import stamped_times
from pointcall_attest.trusted_root import Root, guarded

Key = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
MAX_LOG_ENTRIES: Final = 8
_MEDIA_TYPES: Final = (
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
)


def verify_file(bundle: bytes, file_sha256: bytes, *, trusted_root: bytes, identity: str, issuer: str) -> None:
    """Returns if the identity signed the file. MalformedError or VerifyError with an id `bundle.*` or `trust.root`."""
    from sigstore.verify import policy as p

    parsed = _parse(bundle)
    opened = open_bundle(parsed, "bundle.form")
    named = p.Identity(identity=identity, issuer=issuer)
    root = Root.load(trusted_root)

    def verify(verifier: Any) -> None:
        if "dsseEnvelope" in parsed:
            kind, payload = verifier.verify_dsse(opened, named)
            _check_statement(kind, payload, file_sha256)
        else:
            verifier.verify_artifact(_hashed(file_sha256), opened, named)

    guarded(lambda: verify(root.verifier), "bundle.signature")
    for reduced in guarded(lambda: [root.reduced_to(at) for at in signing_times(parsed)], "bundle.window"):
        if reduced is not None:
            guarded(lambda r=reduced: verify(r), "bundle.window")  # type: ignore[misc]


def verify_file_with_key(bundle: bytes, file_sha256: bytes, *, key: bytes, trusted_root: bytes | None) -> None:
    """Returns if the PEM public key signed the file; log entries and timestamps in the bundle must verify too.

    DSSE: ECDSA on P-256, P-384 and P-521 with their own hash, and Ed25519; message signatures: ECDSA over SHA-256.
    MalformedError or VerifyError `bundle.*`.
    """
    parsed = _parse(bundle)
    public = read_key(key)
    if "publicKey" not in parsed["verificationMaterial"]:
        raise VerifyError("the bundle is by a certificate, not by a key", id="bundle.signature", want="publicKey")
    logged = guarded(lambda: _signed_by_key(parsed, public, file_sha256), "bundle.signature")
    entries = guarded(lambda: _entries(parsed), "bundle.form", MalformedError)
    if trusted_root is None:
        if entries or "timestampVerificationData" in parsed["verificationMaterial"]:
            raise VerifyError("log entries and timestamps need a trusted root", id="bundle.log", want="a trusted root")
        return
    rows = Root.load(trusted_root).rows
    material = parsed["verificationMaterial"]
    stamped = guarded(lambda: stamped_times(material, logged.signature, rows), "bundle.timestamp")
    for entry in entries:
        guarded(lambda e=entry: verify_entry(e, logged, rows, stamped), "bundle.log")  # type: ignore[misc]


def read_key(pem: bytes) -> Key:
    """The public key in PEM bytes; MalformedError `bundle.key`."""
    key = guarded(lambda: load_pem_public_key(pem), "bundle.key", MalformedError)
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise MalformedError("a key of this kind is not supported", id="bundle.key", want="ECDSA or Ed25519")
    return key


def _parse(raw: bytes) -> dict[str, Any]:
    bundle = exact_json.loads(raw, id="bundle.form", max_bytes=MAX_BUNDLE_BYTES, what="the bundle")
    if not isinstance(bundle, dict) or not isinstance(bundle.get("verificationMaterial"), dict):
        raise MalformedError("not a Sigstore bundle", id="bundle.form", want="Sigstore bundle v0.3")
    if ("dsseEnvelope" in bundle) == ("messageSignature" in bundle):
        raise MalformedError("a bundle has one kind of signature", id="bundle.form", want="one of the two")
    return bundle


def _check_statement(payload_type: str, payload: bytes, file_sha256: bytes) -> None:
    """The statement is one, and lists the file. Raises what bad input raises; the caller guards."""
    if payload_type != PAYLOAD_TYPE:
        raise VerifyError("the payload is of another type", id="bundle.statement", want=PAYLOAD_TYPE)
    body = exact_json.loads(payload, id="bundle.statement", max_bytes=MAX_BUNDLE_BYTES, what="the statement")
    if not isinstance(body, dict) or body.get("_type") != STATEMENT_TYPE or not body.get("predicateType"):
        raise VerifyError("the payload is no statement", id="bundle.statement", want=STATEMENT_TYPE)
    if not any(subject["digest"].get("sha256") == file_sha256.hex() for subject in body["subject"]):
        raise VerifyError("the statement is about other files", id="bundle.subject", want=file_sha256.hex())


def _hashed(file_sha256: bytes) -> Any:
    from sigstore.hashes import Hashed
    from sigstore_models.common.v1 import HashAlgorithm

    return Hashed(algorithm=HashAlgorithm.SHA2_256, digest=file_sha256)


# By a long-lived key


def _signed_by_key(bundle: Mapping[str, Any], key: Key, file_sha256: bytes) -> Logged:
    """What the key has signed, if it has. Raises what bad input raises; the caller guards."""
    if bundle.get("mediaType") not in _MEDIA_TYPES:
        raise VerifyError("the bundle is of another version", id="bundle.form", want=_MEDIA_TYPES[0])
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if "messageSignature" in bundle:
        return _message(bundle["messageSignature"], key, spki, file_sha256)
    return _envelope(bundle["dsseEnvelope"], key, spki, file_sha256)


def _message(signed: Mapping[str, Any], key: Key, spki: bytes, file_sha256: bytes) -> Logged:
    stated = signed.get("messageDigest")
    if stated is not None:
        same = stated["algorithm"] == "SHA2_256" and base64.b64decode(stated["digest"], validate=True) == file_sha256
        if not same:
            raise VerifyError("the bundle states another digest", id="bundle.subject", want=file_sha256.hex())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise VerifyError("a digest cannot be verified with Ed25519", id="bundle.signature", want="an ECDSA key")
    signature = base64.b64decode(signed["signature"], validate=True)
    _hold(lambda: key.verify(signature, file_sha256, ec.ECDSA(Prehashed(hashes.SHA256()))))
    return Logged(signature, spki, file_sha256)


def _envelope(envelope: Mapping[str, Any], key: Key, spki: bytes, file_sha256: bytes) -> Logged:
    (one,) = envelope["signatures"]
    kind, payload = envelope["payloadType"], base64.b64decode(envelope["payload"], validate=True)
    signature = base64.b64decode(one["sig"], validate=True)
    pae = b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)
    if isinstance(key, ec.EllipticCurvePublicKey):
        _hold(lambda: key.verify(signature, pae, ec.ECDSA(_hash_of(key))))
    else:
        _hold(lambda: key.verify(signature, pae))
    _check_statement(kind, payload, file_sha256)
    return Logged(signature, spki, hashlib.sha256(pae).digest(), hashlib.sha256(payload).digest())


def _hash_of(key: ec.EllipticCurvePublicKey) -> hashes.HashAlgorithm:
    return {384: hashes.SHA384(), 521: hashes.SHA512()}.get(key.key_size, hashes.SHA256())


def _hold(verify: Callable[[], None]) -> None:
    try:
        verify()
    except InvalidSignature:
        raise VerifyError(
            "the signature does not verify", id="bundle.signature", want="a signature by this key"
        ) from None


def _entries(bundle: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries: list[Mapping[str, Any]] = bundle["verificationMaterial"].get("tlogEntries") or []
    if not isinstance(entries, list) or len(entries) > MAX_LOG_ENTRIES:
        raise MalformedError("too many log entries", id="bundle.form", want=f"<= {MAX_LOG_ENTRIES}")
    return entries
