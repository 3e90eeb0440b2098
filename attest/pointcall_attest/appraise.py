"""Evidence to verdict in three steps of three types, for both platforms: parse, verify, appraise. Offline, no clock.

    parsed = parse(bundle)                      # Parsed: well-formed; MalformedError
    authentic = verify(parsed, roots=, at=)     # Authentic or AuthenticQuote: true; UnverifiedError with all checks
    verdict = appraise(authentic, policy, ...)  # Verdict: acceptable or not, rule by rule; never raises

`appraise_bundle` does all three and turns a refusal of the first two into a failed check, so that there is always a
verdict to show and to keep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from pointcall_attest import collateral, eventlog, hcl, snp, snp_chain, snp_rules, tdx, tdx_chain, tdx_rules
from pointcall_attest.collateral import Collateral
from pointcall_attest.errors import MalformedError
from pointcall_attest.eventlog import EventLog
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.findings import CLAUSES, Findings, UnverifiedError
from pointcall_attest.snp import Report
from pointcall_attest.snp_chain import Authentic
from pointcall_attest.tdx import Quote
from pointcall_attest.tdx_chain import AuthenticQuote
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Check, Verdict


@dataclass(frozen=True, slots=True)
class ParsedReport:
    """An SNP report with the certificates (DER) and revocation lists (DER) that came with it. Nothing is proven."""

    report: Report
    certificates: tuple[bytes, ...]
    crls: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ParsedQuote:
    """A TDX quote with its collateral and event log. Nothing is proven."""

    quote: Quote
    collateral: Collateral
    event_log: EventLog | None


Parsed = ParsedReport | ParsedQuote


def parse(bundle: EvidenceBundle) -> Parsed:
    """The parts of a bundle in their types; MalformedError where one is not of its form."""
    if bundle.platform == "snp":
        return ParsedReport(snp.parse(bundle.evidence), bundle.certificates, bundle.crls)
    log = None if bundle.event_log is None else eventlog.parse(bundle.event_log)
    return ParsedQuote(tdx.parse(bundle.evidence), collateral.parse(bundle.collateral or {}), log)


def verify(parsed: Parsed, *, roots: Roots, at: datetime) -> Authentic | AuthenticQuote:
    """What was parsed, as authentic at this time (aware, UTC); UnverifiedError with every check that was made.

    MalformedError where certificates, revocation lists or signed texts are not of their form.
    """
    if isinstance(parsed, ParsedReport):
        chain = snp_chain.choose(parsed.certificates, parsed.report, roots)
        return snp_chain.verify(parsed.report, chain, roots=roots, at=at, crls=parsed.crls)
    return tdx_chain.verify(parsed.quote, parsed.collateral, roots=roots, at=at)


def appraise(
    evidence: Authentic | AuthenticQuote,
    policy: TeePolicy,
    *,
    report_data: bytes | None,
    measurements: Collection[str] | None,
    event_log: EventLog | None = None,
) -> Verdict:
    """One check for every rule, after the checks of verification. None for an expectation is listed as not checked.

    `event_log` is for TDX: it must replay to the RTMRs.
    """
    if isinstance(evidence, Authentic):
        return snp_rules.appraise(evidence, policy, report_data=report_data, measurements=measurements)
    return tdx_rules.appraise(evidence, policy, report_data=report_data, measurements=measurements, event_log=event_log)


def appraise_bundle(
    bundle: EvidenceBundle,
    *,
    policy: TeePolicy,
    roots: Roots,
    at: datetime,
    report_data: bytes | None,
    measurements: Collection[str] | None,
) -> Verdict:
    """The verdict on a bundle; never raises for what is in it.

    `at` is aware and in UTC. `report_data` is 64 bytes, `measurements` are reference values in hex (SNP launch digests,
    TDX MRTDs). None for either is listed as not checked; an empty collection refuses.
    """
    assert at.tzinfo is not None, "the time of verification has a zone"
    try:
        parsed = parse(bundle)
        evidence = verify(parsed, roots=roots, at=at)
    except MalformedError as error:
        return malformed(error, bundle.platform)
    except UnverifiedError as error:
        return Verdict((*error.checks, _not_appraised()), platform=bundle.platform)
    log = parsed.event_log if isinstance(parsed, ParsedQuote) else None
    return appraise(evidence, policy, report_data=report_data, measurements=measurements, event_log=log)


def appraise_hcl(
    raw: bytes,
    certificates: Sequence[bytes],
    *,
    policy: TeePolicy,
    roots: Roots,
    at: datetime,
    report_data: bytes | None = None,
    measurements: Collection[str] | None = None,
    crls: Sequence[bytes] = (),
) -> Verdict:
    """The verdict on an Azure HCL report: that of the SNP report inside, and whether it binds the runtime data.

    A TDREPORT inside proves nothing away from its machine: refused, with a hint at the quote that Azure hands out.
    """
    try:
        report = hcl.parse(raw)
    except MalformedError as error:
        return malformed(error, "hcl")
    findings = Findings()
    findings.check(
        "hcl.binding",
        report.binds,
        expected=report.runtime_hash.hex(),
        observed=report.report_data.hex(),
        hint="the runtime data, and so the key of the vTPM, is not what the hardware report vouches for",
    )
    if report.platform == "tdx":
        hint = "verify the TD quote of the same guest with `pointcall attest verify tdx`"
        findings.check(
            "hcl.platform", False, expected="an SNP report", observed="a TDREPORT: its MAC is local", hint=hint
        )
        return Verdict(findings.checks, platform="hcl")
    bundle = EvidenceBundle("snp", report.report, tuple(certificates), tuple(crls))
    verdict = appraise_bundle(
        bundle, policy=policy, roots=roots, at=at, report_data=report_data, measurements=measurements
    )
    return Verdict(verdict.checks + findings.checks, verdict.tier, verdict.platform, verdict.claims)


def malformed(error: MalformedError, platform: str) -> Verdict:
    """The verdict on bytes that are not of their form: one failed check `*.malformed`, nothing else was looked at."""
    check = Check(error.id, "fail", error.want, f"{error.message}: {error.got}", "docs/spec/evidence.md", error.hint)
    return Verdict((check, _not_appraised()), platform=platform)


def _not_appraised() -> Check:
    return Check.skipped("tee.appraisal", "the evidence is not authentic", spec=CLAUSES["tee.appraisal"])
