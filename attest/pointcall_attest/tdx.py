"""Intel TDX quote: bytes <-> Quote. No I/O, no policy, no crypto. Spec: Intel TDX DCAP Quoting Library API, appendix.

Versions 4 and 5 with TD 1.0 and TD 1.5 bodies, ECDSA P-256, certification data 6 around 5 (a PEM chain) and no other.
Parsing is exact: lengths agree to the byte, trailing bytes are zero, reserved bytes are zero. docs/spec/tdx.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from pointcall_attest import pem
from pointcall_attest.errors import MalformedError
from pointcall_attest.layout import Field, Layout

MAX_QUOTE_BYTES: Final = 64 * 1024  # the largest real one has 8000 bytes, most of them padding
ECDSA_P256: Final = 2
TEE_TDX: Final = 0x81
INTEL_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
EMULATED_QE_VENDOR: Final = b"EMULATED-QE-VEND"
TD10, TD15 = 2, 3  # body types of version 5
QE_REPORT_DATA, PCK_CHAIN = 6, 5  # certification data types

HEADER: Final = Layout(
    "TDX quote header",
    48,
    (
        Field(0, 2, "version", integer=True),
        Field(2, 2, "att_key_type", integer=True),
        Field(4, 4, "tee_type", integer=True),
        Field(8, 4, ""),
        Field(12, 16, "qe_vendor_id"),
        Field(28, 20, "user_data"),
    ),
    length_id="tdx.length.malformed",
    reserved_id="tdx.reserved.malformed",
)
_TD10_ROWS: Final = (
    Field(0, 16, "tee_tcb_svn"),
    Field(16, 48, "mrseam"),
    Field(64, 48, "mrsignerseam"),
    Field(112, 8, "seam_attributes"),
    Field(120, 8, "td_attributes", integer=True),
    Field(128, 8, "xfam", integer=True),
    Field(136, 48, "mrtd"),
    Field(184, 48, "mrconfigid"),
    Field(232, 48, "mrowner"),
    Field(280, 48, "mrownerconfig"),
    Field(328, 48, "rtmr0"),
    Field(376, 48, "rtmr1"),
    Field(424, 48, "rtmr2"),
    Field(472, 48, "rtmr3"),
    Field(520, 64, "report_data"),  # binding.report_data()
)
TD10_BODY: Final = Layout(
    "TD 1.0 report body",
    584,
    _TD10_ROWS,
    length_id="tdx.length.malformed",
    reserved_id="tdx.reserved.malformed",
)
TD15_BODY: Final = Layout(
    "TD 1.5 report body",
    648,
    (*_TD10_ROWS, Field(584, 16, "tee_tcb_svn2"), Field(600, 48, "mrservicetd")),
    length_id="tdx.length.malformed",
    reserved_id="tdx.reserved.malformed",
)
QE_REPORT: Final = Layout(
    "QE report",
    384,
    (
        Field(0, 16, "cpusvn"),
        Field(16, 4, "misc_select"),
        Field(20, 12, ""),
        Field(32, 16, "isv_ext_prod_id"),
        Field(48, 16, "attributes"),
        Field(64, 32, "mrenclave"),
        Field(96, 32, ""),
        Field(128, 32, "mrsigner"),
        Field(160, 32, ""),
        Field(192, 64, "config_id"),
        Field(256, 2, "isv_prod_id", integer=True),
        Field(258, 2, "isv_svn", integer=True),
        Field(260, 2, "config_svn", integer=True),
        Field(262, 42, ""),
        Field(304, 16, "isv_family_id"),
        Field(320, 64, "report_data"),
    ),
    length_id="tdx.length.malformed",
    reserved_id="tdx.qe.reserved.malformed",
)
BODIES: Final[Mapping[int, Layout]] = {TD10: TD10_BODY, TD15: TD15_BODY}
ATTRIBUTE_BITS: Final[Mapping[str, int]] = {
    "debug": 0,
    "sept_ve_disable": 28,
    "migratable": 29,
    "pks": 30,
    "kl": 31,
    "perfmon": 63,
}
_SIGNATURE: Final = struct.Struct("<64s64sHI")  # signature, attestation key, certification data type and length
_QE_PART: Final = struct.Struct("<384s64sH")  # QE report, its signature, length of the authentication data
_CHAIN_PART: Final = struct.Struct("<HI")  # certification data type and length


@dataclass(frozen=True, slots=True)
class Body:
    """The report of a TD inside a quote. `tee_tcb_svn2` and `mrservicetd` are None in TD 1.0."""

    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seam_attributes: bytes
    td_attributes: int
    xfam: int
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mrservicetd: bytes | None = None

    def attribute(self, name: str) -> bool:
        return bool(self.td_attributes >> ATTRIBUTE_BITS[name] & 1)


@dataclass(frozen=True, slots=True)
class QeReport:
    """The SGX report of the quoting enclave."""

    cpusvn: bytes
    misc_select: bytes
    isv_ext_prod_id: bytes
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes
    report_data: bytes


@dataclass(frozen=True, slots=True)
class Quote:
    """One quote, well-formed and nothing more. Signatures are r || s, keys x || y, all big-endian."""

    raw: bytes = field(repr=False)
    version: int
    qe_vendor_id: bytes
    user_data: bytes
    body_type: int
    body: Body
    signed_bytes: bytes = field(repr=False)
    qe: QeReport
    signature: bytes = field(repr=False)
    attestation_key: bytes
    qe_report: bytes = field(repr=False)
    qe_signature: bytes = field(repr=False)
    qe_auth: bytes
    pck_pem: bytes = field(repr=False)  # the chain as it came: leaf, intermediate, root


assert TD15_BODY.names == tuple(f.name for f in fields(Body))
assert QE_REPORT.names == tuple(f.name for f in fields(QeReport))


def parse(raw: bytes) -> Quote:
    """The quote in exactly these bytes; MalformedError `tdx.*.malformed` for anything else."""
    if not HEADER.size <= len(raw) <= MAX_QUOTE_BYTES:
        raise _refused(
            "tdx.length.malformed", "the quote has a wrong length", f"48 to {MAX_QUOTE_BYTES} bytes", len(raw)
        )
    version = int.from_bytes(raw[:2], "little")
    if version not in (4, 5):
        raise _refused("tdx.version.malformed", "not a quote version that we know", "4 or 5", version)
    _, key_type, tee_type, vendor, user_data = HEADER.read(raw[: HEADER.size])
    if key_type != ECDSA_P256:
        raise _refused(
            "tdx.key_type.malformed", "not an attestation key type that we know", "2 (ECDSA P-256)", key_type
        )
    if tee_type != TEE_TDX:
        raise _refused("tdx.tee_type.malformed", "the TEE type does not fit the version", "0x81 (TDX)", hex(tee_type))
    body_type, start, size = _body_place(raw, version)
    body = Body(*BODIES[body_type].read(_cut(raw, start, size)))
    end = start + size
    signature = _signature_part(raw, end)
    return Quote(
        raw, version, vendor, user_data, body_type, body, raw[:end], QeReport(*QE_REPORT.read(signature[2])), *signature
    )


def _body_place(raw: bytes, version: int) -> tuple[int, int, int]:
    """(body type, where it starts, its size)."""
    if version == 4:
        return TD10, HEADER.size, TD10_BODY.size
    body_type, size = _CHAIN_PART.unpack(_cut(raw, HEADER.size, _CHAIN_PART.size))
    if body_type not in BODIES or size != BODIES[body_type].size:
        raise _refused(
            "tdx.body_type.malformed", "not a body that we know", "type 2 of 584 or 3 of 648 bytes", (body_type, size)
        )
    return body_type, HEADER.size + _CHAIN_PART.size, size


def _signature_part(raw: bytes, at: int) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes]:
    """(signature, attestation key, QE report, QE signature, QE authentication data, PEM chain)."""
    size = int.from_bytes(_cut(raw, at, 4), "little")
    data = _cut(raw, at + 4, size)
    if any(raw[at + 4 + size :]):
        raise _refused("tdx.trailing.malformed", "something follows the quote", "zero bytes only", "other bytes")
    signature, key, outer_type, outer_size = _SIGNATURE.unpack(_cut(data, 0, _SIGNATURE.size))
    if outer_type != QE_REPORT_DATA:
        raise _refused(
            "tdx.certification.malformed", "not certification data that we know", "type 6", f"type {outer_type}"
        )
    rest = _exactly(data, _SIGNATURE.size, outer_size)
    qe_report, qe_signature, auth_size = _QE_PART.unpack(_cut(rest, 0, _QE_PART.size))
    auth = _cut(rest, _QE_PART.size, auth_size)
    at = _QE_PART.size + auth_size
    inner_type, inner_size = _CHAIN_PART.unpack(_cut(rest, at, _CHAIN_PART.size))
    if inner_type != PCK_CHAIN:
        raise _refused(
            "tdx.certification.malformed",
            "not certification data that we know",
            "type 5 inside 6",
            f"type {inner_type}",
        )
    return signature, key, qe_report, qe_signature, auth, _exactly(rest, at + _CHAIN_PART.size, inner_size)


def _cut(raw: bytes, start: int, size: int) -> bytes:
    if size > len(raw) - start:
        raise _refused(
            "tdx.length.malformed", "the quote ends too early", f"{size} bytes at {start}", max(len(raw) - start, 0)
        )
    return raw[start : start + size]


def _exactly(raw: bytes, start: int, size: int) -> bytes:
    if size != len(raw) - start:
        raise _refused("tdx.length.malformed", "lengths inside the quote disagree", f"{len(raw) - start} bytes", size)
    return raw[start:]


def pck_certificates(pck_pem: bytes) -> tuple[bytes, ...]:
    """The DER of leaf, intermediate and root; the text must be exactly what Intel's quoting enclave writes.

    No signature covers this text, so another spelling of the same certificates would be other evidence: it is refused.
    NULs may end it.
    """
    found = tuple(pem.certificates(pck_pem))
    text = b"".join(pem.encode("CERTIFICATE", der) for der in found)
    if pck_pem.rstrip(b"\0") not in (text, text[:-1]) or len(found) != 3:
        raise _refused(
            "tdx.chain.malformed", "the PCK chain is not in its one exact form", "three certificates in PEM", len(found)
        )
    return found


def encode(
    values: Mapping[str, Any], *, version: int, body_type: int, vendor: bytes, user_data: bytes = bytes(20)
) -> bytes:
    """Header and body: the bytes that the attestation key signs. For the emulated platform and tests."""
    header = {"version": version, "att_key_type": ECDSA_P256, "tee_type": TEE_TDX}
    layout = BODIES[body_type]
    start = HEADER.write({**header, "qe_vendor_id": vendor, "user_data": user_data})
    descriptor = _CHAIN_PART.pack(body_type, layout.size) if version == 5 else b""
    return start + descriptor + layout.write(values)


def encode_signed(
    signed: bytes, signature: bytes, key: bytes, qe_report: bytes, qe_signature: bytes, qe_auth: bytes, pck_pem: bytes
) -> bytes:
    """A whole quote around the signed bytes."""
    inner = _QE_PART.pack(qe_report, qe_signature, len(qe_auth)) + qe_auth + _CHAIN_PART.pack(PCK_CHAIN, len(pck_pem))
    inner += pck_pem
    data = _SIGNATURE.pack(signature, key, QE_REPORT_DATA, len(inner)) + inner
    return signed + len(data).to_bytes(4, "little") + data


def _refused(id: str, why: str, want: str, got: object) -> MalformedError:
    return MalformedError(f"not a TDX quote: {why}", id=id, want=want, got=str(got))
