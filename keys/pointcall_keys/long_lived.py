"""Long-lived keys, for sites without any Sigstore: a P-256 key in a file or behind PKCS#11 signs a statement.

The result is a standard Sigstore bundle v0.3 with `publicKey.hint` and no log entry. It proves who signed, never when:
the manifest's own dates and sequence limit it. Which keys count is said by the trust policy's `keys`.
Spec: Sigstore bundle v0.3; DSSE v1.0.2; PKCS#11 v2.40 section 6.4.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final, Protocol, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pointcall_keys.errors import KeysError
from pointcall_keys.signer import MAX_STATEMENT_BYTES

BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
P256_PARAMETERS: Final = bytes.fromhex("06082a8648ce3d030107")  # DER of the curve's object identifier
_SPKI_HEAD: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")


class SigningKey(Protocol):
    """A P-256 key that can sign, wherever it lives."""

    @property
    def spki(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, DER."""

    def close(self) -> None:
        """Let go of the device, if it is one."""


def sign_with_key(statement: bytes, key: SigningKey) -> bytes:
    """A Sigstore bundle over exactly the bytes of a statement. KeysError `sign.statement` if it is too long."""
    if len(statement) > MAX_STATEMENT_BYTES:
        raise KeysError("the statement is too long", id="sign.statement", want=f"<= {MAX_STATEMENT_BYTES} bytes")
    pae = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(statement), statement)
    envelope = {
        "payload": base64.b64encode(statement).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(key.sign(pae)).decode()}],
    }
    material = {"publicKey": {"hint": hint(key.spki)}}
    return json.dumps({"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


def hint(spki: bytes) -> str:
    """How a bundle names a key: base64 of the SHA-256 of its SPKI."""
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()


def policy_row(name: str, key: SigningKey) -> dict[str, str]:
    """The row of a trust policy's `keys` that accepts this key."""
    return {"name": name, "public_key": base64.b64encode(key.spki).decode()}


class FileKey:
    """A key in a PEM file (PKCS#8), best with a passphrase. Who can read file and passphrase can sign."""

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        self._private = private

    @classmethod
    def make(cls, path: Path, passphrase: bytes | None) -> Self:
        """A new key, written with mode 0600; KeysError `sign.key` if the file exists already."""
        private = ec.generate_private_key(ec.SECP256R1())
        how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise KeysError(
                "there is a file already", id="sign.key", got=str(path), hint="choose another name"
            ) from None
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
        return cls(private)

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None) -> Self:
        """The key in a file; KeysError `sign.key` if it is not a P-256 key or the passphrase is wrong."""
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), passphrase)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeysError(
                "the key cannot be read", id="sign.key", got=f"{type(error).__name__}: {error}"[:160]
            ) from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
            raise KeysError("a key of another kind", id="sign.key", want="P-256", got=type(private).__name__)
        return cls(private)

    @property
    def spki(self) -> bytes:
        return self._private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data, ec.ECDSA(hashes.SHA256()))

    def close(self) -> None:
        """Nothing to let go of."""


class TokenKey:
    """A key behind PKCS#11 (a smart card, an HSM), found by its label. It never leaves the device.

    Needs the package `python-pkcs11`, which is an extra; everything else here works without it.
    """

    def __init__(self, session: Any, private: Any, spki: bytes) -> None:
        self._session, self._private, self._spki = session, private, spki

    @classmethod
    def open(cls, library: Path, *, token: str, label: str, pin: str) -> Self:
        """The key pair `label` on the token `token`. KeysError `sign.key` where any of it is missing or refused."""
        try:
            import pkcs11
        except ImportError:
            raise KeysError(
                "PKCS#11 needs the package python-pkcs11", id="sign.key", hint="pip install python-pkcs11"
            ) from None
        kinds = pkcs11.ObjectClass
        try:
            session = pkcs11.lib(str(library)).get_token(token_label=token).open(user_pin=pin)
            private = session.get_key(object_class=kinds.PRIVATE_KEY, label=label)
            public = session.get_key(object_class=kinds.PUBLIC_KEY, label=label)
            spki = _spki(public[pkcs11.Attribute.EC_PARAMS], public[pkcs11.Attribute.EC_POINT])
        except (pkcs11.PKCS11Error, RuntimeError, OSError) as error:
            raise KeysError(
                "the key on the token cannot be used", id="sign.key", want=f"{label} on {token}", got=repr(error)[:160]
            ) from None
        return cls(session, private, spki)

    @property
    def spki(self) -> bytes:
        return self._spki

    def sign(self, data: bytes) -> bytes:
        """The device signs the digest: mechanism ECDSA, whose result is two raw integers."""
        from pkcs11 import Mechanism

        raw = self._private.sign(hashlib.sha256(data).digest(), mechanism=Mechanism.ECDSA)
        return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))

    def close(self) -> None:
        self._session.close()


def _spki(parameters: bytes, point: bytes) -> bytes:
    """SPKI of a P-256 point, which PKCS#11 wraps in an OCTET STRING. KeysError `sign.key` for another curve."""
    if parameters != P256_PARAMETERS or len(point) != 67 or point[:3] != b"\x04\x41\x04":
        raise KeysError("the key on the token is of another kind", id="sign.key", want="P-256, uncompressed")
    return _SPKI_HEAD + point[2:]
