"""Evidence bundle in, verdict out: parse, verify and appraise in one call, offline, at an explicit time.

The three steps exist on their own: snp.parse -> snp_chain.verify -> snp_rules.appraise, and the same for TDX. Here a
refusal of the first two becomes a failed check, so that there is always a verdict to show and to keep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from pointcall_attest import collateral, eventlog, hcl, snp, snp_chain, snp_rules, tdx, tdx_chain, tdx_rules
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.findings import CLAUSES, Findings, UnverifiedError
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Check, Verdict


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
    judge = _judge_snp if bundle.platform == "snp" else _judge_tdx
    try:
        return judge(bundle, policy, roots, at, report_data, measurements)
    except MalformedError as error:
        return malformed(error, bundle.platform)
    except UnverifiedError as error:
        return Verdict((*error.checks, _not_appraised()), platform=bundle.platform)


def _judge_snp(
    bundle: EvidenceBundle,
    policy: TeePolicy,
    roots: Roots,
    at: datetime,
    report_data: bytes | None,
    measurements: Collection[str] | None,
) -> Verdict:
    report = snp.parse(bundle.evidence)
    chain = snp_chain.choose(bundle.certificates, report, roots)
    evidence = snp_chain.verify(report, chain, roots=roots, at=at, crls=bundle.crls)
    return snp_rules.appraise(evidence, policy, report_data=report_data, measurements=measurements)


def _judge_tdx(
    bundle: EvidenceBundle,
    policy: TeePolicy,
    roots: Roots,
    at: datetime,
    report_data: bytes | None,
    measurements: Collection[str] | None,
) -> Verdict:
    quote = tdx.parse(bundle.evidence)
    log = None if bundle.event_log is None else eventlog.parse(bundle.event_log)
    judged_by = collateral.parse(bundle.collateral or {})
    evidence = tdx_chain.verify(quote, judged_by, roots=roots, at=at)
    return tdx_rules.appraise(evidence, policy, report_data=report_data, measurements=measurements, event_log=log)


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
