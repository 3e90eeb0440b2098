"""Opening an epoch: new keys, evidence that binds them, the verdict on it, and the first entry of the key.

Before a manifest is armed the executor works under a boot epoch, whose manifest digest is zero: so that refusals have a
key to be signed with. Chance, time and the platform come in as values.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pointcall_attest import entry
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.binding import report_data
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.manifest import Manifest
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.receipt import Engine
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor import VERSION
from pointcall_executor.tee.platform import Platform
from pointcall_keys.node import EpochKeys

NOTHING: Final = "0" * 64
LIVES: Final = 2  # of an epoch: on older evidence nothing stays armed


@dataclass(frozen=True, slots=True)
class Attested:
    """Keys with the evidence that binds them and what it is worth. Not yet an epoch: nothing is logged."""

    keys: EpochKeys
    nonce: bytes
    evidence: EvidenceBundle
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Trust:
    """What the node was provisioned with: exact bytes, and what they mean."""

    policy: TrustPolicy
    trusted_root: bytes
    trusted_root_sha256: str
    roots: Roots


def attest(platform: Platform, trust: Trust, manifest: Manifest | None, *, nonce: bytes, at: datetime) -> Attested:
    """New keys, bound by fresh evidence to the manifest and the trust policy, and appraised."""
    keys = EpochKeys.generate()
    digest = bytes.fromhex(manifest.sha256 if manifest else NOTHING)
    bound = report_data(digest, bytes.fromhex(trust.policy.sha256), keys.spki, nonce)
    evidence = platform.evidence(bound)
    verdict = appraise_bundle(
        evidence,
        policy=trust.policy.tee,
        roots=trust.roots,
        at=at,
        report_data=bound,
        measurements=manifest.measurements(evidence.platform) if manifest else None,
    )
    return Attested(keys, nonce, evidence, verdict)


def opening(
    attested: Attested,
    trust: Trust,
    manifest: Manifest | None,
    bundles: tuple[str, ...],
    *,
    node: str,
    origin: str,
    engine: Engine,
    previous: str | None,
    at: datetime,
    ktime_ns: int,
) -> bytes:
    """The epoch-open leaf. `bundles` are digests of the manifest's signature bundles, `previous` is the last key."""
    body = entry.EpochOpen(
        node=node,
        platform=attested.evidence.platform,
        tier=attested.verdict.tier,
        evidence=attested.evidence.sha256,
        nonce=attested.nonce.hex(),
        public_key=attested.keys.public_key,
        checkpoint_key=str(attested.keys.verifier(origin)),
        manifest=manifest.sha256 if manifest else NOTHING,
        bundles=bundles,
        policy=trust.policy.sha256,
        trusted_root=trust.trusted_root_sha256,
        sequence=manifest.sequence if manifest else 0,
        previous_epoch=previous,
        executor=VERSION,
        engine=engine.model_dump(mode="json"),
        verdict=attested.verdict.as_dict(),
    )
    return attested.keys.sign(entry.payload(body, at=at, ktime_ns=ktime_ns, epoch=attested.keys.id))
