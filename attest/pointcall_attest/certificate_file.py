"""A file of certificates as people have them: DER, PEM or a GHCB certificate table, holding certificates and CRLs.

Only sorts bytes into DER blobs; what they are is for certs.py, crl.py and pck.py to say. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pointcall_attest import cert_table, pem
from pointcall_attest.errors import MalformedError

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
_OURS: Final = frozenset(cert_table.ENTRIES.values())
_TABLE_STARTS: Final = frozenset(guid.bytes for guid in _OURS)
_PEM: Final = b"-----BEGIN "
_CRL: Final = cert_table.ENTRIES["CRL"]
_DER: Final = (b"\x30\x81", b"\x30\x82", b"\x30\x83")


@dataclass(frozen=True, slots=True)
class CertificateFile:
    """DER certificates and DER CRLs in the order of the file."""

    certificates: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()

    def __add__(self, other: CertificateFile) -> CertificateFile:
        return CertificateFile(self.certificates + other.certificates, self.crls + other.crls)


def read(raw: bytes) -> CertificateFile:
    """What a certificate file holds; MalformedError `cert.file.malformed` where it is none of the three forms."""
    if len(raw) > MAX_FILE_BYTES:
        raise MalformedError("the file is too long", id="cert.file.malformed", want=f"<= {MAX_FILE_BYTES} bytes")
    if raw.startswith(_DER):
        return CertificateFile(crls=(raw,)) if _is_crl(raw) else CertificateFile((raw,))
    if raw[:16] in _TABLE_STARTS or _is_table(raw):
        return _from_table(raw)
    if _PEM in raw:
        return _from_pem(raw)
    raise MalformedError(
        "neither DER, PEM nor a certificate table", id="cert.file.malformed", got=raw[:8].hex() or "an empty file"
    )


def _is_table(raw: bytes) -> bool:
    """Also a table that starts with an entry of somebody else, or has none: hosts hand out both."""
    try:
        cert_table.parse(raw)
    except MalformedError:
        return False
    return True


def _from_table(raw: bytes) -> CertificateFile:
    """Our entries of a table, each DER or PEM; a table inside a table is refused."""
    found = CertificateFile()
    for guid, blob in cert_table.parse(raw).items():
        if guid == _CRL:
            found += CertificateFile(crls=(blob,))
        elif guid in _OURS:
            found += _from_pem(blob) if _PEM in blob else CertificateFile((blob,))
    return found


def _from_pem(raw: bytes) -> CertificateFile:
    rows = pem.blocks(raw)
    certificates = tuple(der for label, der in rows if label == "CERTIFICATE")
    crls = tuple(der for label, der in rows if label == "X509 CRL")
    if len(certificates) + len(crls) != len(rows):
        raise MalformedError("a PEM block is neither certificate nor CRL", id="pem.malformed")
    return CertificateFile(certificates, crls)


def _is_crl(raw: bytes) -> bool:
    """The first field of a certificate is [0] version; that of a CRL is the INTEGER version (RFC 5280, 4.1 and 5.1)."""
    header = 2 + (raw[1] & 0x7F)
    inner = raw[header : header + 2]
    size = inner[1] & 0x7F if len(inner) == 2 and inner[1] & 0x80 else 0
    return raw[header + 2 + size : header + 3 + size] == b"\x02"
