"""The emulated TDX platform: quotes, certificates, CRLs and collateral under a root that is not Intel's. No I/O.

Keys, times and security versions come in as values, so that every TCB status, revocation and relaunch can be produced.
Same verifier as hardware. Marks that every other verifier refuses: another organization, a critical private extension,
FMSPC e5e5e5e5e5e5 and another QE vendor. It proves nothing. Spec: docs/spec/trust.md, section Emulation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pointcall_attest import der, pck, pem, tdx
from pointcall_attest.certs import EMULATED_MARK
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TcbStatus

MRSIGNER: Final = hashlib.sha256(b"EMULATED QE SIGNER").digest()
MRENCLAVE: Final = hashlib.sha256(b"EMULATED QE").digest()
QE_ATTRIBUTES: Final = bytes.fromhex("11000000000000000000000000000000")
QE_AUTH: Final = bytes(range(32))
TD_ATTRIBUTES: Final = 1 << 28  # SEPT_VE_DISABLE
XFAM: Final = 0x61AE7
PCEID: Final = bytes(2)
ROOT, CA, PCK, SIGNER = 1, 2, 3, 4  # serial numbers
_DATE: Final = "2026-01-01T00:00:00Z"


class PlatformRow(NamedTuple):
    """One level of the platform's table."""

    status: TcbStatus
    sgx: int = 5  # of all 16 components
    pcesvn: int = 13
    tdx: bytes = bytes((5, 0, 5)).ljust(16, b"\0")
    date: str = _DATE
    advisories: tuple[str, ...] = ()


class SvnRow(NamedTuple):
    """One level of a module's or enclave's table."""

    status: TcbStatus
    isvsvn: int = 5
    date: str = _DATE
    advisories: tuple[str, ...] = ()


class Tables(NamedTuple):
    """What the collateral says. The default knows one level of each kind, up to date."""

    platform: tuple[PlatformRow, ...] = (PlatformRow("UpToDate"),)
    modules: Mapping[str, tuple[SvnRow, ...]] = {"TDX_01": (SvnRow("UpToDate"),)}
    qe: tuple[SvnRow, ...] = (SvnRow("UpToDate", 4),)
    evaluation_number: int = 18


UP_TO_DATE: Final = Tables()


@dataclass(frozen=True)
class Keys:
    """The private keys of one emulated machine and of its emulated vendor."""

    root: ec.EllipticCurvePrivateKey
    ca: ec.EllipticCurvePrivateKey
    pck: ec.EllipticCurvePrivateKey
    signer: ec.EllipticCurvePrivateKey
    attestation: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class EmulatedTdx:
    """One emulated machine at given security versions: `svn` and `svn2` are TEE_TCB_SVN at launch and now."""

    keys: Keys
    not_before: datetime
    not_after: datetime
    sgx: int = 5
    pcesvn: int = 13
    svn: bytes = bytes((5, 1, 5)).ljust(16, b"\0")
    svn2: bytes = bytes((5, 1, 5)).ljust(16, b"\0")
    qe_svn: int = 4

    @cached_property
    def root(self) -> bytes:
        """The root certificate (DER): what the trust folder must hold."""
        return self._certificate("root", ROOT, self.keys.root, self.keys.root)

    @cached_property
    def chain_pem(self) -> bytes:
        leaf = self._certificate("pck", PCK, self.keys.pck, self.keys.ca)
        ca = self._certificate("pck-ca", CA, self.keys.ca, self.keys.root)
        return b"".join(pem.encode("CERTIFICATE", one) for one in (leaf, ca, self.root))

    @cached_property
    def signer_pem(self) -> bytes:
        signer = self._certificate("tcb-signing", SIGNER, self.keys.signer, self.keys.root)
        return b"".join(pem.encode("CERTIFICATE", one) for one in (signer, self.root))

    def quote(
        self, report_data: bytes, mrtd: bytes, *, version: int = 5, body_type: int = tdx.TD15, **fields: Any
    ) -> bytes:
        """A signed quote; `fields` override any field of the body before it is signed."""
        body: dict[str, Any] = {
            "tee_tcb_svn": self.svn,
            "td_attributes": TD_ATTRIBUTES,
            "xfam": XFAM,
            "mrtd": mrtd,
            "report_data": report_data,
            **({"tee_tcb_svn2": self.svn2} if body_type == tdx.TD15 else {}),
        }
        signed = tdx.encode(body | fields, version=version, body_type=body_type, vendor=tdx.EMULATED_QE_VENDOR)
        return self.sealed(signed)

    def sealed(self, signed: bytes) -> bytes:
        """A quote around header and body: attestation key, QE report and chain, each vouching for the one before."""
        key = _point(self.keys.attestation)
        qe_report = tdx.QE_REPORT.write(
            {
                "attributes": QE_ATTRIBUTES,
                "mrenclave": MRENCLAVE,
                "mrsigner": MRSIGNER,
                "isv_prod_id": 2,
                "isv_svn": self.qe_svn,
                "report_data": hashlib.sha256(key + QE_AUTH).digest().ljust(64, b"\0"),
            }
        )
        signature, qe_signature = _raw(self.keys.attestation, signed), _raw(self.keys.pck, qe_report)
        return tdx.encode_signed(signed, signature, key, qe_report, qe_signature, QE_AUTH, self.chain_pem)

    def collateral(self, tables: Tables = UP_TO_DATE, revoked: Collection[int] = (), days: int = 30) -> dict[str, str]:
        """What judges this machine's quotes; `revoked` serial numbers go into the list of their issuer."""
        until = self.not_before + timedelta(days=days)
        info, identity = self._tcb_info(tables, until), self._qe_identity(tables, until)
        chain = self.signer_pem.decode()
        root_crl = self._crl("root", self.keys.root, [s for s in revoked if s != PCK], until)
        pck_crl = self._crl("pck-ca", self.keys.ca, [s for s in revoked if s == PCK], until)
        return {
            "tcb_info": info,
            "tcb_info_signature": _raw(self.keys.signer, info.encode()).hex(),
            "tcb_info_issuer_chain": chain,
            "qe_identity": identity,
            "qe_identity_signature": _raw(self.keys.signer, identity.encode()).hex(),
            "qe_identity_issuer_chain": chain,
            "root_ca_crl": root_crl.hex(),
            "pck_crl": pck_crl.hex(),
        }

    def bundle(self, quote: bytes, tables: Tables = UP_TO_DATE, revoked: Collection[int] = ()) -> EvidenceBundle:
        return EvidenceBundle("tdx", quote, collateral=self.collateral(tables, revoked))

    def _tcb_info(self, tables: Tables, until: datetime) -> str:
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        rows = {
            "id": "TDX",
            "version": 3,
            "issueDate": _text(self.not_before),
            "nextUpdate": _text(until),
            "fmspc": pck.EMULATED_FMSPC.hex(),
            "pceId": PCEID.hex(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": tables.evaluation_number,
            "tdxModule": module,
            "tdxModuleIdentities": [
                {"id": name, **module, "tcbLevels": list(map(_svn_level, levels))}
                for name, levels in tables.modules.items()
            ],
            "tcbLevels": list(map(_platform_level, tables.platform)),
        }
        return json.dumps(rows, separators=(",", ":"))

    def _qe_identity(self, tables: Tables, until: datetime) -> str:
        rows = {
            "id": "TD_QE",
            "version": 2,
            "issueDate": _text(self.not_before),
            "nextUpdate": _text(until),
            "tcbEvaluationDataNumber": tables.evaluation_number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": QE_ATTRIBUTES.hex(),
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": MRSIGNER.hex(),
            "isvprodid": 2,
            "tcbLevels": list(map(_svn_level, tables.qe)),
        }
        return json.dumps(rows, separators=(",", ":"))

    def _certificate(
        self, role: pck.Role, serial: int, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
    ) -> bytes:
        is_ca = role in ("root", "pck-ca")
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(role))
            .issuer_name(_name("pck-ca" if role == "pck" else "root"))
            .serial_number(serial)
            .not_valid_before(self.not_before)
            .not_valid_after(self.not_after)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(_usage(is_ca), critical=True)
            .add_extension(_unknown(EMULATED_MARK, b"\x05\x00"), critical=True)
        )
        if role == "pck":
            builder = builder.add_extension(_unknown(pck.SGX, self._sgx_extension()), critical=False)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.DER)

    def _sgx_extension(self) -> bytes:
        tcb = [_row(f"2.{i}", der.write_integer(self.sgx)) for i in range(1, 17)]
        tcb += [
            _row("2.17", der.write_integer(self.pcesvn)),
            _row("2.18", der.write(der.OCTET_STRING, bytes([self.sgx] * 16))),
        ]
        return der.write(
            der.SEQUENCE,
            _row("1", der.write(der.OCTET_STRING, b"EMULATED".ljust(16, b"\0"))),
            _row("2", der.write(der.SEQUENCE, *tcb)),
            _row("3", der.write(der.OCTET_STRING, PCEID)),
            _row("4", der.write(der.OCTET_STRING, pck.EMULATED_FMSPC)),
            _row("5", der.write(pck.ENUMERATED, b"\x01")),
            _row("6", der.write(der.OCTET_STRING, b"EMULATED".ljust(16, b"\0"))),
            _row("7", der.write(der.SEQUENCE, *(_row(f"7.{i}", der.write(der.BOOLEAN, b"\xff")) for i in (1, 2, 3)))),
        )

    def _crl(self, role: pck.Role, key: ec.EllipticCurvePrivateKey, revoked: Collection[int], until: datetime) -> bytes:
        builder = x509.CertificateRevocationListBuilder()
        builder = builder.issuer_name(_name(role)).last_update(self.not_before).next_update(until)
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(self.not_before).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _platform_level(row: PlatformRow) -> dict[str, Any]:
    tcb = {
        "sgxtcbcomponents": [{"svn": row.sgx}] * 16,
        "pcesvn": row.pcesvn,
        "tdxtcbcomponents": [{"svn": svn} for svn in row.tdx],
    }
    return {"tcb": tcb, "tcbDate": row.date, "tcbStatus": row.status, "advisoryIDs": list(row.advisories)}


def _svn_level(row: SvnRow) -> dict[str, Any]:
    tcb = {"isvsvn": row.isvsvn}
    return {"tcb": tcb, "tcbDate": row.date, "tcbStatus": row.status, "advisoryIDs": list(row.advisories)}


def _name(role: pck.Role) -> x509.Name:
    common = {
        "root": "Intel SGX Root CA",
        "pck-ca": "Intel SGX PCK Platform CA",
        "pck": "Intel SGX PCK Certificate",
        "tcb-signing": "Intel SGX TCB Signing",
    }[role]
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"EMULATED {common}"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, pck.EMULATED_ORGANIZATION),
        ]
    )


def _usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=not is_ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _unknown(dotted: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(dotted), value)


def _row(key: str, value: bytes) -> bytes:
    return der.write(der.SEQUENCE, der.write_oid(f"{pck.SGX}.{key}"), value)


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _raw(key: ec.EllipticCurvePrivateKey, signed: bytes) -> bytes:
    """r || s, big-endian."""
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
