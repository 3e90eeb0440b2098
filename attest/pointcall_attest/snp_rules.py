"""Is an authentic SNP report acceptable to a policy? Every rule is a check; none stops the others. No I/O, no crypto.

Spec: AMD 56860, tables 10, 23 and 24; docs/spec/snp.md, section Appraisal; docs/spec/trust.md, section Policy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from pointcall_attest import snp
from pointcall_attest.findings import Findings
from pointcall_attest.snp import Report, Tcb
from pointcall_attest.snp_chain import Authentic, Tcbs
from pointcall_attest.tee_policy import Line, SnpPolicy, TcbMinimum, TeePolicy
from pointcall_attest.tee_rules import check_binding, check_bits, check_crl_required, check_member, check_tier
from pointcall_attest.verdict import Verdict

_NO_MIGRATION_AGENT: Final = b"\xff" * 32


def appraise(
    evidence: Authentic, policy: TeePolicy, *, report_data: bytes | None, measurements: Collection[str] | None
) -> Verdict:
    """A verdict with the checks of verification first, then one check for every rule of the policy.

    `report_data` (64 bytes) and `measurements` (hex) of None are listed as not checked; an empty collection refuses.
    """
    findings, report = Findings(), evidence.report
    check_tier(findings, "snp", evidence.tier, policy)
    _check_version(findings, report, policy.snp)
    _check_guest_policy(findings, evidence, policy)
    check_crl_required(findings, "snp", evidence.checks, policy.snp.require_crl)
    _check_masks(findings, report, policy.snp)
    _check_tcb(findings, evidence, policy.snp)
    _check_identities(findings, evidence, policy.snp)
    check_binding(findings, report.report_data, report.measurement, report_data, measurements)
    return Verdict(evidence.checks + findings.checks, evidence.tier, "snp", claims(evidence))


def _check_version(findings: Findings, report: Report, policy: SnpPolicy) -> None:
    findings.check(
        "snp.version",
        report.version > 2 or policy.allow_report_v2,
        expected="3 or later" + (", or 2" if policy.allow_report_v2 else ""),
        observed=str(report.version),
        hint="a version 2 report does not authenticate the product; snp.allow_report_v2 opts in",
    )
    findings.check(
        "snp.guest_svn",
        report.guest_svn >= policy.min_guest_svn,
        expected=f">= {policy.min_guest_svn}",
        observed=str(report.guest_svn),
    )


def _check_guest_policy(findings: Findings, evidence: Authentic, policy: TeePolicy) -> None:
    report, ours = evidence.report, policy.snp
    debug, debug_allowed = report.policy_bit("debug"), policy.allow_debug and evidence.tier == "emulated"
    findings.check(
        "snp.debug",
        not debug or debug_allowed,
        expected="debugging forbidden" + (" or allowed" if debug_allowed else ""),
        observed="the host may read guest memory" if debug else "debugging forbidden",
        hint="launch the guest without the DEBUG bit",
    )
    migrates = report.policy_bit("migrate_ma") or report.report_id_ma != _NO_MIGRATION_AGENT
    findings.check(
        "snp.migration",
        not migrates or ours.allow_migration_agent,
        expected="no migration agent" + (" or one" if ours.allow_migration_agent else ""),
        observed="a migration agent may be associated" if migrates else "no migration agent",
    )
    smt, single = report.policy_bit("smt"), report.policy_bit("single_socket")
    findings.check("snp.smt", not smt or ours.allow_smt, expected=f"SMT {ours.allow_smt}", observed=f"SMT {smt}")
    findings.check(
        "snp.single_socket",
        single or not ours.require_single_socket,
        expected="one socket" if ours.require_single_socket else "any number of sockets",
        observed="one socket" if single else "any number of sockets",
    )
    least, abi = tuple(map(int, ours.min_abi.split("."))), (report.policy >> 8 & 0xFF, report.policy & 0xFF)
    findings.check("snp.abi", abi >= least, expected=f">= {ours.min_abi}", observed=f"{abi[0]}.{abi[1]}")
    findings.check(
        "snp.vmpl",
        report.vmpl in policy.vmpl,
        expected=" or ".join(map(str, policy.vmpl)) or "nothing",
        observed=str(report.vmpl),
        hint="less privileged software of the guest asked for this report",
    )


def _check_masks(findings: Findings, report: Report, policy: SnpPolicy) -> None:
    for name, value, bits in (
        ("snp.guest_policy", report.policy, policy.guest_policy),
        ("snp.platform_info", report.platform_info, policy.platform_info),
        ("snp.launch_mitigations", report.launch_mit_vector, policy.launch_mitigations),
        ("snp.current_mitigations", report.current_mit_vector, policy.current_mitigations),
    ):
        check_bits(findings, name, value, bits)


def _check_tcb(findings: Findings, evidence: Authentic, policy: SnpPolicy) -> None:
    current, reported, committed, launch = evidence.tcbs
    findings.check(
        "snp.tcb_order",
        committed.at_least(reported) and current.at_least(committed),
        expected="reported <= committed <= current, part by part",
        observed=f"reported {reported}; committed {committed}; current {current}",
    )
    for name, have, minimums in (
        ("snp.reported_tcb", reported, policy.min_tcb),
        ("snp.committed_tcb", committed, policy.min_committed_tcb),
        ("snp.launch_tcb", launch, policy.min_launch_tcb),
    ):
        _check_minimum(findings, name, have, evidence.line, minimums)


def _check_minimum(findings: Findings, id: str, have: Tcb, line: Line, minimums: Mapping[Line, TcbMinimum]) -> None:
    least = minimums.get(line)
    if least is None:
        return findings.skip(id, f"{have}; the policy sets no minimum for {line}")
    want = Tcb(least.fmc, least.bl, least.tee, least.snp, least.ucode)
    findings.check(id, have.at_least(want), expected=f">= {want}", observed=str(have), hint="update the firmware")
    return None


def _check_identities(findings: Findings, evidence: Authentic, policy: SnpPolicy) -> None:
    report, facts = evidence.report, evidence.chain.facts
    chip = report.chip_id.rstrip(b"\0") if facts.hwid is None else facts.hwid
    author = report.author_key_digest if report.author_key_en else bytes(48)
    check_member(findings, "snp.host_data", report.host_data.hex(), policy.host_data and (policy.host_data,))
    check_member(findings, "snp.family_id", report.family_id.hex(), policy.family_id and (policy.family_id,))
    check_member(findings, "snp.image_id", report.image_id.hex(), policy.image_id and (policy.image_id,))
    check_member(findings, "snp.id_key", report.id_key_digest.hex(), policy.id_key_digests)
    check_member(findings, "snp.author_key", author.hex(), policy.author_key_digests)
    check_member(findings, "snp.chip_list", chip.hex(), policy.chip_ids)
    check_member(findings, "snp.csp_list", facts.csp_id or "none (VCEK)", policy.csp_ids)


def claims(evidence: Authentic) -> dict[str, Any]:
    """What the report says, readable. Authentic, whether acceptable or not."""
    report, facts = evidence.report, evidence.chain.facts
    return {
        **described(report),
        "product": facts.product,
        "line": evidence.line,
        "csp_id": facts.csp_id,
        "root": evidence.chain.ark.subject_name,
        **{f"{name}_tcb": tcb._asdict() for name, tcb in zip(Tcbs._fields, evidence.tcbs, strict=True)},
    }


def described(report: Report) -> dict[str, Any]:
    """Every field of a report by name: bytes as hex, bit fields by the names of their bits."""
    rows: dict[str, Any] = {}
    for name in snp.LAYOUT.names:
        value = getattr(report, name)
        rows[name] = value.hex() if isinstance(value, bytes) else value
    rows["policy"] = {bit: report.policy_bit(bit) for bit in snp.POLICY_BITS} | {
        "abi": f"{report.policy >> 8 & 0xFF}.{report.policy & 0xFF}"
    }
    rows["platform_info"] = {bit: bool(report.platform_info >> at & 1) for bit, at in snp.PLATFORM_BITS.items()}
    rows["signing_key"] = {snp.VCEK: "VCEK", snp.VLEK: "VLEK", snp.NO_KEY: "none"}[report.signing_key]
    return rows
