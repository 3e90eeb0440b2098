"""Real bundles of real projects, judged as EXPECTED.txt says, offline."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cryptography import x509

from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.file_signature import verify_file, verify_file_with_key
from pointcall_attest.log_entry import in_log
from pointcall_attest.policy import Signer
from pointcall_attest.signature import exactly, open_bundle, refused_by
from pointcall_attest.trusted_root import Root
from pointcall_keys.public_roots import public_root

ROOT = Path(__file__).resolve().parents[3]
VECTORS = (ROOT / "../shared/vectors/sigstore").resolve()
pytestmark = [
    pytest.mark.skipif(not VECTORS.is_dir(), reason="the shared Sigstore vectors are not beside the repository"),
    pytest.mark.filterwarnings(
        "ignore:Attribute's length must be:UserWarning"
    ),  # a country of three letters, in a root
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a verification opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@dataclass(frozen=True)
class Case:
    good: bool
    bundle: str
    root: str
    artifact: str
    identity: str = ""
    issuer: str = ""


def cases() -> list[Case]:
    if not VECTORS.is_dir():
        return []
    rows = [line.split(" | ") for line in (VECTORS / "EXPECTED.txt").read_text().splitlines()[1:-1]]
    return [
        Case(row[0] == "OK", *row[1:4], *((row[6].encode().decode("unicode_escape"), row[7]) if row[0] == "OK" else ()))
        for row in rows
    ]


def bundle_of(name: str) -> dict[str, Any]:
    text = (VECTORS / name).read_text()
    raw: dict[str, Any] = json.loads(text.splitlines()[0] if name.endswith(".jsonl") else text)
    return _from_pep740(raw) if name.endswith(".attestation") else raw


def _from_pep740(attestation: dict[str, Any]) -> dict[str, Any]:
    """A PEP 740 attestation is the same material in another JSON."""
    material, envelope = attestation["verification_material"], attestation["envelope"]
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "certificate": {"rawBytes": material["certificate"]},
            "tlogEntries": material["transparency_entries"],
        },
        "dsseEnvelope": {
            "payload": envelope["statement"],
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": envelope["signature"]}],
        },
    }


def digest_of(case: Case, bundle: dict[str, Any]) -> bytes:
    if case.artifact.startswith("sha256:"):
        return bytes.fromhex(case.artifact[7:])
    if case.artifact != "-":
        return hashlib.sha256((VECTORS / case.artifact).read_bytes()).digest()
    if "messageSignature" in bundle:
        return base64.b64decode(bundle["messageSignature"]["messageDigest"]["digest"])
    return bytes(32)  # the statements without a file here are all refused before anybody looks at their subject


def certificate_of(bundle: dict[str, Any]) -> x509.Certificate | None:
    material = bundle["verificationMaterial"]
    if "publicKey" in material:
        return None
    raw = material["certificate"] if "certificate" in material else material["x509CertificateChain"]["certificates"][0]
    return x509.load_der_x509_certificate(base64.b64decode(raw["rawBytes"]))


def claimed(bundle: dict[str, Any]) -> tuple[str, str]:
    """What a bundle says of itself, so that a refusal is not for the name."""
    certificate = certificate_of(bundle)
    if certificate is None:
        return "nobody", "nobody"
    (name,) = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    oid = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
    try:
        issuer = certificate.extensions.get_extension_for_oid(oid).value
    except x509.ExtensionNotFound:
        return str(name.value), "nobody"
    assert isinstance(issuer, x509.UnrecognizedExtension)
    return str(name.value), issuer.value.decode()


def judge(case: Case, bundle: dict[str, Any], identity: str, issuer: str) -> None:
    root = (VECTORS / case.root).read_bytes()
    raw = json.dumps(bundle).encode()
    verify_file(raw, digest_of(case, bundle), trusted_root=root, identity=identity, issuer=issuer)


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.bundle.split("/")[-1] + ("" if c.good else "-refused"))
def test_real_bundles(case: Case) -> None:
    bundle = bundle_of(case.bundle)
    if case.good:
        judge(case, bundle, case.identity, case.issuer)
    else:
        with pytest.raises((MalformedError, VerifyError)):
            judge(case, bundle, *claimed(bundle))


def test_the_expected_numbers() -> None:
    assert [sum(c.good for c in cases()), len(cases())] == [14, 24]


@pytest.mark.parametrize("case", [c for c in cases() if c.good], ids=lambda c: c.bundle.split("/")[-1])
def test_good_bundles_about_another_file_or_by_another_name(case: Case) -> None:
    bundle = bundle_of(case.bundle)
    root, raw = (VECTORS / case.root).read_bytes(), json.dumps(bundle).encode()
    digest, named = digest_of(case, bundle), (case.identity, case.issuer)
    wrong_digest = digest[:-1] + bytes([digest[-1] ^ 1])
    for sha256, identity, issuer in (
        (wrong_digest, *named),
        (digest, case.identity + "x", case.issuer),
        (digest, case.identity[:-1], case.issuer),
        (digest, case.identity, case.issuer + "/"),
        (digest, case.identity.upper(), case.issuer),
    ):
        with pytest.raises(AttestError):
            verify_file(raw, sha256, trusted_root=root, identity=identity, issuer=issuer)


def test_a_signature_that_is_right_about_another_file() -> None:
    bundle = (VECTORS / "sigstore-python/a.dsse.staging-rekor-v2.txt.sigstore.json").read_bytes()
    artifact = (VECTORS / "sigstore-python/a.dsse.staging-rekor-v2.txt").read_bytes()
    row = next(c for c in cases() if "a.dsse.staging" in c.bundle)
    with pytest.raises(VerifyError) as caught:
        verify_file(
            bundle,
            hashlib.sha256(artifact).digest(),
            trusted_root=public_root(staging=True),
            identity=row.identity,
            issuer=row.issuer,
        )
    assert caught.value.id == "bundle.subject"


def test_the_workflow_that_everybody_can_call() -> None:
    """Its name passes for anybody's repository; only the source repository tells whose build it was."""
    bundle = bundle_of("gh-cli/reusable-workflow-attestation.sigstore.json")
    certificate = open_bundle(bundle, "bundle.form").signing_certificate
    named = {
        "issuer": claimed(bundle)[1],
        "identity": claimed(bundle)[0],
        "build_trigger": ("push", "workflow_dispatch"),
    }
    theirs = Signer(
        **named,  # type: ignore[arg-type]
        source_repository="https://github.com/malancas/attest-demo",
        source_repository_id="804070735",
        runner_environment="github-hosted",
    )
    ours = Signer(**named, source_repository="https://github.com/acme/runbooks")  # type: ignore[arg-type]
    assert refused_by(exactly(theirs), certificate) is None
    assert refused_by(exactly(ours), certificate) is not None
    with pytest.raises(ValueError, match="source_repository"):
        Signer(**named)  # type: ignore[arg-type]


def test_the_managed_key_bundle() -> None:
    folder = VECTORS / "sigstore-go"
    bundle = bundle_of("sigstore-go/public-key-validity.sigstore.json")
    case = Case(True, "", "", "-")
    digest, raw = digest_of(case, bundle), json.dumps(bundle).encode()
    key, root = (folder / "public-key-validity.pem").read_bytes(), (folder / "public-key-validity.json").read_bytes()
    verify_file_with_key(raw, digest, key=key, trusted_root=root)
    with pytest.raises(VerifyError):
        verify_file_with_key(raw, bytes(32), key=key, trusted_root=root)


@pytest.mark.parametrize("staging", [False, True])
def test_the_pinned_roots_are_those_of_the_vectors(staging: bool) -> None:
    name = "staging" if staging else "public-good"
    assert public_root(staging=staging) == (VECTORS / f"trust-roots/{name}.trusted_root.json").read_bytes()


@pytest.mark.parametrize("case", [c for c in cases() if c.good], ids=lambda c: c.bundle.split("/")[-1])
def test_our_own_reading_of_real_log_entries(case: Case) -> None:
    """What `log_entry` checks for long-lived keys (tree, checkpoint, promise) holds for every real entry."""
    entry = bundle_of(case.bundle)["verificationMaterial"]["tlogEntries"][0]
    rows = Root.load((VECTORS / case.root).read_bytes()).rows
    in_log(entry, rows)
    with pytest.raises(VerifyError):
        in_log(entry, {"tlogs": []})
    other = public_root(staging="public-good" in case.root)
    with pytest.raises(VerifyError):
        in_log(entry, Root.load(other).rows)
