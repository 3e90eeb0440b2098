"""Is a TDX quote authentic: signed inside Intel's quoting enclave on a platform that a pinned root vouches for.

Everything comes from the quote, the collateral, the roots and the time; nothing is fetched. No I/O, no policy. The TCB
status is computed here, since it follows from signed tables alone; whether it is acceptable, tdx_rules.py decides.
Spec: Intel TDX DCAP Quote Verification, 4.1.2; docs/spec/tdx.md; the numbers below are those of that page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Literal

from pointcall_attest import collateral as collaterals
from pointcall_attest import crl, pck, tdx, tdx_tcb
from pointcall_attest.collateral import Collateral, QeIdentity, TcbInfo
from pointcall_attest.errors import MalformedError
from pointcall_attest.findings import Findings, stamp
from pointcall_attest.pck import IntelCertificate, SgxExtension
from pointcall_attest.tdx import Quote
from pointcall_attest.tdx_tcb import Assessment
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Check, Tier

_NEEDED_TO_READ: Final = ("tdx.root", "tdx.signing_chain", "tdx.tcb_info", "tdx.qe_identity")
_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Chain:
    """The certificates of a quote and of its collateral, by role. Nothing about them is proven yet."""

    leaf: IntelCertificate
    ca: IntelCertificate
    root: IntelCertificate
    platform: SgxExtension
    signers: tuple[IntelCertificate, IntelCertificate]  # of TCB info and QE identity
    signer_roots: tuple[IntelCertificate, IntelCertificate]


@dataclass(frozen=True, slots=True)
class AuthenticQuote:
    """A quote that is what it says, judged at one time. Only `verify` makes one."""

    quote: Quote
    chain: Chain
    tier: Literal["hardware", "emulated"]
    assessment: Assessment
    tcb_info: TcbInfo
    qe_identity: QeIdentity
    at: datetime
    checks: tuple[Check, ...]
    seal: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.seal is _SEAL, "only verify() makes an AuthenticQuote"


def verify(quote: Quote, collateral: Collateral, *, roots: Roots, at: datetime) -> AuthenticQuote:
    """The quote as AuthenticQuote, or UnverifiedError with every check that was made.

    `at` is the time of verification (aware, UTC). MalformedError where certificates, CRLs or signed texts are not of
    their form; signed texts are parsed only after their signatures hold.
    """
    chain = _chain(quote.pck_pem, collateral.tcb_info_chain, collateral.qe_identity_chain)
    findings = Findings()
    tier = _check_root(findings, quote, chain, roots)  # (1)
    _check_chains(findings, chain)  # (2)
    _check_validity(findings, chain, at)  # (3)
    _check_crls(findings, chain, collateral, at)  # (4)
    _check_quote(findings, quote, chain)  # (5) (6) (7)
    _check_texts(findings, chain, collateral)  # (8)
    if any(check.id in _NEEDED_TO_READ and check.outcome == "fail" for check in findings.checks):
        findings.verified()
    info = collaterals.parse_tcb_info(collateral.tcb_info)
    identity = collaterals.parse_qe_identity(collateral.qe_identity)
    _check_tables(findings, quote, chain, info, identity, at)  # (9) (10) (11) (12)
    checks = findings.verified()
    assert tier != "none", "tdx.root has failed"
    body = quote.body
    assessment = tdx_tcb.assess(
        info, identity, chain.platform, quote.qe.isv_svn, body.tee_tcb_svn, body.tee_tcb_svn2
    )  # (13)
    return AuthenticQuote(quote, chain, tier, assessment, info, identity, at, checks, _SEAL)


@lru_cache(maxsize=32)
def _chain(pck_pem: bytes, tcb_chain: tuple[bytes, ...], qe_chain: tuple[bytes, ...]) -> Chain:
    """The certificates in their places; MalformedError where one is missing or has another role. Pure, memoised."""
    leaf, ca, root = (pck.parse(der) for der in tdx.pck_certificates(pck_pem))
    pairs = [tuple(map(pck.parse, chain)) for chain in (tcb_chain, qe_chain)]
    roles = (leaf.role, ca.role, root.role)
    if roles != ("pck", "pck-ca", "root") or leaf.sgx is None:
        raise MalformedError("the quote's chain has other roles", id="tdx.chain.malformed", got=", ".join(roles))
    if any([one.role for one in pair] != ["tcb-signing", "root"] for pair in pairs):
        raise MalformedError(
            "an issuer chain of the collateral has other roles", id="collateral.malformed", want="TCB signer and root"
        )
    (first, first_root), (second, second_root) = pairs
    return Chain(leaf, ca, root, leaf.sgx, (first, second), (first_root, second_root))


def _check_root(findings: Findings, quote: Quote, chain: Chain, roots: Roots) -> Tier:
    """(1) One pinned root for quote and collateral; marks of the emulated platform everywhere or nowhere."""
    tier = roots.tier_of(chain.root.raw)
    same = all(root.raw == chain.root.raw for root in chain.signer_roots)
    findings.check(
        "tdx.root",
        tier != "none" and same,
        expected="the pinned Intel root, or a registered emulated one, byte for byte in quote and collateral",
        observed=f"{chain.root.name}: {tier if tier != 'none' else 'not pinned'}"
        + ("" if same else ", collateral has another root"),
        hint="the names of a root prove nothing; an emulated root must be in the trust folder",
    )
    marks = [c.emulated for c in (chain.leaf, chain.ca, chain.root, *chain.signers, *chain.signer_roots)]
    findings.check(
        "tdx.mark",
        len(set(marks)) == 1 and (tier == "none" or marks[0] == (tier == "emulated")),
        expected="marks of emulation exactly in the emulated tier",
        observed=f"{sum(marks)} of {len(marks)} certificates marked, tier {tier}",
    )
    vendor = tdx.EMULATED_QE_VENDOR if chain.root.emulated else tdx.INTEL_QE_VENDOR
    findings.check("tdx.vendor", quote.qe_vendor_id == vendor, expected=vendor.hex(), observed=quote.qe_vendor_id.hex())
    return tier


def _check_chains(findings: Findings, chain: Chain) -> None:
    """(2) Root, PCK CA, PCK certificate; root, TCB signer. Roles were fixed when the chain was put together.

    The root's signature over itself says nothing that the pin of its bytes does not say.
    """
    links = [(chain.root, chain.ca), (chain.ca, chain.leaf)]
    findings.check(
        "tdx.pck_chain",
        all(pck.issued(issuer, of) for issuer, of in links),
        expected="root signs CA, CA signs PCK certificate",
        observed=" <- ".join(c.name for c in (chain.leaf, chain.ca, chain.root)),
    )
    findings.check(
        "tdx.signing_chain",
        all(pck.issued(root, signer) for root, signer in zip(chain.signer_roots, chain.signers, strict=True)),
        expected="root signs both TCB signers",
        observed=" and ".join(signer.name for signer in chain.signers),
    )


def _check_validity(findings: Findings, chain: Chain, at: datetime) -> None:
    """(3) Every certificate is valid at the time of verification."""
    everything = (chain.leaf, chain.ca, chain.root, *chain.signers)
    late, soon = max(c.not_before for c in everything), min(c.not_after for c in everything)
    findings.check(
        "tdx.validity",
        late <= at <= soon,
        expected=f"{stamp(late)} to {stamp(soon)}",
        observed=stamp(at),
    )


def _check_crls(findings: Findings, chain: Chain, collateral: Collateral, at: datetime) -> None:
    """(4) Both lists are by their issuers, in force, and name none of our certificates."""
    for name, raw, issuer, certificates in (
        ("tdx.root_crl", collateral.root_crl, chain.root, (chain.ca, *chain.signers)),
        ("tdx.pck_crl", collateral.pck_crl, chain.ca, (chain.leaf,)),
    ):
        found = crl.parse(raw)
        signed = crl.signed_by_intel(found, issuer)
        revoked = [c.name for c in certificates if found.revokes(c.serial)]
        findings.check(
            name,
            signed and found.in_force(at) and not revoked,
            expected=f"signed by {issuer.name}, in force at {at.date()}, nothing of ours revoked",
            observed=f"{'signed by it' if signed else 'NOT signed by it'}, "
            f"{found.this_update.date()} to {found.next_update.date()}, revoked: {revoked or 'nothing'}",
            hint="fetch new collateral with `pointcall attest fetch`",
        )


def _check_quote(findings: Findings, quote: Quote, chain: Chain) -> None:
    findings.check(  # (5) The platform's key signed the report of the quoting enclave.
        "tdx.qe_signature",
        pck.holds_raw(chain.leaf.key, quote.qe_signature, quote.qe_report),
        expected="QE report signed by the PCK key",
        observed="r and s as in the quote",
    )
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth).digest().ljust(64, b"\0")
    findings.check(  # (6) The enclave vouches for the attestation key.
        "tdx.qe_binding", quote.qe.report_data == bound, expected=bound.hex(), observed=quote.qe.report_data.hex()
    )
    findings.check(  # (7) The attestation key signed header and body.
        "tdx.signature",
        pck.holds_raw(pck.key_of(quote.attestation_key), quote.signature, quote.signed_bytes),
        expected="header and body signed by the attestation key",
        observed="r and s as in the quote",
        hint="the quote was changed after it was signed",
    )


def _check_texts(findings: Findings, chain: Chain, collateral: Collateral) -> None:
    """(8) Intel signed the exact bytes of TCB info and QE identity."""
    for name, signer, signature, text in (
        ("tdx.tcb_info", chain.signers[0], collateral.tcb_info_signature, collateral.tcb_info),
        ("tdx.qe_identity", chain.signers[1], collateral.qe_identity_signature, collateral.qe_identity),
    ):
        findings.check(
            name,
            _text_signed(signer, signature, text),
            expected=f"signed by {signer.name}",
            observed=f"sha256 {hashlib.sha256(text).hexdigest()}",
            hint="keep the signed text byte for byte; never write the JSON anew",
        )


@lru_cache(maxsize=64)
def _text_signed(signer: IntelCertificate, signature: bytes, text: bytes) -> bool:
    return pck.holds_raw(signer.key, signature, text)


def _check_tables(
    findings: Findings, quote: Quote, chain: Chain, info: TcbInfo, identity: QeIdentity, at: datetime
) -> None:
    late, soon = max(info.issued, identity.issued), min(info.next_update, identity.next_update)
    findings.check(  # (9) Both tables are in force.
        "tdx.collateral_dates",
        late <= at <= soon,
        expected=f"{stamp(late)} to {stamp(soon)}",
        observed=stamp(at),
        hint="fetch new collateral with `pointcall attest fetch`",
    )
    platform = chain.platform
    findings.check(  # (10) The table is that of this platform.
        "tdx.fmspc",
        (platform.fmspc, platform.pceid) == (info.fmspc, info.pceid),
        expected=f"FMSPC {platform.fmspc.hex()}, PCEID {platform.pceid.hex()}",
        observed=f"FMSPC {info.fmspc.hex()}, PCEID {info.pceid.hex()}",
        hint="the collateral is of another platform family",
    )
    _check_module(findings, quote, info)  # (11)
    _check_qe(findings, quote, identity)  # (12)


def _check_module(findings: Findings, quote: Quote, info: TcbInfo) -> None:
    """(11) The TDX module is Intel's: signer and attributes. A version without identity has no status: refused."""
    body = quote.body
    module = tdx_tcb.find_module(info, body.tee_tcb_svn[1])
    if module is None:
        observed, right = f"module version {body.tee_tcb_svn[1]} has no identity in the TCB info", False
    else:
        right = body.mrsignerseam == module.mrsigner and _masked(body.seam_attributes, module.mask) == module.attributes
        observed = f"signer {body.mrsignerseam.hex()[:16]}.., attributes {body.seam_attributes.hex()}"
    findings.check("tdx.module", right, expected="signer and attributes of Intel's module identity", observed=observed)


def _check_qe(findings: Findings, quote: Quote, identity: QeIdentity) -> None:
    """(12) The quoting enclave is Intel's: signer, product, attributes."""
    qe = quote.qe
    right = (
        _masked(qe.misc_select, identity.misc_mask) == _masked(identity.misc_select, identity.misc_mask)
        and _masked(qe.attributes, identity.attributes_mask) == _masked(identity.attributes, identity.attributes_mask)
        and qe.mrsigner == identity.mrsigner
        and qe.isv_prod_id == identity.isv_prod_id
    )
    findings.check(
        "tdx.qe",
        right,
        expected=f"signer {identity.mrsigner.hex()}, product {identity.isv_prod_id}, attributes of the identity",
        observed=f"signer {qe.mrsigner.hex()}, product {qe.isv_prod_id}, attributes {qe.attributes.hex()}",
    )


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(value, mask, strict=True))
