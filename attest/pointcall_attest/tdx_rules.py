"""Is an authentic TDX quote acceptable to a policy? Every rule is a check; none stops the others. No I/O, no crypto.

Spec: docs/spec/tdx.md, section Appraisal; docs/spec/trust.md, section Policy.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, time, timedelta
from typing import Any, Final

from pointcall_attest import tdx
from pointcall_attest.eventlog import EventLog
from pointcall_attest.findings import Findings, stamp
from pointcall_attest.tdx import Body, Quote
from pointcall_attest.tdx_chain import AuthenticQuote
from pointcall_attest.tee_policy import TcbStatus, TdxPolicy, TeePolicy
from pointcall_attest.tee_rules import check_binding, check_bits, check_member, check_tier
from pointcall_attest.verdict import Verdict

_UNTRUSTED: Final = 0xFF  # ATTRIBUTES.TUD: DEBUG and seven reserved bits that mean the same
_IN_GRACE: Final[dict[TcbStatus, TcbStatus]] = {
    "OutOfDate": "UpToDate",
    "OutOfDateConfigurationNeeded": "ConfigurationNeeded",
}


def appraise(
    evidence: AuthenticQuote,
    policy: TeePolicy,
    *,
    report_data: bytes | None,
    measurements: Collection[str] | None,
    event_log: EventLog | None = None,
) -> Verdict:
    """A verdict with the checks of verification first, then one check for every rule of the policy.

    `report_data` (64 bytes) and `measurements` (MRTDs in hex) of None are listed as not checked; an empty collection
    refuses. An event log must replay to the RTMRs.
    """
    findings, body = Findings(), evidence.quote.body
    check_tier(findings, "tdx", evidence.tier, policy)
    _check_status(findings, evidence, policy.tdx)
    _check_attributes(findings, evidence, policy)
    _check_identities(findings, body, policy.tdx)
    _check_platform(findings, evidence, policy.tdx)
    _check_event_log(findings, body, event_log)
    check_binding(findings, body.report_data, body.mrtd, report_data, measurements)
    return Verdict(evidence.checks + findings.checks, evidence.tier, "tdx", claims(evidence))


def _check_status(findings: Findings, evidence: AuthenticQuote, policy: TdxPolicy) -> None:
    found, at = evidence.assessment, evidence.at
    grace = timedelta(days=policy.out_of_date_grace_days)
    in_grace = found.superseded is not None and at <= found.superseded + grace and grace > timedelta(0)
    accepted = found.status in policy.statuses or (in_grace and _IN_GRACE.get(found.status) in policy.statuses)
    findings.check(
        "tdx.tcb_status",
        accepted,
        expected=(" or ".join(policy.statuses) or "nothing") + (f", {grace.days} days of grace" if grace else ""),
        observed=f"{found.status}: platform {found.platform}, SGX {found.sgx}, module {found.module}, QE {found.qe}",
        hint="update the platform's firmware, TDX module or quoting enclave, or name the status in tdx.statuses",
    )
    denied = [a for a in found.advisories if a in policy.advisories_denied]
    if policy.advisories_allowed is not None:
        denied += [a for a in found.advisories if a not in policy.advisories_allowed and a not in denied]
    findings.check(
        "tdx.advisories",
        not denied,
        expected="no advisory that the policy does not allow",
        observed=", ".join(found.advisories) or "none",
    )
    _check_age(findings, evidence, policy)


def _check_age(findings: Findings, evidence: AuthenticQuote, policy: TdxPolicy) -> None:
    number, date = evidence.tcb_info.evaluation_number, evidence.assessment.date
    lowest = min(number, evidence.qe_identity.evaluation_number)
    findings.check(
        "tdx.evaluation_number",
        lowest >= policy.min_tcb_evaluation_number,
        expected=f">= {policy.min_tcb_evaluation_number}",
        observed=f"TCB info {number}, QE identity {evidence.qe_identity.evaluation_number}",
        hint="fetch newer collateral",
    )
    shown = date.strftime("%Y-%m-%d") if date else "no level fits"
    if policy.min_tcb_date is None:
        return findings.skip("tdx.tcb_date", f"{shown}; the policy sets no baseline")
    baseline = datetime.combine(policy.min_tcb_date, time(), UTC)
    findings.check(
        "tdx.tcb_date", date is not None and date >= baseline, expected=f">= {baseline:%Y-%m-%d}", observed=shown
    )
    return None


def _check_attributes(findings: Findings, evidence: AuthenticQuote, policy: TeePolicy) -> None:
    body = evidence.quote.body
    allowed = policy.allow_debug and evidence.tier == "emulated"
    findings.check(
        "tdx.debug",
        not body.td_attributes & _UNTRUSTED or allowed,
        expected="not a debug TD" + (" or one" if allowed else ""),
        observed="the host may read the TD's memory" if body.td_attributes & _UNTRUSTED else "not a debug TD",
        hint="launch the TD without ATTRIBUTES.DEBUG",
    )
    disabled = body.attribute("sept_ve_disable")
    findings.check(
        "tdx.sept_ve_disable",
        disabled or not policy.tdx.require_sept_ve_disable,
        expected="set" if policy.tdx.require_sept_ve_disable else "set or clear",
        observed="set" if disabled else "clear: the host may inject exceptions on memory access",
    )
    check_bits(findings, "tdx.td_attributes", body.td_attributes, policy.tdx.td_attributes)
    check_bits(findings, "tdx.xfam", body.xfam, policy.tdx.xfam)


def _check_identities(findings: Findings, body: Body, policy: TdxPolicy) -> None:
    if body.mrservicetd is None:
        findings.skip("tdx.mrservicetd", "a TD 1.0 report does not carry it")
    else:
        check_member(findings, "tdx.mrservicetd", body.mrservicetd.hex(), policy.mrservicetd)
    check_member(findings, "tdx.mrseam", body.mrseam.hex(), policy.mrseam)
    for name in ("mrconfigid", "mrowner", "mrownerconfig"):
        wanted = getattr(policy, name)
        check_member(findings, f"tdx.{name}", getattr(body, name).hex(), None if wanted is None else (wanted,))
    for name in ("rtmr0", "rtmr1", "rtmr2", "rtmr3"):
        check_member(findings, f"tdx.{name}", getattr(body, name).hex(), getattr(policy, name))


def _check_platform(findings: Findings, evidence: AuthenticQuote, policy: TdxPolicy) -> None:
    platform = evidence.chain.platform
    for name, have, allowed in (
        ("tdx.dynamic_platform", platform.dynamic_platform, policy.allow_dynamic_platform),
        ("tdx.cached_keys", platform.cached_keys, policy.allow_cached_keys),
        ("tdx.smt", platform.smt_enabled, policy.allow_smt),
    ):
        if allowed is None:
            findings.skip(name, f"{have}; the policy does not say")
        else:
            findings.check(name, have is False or allowed, expected="any" if allowed else "False", observed=str(have))


def _check_event_log(findings: Findings, body: Body, log: EventLog | None) -> None:
    """The log explains the registers: replayed, it gives exactly their values."""
    if log is None:
        return findings.skip("tdx.event_log", "no event log was given")
    registers = (body.rtmr0, body.rtmr1, body.rtmr2, body.rtmr3)
    replayed = log.replay()
    wrong = [index for index, (a, b) in enumerate(zip(registers, replayed, strict=True)) if a != b]
    findings.check(
        "tdx.event_log",
        not wrong,
        expected="the log replays to RTMR0 to RTMR3",
        observed=f"{len(log.events)} events; " + (f"differs in RTMR {wrong}" if wrong else "all four agree"),
        hint="the log is of another boot, or was changed; `pointcall attest measure ccel` shows every event",
    )
    return None


def claims(evidence: AuthenticQuote) -> dict[str, Any]:
    """What the quote and its collateral say, readable. Authentic, whether acceptable or not."""
    found, platform = evidence.assessment, evidence.chain.platform
    return {
        **described(evidence.quote),
        "tcb_status": found.status,
        "tcb_parts": {"platform": found.platform, "sgx": found.sgx, "module": found.module, "qe": found.qe},
        "tcb_date": stamp(found.date) if found.date else None,
        "advisories": list(found.advisories),
        "tcb_evaluation_number": evidence.tcb_info.evaluation_number,
        "fmspc": platform.fmspc.hex(),
        "pceid": platform.pceid.hex(),
        "ppid": platform.ppid.hex(),
        "root": evidence.chain.root.name,
    }


def described(quote: Quote) -> dict[str, Any]:
    """Every field of a quote by name: bytes as hex, attributes by the names of their bits."""
    rows: dict[str, Any] = {
        "version": quote.version,
        "body_type": quote.body_type,
        "qe_vendor_id": quote.qe_vendor_id.hex(),
        "user_data": quote.user_data.hex(),
    }
    for name in tdx.BODIES[quote.body_type].names:
        value = getattr(quote.body, name)
        rows[name] = value.hex() if isinstance(value, bytes) else value
    rows["td_attributes"] = {bit: quote.body.attribute(bit) for bit in tdx.ATTRIBUTE_BITS}
    rows["qe"] = {
        name: value.hex() if isinstance(value := getattr(quote.qe, name), bytes) else value
        for name in tdx.QE_REPORT.names
    }
    rows["attestation_key"] = quote.attestation_key.hex()
    return rows
