"""Admission: change one thing, fail one check."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import pytest

from pointcall_attest import admission
from pointcall_attest.admission import CHECKS, Admitted, admit
from pointcall_attest.errors import RefusedError
from pointcall_attest.signature import CHECKS as SIGNATURE_CHECKS
from pointcall_attest.verdict import Check, Verdict
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_runbook import vocabulary
from pointcall_runbook.meta import Parameter
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import (
    ALICE,
    BOB,
    DAY,
    EVIDENCE,
    NOW,
    TEE,
    World,
    declaration,
    files,
    predicate,
    runbook,
    service,
    sha256,
    statement,
    z,
)


def failed(verdict: Verdict) -> list[str]:
    return [c.id for c in verdict.failed]


def refusal(call: Callable[[], object]) -> list[str]:
    with pytest.raises(RefusedError) as caught:
        call()
    return failed(caught.value.verdict)


def collision(number: Callable[[str], Any]) -> tuple[str, str]:
    """Two names with the same 31-bit number: a birthday among some ten thousand."""
    seen: dict[int, str] = {}
    for i in range(1_000_000):
        name = f"s{i}"
        first = seen.setdefault(number(name).number, name)
        if first != name:
            return first, name
    raise AssertionError("no collision found")


def test_the_good_manifest_is_admitted(world: World) -> None:
    candidate = world.check([world.sign(statement())])
    assert failed(candidate.verdict) == []
    admitted = admit(candidate, TEE)
    assert admitted.verdict.passed
    assert admitted.verdict.tier == "hardware"
    assert admitted.module("restart") == files()["modules/restart.wasm"]
    assert admitted.declarations["db"].process.argv == ("/usr/bin/db",)
    assert admitted.modules["restart"].capabilities == ("recreate",)


def test_every_check_is_made_and_named_once(world: World) -> None:
    ids = [c.id for c in admit(world.check([world.sign(statement())]), TEE).verdict.checks]
    assert ids == [
        *SIGNATURE_CHECKS,
        *[i for i in CHECKS if not i.startswith("admission.")],
        "snp.signature",
        "tee.report_data",
        "tee.measurement",
        "admission.evidence",
        "admission.tier",
    ]


def test_nothing_else_makes_an_admitted(world: World) -> None:
    good = world.check([world.sign(statement())])
    parts = (good.manifest, good.signed, good.policy, good.files, good.modules, good.declarations, good.verdict)
    with pytest.raises(AssertionError, match="made by admit"):
        Admitted(*parts)
    with pytest.raises(AssertionError, match="made by admit"):
        Admitted(*parts, seal=object())


# What the host or the network may do to files and bundles


@pytest.mark.parametrize(
    ("parts", "check"),
    [
        ({"modules/restart.wasm": module()[:-1] + b"\xff"}, "subject.digest"),
        ({"blobs/lifecycle.blob": b"Blob"}, "subject.digest"),
        ({"services/db.json": declaration() + b" "}, "subject.digest"),
        ({"modules/other.wasm": module()}, "subject.unexpected"),
    ],
)
def test_a_changed_file_fails_one_check(world: World, parts: dict[str, bytes], check: str) -> None:
    candidate = world.check([world.sign(statement())], files() | parts)
    assert failed(candidate.verdict) == [check]
    assert refusal(lambda: admit(candidate, TEE)) == [check]


@pytest.mark.parametrize("name", sorted(files()))
def test_a_missing_file_fails_one_check(world: World, name: str) -> None:
    rest = {n: c for n, c in files().items() if n != name}
    assert failed(world.check([world.sign(statement())], rest).verdict) == ["subject.missing"]


def test_every_flipped_byte_of_a_module_is_found(world: World) -> None:
    bundle, good = world.sign(statement()), module()
    signed = world.check([bundle])
    for at in range(len(good)):
        changed = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        verdict = Verdict(tuple(admission._files(signed.manifest, files() | {"modules/restart.wasm": changed})))
        assert failed(verdict) == ["subject.digest"]


def test_an_unsigned_manifest(world: World) -> None:
    assert refusal(lambda: world.check([])) == ["manifest.unsigned"]
    assert refusal(lambda: world.check([statement()])) == ["manifest.bundle"]


def test_a_wrong_trusted_root(world: World, other: PrivateSigstore) -> None:
    bundle = world.sign(statement())
    assert refusal(lambda: world.check([bundle], trusted_root=other.trusted_root())) == ["trust.root"]
    assert refusal(lambda: world.check([bundle], trusted_root=world.sigstore.trusted_root() + b" ")) == ["trust.root"]


def test_signed_at_another_instance(world: World, other: PrivateSigstore) -> None:
    assert refusal(lambda: world.check([World(other).sign(statement())])) == ["manifest.signature"]


def test_a_wrong_identity(world: World) -> None:
    assert refusal(lambda: world.check([world.sign(statement(), who=BOB)])) == ["manifest.signer"]


def test_another_statement(world: World) -> None:
    body = json.loads(statement()) | {"predicateType": "https://slsa.dev/provenance/v1"}
    assert refusal(lambda: world.check([world.sign(json.dumps(body).encode())])) == ["manifest.statement"]


def test_a_payload_that_is_no_manifest(world: World) -> None:
    for payload in (statement() + b"\n", statement(unknown=1), statement(sequence=0)):
        with pytest.raises(RefusedError) as caught:
            world.check([world.sign(payload)])
        verdict = caught.value.verdict
        assert failed(verdict) == ["manifest.form"]
        assert {c.id for c in verdict.checks} >= {"manifest.expires", "subject.digest"}  # listed as not checked


# What a signed manifest may say


@pytest.mark.parametrize(
    ("over", "check"),
    [
        ({"not_before": z(NOW + DAY)}, "manifest.not_before"),
        ({"expires": z(NOW)}, "manifest.expires"),
        ({"sequence": 4}, "manifest.sequence"),
        ({"vocabulary": "00" * 32}, "manifest.vocabulary"),
        ({"min_executor": "0.1.1"}, "manifest.executor"),
        ({"min_executor": "0.10.0"}, "manifest.executor"),
        ({"policy_sha256": "00" * 32}, "manifest.policy"),
        ({"trusted_root_sha256": "00" * 32}, "manifest.trusted_root"),
        ({"revoked": [sha256(module())]}, "manifest.revoked"),
        ({"runbooks": [runbook(grants={"actions": ["notify"], "services": ["db"]})]}, "module.grants"),
        ({"runbooks": [runbook(events=["OomKilled"])]}, "module.events"),
        ({"runbooks": [runbook(events=["ProcessExited", "OomKilled"])]}, "module.events"),
        ({"runbooks": [runbook(grants={"actions": ["recreate"], "services": []})]}, "module.names"),
        ({"runbooks": [runbook(parameters={"least": 1})]}, "module.parameters"),
        ({"runbooks": [runbook(grants={"actions": ["recreate"], "services": ["db", "web"]})]}, "manifest.references"),
        ({"runbooks": [runbook(limits={"approval": ["kill"]})]}, "manifest.references"),
        ({"sensors": []}, "manifest.references"),
        ({"services": [service(digest="00" * 32)]}, "service.digest"),
    ],
)
def test_one_wrong_statement_fails_exactly_one_check(world: World, over: dict[str, Any], check: str) -> None:
    candidate = world.check([world.sign(statement(**over))])
    assert failed(candidate.verdict) == [check]
    assert refusal(lambda: admit(candidate, TEE)) == [check]


@pytest.mark.parametrize(
    ("name", "content", "check"),
    [
        ("modules/restart.wasm", b"\x00asm\x01\x00\x00\x00", "module.form"),
        ("modules/restart.wasm", module("OomKilled"), "module.events"),
        ("modules/restart.wasm", module(action="kill"), "module.grants"),
        ("modules/restart.wasm", module(services=("web",)), "module.names"),
        ("modules/restart.wasm", module(channels=("oncall",)), "module.names"),
        ("services/db.json", b"{}", "service.form"),
        ("services/db.json", declaration("web"), "service.match"),
    ],
)
def test_one_wrong_file_that_was_signed(world: World, name: str, content: bytes, check: str) -> None:
    parts = files() | {name: content}
    rows = {"services": [service(digest=sha256(parts["services/db.json"]))]}
    assert failed(world.check([world.sign(statement(parts, **rows))], parts).verdict) == [check]


@pytest.mark.parametrize(
    ("value", "wrong"), [(1, []), (9, []), (0, ["module.parameters"]), (10, ["module.parameters"])]
)
def test_parameters_stay_within_the_range_of_the_module(world: World, value: int, wrong: list[str]) -> None:
    parts = files() | {"modules/restart.wasm": module(parameters=(Parameter("least", 1, 9, 5),))}
    payload = statement(parts, runbooks=[runbook(parameters={"least": value})])
    assert failed(world.check([world.sign(payload)], parts).verdict) == wrong


def test_two_services_with_the_same_number(world: World) -> None:
    one, two = collision(vocabulary.service)
    parts = files() | {f"services/{n}.json": declaration(n) for n in (one, two)}
    rows = [
        service(name=n, declaration=f"services/{n}.json", digest=sha256(declaration(n)), listen=[]) for n in (one, two)
    ]
    payload = statement(parts, services=[service(), *rows])
    assert failed(world.check([world.sign(payload)], parts).verdict) == ["service.number"]


def test_two_channels_with_the_same_number(world: World) -> None:
    rows = [{"name": n, "kind": "log", "address": ""} for n in collision(vocabulary.channel)]
    assert failed(world.check([world.sign(statement(channels=rows))]).verdict) == ["channel.number"]


# What this node knows


def test_a_revoked_manifest_or_file(world: World) -> None:
    payload = statement()
    for digest in (sha256(payload), sha256(module())):
        candidate = world.check([world.sign(payload)], policy=world.policy(revoked=[digest]))
        assert failed(candidate.verdict) == ["manifest.revoked"]


def test_policy_expectations_that_hold(world: World) -> None:
    policy = world.policy(min_sequence=7, max_age_days=1)
    rows: dict[str, Any] = {"policy_sha256": policy.sha256, "trusted_root_sha256": policy.trusted_root_sha256}
    assert failed(world.check([world.sign(statement(**rows))], policy=policy).verdict) == []


def test_the_floor_of_the_policy(world: World) -> None:
    candidate = world.check([world.sign(statement())], policy=world.policy(min_sequence=8))
    assert failed(candidate.verdict) == ["manifest.floor"]


def test_an_old_signature(world: World) -> None:
    bundle = world.sign(statement())
    for later, wrong in ((29, []), (31, ["manifest.age"])):
        candidate = world.check([bundle], policy=world.policy(max_age_days=30), at=NOW + later * DAY)
        assert failed(candidate.verdict) == wrong


def test_a_signature_from_the_future(world: World) -> None:
    bundle = world.sign(statement(not_before=z(NOW - 9 * DAY)))
    assert refusal(lambda: world.check([bundle], at=NOW - 2 * DAY)) == ["manifest.clock"]


def test_the_same_manifest_again_is_no_rollback(world: World) -> None:
    payload = statement()
    candidate = world.check([world.sign(payload)], highest_sequence=7, highest_digest=sha256(payload))
    assert failed(candidate.verdict) == []


def test_another_manifest_with_the_same_sequence(world: World) -> None:
    candidate = world.check([world.sign(statement())], highest_sequence=7, highest_digest="00" * 32)
    assert failed(candidate.verdict) == ["manifest.fork"]


def test_the_chain_to_the_manifest_before(world: World) -> None:
    for previous, wrong in (("11" * 32, []), ("22" * 32, ["manifest.previous"]), (None, ["manifest.previous"])):
        bundle = world.sign(statement(previous=previous))
        candidate = world.check([bundle], highest_sequence=6, highest_digest="11" * 32)
        assert failed(candidate.verdict) == wrong


def test_the_first_and_the_last_moment(world: World) -> None:
    payload = statement(not_before=z(NOW), expires=z(NOW + DAY))
    for at, wrong in (
        (NOW, []),
        (NOW - dt.timedelta(seconds=1), ["manifest.not_before"]),
        (NOW + DAY - dt.timedelta(seconds=1), []),
        (NOW + DAY, ["manifest.expires"]),
    ):
        assert failed(world.check([world.sign(payload)], at=at).verdict) == wrong


def test_the_last_moment_of_a_signature(world: World) -> None:
    bundle = world.sign(statement())
    signed_at = world.check([bundle]).signed.signed_at
    assert signed_at is not None
    for later, wrong in ((30 * DAY, []), (30 * DAY + dt.timedelta(seconds=1), ["manifest.age"])):
        candidate = world.check([bundle], policy=world.policy(max_age_days=30), at=signed_at + later)
        assert failed(candidate.verdict) == wrong


def test_the_digest_of_the_newest_may_be_unknown(world: World) -> None:
    assert failed(world.check([world.sign(statement())], highest_sequence=7).verdict) == []
    assert failed(world.check([world.sign(statement())], highest_sequence=6).verdict) == []


def test_what_was_admitted_does_not_change(world: World) -> None:
    candidate = world.check([world.sign(statement())])
    admitted = admit(candidate, TEE)
    for value in (candidate, admitted):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.files = {}  # type: ignore[misc]
        with pytest.raises(TypeError):
            value.files["modules/restart.wasm"] = b""  # type: ignore[index]
    with pytest.raises(AssertionError, match="made by admit"):
        dataclasses.replace(admitted, files={})


def test_the_first_manifest_of_a_node(world: World) -> None:
    assert failed(world.check([world.sign(statement(sequence=1))], highest_sequence=None).verdict) == []


# The evidence of the node


@pytest.mark.parametrize(
    ("tee", "wrong"),
    [
        (Verdict((Check("tee.measurement", "fail"),), tier="hardware"), ["tee.measurement"]),
        (Verdict((), tier="hardware"), ["admission.evidence"]),
        (Verdict((Check("snp.signature", "not-checked"),), tier="hardware"), ["admission.evidence"]),
        (Verdict(EVIDENCE, tier="none"), ["admission.tier"]),
        (Verdict(EVIDENCE, tier="emulated"), ["admission.tier"]),
        (Verdict(EVIDENCE[:2], tier="hardware"), ["admission.evidence"]),
        (Verdict((EVIDENCE[0], EVIDENCE[2]), tier="hardware"), ["admission.evidence"]),
    ],
)
def test_evidence_that_does_not_pass(world: World, tee: Verdict, wrong: list[str]) -> None:
    candidate = world.check([world.sign(statement())])
    assert refusal(lambda: admit(candidate, tee)) == wrong


def test_emulated_evidence_passes_only_where_the_policy_says_so(world: World) -> None:
    tee = Verdict(EVIDENCE, tier="emulated", platform="snp")
    policy = world.policy(tee={"allow_emulated": True})
    admitted = admit(world.check([world.sign(statement())], policy=policy), tee)
    assert admitted.verdict.tier == "emulated"


def test_two_signers_over_the_same_bytes(world: World) -> None:
    policy = world.policy(min_signatures=2, signers=[world.signer(ALICE), world.signer(BOB)])
    payload = statement()
    alice, bob = world.sign(payload), world.sign(payload, who=BOB)
    assert [s.identity for s in world.check([alice, bob], policy=policy).signed.signers] == [BOB, ALICE]
    assert refusal(lambda: world.check([alice], policy=policy)) == ["manifest.threshold"]
    assert refusal(lambda: world.check([alice, alice], policy=policy)) == ["manifest.threshold"]
    different = world.sign(statement(sequence=8), who=BOB)
    assert refusal(lambda: world.check([alice, different], policy=policy)) == ["manifest.same"]


def test_all_wrong_things_are_named_at_once(world: World) -> None:
    payload = statement(sequence=1, expires=z(NOW - DAY / 2), min_executor="9.0.0")
    candidate = world.check([world.sign(payload)], files() | {"blobs/lifecycle.blob": b"x"})
    want = ["manifest.expires", "manifest.sequence", "manifest.executor", "subject.digest"]
    assert failed(candidate.verdict) == want


def test_the_predicate_of_these_tests_has_every_required_field() -> None:
    assert set(predicate()) >= {"format", "name", "sequence", "previous", "not_before", "expires", "vocabulary"}
