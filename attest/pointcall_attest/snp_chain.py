"""Is an SNP report authentic: signed by a key that a pinned root vouches for, on the chip it names. No I/O, no policy.

Certificates, CRLs, roots and the time are inputs; nothing is fetched. Whether an authentic report is acceptable is
decided later, by snp_rules.py. Spec: AMD 56860, AMD 57230, docs/spec/snp.md; the numbers below are those of that page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pointcall_attest import certs, crl, snp
from pointcall_attest.certs import Certificate, Leaf
from pointcall_attest.errors import MalformedError
from pointcall_attest.findings import Findings, stamp
from pointcall_attest.snp import Report, Tcb
from pointcall_attest.tee_policy import Line
from pointcall_attest.trust import Roots, vendor_certificates
from pointcall_attest.verdict import Check, Tier

MAX_CERTIFICATES: Final = 16  # a chain has three; a certificate table may carry both kinds of leaf
_SEAL: Final = object()
_ECDSA: Final = ec.ECDSA(hashes.SHA384())
_KEY_NAMES: Final = {snp.VCEK: "VCEK", snp.VLEK: "VLEK", snp.NO_KEY: "none"}


@dataclass(frozen=True, slots=True)
class Chain:
    """The three certificates that belong to one report, chosen by name. Nothing about them is proven yet."""

    ark: Certificate
    ca: Certificate
    leaf: Certificate
    facts: Leaf


class Tcbs(NamedTuple):
    """The four TCB versions of a report, by the layout of its line."""

    current: Tcb
    reported: Tcb
    committed: Tcb
    launch: Tcb


@dataclass(frozen=True, slots=True)
class Authentic:
    """A report that is what it says, and how we know. Only `verify` makes one."""

    report: Report
    chain: Chain
    tier: Literal["hardware", "emulated"]
    line: Line
    tcbs: Tcbs
    checks: tuple[Check, ...]
    seal: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.seal is _SEAL, "only verify() makes an Authentic"


def choose(certificates: Iterable[bytes], report: Report, roots: Roots) -> Chain:
    """The chain for this report out of certificates (DER) in any order; CAs that are missing come from the shipped set.

    MalformedError where one is not a certificate, or where no leaf, intermediate or root of the right name is there.
    """
    given = [certs.parse(der) for der in dict.fromkeys(certificates)]
    if len(given) > MAX_CERTIFICATES:
        raise MalformedError("too many certificates", id="cert.chain.malformed", want=f"<= {MAX_CERTIFICATES}")
    wanted = "VLEK" if report.signing_key == snp.VLEK else "VCEK"
    leaf = _leaf(report, [c for c in given if c.kind == wanted] or [c for c in given if c.leaf])
    if leaf is None or leaf.leaf is None:
        raise MalformedError(
            "the evidence needs one certificate of the signing key, of this chip and TCB",
            id="cert.chain.malformed",
            want=f"one {wanted}",
            got=", ".join(c.kind for c in given) or "no certificate",
            hint="give the VCEK or VLEK with --certs, or a certificate table that holds it",
        )
    ca = _issuer(leaf, given, roots)
    return Chain(_issuer(ca, given, roots), ca, leaf, leaf.leaf)


def _leaf(report: Report, leaves: Sequence[Certificate]) -> Certificate | None:
    """The only leaf; of several the one of this chip and TCB (the youngest, where issued twice), else None."""
    if len(leaves) > 1:
        leaves = sorted((c for c in leaves if _is_of(c, report)), key=lambda c: (c.not_after, c.raw))[-1:]
    return leaves[0] if leaves else None


def _is_of(leaf: Certificate, report: Report) -> bool:
    facts = leaf.leaf
    assert facts is not None, "only leaves are asked for"
    chip = facts.hwid is None or facts.hwid.ljust(64, b"\0") == report.chip_id
    return chip and snp.tcb_bytes(facts.line, facts.tcb) == report.reported_tcb


def _issuer(of: Certificate, given: Sequence[Certificate], roots: Roots) -> Certificate:
    """The certificate of the issuer's name and kind: a given one, else a shipped one, else an emulated root.

    Of several that were given, the one that we do not ship: it must hold too, so the order of files decides nothing.
    """
    wanted = {"VCEK": "ASK", "VLEK": "ASVK"}.get(of.kind, "ARK")
    ours = [c for c in given if c.subject == of.issuer and c.kind == wanted]
    if len(ours) != 1:
        known = (*_vendor_amd(), *_emulated_amd(tuple(roots.emulated.values())))
        shipped = (c for c in map(certs.parse, known) if c.subject == of.issuer and c.kind == wanted)
        ours = [c for c in ours if c.raw not in known] or list(itertools.islice(shipped, 1))
    if len(ours) != 1:
        raise MalformedError(
            "a certificate of the chain is missing, or there are several of its name",
            id="cert.chain.malformed",
            want=f"the issuer of {of.subject_name}, once",
            got=f"{len(ours)} certificates",
        )
    return ours[0]


@lru_cache(maxsize=1)
def _vendor_amd() -> tuple[bytes, ...]:
    """The shipped AMD certificates; Intel's root among them is not in AMD's form."""
    return tuple(der for der in vendor_certificates() if b"Advanced Micro Devices" in der)


@lru_cache(maxsize=8)
def _emulated_amd(roots: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Emulated roots in AMD's form; the others belong to emulated TDX."""
    return tuple(der for der in roots if certs.EMULATED_ORGANIZATION.encode() in der)


def verify(report: Report, chain: Chain, *, roots: Roots, at: datetime, crls: Sequence[bytes] = ()) -> Authentic:
    """The report as Authentic, or UnverifiedError with every check that was made; MalformedError for its parts.

    `at` is the time of verification (aware, UTC). The caller has yet to appraise the result against a policy.
    """
    findings = Findings()
    tier = _check_root(findings, chain, roots)  # (1)
    _check_signatures(findings, chain)  # (2) (3)
    _check_validity(findings, chain, at)  # (4)
    _check_crl(findings, chain, crls, at)  # (5)
    _check_key_and_chip(findings, report, chain)  # (6) to (9)
    _check_report_signature(findings, report, chain)  # (10)
    checks = findings.verified()
    assert tier != "none", "snp.root has failed"
    line = chain.ark.line
    versions = (report.current_tcb, report.reported_tcb, report.committed_tcb, report.launch_tcb)
    return Authentic(report, chain, tier, line, Tcbs(*(snp.tcb_of(line, raw) for raw in versions)), checks, _SEAL)


def _check_root(findings: Findings, chain: Chain, roots: Roots) -> Tier:
    """(1) The root is pinned, byte for byte; marks of the emulated platform are on all certificates or on none."""
    tier = roots.tier_of(chain.ark.raw)
    findings.check(
        "snp.root",
        tier != "none",
        expected="a pinned AMD root, or a registered emulated one",
        observed=f"{chain.ark.subject_name}: {tier if tier != 'none' else 'not pinned'}",
        hint="the names of a root prove nothing; an emulated root must be in the trust folder",
    )
    marks = [c.emulated for c in (chain.ark, chain.ca, chain.leaf)]
    findings.check(
        "snp.mark",
        len(set(marks)) == 1 and (tier == "none" or marks[0] == (tier == "emulated")),
        expected="marks of emulation exactly in the emulated tier",
        observed=f"{sum(marks)} of 3 certificates marked, tier {tier}",
    )
    return tier


def _check_signatures(findings: Findings, chain: Chain) -> None:
    """(2) The root signed the intermediate, (3) the intermediate signed the leaf, each in its role."""
    ark, ca, leaf = chain.ark, chain.ca, chain.leaf
    roles = (ark.kind, ca.kind, leaf.kind) in (("ARK", "ASK", "VCEK"), ("ARK", "ASVK", "VLEK"))
    findings.check(
        "snp.chain",
        roles and ark.line == ca.line == leaf.line,
        expected="ARK, ASK, VCEK or ARK, ASVK, VLEK of one line",
        observed=f"{ark.subject_name}, {ca.subject_name}, {leaf.subject_name}",
    )
    for name, issuer, of in (("snp.ca", ark, ca), ("snp.leaf", ca, leaf)):
        findings.check(
            name,
            certs.signed_by(issuer.spki, of.signature, of.tbs),
            expected=f"signed by {issuer.subject_name}",
            observed=of.subject_name,
            hint="the certificate was changed, or another key of the same name signed it",
        )


def _check_validity(findings: Findings, chain: Chain, at: datetime) -> None:
    """(4) Every certificate is valid at the time of verification."""
    late = max(c.not_before for c in (chain.ark, chain.ca, chain.leaf))
    soon = min(c.not_after for c in (chain.ark, chain.ca, chain.leaf))
    findings.check(
        "snp.validity",
        late <= at <= soon,
        expected=f"{stamp(late)} to {stamp(soon)}",
        observed=stamp(at),
        hint="check the clock, or fetch a new certificate",
    )


def _check_crl(findings: Findings, chain: Chain, crls: Sequence[bytes], at: datetime) -> None:
    """(5) The intermediate is not revoked, by a list of the same root that is in force."""
    if not crls:
        return findings.skip("snp.crl", "no CRL was given")
    lists = [one for one in map(crl.parse, crls) if one.issuer == chain.ark.subject]
    genuine = [one for one in lists if crl.signed_by_amd(one, chain.ark.subject, chain.ark.spki)]
    current = [one for one in genuine if one.in_force(at)]
    revoked = any(one.revokes(chain.ca.serial) for one in genuine)
    observed = f"{len(crls)} given, {len(genuine)} signed by this root, {len(current)} in force"
    findings.check(
        "snp.crl",
        bool(current) and len(genuine) == len(lists) and not revoked,
        expected=f"a CRL of {chain.ark.subject_name} in force that does not list {chain.ca.subject_name}",
        observed=observed + (", intermediate REVOKED" if revoked else ""),
    )
    return None


def _check_key_and_chip(findings: Findings, report: Report, chain: Chain) -> None:
    facts = chain.facts
    # (6) The report names the kind of key that the certificate has, and the firmware did sign.
    findings.check(
        "snp.signing_key",
        _KEY_NAMES[report.signing_key] == chain.leaf.kind and not report.mask_chip_key,
        expected=f"{chain.leaf.kind}, chip key not masked",
        observed=_KEY_NAMES[report.signing_key] + (", chip key masked" if report.mask_chip_key else ""),
    )
    # (7) One product line in CPUID, certificate and root. Version 2 has no CPUID: the policy must opt in to it.
    lines = {chain.ark.line, facts.line, *([report.line] if report.version > 2 else [])}
    findings.check(
        "snp.product",
        len(lines) == 1,
        expected=f"{chain.ark.line}, as the root",
        observed=f"certificate {facts.product}, CPUID {report.cpuid_family:02x}h/{report.cpuid_model:02x}h"
        + ("" if report.line or report.version == 2 else " (unknown CPU)"),
    )
    _check_certificate_tcb(findings, report, chain)  # (8)
    _check_chip(findings, report, facts)  # (9)


def _check_certificate_tcb(findings: Findings, report: Report, chain: Chain) -> None:
    """(8) The key was derived for exactly the firmware that the report states."""
    try:
        reported: Tcb | None = snp.tcb_of(chain.facts.line, report.reported_tcb)
    except MalformedError:
        reported = None
    findings.check(
        "snp.certificate_tcb",
        reported == chain.facts.tcb,
        expected=str(chain.facts.tcb),
        observed=str(reported) if reported else report.reported_tcb.hex(),
        hint="fetch the certificate for the reported TCB",
    )


def _check_chip(findings: Findings, report: Report, facts: Leaf) -> None:
    """(9) A VCEK belongs to the chip of the report. A VLEK belongs to a provider: its chip id is not vouched for."""
    if facts.hwid is None:
        return findings.skip("snp.chip_id", f"a VLEK names a provider, not a chip: {facts.csp_id}")
    findings.check(
        "snp.chip_id",
        report.chip_id == facts.hwid.ljust(64, b"\0"),
        expected=facts.hwid.hex(),
        observed=report.chip_id.hex(),
        hint="the certificate is of another chip",
    )
    return None


def _check_report_signature(findings: Findings, report: Report, chain: Chain) -> None:
    """(10) The key of the leaf signed the first 0x2A0 bytes: ECDSA P-384 with SHA-384."""
    findings.check(
        "snp.signature",
        _signature_holds(chain.leaf.spki, report),
        expected=f"made by the {chain.leaf.kind} of the certificate",
        observed="zero" if not any(report.signature_r + report.signature_s) else "r and s as in the report",
        hint="the report was changed after it was signed, or another key signed it",
    )


def _signature_holds(spki: bytes, report: Report) -> bool:
    key = _p384_key(spki)
    if key is None:
        return False
    r, s = (int.from_bytes(part, "little") for part in (report.signature_r, report.signature_s))
    try:
        key.verify(encode_dss_signature(r, s), report.signed_bytes, _ECDSA)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=64)
def _p384_key(spki: bytes) -> ec.EllipticCurvePublicKey | None:
    """The key, or None where the point is not on the curve. The form of the SPKI was checked by certs.parse."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), b"\x04" + spki[len(certs.P384_SPKI) :])
    except ValueError:
        return None
