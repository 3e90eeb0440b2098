"""The emulated SNP platform: real formats under a root that is not AMD's. No I/O; keys, time and ids are values.

It goes through the same verifier as hardware. Every certificate carries marks that every other verifier refuses:
another organization, another common name and a critical private extension; the chip id starts with EMULATED.
It proves nothing about confidentiality or integrity. Spec: docs/spec/trust.md, section Emulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pointcall_attest import certs, der, snp
from pointcall_attest.certs import AMD, Kind
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.snp import Tcb
from pointcall_attest.tee_policy import Line

CPUID: Final[Mapping[Line, tuple[int, int, int]]] = {
    "Milan": (0x19, 0x01, 0x01),
    "Genoa": (0x19, 0x11, 0x01),
    "Turin": (0x1A, 0x02, 0x01),
    "Venice": (0x1A, 0x50, 0x00),
}
TCBS: Final[Mapping[Line, Tcb]] = {
    "Milan": Tcb(0, 4, 0, 24, 219),
    "Genoa": Tcb(0, 10, 0, 25, 84),
    "Turin": Tcb(0, 1, 0, 2, 71),
    "Venice": Tcb(0, 1, 0, 1, 1),
}
POLICY: Final = 0x3_0000  # SMT allowed, bit 17; no debug, no migration agent
PLATFORM_INFO: Final = 0x25  # SMT, ECC, alias check complete
_OF_ROOT: Final[Mapping[Kind, int]] = {"ARK": 0x1_0000, "ASK": 0x1_0001, "ASVK": 0x1_0101, "VCEK": 0, "VLEK": 0}
_EXTENSION_CA: Final[Mapping[Kind, tuple[bytes, bytes]]] = {
    "ARK": (bytes.fromhex("03020106"), bytes.fromhex("30030101ff")),
    "ASK": (bytes.fromhex("03020104"), bytes.fromhex("30060101ff020100")),
    "ASVK": (bytes.fromhex("03020104"), bytes.fromhex("30060101ff020100")),
}


@dataclass(frozen=True)
class Keys:
    """The private keys of one emulated machine. `ca` signs the leaf: it is the ASK of a VCEK or the ASVK of a VLEK."""

    ark: rsa.RSAPrivateKey
    ca: rsa.RSAPrivateKey
    leaf: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class EmulatedSnp:
    """One emulated machine: `chip` is 8 bytes that follow EMULATED in its chip id (unused on Turin and Venice)."""

    line: Line
    keys: Keys
    chip: bytes
    not_before: datetime
    not_after: datetime
    tcb: Tcb
    kind: Kind = "VCEK"
    csp_id: str = "EMULATED provider"

    @cached_property
    def ark(self) -> bytes:
        """The root certificate (DER): what the trust folder must hold."""
        return self._certificate("ARK", _spki(self.keys.ark), "ARK", self.keys.ark)

    @cached_property
    def ca(self) -> bytes:
        return self._certificate(self._ca_kind, _spki(self.keys.ca), "ARK", self.keys.ark)

    @cached_property
    def leaf(self) -> bytes:
        return self._certificate(self.kind, _spki(self.keys.leaf), self._ca_kind, self.keys.ca)

    @property
    def certificates(self) -> tuple[bytes, bytes, bytes]:
        return self.leaf, self.ca, self.ark

    @property
    def chip_id(self) -> bytes:
        """64 bytes as a report carries them; zero for a VLEK, as providers mask it."""
        if self.kind == "VLEK":
            return bytes(64)
        return (certs.EMULATED_CHIP + (b"" if self._short_id else self.chip.ljust(56, b"\0"))).ljust(64, b"\0")

    def report(self, report_data: bytes, measurement: bytes, report_id: bytes, **fields: int | bytes) -> bytes:
        """A signed report; `fields` override any field of snp.LAYOUT before it is signed."""
        tcb = snp.tcb_bytes(self.line, self.tcb)
        family, model, stepping = CPUID[self.line]
        values: dict[str, int | bytes] = {
            "version": 5 if self.line in ("Turin", "Venice") else 3,
            "policy": POLICY,
            "signature_algo": snp.ECDSA_P384_SHA384,
            "platform_info": PLATFORM_INFO,
            "key_info": (snp.VLEK if self.kind == "VLEK" else snp.VCEK) << 2,
            "report_data": report_data,
            "measurement": measurement,
            "report_id": report_id,
            "report_id_ma": b"\xff" * 32,
            "cpuid_family": family,
            "cpuid_model": model,
            "cpuid_stepping": stepping,
            "chip_id": self.chip_id,
            **dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), tcb),
        }
        return sign_report(values | fields, self.keys.leaf)

    def bundle(self, report: bytes) -> EvidenceBundle:
        return EvidenceBundle("snp", report, self.certificates)

    def crl(self, revoked: Sequence[int], this_update: datetime, next_update: datetime) -> bytes:
        """A revocation list in AMD's form, signed by the ARK."""
        entries = [der.write(der.SEQUENCE, der.write_integer(s), der.write_time(this_update)) for s in revoked]
        tbs = der.write(
            der.SEQUENCE,
            der.write_integer(1),
            certs.PSS_ALGORITHM,
            _name("ARK", self.line),
            der.write_time(this_update),
            der.write_time(next_update),
            *([der.write(der.SEQUENCE, *entries)] if entries else []),
        )
        return _signed(tbs, self.keys.ark)

    @property
    def _ca_kind(self) -> Kind:
        return "ASVK" if self.kind == "VLEK" else "ASK"

    @property
    def _short_id(self) -> bool:
        return self.line in ("Turin", "Venice")

    def _certificate(self, kind: Kind, spki: bytes, issuer: Kind, key: rsa.RSAPrivateKey) -> bytes:
        """One certificate in AMD's form: serial 0 for a leaf, extensions as 57230 lists them, and our marks."""
        extensions = [_extension(certs.EMULATED_MARK, b"\x05\x00", critical=True)]
        if kind in _EXTENSION_CA:
            usage, constraints = _EXTENSION_CA[kind]
            extensions += [_extension("2.5.29.15", usage, True), _extension("2.5.29.19", constraints, True)]
        else:
            extensions += self._leaf_extensions()
        tbs = der.write(
            der.SEQUENCE,
            der.write(der.explicit(0), der.write_integer(2)),
            der.write_integer(_OF_ROOT[kind]),
            certs.PSS_ALGORITHM,
            _name(issuer, self.line),
            der.write(der.SEQUENCE, der.write_time(self.not_before), der.write_time(self.not_after)),
            _name(kind, self.line),
            spki,
            der.write(der.explicit(3), der.write(der.SEQUENCE, *extensions)),
        )
        return _signed(tbs, key)

    def _leaf_extensions(self) -> list[bytes]:
        tcb, short = self.tcb, self._short_id
        parts = {"3.1": tcb.bl, "3.2": tcb.tee, "3.3": tcb.snp, "3.8": tcb.ucode} | ({"3.9": tcb.fmc} if short else {})
        rows = {"1": der.write_integer(int(short)), "2": der.write(der.IA5_STRING, self.line.encode())}
        rows |= {key: der.write_integer(value) for key, value in parts.items()}
        if self.kind == "VCEK":
            rows["4"] = self.chip_id[:8] if short else self.chip_id
        else:
            rows["5"] = der.write(der.IA5_STRING, self.csp_id.encode())
        return [_extension(f"{AMD}.{key}", value) for key, value in rows.items()]


def sign_report(values: Mapping[str, int | bytes], key: ec.EllipticCurvePrivateKey) -> bytes:
    """A report with these fields, signed as the firmware does (AMD 56860, 10.4)."""
    unsigned = snp.encode(values)
    r, s = decode_dss_signature(key.sign(unsigned[snp.SIGNED], ec.ECDSA(hashes.SHA384())))
    return snp.encode({**values, "signature_r": r.to_bytes(48, "little"), "signature_s": s.to_bytes(48, "little")})


def _name(kind: Kind, line: Line) -> bytes:
    common = {
        "ARK": f"ARK-{line}",
        "ASK": f"SEV-{line}",
        "ASVK": f"SEV-VLEK-{line}",
        "VCEK": "SEV-VCEK",
        "VLEK": "SEV-VLEK",
    }
    parts = (("2.5.4.10", certs.EMULATED_ORGANIZATION), ("2.5.4.3", f"EMULATED-{common[kind]}"))
    rows = [
        der.write(der.SEQUENCE, der.write_oid(oid), der.write(der.UTF8_STRING, text.encode())) for oid, text in parts
    ]
    return der.write(der.SEQUENCE, *(der.write(der.SET, row) for row in rows))


def _extension(oid: str, value: bytes, critical: bool = False) -> bytes:
    flag = [der.write(der.BOOLEAN, b"\xff")] if critical else []
    return der.write(der.SEQUENCE, der.write_oid(oid), *flag, der.write(der.OCTET_STRING, value))


def _spki(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _signed(tbs: bytes, key: rsa.RSAPrivateKey) -> bytes:
    signature = key.sign(tbs, certs.PSS, hashes.SHA384())
    return der.write(der.SEQUENCE, tbs, certs.PSS_ALGORITHM, der.write_bits(signature))
