"""The rules that both platforms share: which platform, which tier, what is bound and what is measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from pointcall_attest.findings import Findings
from pointcall_attest.tee_policy import Bits, Platform, TeePolicy
from pointcall_attest.verdict import Check


def check_tier(
    findings: Findings, platform: Platform, tier: Literal["hardware", "emulated"], policy: TeePolicy
) -> None:
    """The platform is one the policy names, and an emulated one only where the policy says so."""
    findings.check(
        "tee.platform",
        platform in policy.platforms,
        expected=" or ".join(policy.platforms) or "none",
        observed=platform,
    )
    findings.check("tee.tier", True, expected="hardware or emulated, by the root that verified", observed=tier)
    findings.check(
        "tee.emulated",
        tier == "hardware" or policy.allow_emulated,
        expected="hardware" + (" or emulated" if policy.allow_emulated else ""),
        observed=tier,
        hint="EMULATED evidence proves nothing about confidentiality or integrity; allow_emulated accepts it",
    )


def check_crl_required(findings: Findings, platform: Platform, made: Sequence[Check], required: bool) -> None:
    """Revocation was looked at, where the policy demands it."""
    seen = any(check.id == f"{platform}.crl" and check.outcome == "pass" for check in made)
    findings.check(
        f"{platform}.crl_required",
        seen or not required,
        expected="revocation checked" if required else "revocation checked or not",
        observed="checked" if seen else "no CRL was given",
        hint="add the vendor's CRL to the evidence",
    )


def check_binding(
    findings: Findings,
    report_data: bytes,
    measurement: bytes,
    wanted_data: bytes | None,
    wanted_measurements: Collection[str] | None,
) -> None:
    """REPORT_DATA is exactly what we asked for, and the measurement is one of the reference values."""
    if wanted_data is None:
        findings.skip("tee.report_data", f"{report_data.hex()}; the caller expects no value")
    else:
        findings.check(
            "tee.report_data",
            report_data == wanted_data,
            expected=wanted_data.hex(),
            observed=report_data.hex(),
            hint="the evidence was made for another manifest, policy, key or nonce",
        )
    if wanted_measurements is None:
        findings.skip("tee.measurement", f"{measurement.hex()}; the caller has no reference values")
    else:
        findings.check(
            "tee.measurement",
            measurement.hex() in wanted_measurements,
            expected=" or ".join(sorted(wanted_measurements)) or "no reference value is known",
            observed=measurement.hex(),
            hint="the node runs something else than the manifest expects; see `pointcall attest measure`",
        )


def check_bits(findings: Findings, id: str, value: int, bits: Bits) -> None:
    """Required bits set, forbidden bits clear, all others tolerated; not checked where the policy names none."""
    if not bits.required and not bits.forbidden:
        return findings.skip(id, f"{value:#x}; the policy names no bits")
    findings.check(
        id,
        value & bits.required == bits.required and not value & bits.forbidden,
        expected=f"{bits.required:#x} set, {bits.forbidden:#x} clear",
        observed=f"{value:#x}",
    )
    return None


def check_member(findings: Findings, id: str, have: str, wanted: Collection[str] | str | None) -> None:
    """`have` is one of `wanted`; not checked where the policy does not say (None), refused where it lists nothing."""
    if wanted is None:
        return findings.skip(id, f"{have}; the policy does not say")
    findings.check(id, have in tuple(wanted), expected=" or ".join(wanted) or "nothing", observed=have)
    return None
