"""Pointers and revocations: what they can do (remove, and show that something newer exists) and what they cannot."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from pointcall_attest import canonical
from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.notice import (
    Notice,
    Pointer,
    PointerBody,
    Revocation,
    RevocationBody,
    notice_statement,
    verify_pointer,
    verify_revocation,
)
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import BOB, DAY, NOW, World, sha256, statement

HOUR = dt.timedelta(hours=1)


def pointer(world: World, **over: Any) -> Pointer:
    fields: dict[str, Any] = {"name": "edge", "ring": "canary", "sequence": 7, "manifest": sha256(statement())}
    body = PointerBody(**(fields | {"issued": NOW - HOUR, "expires": NOW + HOUR} | over))
    bundle = world.sign(notice_statement(body))
    root = world.sigstore.trusted_root()
    return verify_pointer([bundle], trusted_root=root, policy=world.policy(), at=NOW, in_process=True)


def revocation(world: World, *digests: str) -> Revocation:
    body = RevocationBody(name="edge", issued=NOW, reason="a bad module", revoked=digests)
    bundle = world.sign(notice_statement(body))
    root = world.sigstore.trusted_root()
    return verify_revocation([bundle], trusted_root=root, policy=world.policy(), at=NOW, in_process=True)


def failed(world: World, **over: Any) -> list[str]:
    return [c.id for c in world.check([world.sign(statement())], **over).verdict.failed]


def test_a_pointer_to_this_manifest(world: World) -> None:
    for policy in ({"require_pointer": True}, {"require_pointer": True, "ring": "canary"}, {}):
        assert failed(world, policy=world.policy(**policy), pointer=pointer(world)) == []


@pytest.mark.parametrize(
    "over",
    [
        {"sequence": 8},
        {"manifest": "00" * 32},
        {"name": "core"},
        {"expires": NOW},
        {"issued": NOW + HOUR, "expires": NOW + 2 * HOUR},
    ],
)
def test_a_pointer_to_something_else(world: World, over: dict[str, Any]) -> None:
    assert failed(world, pointer=pointer(world, **over)) == ["manifest.newest"]


def test_the_first_and_the_last_moment_of_a_pointer(world: World) -> None:
    soon = pointer(world, issued=NOW + dt.timedelta(minutes=5), expires=NOW + HOUR)
    assert failed(world, pointer=soon) == []  # clocks differ a little
    assert failed(world, pointer=soon, at=NOW - dt.timedelta(seconds=1)) == ["manifest.newest"]
    assert failed(world, pointer=soon, at=NOW + HOUR - dt.timedelta(seconds=1)) == []


def test_a_pointer_of_another_ring(world: World) -> None:
    assert failed(world, policy=world.policy(ring="fleet"), pointer=pointer(world)) == ["manifest.newest"]


def test_a_policy_that_demands_a_pointer(world: World) -> None:
    assert failed(world, policy=world.policy(require_pointer=True)) == ["manifest.newest"]
    assert failed(world) == []


def test_a_pointer_expires_while_the_manifest_does_not(world: World) -> None:
    given = pointer(world)
    assert failed(world, pointer=given, at=NOW + DAY) == ["manifest.newest"]


def test_a_revocation_removes(world: World) -> None:
    for digest in (sha256(statement()), sha256(module())):
        assert failed(world, revocations=[revocation(world, "00" * 32), revocation(world, digest)]) == [
            "manifest.revoked"
        ]
    assert failed(world, revocations=[revocation(world, "00" * 32)]) == []


def test_a_notice_is_made_by_verifying_one(world: World) -> None:
    good = pointer(world)
    with pytest.raises(AssertionError, match="verifying"):
        Notice(good.body, good.sha256, good.signed)


def test_one_kind_does_not_pass_for_the_other(world: World) -> None:
    body = RevocationBody(name="edge", issued=NOW, reason="", revoked=("00" * 32,))
    root = world.sigstore.trusted_root()
    for verify, payload in ((verify_pointer, notice_statement(body)), (verify_revocation, statement())):
        with pytest.raises(VerifyError) as caught:
            verify([world.sign(payload)], trusted_root=root, policy=world.policy(), at=NOW, in_process=True)
        assert caught.value.id == "manifest.statement"


def test_a_notice_by_somebody_else(world: World) -> None:
    body = RevocationBody(name="edge", issued=NOW, reason="", revoked=("00" * 32,))
    bundle, root = world.sign(notice_statement(body), who=BOB), world.sigstore.trusted_root()
    with pytest.raises(VerifyError) as caught:
        verify_revocation([bundle], trusted_root=root, policy=world.policy(), at=NOW, in_process=True)
    assert caught.value.id == "manifest.signer"


def test_the_child_verifies_notices(world: World) -> None:
    body = RevocationBody(name="edge", issued=NOW, reason="", revoked=("00" * 32,))
    bundle, root = world.sign(notice_statement(body)), world.sigstore.trusted_root()
    assert verify_revocation([bundle], trusted_root=root, policy=world.policy(), at=NOW).body == body


@pytest.mark.parametrize(
    "change",
    [
        {"subject": [{"name": "notice/0", "digest": {"sha256": "11" * 32}}]},
        {"predicate": {}},
        {"other": 1},
    ],
)
def test_the_form_of_a_notice_is_exact(world: World, change: dict[str, Any]) -> None:
    body = RevocationBody(name="edge", issued=NOW, reason="", revoked=("00" * 32,))
    root = world.sigstore.trusted_root()
    changed = canonical.dumps(json.loads(notice_statement(body)) | change)
    with pytest.raises(MalformedError) as caught:
        verify_revocation([world.sign(changed)], trusted_root=root, policy=world.policy(), at=NOW, in_process=True)
    assert caught.value.id == "notice.form"


def test_a_pointer_ends_after_it_starts() -> None:
    with pytest.raises(ValueError, match="earlier"):
        PointerBody(name="edge", ring="canary", sequence=7, manifest="00" * 32, issued=NOW, expires=NOW)
