"""A second person's word: its form, who may give it, for what, and for how long. Signed with keys: no authority needed.

What an executor does with one: tests/scenario/test_people_story.py.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from pointcall_attest.approval import (
    MAX_APPROVAL_BYTES,
    Approval,
    ApprovalBody,
    approval_statement,
    parse_approval,
    verify_approval,
)
from pointcall_attest.errors import AttestError, MalformedError, RefusedError
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import CLOCK_SKEW, KEY_ISSUER, SignerIdentity
from pointcall_keys.long_lived import PAYLOAD_TYPE, FileKey, policy_row, sign_with_key
from tests.unit.signing.mutation import dropped, flip, leaves, members, replaced
from tests.unit.signing.world import ALICE, BOB, NOW, World, sha256, statement, z

MANIFEST = "ab" * 32
RUN = "01JDDDDDDDDDDDDDDDDDDDDDDD"
MINUTE, SECOND = dt.timedelta(minutes=1), dt.timedelta(seconds=1)
ISSUED, EXPIRES = NOW - MINUTE, NOW + 9 * MINUTE


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileKey]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: FileKey.make(folder / f"{name}.pem", None) for name in ("anna", "release", "stranger")}


def policy(keys: dict[str, FileKey], **over: Any) -> TrustPolicy:
    body = {
        "format": "pointcall-trust-policy/v1",
        "keys": [policy_row("release", keys["release"])],
        "approver_keys": [policy_row("anna", keys["anna"])],
    }
    return TrustPolicy.parse(json.dumps(body | over).encode())


def who(key: FileKey) -> SignerIdentity:
    return SignerIdentity(KEY_ISSUER, hashlib.sha256(key.spki).hexdigest())


def body(**over: Any) -> ApprovalBody:
    fields: dict[str, Any] = {
        "node": "edge-1",
        "run": RUN,
        "index": 2,
        "runbook": "restart",
        "action": "recreate",
        "args": ("4711", "-9223372036854775808"),
        "issued": ISSUED,
        "expires": EXPIRES,
    }
    return ApprovalBody(**(fields | over))


def good() -> bytes:
    return approval_statement(body(), manifest=MANIFEST)


@pytest.fixture
def verify(keys: dict[str, FileKey]) -> Callable[..., Approval]:
    """Sign these bytes and verify them; `by` names the key, everything else is an argument of the verifier."""

    def go(payload: bytes, by: str = "anna", bundle: bytes | None = None, **over: Any) -> Approval:
        given: dict[str, Any] = {
            "trusted_root": b"{}",
            "policy": policy(keys),
            "node": "edge-1",
            "manifest": MANIFEST,
            "manifest_signers": frozenset({who(keys["release"])}),
            "at": NOW,
            "in_process": True,
        }
        return verify_approval(bundle or sign_with_key(payload, keys[by]), **(given | over))

    return go


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(AttestError) as caught:
        call()
    return caught.value.id


# Its form


def test_a_good_approval_says_what_was_signed(verify: Callable[..., Approval], keys: dict[str, FileKey]) -> None:
    for in_process in (True, False):
        found = verify(good(), in_process=in_process)
        assert (found.body, found.by, found.sha256) == (body(), who(keys["anna"]), sha256(good()))
    assert parse_approval(good()) == (body(), MANIFEST)


def test_an_approval_is_made_by_verifying_one(keys: dict[str, FileKey]) -> None:
    with pytest.raises(AssertionError, match="verifying"):
        Approval(body(), who(keys["anna"]), "00" * 32)


CHANGES: tuple[Callable[[Any], Any], ...] = (
    flip,
    lambda _: None,
    lambda _: "",
    lambda _: "x y",
    lambda _: "cd" * 32,
    lambda _: -1,
    lambda _: 8,
    lambda _: True,
    lambda _: 1.0,
    lambda _: [],
    lambda _: {},
    lambda _: "\u202e",
    lambda _: "a" * 5000,
    lambda v: [v],
)
# What a changed statement may say and still be an approval: of something else, which is not what waits or not of here.
OTHER: dict[str, str] = {
    "subject.name": "the name of the manifest's file: the digest counts",
    "predicate.format": "left out: the type of the predicate says it already",
    "predicate.run": "another run: the executor has none that waits",
    "predicate.index": "another call",
    "predicate.runbook": "another name",
    "predicate.action": "another action: it is compared with the call",
    "predicate.args": "other arguments: they are compared with the call",
}


def changed(value: Any) -> Iterator[tuple[str, bytes]]:
    for path, leaf in leaves(value):
        for change in CHANGES:
            yield _named(path), replaced(value, path, change(leaf))
    for path in members(value):
        yield _named(path), dropped(value, path)
        yield _named(path), replaced(value, path, [])
    for path in ((), ("predicate",), ("subject", 0), ("subject", 0, "digest")):
        yield f"{_named(path)}.unknown", replaced(value, (*path, "unknown"), 1)


def _named(path: tuple[Any, ...]) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def test_every_changed_field_is_refused_or_says_something_else(verify: Callable[..., Approval]) -> None:
    """Signed again each time, so that not the signature refuses it; only declared errors come out."""
    passed: set[str] = set()
    ids: dict[str, set[str]] = {}
    for where, raw in changed(json.loads(good())):
        payload = raw if b"1.0" in raw else rfc8785.dumps(json.loads(raw))
        if payload == good():
            continue
        try:
            found = verify(payload)
        except AttestError as refusal:
            ids.setdefault(where, set()).add(refusal.id)
        else:
            assert where in {"subject.name", "predicate.format"} or found.body != body(), where
            passed.add(where)
    assert passed - set(OTHER) == set()
    assert {i for found in ids.values() for i in found} == {"approval.form", "approval.other", "manifest.statement"}
    assert "approval.other" in ids["predicate.node"] & ids["subject.digest.sha256"]
    for where in (".unknown", "predicate.unknown", "subject.unknown", "subject.digest.unknown"):
        assert ids[where] == {"approval.form"}


@pytest.mark.parametrize(
    "over",
    [
        {"run": RUN.lower()},
        {"run": RUN[:-1]},
        {"index": 8},
        {"index": -1},
        {"args": ["01"]},
        {"args": ["-0"]},
        {"args": ["1e3"]},
        {"args": [4711]},
        {"args": ["1"] * 17},
        {"action": "Recreate"},
        {"issued": z(NOW).replace("Z", "+00:00")},
        {"issued": z(EXPIRES)},
        {"expires": z(ISSUED)},
        {"expires": z(ISSUED + dt.timedelta(hours=1) + SECOND)},
        {"format": "pointcall-approval/v2"},
        {"and_also": "open_circuit"},
        {"calls": []},
    ],
)
def test_what_is_no_approval(verify: Callable[..., Approval], over: dict[str, Any]) -> None:
    whole = json.loads(good())
    payload = rfc8785.dumps(whole | {"predicate": whole["predicate"] | over})
    assert refused(lambda: verify(payload)) == "approval.form"
    with pytest.raises(MalformedError):
        parse_approval(payload)


def test_an_hour_is_the_longest(verify: Callable[..., Approval]) -> None:
    longest = body(expires=ISSUED + dt.timedelta(hours=1))
    assert verify(approval_statement(longest, manifest=MANIFEST)).body == longest
    with pytest.raises(ValueError, match="an hour at most"):
        body(expires=ISSUED + dt.timedelta(hours=1) + SECOND)


def test_an_approval_is_of_one_manifest(verify: Callable[..., Approval]) -> None:
    """Two subjects would let one word count where only the other was meant."""
    whole = json.loads(good())
    other = {"name": "other.json", "digest": {"sha256": "cd" * 32}}
    for subjects in ([*whole["subject"], other], [other, *whole["subject"]], []):
        payload = rfc8785.dumps(whole | {"subject": subjects})
        assert refused(lambda p=payload: verify(p)) == "approval.form"  # type: ignore[misc]
    both = {"subject": [{"name": "m", "digest": {"sha256": MANIFEST, "sha512": "00" * 64}}]}
    assert refused(lambda: verify(rfc8785.dumps(whole | both))) == "approval.form"


@pytest.mark.parametrize("change", [lambda raw: raw + b"\n", lambda raw: raw.replace(b":", b": ", 1)])
def test_only_the_canonical_form_counts(verify: Callable[..., Approval], change: Callable[[bytes], bytes]) -> None:
    assert refused(lambda: verify(change(good()))) == "approval.form"


def test_a_long_approval_is_refused_before_it_is_read() -> None:
    whole = json.loads(good())
    long = rfc8785.dumps(whole | {"subject": [{"name": "a" * MAX_APPROVAL_BYTES, "digest": {"sha256": MANIFEST}}]})
    with pytest.raises(MalformedError, match="too long") as caught:
        parse_approval(long)
    assert caught.value.id == "approval.form"


def test_another_type_of_payload(verify: Callable[..., Approval], keys: dict[str, FileKey]) -> None:
    """The signature over another type is good; what it is about is not."""
    bundle, kind, payload = json.loads(sign_with_key(good(), keys["anna"])), "application/json", good()
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    signatures = [{"sig": base64.b64encode(keys["anna"].sign(pae)).decode()}]
    bundle["dsseEnvelope"] |= {"payloadType": kind, "signatures": signatures}
    assert refused(lambda: verify(b"", bundle=json.dumps(bundle).encode())) == "manifest.statement"
    bundle["dsseEnvelope"]["payloadType"] = PAYLOAD_TYPE  # what was signed was another type
    assert refused(lambda: verify(b"", bundle=json.dumps(bundle).encode())) == "manifest.signature"


def test_a_signed_manifest_is_no_approval(verify: Callable[..., Approval]) -> None:
    assert refused(lambda: verify(statement())) == "manifest.statement"


# Who


def test_nobody_can_approve_where_the_policy_names_nobody(
    verify: Callable[..., Approval], keys: dict[str, FileKey]
) -> None:
    nobody = policy(keys, approver_keys=[])
    assert not nobody.may_approve
    assert refused(lambda: verify(good(), policy=nobody)) == "approval.approvers"
    assert refused(lambda: verify(good(), by="release", policy=nobody)) == "approval.approvers"


@pytest.mark.parametrize("by", ["release", "stranger"])
def test_only_approvers_can_approve(verify: Callable[..., Approval], by: str) -> None:
    """Whoever may sign manifests is no approver by that."""
    assert refused(lambda: verify(good(), by=by)) == "manifest.signer"


def test_an_approver_cannot_sign_a_manifest(world: World, keys: dict[str, FileKey]) -> None:
    with pytest.raises(RefusedError) as caught:
        world.check([sign_with_key(statement(), keys["anna"])], policy=policy(keys))
    assert [c.id for c in caught.value.verdict.failed] == ["manifest.signer"]


def test_the_signer_of_the_manifest_is_no_second_person(
    verify: Callable[..., Approval], keys: dict[str, FileKey]
) -> None:
    """Also one of several."""
    signers = frozenset({who(keys["release"]), who(keys["anna"])})
    assert refused(lambda: verify(good(), manifest_signers=signers)) == "approval.second-person"


def test_the_signer_of_the_manifest_is_found_by_identity(world: World) -> None:
    """Keyless: a new certificate each time, and one identity."""
    trust = world.policy(approvers=[world.signer(ALICE), world.signer(BOB)])
    given: dict[str, Any] = {
        "trusted_root": world.sigstore.trusted_root(),
        "policy": trust,
        "node": "edge-1",
        "manifest": MANIFEST,
        "manifest_signers": frozenset({SignerIdentity(world.sigstore.issuer, ALICE)}),
        "at": NOW,
        "in_process": True,
    }
    assert verify_approval(world.sign(good(), who=BOB), **given).by.identity == BOB
    assert refused(lambda: verify_approval(world.sign(good(), who=ALICE), **given)) == "approval.second-person"


def test_the_policy_for_approvals_is_the_approvers_and_nothing_else(world: World, keys: dict[str, FileKey]) -> None:
    row = world.signer(BOB, source_repository="https://git.example/acme", build_trigger=["push"], valid_until=z(NOW))
    given = world.policy(
        signers=[world.signer(ALICE), world.signer(BOB)],
        keys=[policy_row("release", keys["release"])],
        approvers=[row],
        approver_keys=[policy_row("anna", keys["anna"]) | {"valid_until": z(NOW)}],
        min_signatures=2,
        min_sequence=9,
        max_age_days=1,
        require_pointer=True,
    )
    made = given.for_approvals()
    assert [s.model_dump(mode="json") for s in made.signers] == [
        row | {"source_repository_id": None, "runner_environment": None}
    ]
    assert [(k.name, k.valid_until) for k in made.keys] == [("anna", NOW)]
    assert (made.approvers, made.approver_keys, made.min_signatures) == ((), (), 1)
    assert made.trusted_root_sha256 == given.trusted_root_sha256


def test_an_approvers_key_ends(verify: Callable[..., Approval], keys: dict[str, FileKey]) -> None:
    ended = policy(keys, approver_keys=[policy_row("anna", keys["anna"]) | {"valid_until": z(NOW - SECOND)}])
    assert refused(lambda: verify(good(), policy=ended)) == "manifest.signer"


# For what, and when


@pytest.mark.parametrize(
    "over", [{"node": "edge-2"}, {"node": "edge-1 "}, {"node": ""}, {"manifest": "cd" * 32}, {"manifest": ""}]
)
def test_an_approval_for_something_else(verify: Callable[..., Approval], over: dict[str, str]) -> None:
    assert refused(lambda: verify(good(), **over)) == "approval.other"


def test_the_first_and_the_last_moment(verify: Callable[..., Approval]) -> None:
    for at, ok in (
        (ISSUED - CLOCK_SKEW - SECOND, False),
        (ISSUED - CLOCK_SKEW, True),  # clocks differ a little
        (EXPIRES - SECOND, True),
        (EXPIRES, False),
        (EXPIRES + dt.timedelta(days=365), False),
    ):
        if ok:
            assert verify(good(), at=at).body == body()
        else:
            assert refused(lambda at=at: verify(good(), at=at)) == "approval.time"  # type: ignore[misc]


def test_a_key_file_is_enough_to_approve(verify: Callable[..., Approval], tmp_path: Path) -> None:
    """The whole way of a site without any Sigstore: a new key, its row in the policy, a signature."""
    key = FileKey.make(tmp_path / "key.pem", b"a passphrase")
    trust = TrustPolicy.parse(
        json.dumps({
            "format": "pointcall-trust-policy/v1",
            "keys": [policy_row("other", FileKey.make(tmp_path / "other.pem", None))],
            "approver_keys": [policy_row("me", key)],
        }).encode()
    )  # fmt: skip
    again = FileKey.load(tmp_path / "key.pem", b"a passphrase")
    assert verify(b"", bundle=sign_with_key(good(), again), policy=trust).by == who(key)
