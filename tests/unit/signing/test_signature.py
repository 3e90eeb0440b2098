"""Signatures: what the library checks, what we add, and that nothing but our two errors comes out."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime as dt
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import signature
from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import SignedStatement, SignerIdentity, verify_bundles
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.unit.signing.mutation import dropped, flip, leaves, members, replaced
from tests.unit.signing.world import ALICE, BOB, NOW, World, statement

ENDED = {"start": "2020-01-01T00:00:00Z", "end": "2021-01-01T00:00:00Z"}


@pytest.fixture(params=[1, 2], ids=["rekor1", "rekor2"])
def rekor(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def verify(world: World, bundle: bytes, mutate: Callable[[Any], None] | None = None, **over: Any) -> SignedStatement:
    """Verify with a root that a test has changed and a policy that pins the changed root."""
    rows = json.loads(world.sigstore.trusted_root())
    if mutate is not None:
        mutate(rows)
    root = json.dumps(rows).encode()
    policy = world.policy(trusted_root_sha256=hashlib.sha256(root).hexdigest(), **over)
    return verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(AttestError) as caught:
        call()
    assert isinstance(caught.value, MalformedError | VerifyError)
    return caught.value.id


def test_both_logs_give_the_signed_bytes(world: World, rekor: int) -> None:
    payload = statement()
    signed = verify(world, world.sign(payload, rekor=rekor))
    assert signed.payload == payload
    assert signed.signers == (SignerIdentity(world.sigstore.issuer, ALICE),)
    assert signed.signed_at is not None
    assert NOW - dt.timedelta(hours=1, minutes=5) < signed.signed_at <= NOW


def test_bytes_that_are_not_canonical_are_signed_as_they_are(world: World) -> None:
    payload = json.dumps(json.loads(statement()), indent=3).encode()
    assert verify(world, world.sign(payload)).payload == payload


def test_a_panic_in_native_code_is_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # as pyo3 raises it
        pass

    def panic(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("sigstore.verify.Verifier.verify_dsse", panic)
    assert refused(lambda: verify(world, world.sign(statement()))) == "manifest.signature"


# The child


def test_the_child_says_the_same(world: World) -> None:
    bundle, policy, root = world.sign(statement()), world.policy(), world.sigstore.trusted_root()
    here = verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True)
    assert verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW) == here


def verified(bundles: list[bytes], policy: TrustPolicy, root: bytes) -> SignedStatement:
    return verify_bundles(bundles, trusted_root=root, policy=policy, at=NOW)


def test_the_child_refuses_the_same(world: World) -> None:
    policy, root = world.policy(), world.sigstore.trusted_root()
    bundles = [[], [b"{}"], [world.sign(statement(), who=BOB)], [b"x" * (signature.MAX_BUNDLE_BYTES + 1)]]
    for given, wrong in zip(
        bundles, ["manifest.unsigned", "manifest.bundle", "manifest.signer", "manifest.bundle"], strict=True
    ):
        for in_process in (True, False):
            assert wrong == refused(
                lambda g=given, p=in_process: verify_bundles(  # type: ignore[misc]
                    g, trusted_root=root, policy=policy, at=NOW, in_process=p
                )
            )


def test_a_child_that_dies_is_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from pointcall_attest import signature_child

    bundle, root = world.sign(statement()), world.sigstore.trusted_root()
    for program in ("import sys; sys.exit(3)", "print('{}')", "print('no JSON')", "import os; os.abort()", "pass"):
        monkeypatch.setattr(signature_child, "_PROGRAM", program)
        assert refused(lambda: verify_bundles([bundle], trusted_root=root, policy=world.policy(), at=NOW)) == (
            "manifest.child"
        )


def test_a_child_that_was_begun_answers_as_one_that_was_not_and_only_once(world: World) -> None:
    from pointcall_attest import signature_child as child

    policy, root = world.policy(), world.sigstore.trusted_root()
    child.begin(2)
    try:
        first, second = child._waiting
        assert verified([world.sign(statement())], policy, root).payload == statement()
        assert first.returncode == 0
        with pytest.raises(VerifyError, match="names no signer"):
            verified([world.sign(statement(), who=BOB)], policy, root)
        assert second.returncode == 0
        assert not child._waiting
        assert verified([world.sign(statement())], policy, root).payload == statement()
    finally:
        child.discard()


def test_a_begun_child_has_given_up_everything_before_it_has_a_request(world: World) -> None:
    from pointcall_attest import signature_child as child

    child.begin()
    try:
        limits = Path(f"/proc/{child._waiting[0].pid}/limits")
        deadline = time.monotonic() + 60
        while not re.search(rf"Max address space +{child.MEMORY_BYTES} ", limits.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert re.search(r"Max processes +0 +0 ", limits.read_text())
        assert verified([world.sign(statement())], world.policy(), world.sigstore.trusted_root())
    finally:
        child.discard()


def test_a_begun_child_that_died_is_replaced_and_none_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from pointcall_attest import signature_child as child

    child.begin()
    (dead,) = child._waiting
    dead.kill()
    dead.wait()
    assert verified([world.sign(statement())], world.policy(), world.sigstore.trusted_root())
    child.begin(2)
    pids = [one.pid for one in child._waiting]
    child.discard()
    child.discard()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not child._waiting
    monkeypatch.setattr(child.sys, "executable", "/nowhere")  # type: ignore[attr-defined]
    child.begin()
    assert not child._waiting
    with pytest.raises(VerifyError) as refusal:
        verified([world.sign(statement())], world.policy(), world.sigstore.trusted_root())
    assert refusal.value.id == "manifest.child"


def test_a_begun_child_ends_with_whoever_began_it() -> None:
    words = (
        f"import sys, os; sys.path[:] = {sys.path!r}\nfrom pointcall_attest import signature_child as child\n"
        "child.begin(); print(child._waiting[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", words], capture_output=True, timeout=60, check=False)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 60
    with contextlib.suppress(OSError):  # it is gone
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may wait for it here
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    "act",
    [
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 9)",
        "open('/tmp/pointcall-child', 'w')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.open('/tmp/pointcall-child', os.O_CREAT | os.O_WRONLY)",
        "import os; os.remove('/tmp/pointcall-child')",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
        "x = bytearray(2 << 30)",
    ],
)
def test_what_the_child_can_no_longer_do(act: str) -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}\nfrom pointcall_attest.signature_child import _give_up\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{program}_give_up()\n{act}\nprint('done')"], capture_output=True
    )
    assert b"done" not in done.stdout
    assert b"PermissionError" in done.stderr or b"MemoryError" in done.stderr


def test_a_child_that_computes_for_ever_ends() -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}\nfrom pointcall_attest import signature_child as child\n"
    words = f"{program}child.CPU_SECONDS = 1\nchild._give_up()\nwhile True: pass"
    done = subprocess.run([sys.executable, "-I", "-c", words], capture_output=True, timeout=60, check=False)
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


# Windows: the library ignores the end of log, CT and CA keys


def _retire(kind: str) -> Callable[[Any], None]:
    def mutate(rows: Any) -> None:
        for row in rows[kind]:
            row.get("publicKey", row)["validFor"] = ENDED

    return mutate


@pytest.mark.parametrize("kind", ["tlogs", "ctlogs", "certificateAuthorities"])
@pytest.mark.parametrize("beside_a_current_one", [False, True])
def test_a_retired_key_signs_nothing(
    world: World, other: PrivateSigstore, rekor: int, kind: str, beside_a_current_one: bool
) -> None:
    def mutate(rows: Any) -> None:
        _retire(kind)(rows)
        if beside_a_current_one:
            rows[kind] += json.loads(other.trusted_root())[kind]

    bundle = world.sign(statement(), rekor=rekor)
    assert refused(lambda: verify(world, bundle, mutate)) == "manifest.window"


def test_a_retired_timestamp_authority(world: World) -> None:
    bundle = world.sign(statement(), rekor=2)
    assert refused(lambda: verify(world, bundle, _retire("timestampAuthorities"))) == "manifest.signature"


def test_a_retired_log_cannot_borrow_the_id_of_a_current_one(world: World, other: PrivateSigstore) -> None:
    theirs = json.loads(other.trusted_root())["tlogs"]

    def mutate(rows: Any) -> None:
        _retire("tlogs")(rows)
        rows["tlogs"] += theirs

    bundle = json.loads(world.sign(statement(), rekor=2))
    entry = bundle["verificationMaterial"]["tlogEntries"][0]
    borrowed = entry["logId"]["keyId"] = theirs[0]["logId"]["keyId"]
    proof = entry["inclusionProof"]["checkpoint"]
    text, sig = proof["envelope"].rsplit(" ", 1)
    hinted = base64.b64encode(base64.b64decode(borrowed)[:4] + base64.b64decode(sig)[4:]).decode()
    proof["envelope"] = f"{text} {hinted}\n"
    assert refused(lambda: verify(world, json.dumps(bundle).encode(), mutate)) == "manifest.window"


def test_windows_that_ended_after_the_signature_do_no_harm(world: World, rekor: int) -> None:
    def mutate(rows: Any) -> None:
        for kind in ("tlogs", "ctlogs", "certificateAuthorities", "timestampAuthorities"):
            for row in rows[kind]:
                row.get("publicKey", row)["validFor"]["end"] = "2099-01-01T00:00:00Z"
        rows["ctlogs"].append(copy.deepcopy(rows["ctlogs"][0]))
        rows["ctlogs"][-1]["publicKey"]["validFor"] = ENDED

    assert verify(world, world.sign(statement(), rekor=rekor), mutate).payload == statement()


def test_a_second_timestamp_is_ambiguous(world: World) -> None:
    bundle = json.loads(world.sign(statement(), rekor=2))
    tokens = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    other_bundle = json.loads(world.sign(statement(sequence=9), rekor=2))
    tokens.extend(other_bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"])
    assert refused(lambda: verify(world, json.dumps(bundle).encode())) == "manifest.window"


# Identities are exact


GITHUB = "https://token.actions.githubusercontent.com"
WORKFLOW = "acme/runbooks/.github/workflows/sign.yml@refs/heads/main"
CLAIMS: dict[str, Any] = {
    "iss": GITHUB,
    "repository": "acme/runbooks",
    "repository_id": "99",
    "event_name": "push",
    "runner_environment": "github-hosted",
    "job_workflow_ref": WORKFLOW,
}
# Other organisation, repository, workflow, branch, pull request, tag, embedded URL, dot as wildcard, trailing newline.
LOOK_ALIKES = (
    "acme-evil/runbooks/.github/workflows/sign.yml@refs/heads/main",
    "acme/runbooks-evil/.github/workflows/sign.yml@refs/heads/main",
    "acme/runbooks/.github/workflows/sign2.yml@refs/heads/main",
    "acme/runbooks/.github/workflows/sign.yml@refs/heads/main2",
    "acme/runbooks/.github/workflows/sign.yml@refs/pull/1/merge",
    "acme/runbooks/.github/workflows/sign.yml@refs/tags/main",
    "x/y?https://github.com/acme/runbooks/.github/workflows/sign.yml@refs/heads/main",
    "acme/runbooks/.github/workflows/signxyml@refs/heads/main",
    "acme/runbooks/.github/workflows/sign.yml@refs/heads/main\n",
)
SIGNER = {
    "issuer": GITHUB,
    "identity": f"https://github.com/{WORKFLOW}",
    "source_repository": "https://github.com/acme/runbooks",
    "source_repository_id": "99",
    "build_trigger": ["push", "workflow_dispatch"],
    "runner_environment": "github-hosted",
}


@pytest.fixture
def github(world: World) -> World:
    world.sigstore.accept_issuer(GITHUB, "github")
    return world


def test_a_github_identity(github: World) -> None:
    bundle = github.sign(statement(), who="repo:acme/runbooks", **CLAIMS)
    assert verify(github, bundle, signers=[SIGNER]).signers[0].identity == SIGNER["identity"]


@pytest.mark.parametrize(
    "claims",
    [
        *({"job_workflow_ref": ref} for ref in LOOK_ALIKES),
        {"repository": "acme/other"},
        {"repository_id": "100"},
        {"event_name": "pull_request_target"},
        {"runner_environment": "self-hosted"},
    ],
)
def test_look_alikes_do_not_pass(github: World, claims: dict[str, str]) -> None:
    bundle = github.sign(statement(), who="repo:acme/runbooks", **(CLAIMS | claims))
    assert refused(lambda: verify(github, bundle, signers=[SIGNER])) == "manifest.signer"


@pytest.mark.parametrize("issuer", [GITHUB, f"{GITHUB}/some-enterprise", "https://gitlab.com"])
@pytest.mark.parametrize("left_out", ["source_repository", "build_trigger"])
def test_a_ci_identity_names_repository_and_trigger(world: World, issuer: str, left_out: str) -> None:
    row = SIGNER | {"issuer": issuer}
    assert world.policy(signers=[row]).signers
    with pytest.raises(MalformedError, match="CI identity"):
        world.policy(signers=[{name: value for name, value in row.items() if name != left_out}])


def test_a_claim_that_the_policy_names_must_be_there(world: World) -> None:
    signer = world.signer(ALICE, source_repository="https://ci.example/acme")
    assert refused(lambda: verify(world, world.sign(statement()), signers=[signer])) == "manifest.signer"


def test_the_same_subject_of_another_issuer(world: World) -> None:
    world.sigstore.accept_issuer("https://elsewhere.example", "uri")
    bundle = world.sign(statement(), iss="https://elsewhere.example")
    assert refused(lambda: verify(world, bundle)) == "manifest.signer"


def test_an_identity_ends(world: World) -> None:
    bundle = world.sign(statement())
    ends = {"valid_until": "2026-01-01T00:00:00Z"}
    assert refused(lambda: verify(world, bundle, signers=[world.signer(ALICE, **ends)])) == "manifest.signer"
    lives = {"valid_until": "2099-01-01T00:00:00Z"}
    assert verify(world, bundle, signers=[world.signer(ALICE, **lives)]).signers


# Every field changed once


# What Sigstore leaves unauthenticated. Harmless here: the payload and the signer are the same, and nobody uses them.
UNAUTHENTICATED = {
    1: {"verificationMaterial.timestampVerificationData.rfc3161Timestamps.0.signedTimestamp"},
    2: {"verificationMaterial.tlogEntries.0.logIndex", "verificationMaterial.tlogEntries.0.logId.keyId"},
}


@pytest.mark.parametrize("change", [flip, lambda _: None, lambda _: "", lambda _: 7, lambda _: [], lambda _: {}])
def test_every_changed_field_is_refused_or_irrelevant(world: World, rekor: int, change: Callable[[Any], Any]) -> None:
    bundle = json.loads(world.sign(statement(), rekor=rekor))
    good, accepted = verify(world, json.dumps(bundle).encode()), set()
    for path, value in leaves(bundle):
        try:
            signed = verify(world, replaced(bundle, path, change(value)))
        except (MalformedError, VerifyError):
            continue
        assert (signed.payload, signed.signers) == (good.payload, good.signers)
        accepted.add(".".join(map(str, path)))
    allowed = UNAUTHENTICATED[rekor] | ({"verificationMaterial.tlogEntries.0.integratedTime"} if rekor == 1 else set())
    assert accepted <= allowed


def test_every_dropped_member_is_refused_or_irrelevant(world: World, rekor: int) -> None:
    bundle = json.loads(world.sign(statement(), rekor=rekor))
    good = verify(world, json.dumps(bundle).encode())
    for path in members(bundle):
        try:
            signed = verify(world, dropped(bundle, path))
        except (MalformedError, VerifyError):
            continue
        assert (signed.payload, signed.signers) == (good.payload, good.signers), path


def test_every_changed_field_of_the_signed_statement_is_refused(world: World) -> None:
    bundle = json.loads(world.sign(statement()))
    for path, value in leaves(json.loads(statement())):
        payload = replaced(json.loads(statement()), path, flip(value))
        changed = bundle["dsseEnvelope"] | {"payload": base64.b64encode(payload).decode()}
        assert refused(lambda c=changed: verify(world, json.dumps(bundle | {"dsseEnvelope": c}).encode())) == (  # type: ignore[misc]
            "manifest.signature"
        )


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"verificationMaterial": []}',
        b'{"verificationMaterial": {}, "verificationMaterial": {}}',
        b"[" * 100_000,
        b'{"verificationMaterial": {"tlogEntries": 1e999}}',
        b'{"verificationMaterial": {"tlogEntries": NaN}}',
        b"9" * 10_000,
        b" " * (signature.MAX_BUNDLE_BYTES + 1),
    ],
)
def test_what_is_no_bundle(world: World, raw: bytes) -> None:
    assert refused(lambda: verify(world, raw)) == "manifest.bundle"


def test_too_many_bundles(world: World) -> None:
    bundles = [world.sign(statement())] * 9
    root = world.sigstore.trusted_root()
    assert (
        refused(lambda: verify_bundles(bundles, trusted_root=root, policy=world.policy(), at=NOW, in_process=True))
        == "manifest.bundle"
    )


@pytest.mark.parametrize("root", [b"{}", b"[]", b"null", b"x", b'{"tlogs": 7}'])
def test_a_pinned_root_that_is_none(world: World, root: bytes) -> None:
    policy = world.policy(trusted_root_sha256=hashlib.sha256(root).hexdigest())
    bundle = world.sign(statement())
    wrong = refused(lambda: verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True))
    assert wrong in ("trust.root", "manifest.signature")


BAD_VALUES: list[Any] = [7.5, [[]], "\u00fc", {"x": 1}]


def test_the_policy_is_parsed_strictly(world: World) -> None:
    good = json.loads(world.policy().raw)
    for path, _ in [*leaves(good), (("unknown",), 1), (("signers", 0, "identityRegExp"), 1), (("tee",), 1)]:
        for bad in BAD_VALUES:
            with pytest.raises(MalformedError) as caught:
                TrustPolicy.parse(replaced(good, path, bad))
            assert caught.value.id == "policy.malformed"
