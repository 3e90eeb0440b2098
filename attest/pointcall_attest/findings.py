"""Collects checks while evidence is verified or appraised: every check is made, and each names its specification.

`CLAUSES` is the one table of check ids of this half of the room; docs/checks.md has a line for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from pointcall_attest.errors import VerifyError
from pointcall_attest.verdict import Check

CLAUSES: Final[Mapping[str, str]] = {
    # both platforms
    "tee.platform": "docs/spec/trust.md, platforms",
    "tee.tier": "docs/spec/trust.md, tiers",
    "tee.emulated": "docs/spec/trust.md, tiers",
    "tee.report_data": "docs/spec/evidence.md, binding",
    "tee.appraisal": "docs/spec/trust.md, policy",
    "tee.measurement": "docs/spec/evidence.md, measurements",
    # SNP, authenticity
    "snp.root": "AMD 57230, ARK; docs/spec/trust.md",
    "snp.mark": "docs/spec/trust.md, marks",
    "snp.chain": "AMD 57230, section 3",
    "snp.ca": "AMD 57230, ASK and ASVK",
    "snp.leaf": "AMD 57230, VCEK and VLEK",
    "snp.validity": "RFC 5280, 4.1.2.5",
    "snp.crl": "AMD 57230, CRL",
    "snp.crl_required": "docs/spec/trust.md, require_crl",
    "snp.signing_key": "AMD 56860, table 23, SIGNING_KEY",
    "snp.product": "AMD 56860, table 23, CPUID_FAM_ID",
    "snp.certificate_tcb": "AMD 57230, table 8",
    "snp.chip_id": "AMD 57230, table 8, HWID",
    "snp.signature": "AMD 56860, 10.4 and chapter 9",
    # SNP, appraisal
    "snp.version": "AMD 56860, table 23, VERSION",
    "snp.debug": "AMD 56860, table 10, DEBUG",
    "snp.migration": "AMD 56860, table 10, MIGRATE_MA",
    "snp.smt": "AMD 56860, table 10, SMT",
    "snp.single_socket": "AMD 56860, table 10, SINGLE_SOCKET",
    "snp.abi": "AMD 56860, table 10, ABI_MAJOR",
    "snp.guest_policy": "AMD 56860, table 10",
    "snp.guest_svn": "AMD 56860, table 23, GUEST_SVN",
    "snp.vmpl": "AMD 56860, table 23, VMPL",
    "snp.platform_info": "AMD 56860, table 24; AMD-SB-3015",
    "snp.tcb_order": "AMD 56860, 2.2",
    "snp.reported_tcb": "AMD 56860, table 23, REPORTED_TCB",
    "snp.committed_tcb": "AMD 56860, table 23, COMMITTED_TCB",
    "snp.launch_tcb": "AMD 56860, table 23, LAUNCH_TCB",
    "snp.launch_mitigations": "AMD 56860, table 23, LAUNCH_MIT_VECTOR",
    "snp.current_mitigations": "AMD 56860, table 23, CURRENT_MIT_VECTOR",
    "snp.host_data": "AMD 56860, table 23, HOST_DATA",
    "snp.family_id": "AMD 56860, table 23, FAMILY_ID",
    "snp.image_id": "AMD 56860, table 23, IMAGE_ID",
    "snp.id_key": "AMD 56860, table 23, ID_KEY_DIGEST",
    "snp.author_key": "AMD 56860, table 23, AUTHOR_KEY_DIGEST",
    "snp.chip_list": "docs/spec/trust.md, chip_ids",
    "snp.csp_list": "docs/spec/trust.md, csp_ids",
    "hcl.binding": "Azure confidential VM guest attestation, runtime data",
    "hcl.platform": "Azure confidential VM guest attestation, TDX",
    # TDX, authenticity; the numbers are steps of Intel's TDX DCAP quote verification
    "tdx.root": "Intel PCK profile, 1.1; docs/spec/trust.md",
    "tdx.mark": "docs/spec/trust.md, marks",
    "tdx.vendor": "Intel TDX DCAP, QE vendor id",
    "tdx.pck_chain": "Intel TDX DCAP, 4.1.2.2",
    "tdx.signing_chain": "Intel PCS API v4, issuer chains",
    "tdx.validity": "RFC 5280, 4.1.2.5",
    "tdx.root_crl": "Intel TDX DCAP, 4.1.2.3",
    "tdx.pck_crl": "Intel TDX DCAP, 4.1.2.3",
    "tdx.qe_signature": "Intel TDX DCAP, 4.1.2.4.12",
    "tdx.qe_binding": "Intel TDX DCAP, 4.1.2.4.13",
    "tdx.signature": "Intel TDX DCAP, 4.1.2.4.14",
    "tdx.tcb_info": "Intel PCS API v4, TCB info V3",
    "tdx.qe_identity": "Intel PCS API v4, enclave identity V2",
    "tdx.collateral_dates": "Intel PCS API v4, issueDate and nextUpdate",
    "tdx.fmspc": "Intel TDX DCAP, 4.1.2.4.9",
    "tdx.module": "Intel TDX DCAP, 4.1.2.4.10",
    "tdx.qe": "Intel TDX DCAP, 4.1.2.4.15",
    # TDX, appraisal
    "tdx.tcb_status": "Intel TDX DCAP, 4.1.2.5",
    "tdx.advisories": "Intel security advisories",
    "tdx.tcb_date": "Intel PCS API v4, tcbDate",
    "tdx.evaluation_number": "Intel PCS API v4, tcbEvaluationDataNumber",
    "tdx.debug": "Intel TDX module ABI, ATTRIBUTES.TUD",
    "tdx.sept_ve_disable": "Intel TDX module ABI, ATTRIBUTES.SEPT_VE_DISABLE",
    "tdx.td_attributes": "Intel TDX module ABI, ATTRIBUTES",
    "tdx.xfam": "Intel TDX module ABI, XFAM",
    "tdx.mrservicetd": "Intel TDX module ABI, SERVTD_HASH",
    "tdx.mrseam": "Intel TDX module ABI, MRSEAM",
    "tdx.mrconfigid": "Intel TDX module ABI, MRCONFIGID",
    "tdx.mrowner": "Intel TDX module ABI, MROWNER",
    "tdx.mrownerconfig": "Intel TDX module ABI, MROWNERCONFIG",
    "tdx.rtmr0": "Intel TDX module ABI, RTMR",
    "tdx.rtmr1": "Intel TDX module ABI, RTMR",
    "tdx.rtmr2": "Intel TDX module ABI, RTMR",
    "tdx.rtmr3": "Intel TDX module ABI, RTMR",
    "tdx.event_log": "UEFI 2.10, 38.4; TCG PC Client Platform Firmware Profile",
    "tdx.dynamic_platform": "Intel PCK profile, Dynamic Platform",
    "tdx.cached_keys": "Intel PCK profile, Cached Keys",
    "tdx.smt": "Intel PCK profile, SMT Enabled",
}


class UnverifiedError(VerifyError):
    """Evidence is not authentic. Carries every check that was made, passed or not."""

    id = "attest.unverified"

    def __init__(self, checks: tuple[Check, ...]) -> None:
        failed = [c for c in checks if c.outcome == "fail"]
        first = failed[0]
        super().__init__(
            "not authentic: " + ", ".join(c.id for c in failed),
            id=first.id,
            want=first.expected,
            got=first.observed,
            hint=first.hint,
        )
        self.checks = checks


def stamp(at: datetime) -> str:
    """A time in UTC to the second, as RFC 3339 writes it; six times as fast as strftime."""
    return at.isoformat()[:19] + "Z"


class Findings:
    """A growing list of checks. Ids are looked up in CLAUSES, so an undocumented id is a KeyError in tests."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def check(self, id: str, passed: bool, *, expected: str, observed: str, hint: str = "") -> bool:
        """Note a check that was made, and give back whether it passed."""
        self._checks.append(
            Check(id, "pass" if passed else "fail", expected, observed, CLAUSES[id], "" if passed else hint)
        )
        return passed

    def skip(self, id: str, why: str) -> None:
        """Note a check that was not made, and why."""
        self._checks.append(Check.skipped(id, why, spec=CLAUSES[id]))

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(self._checks)

    def verified(self) -> tuple[Check, ...]:
        """Every check, or UnverifiedError where one failed."""
        if any(c.outcome == "fail" for c in self._checks):
            raise UnverifiedError(self.checks)
        return self.checks
