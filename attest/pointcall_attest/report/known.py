"""What can be found out from the log's own content: manifests, who signed them, what the evidence is worth, replays.

Bytes come from a content store by SHA-256, so what is found there is what the log named. Whose signature counts is the
reader's trust, not the log's. Not here: reading files or a journal; those are values.
Spec: docs/spec/report.md section 2.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.binding import report_data
from pointcall_attest.entry import Entry, EpochOpen
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.log.checkpoint import Verifier
from pointcall_attest.manifest import Manifest
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.replay import replay_all
from pointcall_attest.report.build import Known
from pointcall_attest.signature import verify_bundles
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_runbook.errors import PointcallError

Content = Callable[[str], bytes]  # SHA-256 (hex) -> bytes; raises PointcallError where it is not there


@dataclass(frozen=True)
class Trust:
    """Whom the reader of a report believes: a trust policy, the trusted root that it pins, and the emulated roots."""

    policy: TrustPolicy
    trusted_root: bytes
    roots: Roots


def known(
    entries: Sequence[Entry], content: Content, *, trust: Trust | None = None, witnesses: tuple[Verifier, ...] = ()
) -> Known:
    """Everything that can be known from the content store. What is missing there, or does not verify, is left out: the
    report then says "as receipts state it", "not checked" or "no data"."""
    opened = {e.body["manifest"]: e for e in entries if e.kind == "epoch-open"}
    manifests = {digest: m for digest in opened if (m := _manifest(digest, content)) is not None}
    signers = {
        digest: s for digest in manifests if trust is not None and (s := _signers(opened[digest], content, trust))
    }
    appraisals = {} if trust is None else dict(_appraisals(entries, content, manifests, trust))
    return Known(manifests, signers, appraisals, dict(_replays(entries, content)), witnesses)


def _manifest(digest: str, content: Content) -> Manifest | None:
    try:
        return Manifest.parse(content(digest))
    except PointcallError:
        return None


def _signers(opened: Entry, content: Content, trust: Trust) -> tuple[str, ...]:
    """Who signed the manifest of this epoch, by the reader's own policy, judged at the time when the epoch opened."""
    body = opened.typed()
    assert isinstance(body, EpochOpen)
    try:
        signed = verify_bundles(
            [content(b) for b in body.bundles],
            trusted_root=trust.trusted_root,
            policy=trust.policy,
            at=opened.at,
            in_process=True,
        )
    except PointcallError:
        return ()
    if hashlib.sha256(signed.payload).hexdigest() != body.manifest:
        return ()
    return tuple(f"{s.identity} ({s.issuer})" for s in signed.signers)


def _appraisals(
    entries: Sequence[Entry], content: Content, manifests: Mapping[str, Manifest], trust: Trust
) -> Iterable[tuple[int, Verdict]]:
    """The reader's own verdict over the evidence of each epoch whose evidence is there."""
    for entry in entries:
        if entry.kind == "epoch-open":
            try:
                yield entry.index, _appraisal(entry, content, manifests, trust)
            except (PointcallError, binascii.Error):
                continue


def _appraisal(entry: Entry, content: Content, manifests: Mapping[str, Manifest], trust: Trust) -> Verdict:
    """Judged at the time when the epoch opened. REPORT_DATA is computed from the entry: the evidence must bind what the
    entry says. Where nothing was armed there is no manifest, and so no measurement to compare with."""
    body = entry.typed()
    assert isinstance(body, EpochOpen)
    bundle = EvidenceBundle.parse(content(body.evidence))
    spki = base64.b64decode(body.public_key, validate=True)
    manifest, policy, nonce = map(bytes.fromhex, (body.manifest, body.policy, body.nonce))
    armed = manifests.get(body.manifest)
    return appraise_bundle(
        bundle,
        policy=trust.policy.tee,
        roots=trust.roots,
        at=entry.at,
        report_data=report_data(manifest, policy, spki, nonce),
        measurements=armed.measurements(bundle.platform) if armed else None,
    )


def _replays(entries: Iterable[Entry], content: Content) -> Iterable[tuple[str, bool]]:
    """Each run whose module and inputs are there, and whether its decision is the same again."""
    receipts = [e for e in entries if e.kind == "receipt" and not e.closed]
    there = {module: _has(content, module) for module in {e.body["runbook"]["module"] for e in receipts}}
    for replayed in replay_all((e for e in receipts if there[e.body["runbook"]["module"]]), content):
        yield replayed.run, replayed.identical


def _has(content: Content, digest: str) -> bool:
    try:
        content(digest)
    except PointcallError:
        return False
    return True
