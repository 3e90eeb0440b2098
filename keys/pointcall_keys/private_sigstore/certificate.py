"""Keys on disk and the X.509 building blocks of the private instance. Not a general PKI: P-256, SHA-256, fixed forms.

Spec: RFC 5280; Sigstore `certificate-specification.md` for the profile of the authority and of its leaves.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW: Final = dt.timedelta(minutes=5)  # a start in the future is refused: leave room for clock differences
LIFETIME: Final = dt.timedelta(days=3650)
ORGANIZATION: Final = "pointcall private sigstore"

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def p256(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key at `path`, made on first use. ValueError if the file holds another kind of key."""
    key = _load(path, lambda: ec.generate_private_key(ec.SECP256R1()))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} holds a {type(key).__name__}")  # noqa: TRY004 - the file is input
    return key


def ed25519_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """The Ed25519 key at `path`, made on first use. ValueError if the file holds another kind of key."""
    key = _load(path, ed25519.Ed25519PrivateKey.generate)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(f"{path.name} holds a {type(key).__name__}")  # noqa: TRY004 - the file is input
    return key


def _load(path: Path, make: Callable[[], Key]) -> PrivateKeyTypes:
    if path.exists():
        return serialization.load_pem_private_key(path.read_bytes(), None)
    fresh = make()
    pem = fresh.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return fresh


def spki(key: Key) -> bytes:
    """DER SubjectPublicKeyInfo of the public half."""
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: dt.datetime,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    """What every certificate of the instance has: names, dates, both key identifiers."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def usage(*, signs_data: bool = False, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs_data,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def authority(
    own: tuple[str, ec.EllipticCurvePrivateKey],
    issuer: tuple[str, ec.EllipticCurvePrivateKey],
    *,
    path_length: int,
    now: dt.datetime,
) -> x509.Certificate:
    """A CA certificate; `own` and `issuer` are (common name, key), the same pair for a root."""
    start = now - CLOCK_SKEW
    return (
        builder(name(own[0]), name(issuer[0]), own[1].public_key(), issuer[1], start, start + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(issuer[1], hashes.SHA256())
    )


def timestamper(
    key: ec.EllipticCurvePrivateKey, issuer: tuple[str, ec.EllipticCurvePrivateKey], *, now: dt.datetime
) -> x509.Certificate:
    """The leaf that signs RFC 3161 tokens: extended key usage timeStamping, critical as section 2.3 demands."""
    start = now - CLOCK_SKEW
    return (
        builder(name("tsa"), name(issuer[0]), key.public_key(), issuer[1], start, start + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_data=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
        .sign(issuer[1], hashes.SHA256())
    )


def load_chain(path: Path, make: Callable[[], list[x509.Certificate]]) -> list[x509.Certificate]:
    """The PEM chain at `path`, leaf first, made on first use."""
    if not path.exists():
        path.write_text("".join(map(pem, make())))
    return x509.load_pem_x509_certificates(path.read_bytes())
