"""Intel TDREPORT: bytes <-> TdReport. No I/O. Its MAC can be checked on the same machine only: it proves nothing here.

Spec: Intel TDX module ABI, TDREPORT_STRUCT; docs/spec/tdx.md, section TDREPORT.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Final

from pointcall_attest.errors import MalformedError
from pointcall_attest.layout import Field, Layout

SIZE: Final = 1024
TYPES: Final = (bytes.fromhex("81000000"), bytes.fromhex("81000100"))  # the second with a service TD hash

LAYOUT: Final = Layout(
    "TDREPORT",
    SIZE,
    (
        Field(0, 4, "type"),
        Field(4, 12, ""),
        Field(16, 16, "cpusvn"),
        Field(32, 48, "tee_tcb_info_hash"),
        Field(80, 48, "tdinfo_hash"),
        Field(128, 64, "report_data"),
        Field(192, 32, ""),
        Field(224, 32, "mac"),
        Field(256, 8, "valid"),
        Field(264, 16, "tee_tcb_svn"),
        Field(280, 48, "mrseam"),
        Field(328, 48, "mrsignerseam"),
        Field(376, 8, "seam_attributes"),
        Field(384, 16, "tee_tcb_svn2"),
        Field(400, 95, ""),
        Field(495, 17, ""),
        Field(512, 8, "td_attributes", integer=True),
        Field(520, 8, "xfam", integer=True),
        Field(528, 48, "mrtd"),
        Field(576, 48, "mrconfigid"),
        Field(624, 48, "mrowner"),
        Field(672, 48, "mrownerconfig"),
        Field(720, 48, "rtmr0"),
        Field(768, 48, "rtmr1"),
        Field(816, 48, "rtmr2"),
        Field(864, 48, "rtmr3"),
        Field(912, 48, "servtd_hash"),
        Field(960, 64, ""),
    ),
    length_id="tdreport.length.malformed",
    reserved_id="tdreport.reserved.malformed",
)


@dataclass(frozen=True, slots=True)
class TdReport:
    """One TDREPORT whose two hashes agree with its parts."""

    type: bytes
    cpusvn: bytes
    tee_tcb_info_hash: bytes
    tdinfo_hash: bytes
    report_data: bytes
    mac: bytes
    valid: bytes
    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seam_attributes: bytes
    tee_tcb_svn2: bytes
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
    servtd_hash: bytes


assert LAYOUT.names == tuple(f.name for f in fields(TdReport))


def parse(raw: bytes) -> TdReport:
    """The TDREPORT in exactly these 1024 bytes; MalformedError `tdreport.*.malformed` for anything else."""
    report = TdReport(*LAYOUT.read(raw))
    if report.type not in TYPES:
        raise MalformedError("not a TDREPORT", id="tdreport.type.malformed", want="81000x00", got=report.type.hex())
    for name, want, part in (
        ("TEE_TCB_INFO", report.tee_tcb_info_hash, raw[256:495]),
        ("TDINFO", report.tdinfo_hash, raw[512:1024]),
    ):
        if (got := hashlib.sha384(part).digest()) != want:
            raise MalformedError(
                f"the hash of {name} does not agree", id="tdreport.hash.malformed", want=want.hex(), got=got.hex()
            )
    return report
