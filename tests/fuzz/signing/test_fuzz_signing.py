"""Every parser of this room, fed with what is almost right: only the declared errors come out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_attest import exact_json, notice, provenance_check
from pointcall_attest.approval import ApprovalBody, approval_statement, parse_approval
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.file_signature import verify_file_with_key
from pointcall_attest.manifest import Manifest
from pointcall_attest.notice import PointerBody, RevocationBody, notice_statement, verify_notices
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.trusted_root import Root
from pointcall_keys.long_lived import FileKey, sign_with_key
from pointcall_keys.provenance import Builder, provenance, results_of_tests
from pointcall_keys.public_roots import public_root
from pointcall_keys.recovery_manifest import RecoveryManifest
from pointcall_keys.release import Release
from tests.unit.signing.mutation import leaves, replaced
from tests.unit.signing.rb1 import module
from tests.unit.signing.test_assemble import document
from tests.unit.signing.test_file_signature import DIGEST, KEY, ROOT, der, dsse_bundle, message_bundle, pem
from tests.unit.signing.world import DAY, NOW, declaration, files, statement

SHORT = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)

POLICY = json.dumps(
    {
        "format": "pointcall-trust-policy/v1",
        "trusted_root_sha256": "ab" * 32,
        "signers": [{"issuer": "https://a", "identity": "b", "source_repository": "c", "build_trigger": ["push"]}],
        "tee": {"platforms": ["snp"]},
    }
).encode()


def is_called(error: AttestError, start: str) -> None:
    assert error.id.startswith(start)
    assert error.message


def _root(raw: bytes) -> None:
    try:
        assert Root.load(raw).verifier
    except VerifyError as error:
        is_called(error, "trust.root")


def _key_bundle(raw: bytes) -> None:
    try:
        verify_file_with_key(raw, DIGEST, key=pem(KEY), trusted_root=json.dumps(ROOT).encode())
    except VerifyError as error:
        is_called(error, "bundle.")


def _notices(raw: bytes) -> None:
    """Whatever lies in a node's folder becomes a notice or a word about what is wrong with it."""
    found = verify_notices([raw], trusted_root=b"{}", policy=KEY_POLICY, at=NOW, in_process=True)
    assert len(found.revocations) + len(found.pointers) + len(found.wrong) == 1


def _key_policy() -> TrustPolicy:
    row = {"name": "release", "public_key": base64.b64encode(der(KEY)).decode()}
    return TrustPolicy.parse(json.dumps({"format": "pointcall-trust-policy/v1", "keys": [row]}).encode())


KEY_POLICY = _key_policy()
REVOCATION = notice_statement(RevocationBody(name="edge", issued=NOW, reason="bad", revoked=("00" * 32,)))
POINTER = notice_statement(
    PointerBody(name="edge", ring="a", sequence=7, manifest="00" * 32, issued=NOW, expires=NOW + DAY)
)
PROVENANCE = provenance(
    files(), Manifest.parse(statement()), Builder("https://ci.example", "1", "https://a", "ab" * 20)
)
APPROVAL = approval_statement(
    ApprovalBody(
        node="n1", run="0" * 26, index=0, runbook="fix", action="recreate", args=("1", "-7"),
        issued=NOW, expires=NOW + DAY / 24,
    ),
    manifest="00" * 32,
)  # fmt: skip
RESULT = results_of_tests("modules/restart.wasm", module(), {"a.json": b"[]"}, passed=["a/b"], failed=[])
RELEASE = Release(statement(), (b"{}",), files(), {"restart.json": b"{}"}).encode()
CANONICAL = ("manifest", "revocation", "pointer", "provenance", "test result", "approval")

PARSERS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "revocation": (lambda raw: notice._parse(notice._Statement[RevocationBody], raw), REVOCATION),
    "pointer": (lambda raw: notice._parse(notice._Statement[PointerBody], raw), POINTER),
    "provenance": (provenance_check._parse, PROVENANCE["restart"]),
    "test result": (provenance_check._parse, RESULT),
    "approval": (parse_approval, APPROVAL),
    "notices": (_notices, sign_with_key(REVOCATION, FileKey(KEY))),
    "release": (lambda raw: Release.decode(raw, lambda name, _: RELEASE.blobs[name]), RELEASE.image),
    "manifest": (Manifest.parse, statement()),
    "policy": (TrustPolicy.parse, POLICY),
    "declaration": (ServiceDeclaration.parse, declaration()),
    "recovery manifest": (lambda raw: RecoveryManifest.parse(json.loads(raw)), json.dumps(document()).encode()),
    "trusted root": (_root, public_root()),
    "key bundle, message": (_key_bundle, json.dumps(message_bundle("0.0.2")).encode()),
    "key bundle, statement": (_key_bundle, json.dumps(dsse_bundle("intoto")).encode()),
}


def feed(name: str, raw: bytes) -> None:
    try:
        PARSERS[name][0](raw)
    except MalformedError as error:
        is_called(error, "")
    except KeyError:
        if name != "release":  # a registry that has no such blob
            raise


@pytest.mark.parametrize("name", PARSERS)
def test_the_examples_are_good(name: str) -> None:
    parse, good = PARSERS[name]
    parse(good)


@pytest.mark.parametrize("name", PARSERS)
@SHORT
@given(data=st.data())
def test_one_field_becomes_anything(name: str, data: st.DataObject) -> None:
    good = json.loads(PARSERS[name][1])
    path, _ = data.draw(st.sampled_from(list(leaves(good))))
    cut = data.draw(st.integers(1, len(path)))
    value = data.draw(VALUES)
    try:
        raw = replaced(good, path[:cut], value)
        raw = rfc8785.dumps(json.loads(raw)) if name in CANONICAL else raw
    except (ValueError, rfc8785.CanonicalizationError):
        return
    feed(name, raw)


@pytest.mark.parametrize("name", [n for n in PARSERS if n != "recovery manifest"])
@SHORT
@given(data=st.data())
def test_bytes_are_cut_flipped_and_repeated(name: str, data: st.DataObject) -> None:
    good = PARSERS[name][1]
    at = data.draw(st.integers(0, len(good) - 1))
    change = data.draw(st.sampled_from(["cut", "flip", "repeat", "insert"]))
    match change:
        case "cut":
            raw = good[:at]
        case "flip":
            raw = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
        case "repeat":
            raw = good[:at] + good
        case _:
            raw = good[:at] + data.draw(st.binary(max_size=4)) + good[at:]
    feed(name, raw)


@SHORT
@given(raw=st.binary(max_size=64) | VALUES.map(lambda v: json.dumps(v).encode()))
def test_exact_json_never_raises_anything_else(raw: bytes) -> None:
    try:
        value = exact_json.loads(raw, id="x", max_bytes=1000, what="it")
    except MalformedError as error:
        is_called(error, "x")
    else:
        assert json.loads(raw) == value


@pytest.mark.parametrize("depth", [24, 25, 10_000])
def test_exact_json_depth(depth: int) -> None:
    raw = b"[" * depth + b"]" * depth
    if depth <= exact_json.MAX_DEPTH:
        assert exact_json.loads(raw, id="x", max_bytes=100_000, what="it") is not None
    else:
        with pytest.raises(MalformedError):
            exact_json.loads(raw, id="x", max_bytes=100_000, what="it")
