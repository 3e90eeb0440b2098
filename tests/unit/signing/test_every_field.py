"""Every field of a manifest and of a trust policy changed: refused, or among those that are listed here with a reason.

The changed manifest is signed again, so that not the signature refuses it. Nothing but a refusal ever comes out.
(Every field of a bundle and of a signed statement: test_signature.py; of a bundle by a key: test_file_signature.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rfc8785

from pointcall_attest.admission import Candidate, check_manifest
from pointcall_attest.errors import MalformedError, RefusedError
from pointcall_attest.policy import TrustPolicy
from pointcall_keys.long_lived import FileKey, policy_row, sign_with_key
from tests.unit.signing.mutation import dropped, flip, leaves, members, replaced
from tests.unit.signing.test_manifest import CIRCUIT
from tests.unit.signing.world import DAY, NOW, files, service, sha256, statement, z

ROOT = b"{}"
CHANGES: tuple[Callable[[Any], Any], ...] = (
    flip,
    lambda _: None,
    lambda _: "",
    lambda _: "x",
    lambda _: 7,
    lambda _: -1,
    lambda _: 2**63,
    lambda _: True,
    lambda _: [],
    lambda _: {},
    lambda _: "\u202e",
    lambda _: "a" * 5000,
    lambda v: [v],
)


def full_statement() -> bytes:
    """A manifest in which every optional field of the first level is set."""
    over: dict[str, Any] = {
        "previous": "11" * 32,
        "revoked": ["22" * 32],
        "guard": {"max_actions_per_minute": 10, "never_touch": ["10.0.0.0/8", "db"]},
        "reference_values": {"snp": ["cd" * 48], "tdx": ["ef" * 48]},
        "services": [service(listen=[{"address": "127.0.0.1", "port": 5432, "protocol": "tcp", "circuit": CIRCUIT}])],
    }
    return statement(**over)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> FileKey:
    return FileKey.make(tmp_path_factory.mktemp("key") / "key.pem", None)


def full_policy(key: FileKey) -> dict[str, Any]:
    signer = {
        "issuer": "https://issuer.example",
        "identity": "https://issuer.example/sign@main",
        "source_repository": "https://issuer.example/acme",
        "source_repository_id": "99",
        "build_trigger": ["push"],
        "runner_environment": "hosted",
        "valid_until": z(NOW + DAY),
    }
    return {
        "format": "pointcall-trust-policy/v1",
        "trusted_root_sha256": sha256(ROOT),
        "signers": [signer],
        "keys": [policy_row("release", key) | {"valid_until": z(NOW + DAY)}],
        "min_signatures": 1,
        "min_sequence": 7,
        "revoked": ["33" * 32],
        "max_age_days": 30,
        "require_pointer": False,
        "ring": "canary",
        "tee": {"allow_emulated": True, "platforms": ["snp"], "snp": {"min_guest_svn": 1}},
    }


def check(payload: bytes, key: FileKey, policy: TrustPolicy) -> Candidate:
    return check_manifest(
        [sign_with_key(payload, key)],
        files(),
        policy=policy,
        trusted_root=ROOT,
        at=NOW,
        highest_sequence=6,
        highest_digest="11" * 32,
        executor_version="0.1.0",
        in_process=True,
    )


def parse(body: dict[str, Any]) -> TrustPolicy:
    return TrustPolicy.parse(json.dumps(body).encode())


def accepted(make: Callable[[], Candidate]) -> bool:
    """Whether it would go on to evidence. Anything but a refusal is an error of the test."""
    try:
        return make().verdict.passed
    except (RefusedError, MalformedError):
        return False


def named(path: tuple[Any, ...]) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def changed(body: Any) -> Iterator[tuple[str, bytes]]:
    for path, value in leaves(body):
        for change in CHANGES:
            if change(value) != value or type(change(value)) is not type(value):
                yield named(path), replaced(body, path, change(value))
    for path in members(body):
        yield named(path), dropped(body, path)
        yield named(path), replaced(body, path, [])
    for path in [(), *(p for p in members(body) if isinstance(_at(body, p), dict))]:
        yield f"{named(path)}.unknown", replaced(body, (*path, "unknown"), 1)


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        body = body[part]
    return body


# What the author of a manifest may choose freely: a change there is another manifest, with its own digest, and says so.
AUTHORS: dict[str, str] = {
    "name": "the series",
    "sequence": "may rise by more than one; then what was before is not known",
    "previous": "not known where the sequence rises by more than one",
    "not_before": "earlier",
    "expires": "later",
    "runbooks": "fewer",
    "runbooks.name": "a name",
    "runbooks.version": "a number for people",
    "runbooks.events": "fewer events",
    "runbooks.mode": "monitor, or left out",
    "runbooks.parameters": "left out: the module's own",
    "runbooks.grants.services": "fewer or other declared names",
    "runbooks.grants.channels": "left out",
    "runbooks.grants.networks": "left out",
    "sensors.name": "a name; arming asks whether it knows the sensor",
    "sensors.params": "left out",
    "sensors.params.unknown": "a constant of the blob: for its sensor to judge",
    "services.name": "a name; then its declaration is of another kind",
    "services.kind": "another kind; arming asks whether it can",
    "services.listen": "nowhere",
    "services.listen.address": "elsewhere",
    "services.listen.port": "elsewhere",
    "services.listen.protocol": "udp, or left out",
    "services.listen.circuit": "left out: as the sensor's constants say",
    "services.listen.circuit.threshold": "another number in its range, or left out",
    "services.listen.circuit.window_ms": "as above",
    "services.listen.circuit.cooldown_ms": "as above",
    "services.listen.circuit.percent": "as above",
    "services.listen.circuit.min_attempts": "as above",
    "services.listen.circuit.refuse_errno": "another name, or left out",
    "services.listen.circuit.abandoned": "the other way, or left out",
    "channels": "none",
    "channels.name": "a name",
    "channels.kind": "another kind; arming asks whether it can",
    "channels.address": "elsewhere",
    "guard": "left out: the strict defaults",
    "guard.max_actions_per_minute": "a limit",
    "guard.never_touch": "a list",
    "reference_values": "none: then no image may arm it",
    "reference_values.snp": "another measurement; evidence decides",
    "reference_values.tdx": "another measurement; evidence decides",
    "min_executor": "left out",
    "policy_sha256": "any",
    "trusted_root_sha256": "any",
    "revoked": "another digest that is not here",
}


def test_every_changed_field_of_a_manifest(key: FileKey) -> None:
    policy, good = parse(full_policy(key)), full_statement()
    assert accepted(lambda: check(good, key, policy))
    free: set[str] = set()
    for where, raw in changed(json.loads(good)):
        try:
            payload = rfc8785.dumps(json.loads(raw))
        except rfc8785.CanonicalizationError:
            payload = raw
        if payload != good and accepted(lambda p=payload: check(p, key, policy)):  # type: ignore[misc]
            free.add(where.removeprefix("predicate."))
    assert free - set(AUTHORS) == set()
    assert not any(name.startswith(("subject", "_type", "vocabulary", "format")) for name in free)
    assert [name for name in free if name.endswith("unknown")] == ["sensors.params.unknown"]


# What does not matter to a manifest that a key signed, or is still met; the policy's digest in the evidence changes.
IRRELEVANT: dict[str, str] = {
    "trusted_root_sha256": "left out together with nobody's signature by certificate: keys need no root",
    "signers": "another signer than the one who signed",
    "signers.issuer": "as above",
    "signers.identity": "as above",
    "signers.source_repository": "as above",
    "signers.source_repository_id": "as above",
    "signers.build_trigger": "as above",
    "signers.runner_environment": "as above",
    "signers.valid_until": "as above",
    "keys.name": "a name for people",
    "keys.valid_until": "no end",
    "min_signatures": "left out: one, as before",
    "min_sequence": "lower, or left out",
    "revoked": "another digest that is not here",
    "max_age_days": "a key states no time of signing",
    "require_pointer": "left out: false, as before",
    "ring": "no pointer is asked for",
    "tee": "judges evidence, not manifests",
    "tee.allow_emulated": "as above",
    "tee.platforms": "as above",
    "tee.snp": "as above",
    "tee.snp.min_guest_svn": "as above",
}


def test_every_changed_field_of_a_policy(key: FileKey) -> None:
    body, good = full_policy(key), full_statement()
    digest, free = parse(body).sha256, set()
    for where, raw in changed(body):
        if accepted(lambda r=raw: check(good, key, TrustPolicy.parse(r))):  # type: ignore[misc]
            assert TrustPolicy.parse(raw).sha256 != digest
            free.add(where)
    assert free - set(IRRELEVANT) == set()
    assert not any(name.endswith("unknown") for name in free)
    assert "keys.public_key" not in free


def test_what_a_policy_demands_is_demanded(key: FileKey) -> None:
    """The other direction: every field that can refuse a manifest does, each with its own check."""
    good, body = full_statement(), full_policy(key)
    refusing: tuple[tuple[dict[str, Any], str], ...] = (
        ({"trusted_root_sha256": "00" * 32}, "trust.root"),
        ({"keys": [], "signers": body["signers"]}, "manifest.signer"),
        ({"keys": [body["keys"][0] | {"valid_until": z(NOW - DAY)}]}, "manifest.signer"),
        ({"min_signatures": 2}, "manifest.threshold"),
        ({"min_sequence": 8}, "manifest.floor"),
        ({"revoked": [sha256(good)]}, "manifest.revoked"),
        ({"require_pointer": True}, "manifest.newest"),
    )
    for over, wrong in refusing:
        policy = parse(body | over)
        try:
            failed = [c.id for c in check(good, key, policy).verdict.failed]
        except RefusedError as refusal:
            failed = [c.id for c in refusal.verdict.failed]
        assert failed == [wrong], over


def test_the_examples_are_full(key: FileKey) -> None:
    """A field that is added to a format is in these examples too."""
    from pointcall_attest.manifest import Circuit, Listen, Predicate
    from pointcall_attest.policy import PinnedKey, Signer

    elsewhere = {"approvers", "approver_keys"}  # who may approve an action: nothing that admission asks
    assert set(TrustPolicy.model_fields) - set(full_policy(key)) <= elsewhere
    assert set(Signer.model_fields) == set(full_policy(key)["signers"][0])
    assert set(PinnedKey.model_fields) == set(full_policy(key)["keys"][0])
    (listen,) = json.loads(full_statement())["predicate"]["services"][0]["listen"]
    assert (set(listen), set(listen["circuit"])) == (set(Listen.model_fields), set(Circuit.model_fields))
    optional = {"policy_sha256", "trusted_root_sha256"}  # null here; admission's own tests set them
    assert set(Predicate.model_fields) - set(json.loads(full_statement())["predicate"]) <= optional
