"""Pointers and revocations: what they can do (remove, and show that something newer exists) and what they cannot."""

from __future__ import annotations

import base64
import datetime as dt
import json
from typing import Any

import pytest

from pointcall_attest import canonical, signature_child
from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.notice import (
    MAX_NOTICES,
    Notice,
    Notices,
    Pointer,
    PointerBody,
    Revocation,
    RevocationBody,
    notice_statement,
    verify_notices,
    verify_pointer,
    verify_revocation,
)
from pointcall_attest.signature import UNANSWERED
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import ALICE, BOB, DAY, NOW, World, sha256, statement

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


def failed(world: World, *pointers: Pointer, revocations: tuple[Revocation, ...] = (), **over: Any) -> list[str]:
    notices = Notices(pointers, revocations)
    return [c.id for c in world.check([world.sign(statement())], notices=notices, **over).verdict.failed]


def test_a_pointer_to_this_manifest(world: World) -> None:
    for policy in ({"require_pointer": True}, {"require_pointer": True, "ring": "canary"}, {}):
        assert failed(world, pointer(world), policy=world.policy(**policy)) == []


@pytest.mark.parametrize("over", [{"sequence": 8}, {"sequence": 6}, {"manifest": "00" * 32}])
def test_a_pointer_to_another_manifest(world: World, over: dict[str, Any]) -> None:
    for demanded in (True, False):
        policy = world.policy(require_pointer=demanded)
        assert failed(world, pointer(world, **over), policy=policy) == ["manifest.newest"]


@pytest.mark.parametrize(
    "over", [{"name": "core"}, {"expires": NOW}, {"issued": NOW + HOUR, "expires": NOW + 2 * HOUR}, {"ring": "fleet"}]
)
def test_a_pointer_that_says_nothing_here(world: World, over: dict[str, Any]) -> None:
    """Of another series, another time, another ring: it counts for nobody, and is not enough where one must be."""
    given = pointer(world, **over)
    assert failed(world, given, policy=world.policy(ring="canary")) == []
    assert failed(world, given, policy=world.policy(ring="canary", require_pointer=True)) == ["manifest.newest"]


def test_the_newest_of_several_pointers(world: World) -> None:
    """An older one that still holds cannot bring the older manifest back, whatever the order of the files."""
    own, newer = pointer(world), pointer(world, sequence=8, manifest="00" * 32)
    past = pointer(world, sequence=9, manifest="11" * 32, expires=NOW)
    for given in ((own, past), (past, own)):
        assert failed(world, *given, policy=world.policy(require_pointer=True)) == []
    for given in ((own, newer), (newer, own), (past, newer, own)):
        assert failed(world, *given) == ["manifest.newest"]


def test_the_first_and_the_last_moment_of_a_pointer(world: World) -> None:
    soon = pointer(world, issued=NOW + dt.timedelta(minutes=5), expires=NOW + HOUR)
    policy, second = world.policy(require_pointer=True), dt.timedelta(seconds=1)
    assert failed(world, soon, policy=policy) == []  # clocks differ a little
    assert failed(world, soon, policy=policy, at=NOW - second) == ["manifest.newest"]
    assert failed(world, soon, policy=policy, at=NOW + HOUR - second) == []
    assert failed(world, soon, policy=policy, at=NOW + HOUR) == ["manifest.newest"]


def test_a_policy_that_demands_a_pointer(world: World) -> None:
    assert failed(world, policy=world.policy(require_pointer=True)) == ["manifest.newest"]
    assert failed(world) == []


def test_a_pointer_expires_while_the_manifest_does_not(world: World) -> None:
    given, policy = pointer(world), world.policy(require_pointer=True)
    assert failed(world, given, policy=policy, at=NOW + DAY) == ["manifest.newest"]


def test_a_revocation_removes(world: World) -> None:
    for digest in (sha256(statement()), sha256(module())):
        given = (revocation(world, "00" * 32), revocation(world, digest))
        assert failed(world, revocations=given) == ["manifest.revoked"]
    assert failed(world, revocations=(revocation(world, "00" * 32),)) == []


def test_a_revocation_can_only_remove(world: World) -> None:
    """With it, everything that failed before fails, and more: for every combination of what else is wrong."""
    for over in ({}, {"highest_sequence": 9}, {"at": NOW + 100 * DAY}, {"policy": world.policy(require_pointer=True)}):
        before = failed(world, **over)
        for given in (revocation(world, "00" * 32), revocation(world, sha256(statement()), sha256(module()))):
            assert set(failed(world, revocations=(given,), **over)) - {"manifest.revoked"} == set(before)


# Whatever lies in the folder


PROVENANCE = canonical.dumps(json.loads(statement()) | {"predicateType": "https://slsa.dev/provenance/v1"})


def gathered(world: World, *bundles: bytes, **over: Any) -> Notices:
    root = world.sigstore.trusted_root()
    return verify_notices(bundles, trusted_root=root, policy=world.policy(**over), at=NOW, in_process=True)


def bodies(name: str = "edge") -> tuple[PointerBody, RevocationBody]:
    fields: dict[str, Any] = {"name": name, "ring": "canary", "sequence": 7, "manifest": sha256(statement())}
    return (
        PointerBody(**fields, issued=NOW - HOUR, expires=NOW + HOUR),
        RevocationBody(name=name, issued=NOW, reason="a bad module", revoked=("00" * 32,)),
    )


def test_a_folder_of_notices(world: World) -> None:
    point, revoke = (notice_statement(body) for body in bodies())
    found = gathered(world, world.sign(revoke), world.sign(point))
    assert [p.body.sequence for p in found.pointers] == [7]
    assert found.revoked == {"00" * 32}
    assert found.wrong == ()
    assert gathered(world) == Notices()
    twice = gathered(world, world.sign(point), world.sign(point))
    assert len(twice.pointers) == 1


def test_notices_need_as_many_signers_as_manifests(world: World) -> None:
    _, revoke = (notice_statement(body) for body in bodies())
    two = {"signers": [world.signer(ALICE), world.signer(BOB)], "min_signatures": 2}
    one = gathered(world, world.sign(revoke), **two)
    assert one.revocations == ()
    assert "manifest.threshold" in one.wrong[0]
    assert gathered(world, world.sign(revoke), world.sign(revoke, who=BOB), **two).revoked == {"00" * 32}


def test_what_is_no_notice_is_not_passed_over(world: World) -> None:
    _, revoke = (notice_statement(body) for body in bodies())
    for bundle in (b"", b"{}", world.sign(statement()), world.sign(revoke, who=BOB), world.sign(PROVENANCE)):
        found = gathered(world, bundle, world.sign(revoke)) if bundle else gathered(world, bundle)
        assert len(found.wrong) == 1
        checked = world.check([world.sign(statement())], notices=found).verdict
        assert [c.id for c in checked.failed] == ["manifest.notices"]


def test_too_many_notices(world: World) -> None:
    good = json.loads(world.sign(notice_statement(bodies()[1])))
    many = []
    for n in range(MAX_NOTICES + 1):
        payload = base64.b64encode(b"%d" % n).decode()
        many.append(json.dumps(good | {"dsseEnvelope": good["dsseEnvelope"] | {"payload": payload}}).encode())
    (wrong,) = gathered(world, *many).wrong
    assert "at most" in wrong


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


def test_a_child_that_gives_no_answer_says_nothing_about_notices(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = world.sign(notice_statement(bodies()[0]))
    signature_child.discard()
    monkeypatch.setattr(signature_child.sys, "executable", "/nowhere")  # type: ignore[attr-defined]
    root = world.sigstore.trusted_root()

    def asked() -> Notices:
        return verify_notices([bundle], trusted_root=root, policy=world.policy(), at=NOW)

    found = asked()
    assert found.unanswered
    assert UNANSWERED in found.wrong[0]
    checked = world.check([world.sign(statement())], notices=found)
    assert [c.id for c in checked.verdict.failed] == [UNANSWERED]
    monkeypatch.undo()
    assert asked().pointers
    assert not asked().unanswered
