"""From a signed manifest to `Admitted` with real-layout evidence of the emulated platform, and what refuses it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.admission import Candidate, admit
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.binding import report_data
from pointcall_attest.errors import RefusedError
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor.tee.emulated import EmulatedPlatform
from tests.unit.signing.world import World, statement

NONCE, SPKI = b"n" * 32, b"the epoch key"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> EmulatedPlatform:
    return EmulatedPlatform.open(tmp_path_factory.mktemp("tee"), clock=lambda: dt.datetime.now(dt.UTC))


def evidence(platform: EmulatedPlatform, candidate: Candidate, bound_to: str | None = None) -> Verdict:
    manifest, policy = bytes.fromhex(bound_to or candidate.manifest.sha256), bytes.fromhex(candidate.policy.sha256)
    return appraise_bundle(
        platform.evidence(report_data(manifest, policy, SPKI, NONCE)),
        policy=candidate.policy.tee,
        roots=Roots.of([platform.root_der]),
        at=dt.datetime.now(dt.UTC),
        report_data=report_data(bytes.fromhex(candidate.manifest.sha256), policy, SPKI, NONCE),
        measurements=candidate.manifest.measurements("snp"),
    )


def candidate(world: World, measurement: str, **tee: Any) -> Candidate:
    policy = world.policy(tee={"allow_emulated": True} | tee)
    payload = statement(reference_values={"snp": [measurement], "tdx": []})
    return world.check([world.sign(payload)], policy=policy)


def refused(found: Candidate, tee: Verdict) -> list[str]:
    with pytest.raises(RefusedError) as caught:
        admit(found, tee)
    return [c.id for c in caught.value.verdict.failed]


def test_the_whole_way(world: World, platform: EmulatedPlatform, tmp_path: Path) -> None:
    found = candidate(world, platform.measurement)
    admitted = admit(found, evidence(platform, found))
    assert admitted.verdict.tier == "emulated"
    assert admitted.verdict.platform == "snp"


def test_a_wrong_measurement(world: World, platform: EmulatedPlatform) -> None:
    found = candidate(world, "00" * 48)
    assert refused(found, evidence(platform, found)) == ["tee.measurement"]


def test_evidence_of_another_manifest(world: World, platform: EmulatedPlatform) -> None:
    found = candidate(world, platform.measurement)
    assert refused(found, evidence(platform, found, bound_to="11" * 32)) == ["tee.report_data"]


def test_emulation_that_is_not_allowed(world: World, platform: EmulatedPlatform) -> None:
    found = candidate(world, platform.measurement, allow_emulated=False)
    assert refused(found, evidence(platform, found)) == ["tee.emulated"]
