"""What the log's own content says about its manifests and runs, checked: manifests by digest, signers, replays.

Bytes come from a content store by SHA-256, so what is found there is what the log named. Whose signature counts is the
reader's trust, not the log's. Not here: reading files or a journal; those are values.
Spec: docs/spec/report.md section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pointcall_attest.entry import Entry, EpochOpen
from pointcall_attest.log.checkpoint import Verifier
from pointcall_attest.manifest import Manifest
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.replay import replay_all
from pointcall_attest.report.build import Known
from pointcall_attest.signature import verify_bundles
from pointcall_runbook.errors import PointcallError

Content = Callable[[str], bytes]  # SHA-256 (hex) -> bytes; raises PointcallError where it is not there


@dataclass(frozen=True)
class Trust:
    """Whose signatures the reader of a report believes: a trust policy and the trusted root that it pins."""

    policy: TrustPolicy
    trusted_root: bytes


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
    return Known(manifests, signers, dict(_replays(entries, content)), witnesses)


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


def _replays(entries: Iterable[Entry], content: Content) -> Iterable[tuple[str, bool]]:
    """Each run whose module is there, and whether its decision is the same again."""
    receipts = [e for e in entries if e.kind == "receipt"]
    there = {module: _has(content, module) for module in {e.body["runbook"]["module"] for e in receipts}}
    for replayed in replay_all((e for e in receipts if there[e.body["runbook"]["module"]]), content):
        yield replayed.run, replayed.identical


def _has(content: Content, digest: str) -> bool:
    try:
        content(digest)
    except PointcallError:
        return False
    return True
