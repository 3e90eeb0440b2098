"""Intel certificates: DER -> IntelCertificate, and whether one key signed another. No I/O, no clock, no trust.

PCK leaf with its SGX extension, PCK Platform and Processor CA, TCB signing certificate, SGX Root CA. P-256 throughout.
Spec: Intel SGX PCK Certificate and CRL Profile Specification 1.5; docs/spec/tdx.md, section Certificates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pointcall_attest import certs, der
from pointcall_attest.certs import EMULATED_MARK
from pointcall_attest.der import Reader
from pointcall_attest.errors import MalformedError

Role = Literal["root", "pck-ca", "pck", "tcb-signing"]

MAX_CERTIFICATE_BYTES: Final = 8 * 1024
EMULATED_ORGANIZATION: Final = "EMULATED - NOT INTEL"
EMULATED_FMSPC: Final = bytes.fromhex("e5e5e5e5e5e5")
SGX: Final = "1.2.840.113741.1.13.1"
ENUMERATED: Final = 0x0A
X509_ERRORS: Final = (  # whatever the library raises for a certificate or list that it does not like
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_ROLES: Final[dict[str, Role]] = {
    "Intel SGX Root CA": "root",
    "Intel SGX PCK Platform CA": "pck-ca",
    "Intel SGX PCK Processor CA": "pck-ca",
    "Intel SGX PCK Certificate": "pck",
    "Intel SGX TCB Signing": "tcb-signing",
}
_ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
_V3: Final = bytes.fromhex("a003020102")
_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_MEMOISED: Final = 128


@dataclass(frozen=True, slots=True)
class SgxExtension:
    """What a PCK certificate says about its platform. The flags are None on single-package platforms."""

    ppid: bytes
    components: bytes  # 16 security versions
    pcesvn: int
    cpusvn: bytes
    pceid: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance: bytes | None
    dynamic_platform: bool | None
    cached_keys: bool | None
    smt_enabled: bool | None


@dataclass(frozen=True, slots=True)
class IntelCertificate:
    """One certificate, well-formed and nothing more. The role follows from name and CA flag; it proves nothing."""

    raw: bytes = field(repr=False)
    role: Role
    emulated: bool
    name: str
    issuer: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    serial: int
    not_before: datetime
    not_after: datetime
    key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)
    tbs: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    sgx: SgxExtension | None = None

    def __hash__(self) -> int:
        return hash(self.raw)


@lru_cache(maxsize=_MEMOISED)
def parse(raw: bytes) -> IntelCertificate:
    """One Intel certificate; MalformedError `pck.malformed` for anything else, unknown critical extensions included."""
    if len(raw) > MAX_CERTIFICATE_BYTES:
        raise _refused("too long")
    parts = _split(raw)
    try:
        return _parse(raw, parts, x509.load_der_x509_certificate(raw))
    except X509_ERRORS as error:
        raise _refused(str(error)) from None


def _split(raw: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """(signed part, signature, issuer, subject) of a version 3 certificate with a serial, by ECDSA and SHA-256.

    Done here, in strict DER, so that no second encoding of a certificate passes and the library never has to guess.
    """
    outer = Reader(raw)
    body = outer.inside(der.SEQUENCE)
    outer.done()
    tbs, algorithm, signature = body.whole(der.SEQUENCE), body.whole(der.SEQUENCE), body.bits()
    body.done()
    inner = Reader(tbs).inside(der.SEQUENCE)
    version, serial, inner_algorithm = inner.whole(der.explicit(0)), inner.integer(), inner.whole(der.SEQUENCE)
    if version != _V3 or not serial or algorithm != _ECDSA_SHA256 or inner_algorithm != _ECDSA_SHA256:
        raise _refused("version, serial number or signature algorithm")
    issuer, _, subject = inner.whole(der.SEQUENCE), inner.whole(der.SEQUENCE), inner.whole(der.SEQUENCE)
    return tbs, signature, issuer, subject


def _parse(raw: bytes, parts: tuple[bytes, bytes, bytes, bytes], certificate: x509.Certificate) -> IntelCertificate:
    tbs, signature, issuer, subject = parts
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _refused("the key is not a P-256 point")
    names = certs.name_parts(subject)
    name, emulated = names["CN"], names["O"] == EMULATED_ORGANIZATION
    role = _ROLES.get(name.removeprefix("EMULATED "))
    if role is None or name.startswith("EMULATED ") != emulated:
        raise _refused(f"the name is not that of an Intel key: {name}")
    sgx = _extensions(certificate, role, emulated)
    if sgx is not None and (sgx.fmspc == EMULATED_FMSPC) != emulated:
        raise _refused("it carries only some of the marks of the emulated platform")
    return IntelCertificate(
        raw,
        role,
        emulated,
        name,
        issuer,
        subject,
        certificate.serial_number,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        key,
        tbs,
        signature,
        sgx,
    )


def _extensions(certificate: x509.Certificate, role: Role, emulated: bool) -> SgxExtension | None:
    """Check CA flag, key usage and marks; give back the SGX extension of a PCK certificate."""
    sgx, is_ca, usage, mark = None, False, None, False
    for extension in certificate.extensions:
        value, dotted = extension.value, extension.oid.dotted_string
        if isinstance(value, x509.BasicConstraints):
            is_ca = value.ca
        elif isinstance(value, x509.KeyUsage):
            usage = value
        elif dotted == EMULATED_MARK:
            mark = extension.critical
        elif dotted == SGX and isinstance(value, x509.UnrecognizedExtension):
            sgx = _sgx(value.value)
        elif extension.critical:
            raise _refused(f"a critical extension is not known: {dotted}")
    needs_ca = role in ("root", "pck-ca")
    may_sign = usage is not None and (usage.key_cert_sign if needs_ca else usage.digital_signature)
    if is_ca != needs_ca or not may_sign or (sgx is not None) != (role == "pck") or mark != emulated:
        raise _refused(f"the extensions are not those of its role: {role}")
    return sgx


def _sgx(raw: bytes) -> SgxExtension:
    """SEQUENCE of SEQUENCE { OID, value }, each once (Intel PCK profile, 1.3.5)."""
    rows = _rows(raw)
    tcb = _rows(_part(rows, "2", der.SEQUENCE, whole=True))
    config = _rows(_part(rows, "7", der.SEQUENCE, whole=True)) if f"{SGX}.7" in rows else {}
    return SgxExtension(
        _octets(rows, "1", 16),
        bytes(_number(tcb, f"2.{i}", 0xFF) for i in range(1, 17)),
        _number(tcb, "2.17", 0xFFFF),
        _octets(tcb, "2.18", 16),
        _octets(rows, "3", 2),
        _octets(rows, "4", 6),
        int.from_bytes(_part(rows, "5", ENUMERATED), "big"),
        _octets(rows, "6", 16) if f"{SGX}.6" in rows else None,
        _flag(config, "7.1"),
        _flag(config, "7.2"),
        _flag(config, "7.3"),
    )


def _rows(raw: bytes) -> dict[str, bytes]:
    """OID -> the whole encoded value, out of one SEQUENCE."""
    outer = Reader(raw)
    reader = outer.inside(der.SEQUENCE)
    outer.done()
    found: dict[str, bytes] = {}
    while reader.peek() is not None:
        row = reader.inside(der.SEQUENCE)
        oid = _SGX_OIDS.get(row.value(der.OID))
        value = row.whole(row.peek() or 0)
        row.done()
        if oid is None or oid in found:
            raise _refused("a part of the SGX extension is unknown or occurs twice")
        found[oid] = value
    return found


_SGX_OIDS: Final = {
    der.write_oid(dotted)[2:]: dotted
    for dotted in (
        *(f"{SGX}.{i}" for i in range(1, 8)),
        *(f"{SGX}.2.{i}" for i in range(1, 19)),
        *(f"{SGX}.7.{i}" for i in range(1, 4)),
    )
}


def _part(rows: dict[str, bytes], key: str, tag: int, *, whole: bool = False) -> bytes:
    """The content of one part, never empty, or with `whole` its encoding. Parts have at most 127 bytes unless whole."""
    found = rows.get(f"{SGX}.{key}")
    if found is None or found[0] != tag or len(found) < 3:
        raise _refused(f"part {key} of the SGX extension is missing or of another type")
    return found if whole else found[2:]


def _octets(rows: dict[str, bytes], key: str, size: int) -> bytes:
    content = _part(rows, key, der.OCTET_STRING)
    if len(content) != size:
        raise _refused(f"part {key} of the SGX extension has a wrong length")
    return content


def _number(rows: dict[str, bytes], key: str, largest: int) -> int:
    value = Reader(_part(rows, key, der.INTEGER, whole=True)).integer()
    if value > largest:
        raise _refused(f"part {key} of the SGX extension is too large")
    return value


def _flag(rows: dict[str, bytes], key: str) -> bool | None:
    if f"{SGX}.{key}" not in rows:
        return None
    value = _part(rows, key, der.BOOLEAN)
    if value not in (b"\x00", b"\xff"):
        raise _refused(f"part {key} of the SGX extension is not a boolean")
    return value == b"\xff"


@lru_cache(maxsize=_MEMOISED)
def issued(issuer: IntelCertificate, of: IntelCertificate) -> bool:
    """True where `of` names this issuer and the issuer's key signed it. Memoised: a pure function of bytes."""
    return of.issuer == issuer.subject and holds(issuer.key, of.signature, of.tbs)


def holds(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> bool:
    """True where the P-256 key made this DER signature over SHA-256 of these bytes."""
    try:
        key.verify(signature, signed, _ECDSA)
    except InvalidSignature:
        return False
    return True


def holds_raw(key: ec.EllipticCurvePublicKey | None, signature: bytes, signed: bytes) -> bool:
    """The same for a signature of 64 bytes, r || s, big-endian; False without a key."""
    if key is None or len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    return holds(key, encode_dss_signature(r, s), signed)


@lru_cache(maxsize=_MEMOISED)
def key_of(point: bytes) -> ec.EllipticCurvePublicKey | None:
    """The P-256 key x || y (64 bytes, big-endian), or None where that is no point of the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except ValueError:
        return None


def _refused(why: str) -> MalformedError:
    return MalformedError("not a certificate of the form Intel writes", id="pck.malformed", got=why)
