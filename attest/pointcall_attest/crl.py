"""Certificate revocation lists of AMD and Intel. bytes <-> RevocationList. No I/O, no clock, no trust.

AMD's cannot name a VCEK (they all have serial 0): it revokes ASK and ASVK, and the ARK signs it. Intel has one by the
root (for CAs and the TCB signer) and one by each PCK CA (for PCK certificates). Spec: AMD 57230; RFC 5280, 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509

from pointcall_attest import certs, der, pck
from pointcall_attest.der import Reader
from pointcall_attest.errors import MalformedError

MAX_CRL_BYTES: Final = 1024 * 1024  # Intel's largest has some 60 KiB
_PSS_OID: Final = "1.2.840.113549.1.1.10"
_ECDSA_OID: Final = "1.2.840.10045.4.3.2"
_MEMOISED: Final = 64


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One list, well-formed and nothing more. Times are UTC."""

    raw: bytes = field(repr=False)
    issuer: bytes
    this_update: datetime
    next_update: datetime
    algorithm: str  # OID of the signature algorithm
    tbs: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    entries: x509.CertificateRevocationList = field(repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(self.raw)

    def in_force(self, at: datetime) -> bool:
        return self.this_update <= at <= self.next_update

    def revokes(self, serial: int) -> bool:
        return self.entries.get_revoked_certificate_by_serial_number(serial) is not None


@lru_cache(maxsize=_MEMOISED)
def parse(raw: bytes) -> RevocationList:
    """A CRL in DER; MalformedError `crl.malformed` otherwise, also without nextUpdate or with a critical extension."""
    if len(raw) > MAX_CRL_BYTES:
        raise MalformedError("the CRL is too long", id="crl.malformed", want=f"<= {MAX_CRL_BYTES} bytes")
    try:
        crl = x509.load_der_x509_crl(raw)
        next_update, extensions = crl.next_update_utc, crl.extensions
        this_update, algorithm = crl.last_update_utc, crl.signature_algorithm_oid.dotted_string
    except pck.X509_ERRORS as error:
        raise MalformedError(f"not a CRL: {error}", id="crl.malformed") from None
    if next_update is None or any(extension.critical for extension in extensions):
        raise MalformedError("not a CRL that we know", id="crl.malformed", want="nextUpdate, no critical extension")
    tbs, signature, issuer = _split(raw)
    return RevocationList(raw, issuer, this_update, next_update, algorithm, tbs, signature, crl)


def _split(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """(signed part, signature, issuer) as they are written, in strict DER (RFC 5280, 5.1)."""
    body = Reader(raw).inside(der.SEQUENCE)
    tbs, _, signature = body.whole(der.SEQUENCE), body.whole(der.SEQUENCE), body.bits()
    body.done()
    inner = Reader(tbs).inside(der.SEQUENCE)
    inner.integer()
    inner.whole(der.SEQUENCE)  # the algorithm: the library has compared both
    return tbs, signature, inner.whole(der.SEQUENCE)


def signed_by_amd(crl: RevocationList, issuer: bytes, spki: bytes) -> bool:
    """True where the CRL names this issuer and the issuer's RSA key signed it."""
    return crl.algorithm == _PSS_OID and crl.issuer == issuer and certs.signed_by(spki, crl.signature, crl.tbs)


@lru_cache(maxsize=_MEMOISED)
def signed_by_intel(crl: RevocationList, issuer: pck.IntelCertificate) -> bool:
    """True where the CRL names this issuer and the issuer's P-256 key signed it. Memoised: pure."""
    named = crl.algorithm == _ECDSA_OID and crl.issuer == issuer.subject
    return named and pck.holds(issuer.key, crl.signature, crl.tbs)
