"""AMD SEV-SNP report: bytes <-> Report. No I/O, no policy, no crypto. Spec: AMD 56860, table 23 (docs/spec/snp.md).

Parsing is exact: 1184 bytes, known version, every reserved byte zero (also those that no signature covers).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, NamedTuple

from pointcall_attest.errors import MalformedError
from pointcall_attest.layout import Field, Layout
from pointcall_attest.tee_policy import Line

SIZE: Final = 0x4A0
SIGNED: Final = slice(0, 0x2A0)  # the signature covers these bytes
VERSIONS: Final = (2, 3, 5)
ECDSA_P384_SHA384: Final = 1
VCEK, VLEK, NO_KEY = 0, 1, 7  # SIGNING_KEY
VMPLS: Final = (0, 1, 2, 3, 0xFFFF_FFFF)  # the last: the host asked for the report, not the guest

LAYOUT: Final = Layout(
    "SNP report",
    SIZE,
    (
        Field(0x000, 4, "version", integer=True),
        Field(0x004, 4, "guest_svn", integer=True),
        Field(0x008, 8, "policy", integer=True),
        Field(0x010, 16, "family_id"),
        Field(0x020, 16, "image_id"),
        Field(0x030, 4, "vmpl", integer=True),
        Field(0x034, 4, "signature_algo", integer=True),
        Field(0x038, 8, "current_tcb"),
        Field(0x040, 8, "platform_info", integer=True),
        Field(0x048, 4, "key_info", integer=True),
        Field(0x04C, 4, ""),
        Field(0x050, 64, "report_data"),  # binding.report_data(): manifest, policy, epoch key, nonce
        Field(0x090, 48, "measurement"),  # SHA-384 launch digest
        Field(0x0C0, 32, "host_data"),
        Field(0x0E0, 48, "id_key_digest"),
        Field(0x110, 48, "author_key_digest"),
        Field(0x140, 32, "report_id"),
        Field(0x160, 32, "report_id_ma"),  # all FF: no migration agent
        Field(0x180, 8, "reported_tcb"),
        Field(0x188, 1, "cpuid_family", integer=True),  # version 3 and later; zero in version 2
        Field(0x189, 1, "cpuid_model", integer=True),
        Field(0x18A, 1, "cpuid_stepping", integer=True),
        Field(0x18B, 21, ""),
        Field(0x1A0, 64, "chip_id"),
        Field(0x1E0, 8, "committed_tcb"),
        Field(0x1E8, 1, "current_build", integer=True),
        Field(0x1E9, 1, "current_minor", integer=True),
        Field(0x1EA, 1, "current_major", integer=True),
        Field(0x1EB, 1, ""),
        Field(0x1EC, 1, "committed_build", integer=True),
        Field(0x1ED, 1, "committed_minor", integer=True),
        Field(0x1EE, 1, "committed_major", integer=True),
        Field(0x1EF, 1, ""),
        Field(0x1F0, 8, "launch_tcb"),
        Field(0x1F8, 8, "launch_mit_vector", integer=True),  # version 5; zero before
        Field(0x200, 8, "current_mit_vector", integer=True),
        Field(0x208, 152, ""),
        Field(0x2A0, 48, "signature_r"),  # little-endian
        Field(0x2D0, 24, ""),
        Field(0x2E8, 48, "signature_s"),
        Field(0x318, 24, ""),
        Field(0x330, 368, ""),  # not signed: without this rule anyone could change the evidence digest
    ),
    length_id="snp.length.malformed",
    reserved_id="snp.reserved.malformed",
)

POLICY_BITS: Final[Mapping[str, int]] = {
    "smt": 16,
    "migrate_ma": 18,
    "debug": 19,
    "single_socket": 20,
    "cxl_allow": 21,
    "mem_aes_256_xts": 22,
    "rapl_dis": 23,
    "ciphertext_hiding": 24,
    "page_swap_disable": 25,
}
PLATFORM_BITS: Final[Mapping[str, int]] = {
    "smt_en": 0,
    "tsme_en": 1,
    "ecc_en": 2,
    "rapl_dis": 3,
    "ciphertext_hiding_dram": 4,
    "alias_check_complete": 5,
    "sev_tio": 7,
}
_POLICY_MUST_BE_ONE: Final = 1 << 17
_POLICY_RESERVED_FROM: Final = 26
_KEY_INFO_RESERVED_FROM: Final = 5


class Tcb(NamedTuple):
    """Security versions of the firmware parts. Compare part by part, never as one number."""

    fmc: int
    bl: int
    tee: int
    snp: int
    ucode: int

    def at_least(self, least: Tcb) -> bool:
        """True where no part is below `least`."""
        return all(have >= want for have, want in zip(self, least, strict=True))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in zip(self._fields, self, strict=True))


def tcb_of(line: Line, raw: bytes) -> Tcb:
    """The parts of a TCB_VERSION (8 bytes) of one product line; MalformedError where a reserved byte is set.

    Milan and Genoa: [0] BL, [1] TEE, [6] SNP, [7] microcode. Turin and Venice: [0] FMC, [1] BL, [2] TEE, [3] SNP,
    [7] microcode. Source: AMD 56860, 2.2.
    """
    if line in ("Milan", "Genoa"):
        tcb, reserved = Tcb(0, raw[0], raw[1], raw[6], raw[7]), raw[2:6]
    else:
        tcb, reserved = Tcb(raw[0], raw[1], raw[2], raw[3], raw[7]), raw[4:7]
    if any(reserved):
        raise MalformedError("a reserved byte of a TCB version is set", id="snp.tcb.malformed", got=raw.hex())
    return tcb


def tcb_bytes(line: Line, tcb: Tcb) -> bytes:
    """The TCB_VERSION of these parts: `tcb_of` backwards."""
    if line in ("Milan", "Genoa"):
        assert tcb.fmc == 0, f"{line} has no FMC"
        return struct.pack("<BB4xBB", tcb.bl, tcb.tee, tcb.snp, tcb.ucode)
    return struct.pack("<BBBB3xB", tcb.fmc, tcb.bl, tcb.tee, tcb.snp, tcb.ucode)


def line_of(family: int, model: int) -> Line | None:
    """The product line whose keys and TCB layout a CPU uses; None for a CPU that is not known."""
    for line, of_family, models in _LINES:
        if family == of_family and any(low <= model <= high for low, high in models):
            return line
    return None


_LINES: Final[tuple[tuple[Line, int, tuple[tuple[int, int], ...]], ...]] = (
    ("Milan", 0x19, ((0x00, 0x0F),)),
    ("Genoa", 0x19, ((0x10, 0x1F), (0xA0, 0xAF))),  # Axh: Bergamo and Siena
    ("Turin", 0x1A, ((0x00, 0x11),)),
    ("Venice", 0x1A, ((0x50, 0x57), (0x90, 0x9F), (0xA0, 0xAF), (0xC0, 0xC7))),
)


@dataclass(frozen=True, slots=True)
class Report:
    """One report, well-formed and nothing more: not yet authentic, not yet acceptable."""

    raw: bytes = field(repr=False)
    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_family: int
    cpuid_model: int
    cpuid_stepping: int
    chip_id: bytes
    committed_tcb: bytes
    current_build: int
    current_minor: int
    current_major: int
    committed_build: int
    committed_minor: int
    committed_major: int
    launch_tcb: bytes
    launch_mit_vector: int
    current_mit_vector: int
    signature_r: bytes
    signature_s: bytes

    @property
    def signed_bytes(self) -> bytes:
        return self.raw[SIGNED]

    @property
    def signing_key(self) -> int:
        """VCEK, VLEK or NO_KEY."""
        return self.key_info >> 2 & 7

    @property
    def author_key_en(self) -> bool:
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """The firmware was told not to sign: the signature is zero."""
        return bool(self.key_info & 2)

    @property
    def line(self) -> Line | None:
        """The product line by CPUID; None where the CPU is unknown or the version does not say (2)."""
        return line_of(self.cpuid_family, self.cpuid_model) if self.version > 2 else None

    def policy_bit(self, name: str) -> bool:
        return bool(self.policy >> POLICY_BITS[name] & 1)


assert LAYOUT.names == tuple(f.name for f in fields(Report))[1:]


def parse(raw: bytes) -> Report:
    """The report in exactly these 1184 bytes; MalformedError `snp.*.malformed` for anything else."""
    report = Report(raw, *LAYOUT.read(raw))
    _known(report.version in VERSIONS, "snp.version.malformed", "one of 2, 3, 5", report.version)
    _known(report.signature_algo == ECDSA_P384_SHA384, "snp.algorithm.malformed", "1", report.signature_algo)
    _known(report.vmpl in VMPLS, "snp.vmpl.malformed", "0 to 3, or FFFFFFFF", report.vmpl)
    _parse_bits(report)
    _parse_by_version(report)
    return report


def _parse_bits(report: Report) -> None:
    policy_is_right = report.policy & _POLICY_MUST_BE_ONE and not report.policy >> _POLICY_RESERVED_FROM
    _known(bool(policy_is_right), "snp.policy.malformed", "bit 17 set, bits 26 and up clear", hex(report.policy))
    key_is_known = report.signing_key in (VCEK, VLEK, NO_KEY) and not report.key_info >> _KEY_INFO_RESERVED_FROM
    _known(key_is_known, "snp.key_info.malformed", "SIGNING_KEY 0, 1 or 7, bits 5 and up clear", hex(report.key_info))


def _parse_by_version(report: Report) -> None:
    cpuid = (report.cpuid_family, report.cpuid_model, report.cpuid_stepping)
    _known(report.version > 2 or not any(cpuid), "snp.reserved.malformed", "zero at 0x188 in version 2", cpuid)
    mitigations = (report.launch_mit_vector, report.current_mit_vector)
    _known(
        report.version > 3 or not any(mitigations),
        "snp.reserved.malformed",
        "zero at 0x1f8 before version 5",
        mitigations,
    )
    if line := report.line:
        for raw in (report.current_tcb, report.reported_tcb, report.committed_tcb, report.launch_tcb):
            tcb_of(line, raw)


def _known(condition: bool, id: str, want: str, got: object) -> None:
    if not condition:
        raise MalformedError("not an SNP report that we know", id=id, want=want, got=str(got))


def encode(values: Mapping[str, int | bytes]) -> bytes:
    """The report with these fields, unsigned fields zero. For the emulated platform and tests."""
    return LAYOUT.write(values)
