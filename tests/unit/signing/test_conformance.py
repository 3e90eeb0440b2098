"""The verbs of the Sigstore conformance protocol and the cases of that suite, made again on the private instance.

The suite's own bundles are not here and its signing tests need the public staging instance; each of its cases is made
again from a good bundle by changing what its description says. Words of the call come in the order of the protocol.
"""

from __future__ import annotations

import base64
import copy
import datetime as dt
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder, decode_timestamp_response

from pointcall_executor import cli
from pointcall_keys.private_sigstore import PrivateSigstore, certificate, timestamp
from tests.unit.signing.test_signature import CLAIMS, GITHUB, LOOK_ALIKES, WORKFLOW
from tests.unit.signing.world import ALICE, World

ARTIFACT = b"the signed file\n"
DIGEST = hashlib.sha256(ARTIFACT).digest()
STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "other", "digest": {"sha256": "00" * 32}}, {"name": "a", "digest": {"sha256": DIGEST.hex()}}],
    "predicateType": "https://example.org/predicate/v1",
    "predicate": {},
}
Bundle = dict[str, Any]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Case:
    """One folder of the suite: a bundle, the artifact, a root. `accepted` asks for the path and for its digest."""

    def __init__(self, folder: Path, world: World, issuer: str) -> None:
        self.folder, self.world, self.issuer = folder, world, issuer
        self.root: dict[str, Any] = json.loads(world.sigstore.trusted_root())
        (folder / "artifact").write_bytes(ARTIFACT)
        (folder / "statement.json").write_text(json.dumps(STATEMENT))

    def sign(self, *, rekor: int = 2, statement: bool = False, who: str = ALICE) -> Bundle:
        """As the suite signs: with a trusted root and a signing config."""
        config = self.world.sigstore.trust_config(2 if rekor == 2 else 1)
        for name, half in (("root.json", "trustedRoot"), ("signing.json", "signingConfig")):
            (self.folder / name).write_text(json.dumps(config[half]))
        words = ["sign-bundle", *(["--in-toto"] if statement else [])]
        words += ["--identity-token", self.world.sigstore.token(who), "--bundle", str(self.folder / "bundle.json")]
        words += ["--trusted-root", str(self.folder / "root.json")]
        words += ["--signing-config", str(self.folder / "signing.json")]
        assert cli.main([*words, str(self.folder / ("statement.json" if statement else "artifact"))]) == 0
        made: Bundle = json.loads((self.folder / "bundle.json").read_bytes())
        return made

    def accepted(self, bundle: Bundle | bytes, root: dict[str, Any] | None = None, identity: str = ALICE) -> bool:
        raw = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
        (self.folder / "bundle.json").write_bytes(raw)
        (self.folder / "root.json").write_text(json.dumps(root or self.root))
        words = ["verify-bundle", "--bundle", str(self.folder / "bundle.json"), "--certificate-identity", identity]
        words += ["--certificate-oidc-issuer", self.issuer, "--trusted-root", str(self.folder / "root.json")]
        codes = [cli.main([*words, what]) for what in (str(self.folder / "artifact"), f"sha256:{DIGEST.hex()}")]
        assert codes[0] == codes[1]
        assert codes[0] in (0, 1, 4)
        return codes[0] == 0


@pytest.fixture
def case(tmp_path: Path, world: World) -> Case:
    return Case(tmp_path, world, world.sigstore.issuer)


def entry(bundle: Bundle) -> dict[str, Any]:
    (one,) = bundle["verificationMaterial"]["tlogEntries"]
    assert isinstance(one, dict)
    return one


def signature_of(bundle: Bundle) -> bytes:
    text = bundle["messageSignature"]["signature"] if "messageSignature" in bundle else _sig(bundle)["sig"]
    return base64.b64decode(text)


def _sig(bundle: Bundle) -> dict[str, Any]:
    (one,) = bundle["dsseEnvelope"]["signatures"]
    assert isinstance(one, dict)
    return one


def flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[-1] ^= 1
    return b64(raw)


KINDS = [(rekor, statement) for rekor in (1, 2) for statement in (False, True)]
kinds = pytest.mark.parametrize(("rekor", "statement"), KINDS, ids=["v1", "v1-dsse", "v2", "v2-dsse"])


@kinds
def test_happy_path(case: Case, rekor: int, statement: bool) -> None:
    """happy-path-*, rekor2-happy-path, rekor2-dsse-happy-path, and signing with --in-toto, where the file is the
    statement and the artifact one of its subjects."""
    bundle = case.sign(rekor=rekor, statement=statement)
    assert case.accepted(bundle)
    kind = entry(bundle)["kindVersion"]
    want = {(1, False): "hashedrekord/0.0.1", (1, True): "dsse/0.0.1"}.get((rekor, statement), "hashedrekord/0.0.2")
    assert f"{kind['kind']}/{kind['version']}" == want
    assert ("dsseEnvelope" in bundle) == statement
    if statement:
        assert base64.b64decode(bundle["dsseEnvelope"]["payload"]) == json.dumps(STATEMENT).encode()


@pytest.mark.parametrize("content", [ARTIFACT, b"", b"[1]", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_in_toto_over_a_file_that_is_no_statement(case: Case, content: bytes) -> None:
    """Then a statement about the file is signed, so that the file itself verifies."""
    (case.folder / "artifact").write_bytes(content)
    (case.folder / "statement.json").write_bytes(content)
    bundle = case.sign(statement=True)
    assert "dsseEnvelope" in bundle
    (case.folder / "root.json").write_text(json.dumps(case.root))
    words = ["verify-bundle", "--bundle", str(case.folder / "bundle.json"), "--certificate-identity", ALICE]
    words += ["--certificate-oidc-issuer", case.issuer, "--trusted-root", str(case.folder / "root.json")]
    assert cli.main([*words, str(case.folder / "artifact")]) == 0
    assert cli.main([*words, f"sha256:{bytes(32).hex()}"]) == 1


@pytest.mark.parametrize("rekor", [1, 2])
def test_the_stock_client_verifies_what_we_sign(case: Case, rekor: int) -> None:
    """The suite verifies every bundle that a client signs with another client."""
    case.sign(rekor=rekor)
    (case.folder / "trust.json").write_text(json.dumps(case.world.sigstore.trust_config()))
    words = ["--trust-config", str(case.folder / "trust.json"), "verify", "identity", "--cert-identity", ALICE]
    words += ["--cert-oidc-issuer", case.issuer, "--bundle", str(case.folder / "bundle.json")]
    for artifact, good in (("artifact", True), ("statement.json", False)):
        call = [sys.executable, "-m", "sigstore", *words, str(case.folder / artifact)]
        environment = os.environ | {"HOME": str(case.folder)}
        done = subprocess.run(call, capture_output=True, env=environment, timeout=60, check=False)
        assert (done.returncode == 0) is good, done.stderr


@pytest.mark.parametrize("version", ["0.1", "0.2", "0.3"])
def test_older_media_types(case: Case, version: str) -> None:
    """happy-path-v0.1, -v0.2, -v0.3; bundle-empty-certificate-chain_fail, bundle-with-root-cert_fail."""
    bundle = case.sign(rekor=1)
    bundle["mediaType"] = f"application/vnd.dev.sigstore.bundle+json;version={version}"
    if version != "0.3":
        leaf = bundle["verificationMaterial"].pop("certificate")
        chain = bundle["verificationMaterial"]["x509CertificateChain"] = {"certificates": [leaf]}
    assert case.accepted(bundle)
    if version != "0.3":
        authorities = case.root["certificateAuthorities"][0]["certChain"]["certificates"]
        for certificates in ([], authorities[-1:], [authorities[-1], leaf]):
            chain["certificates"] = certificates
            assert not case.accepted(bundle)


def test_a_signing_certificate_is_no_authority(case: Case) -> None:
    """A signed bundle contains no root."""
    for rekor in (1, 2):
        material = case.sign(rekor=rekor)["verificationMaterial"]
        assert "x509CertificateChain" not in material
        leaf = x509.load_der_x509_certificate(base64.b64decode(material["certificate"]["rawBytes"]))
        with pytest.raises(x509.ExtensionNotFound):
            leaf.extensions.get_extension_for_class(x509.BasicConstraints)


@kinds
def test_another_instance(case: Case, other: PrivateSigstore, rekor: int, statement: bool) -> None:
    """bundle-from-wrong-instance_fail, and each authority alone: invalid-ct-key_fail, untrusted-tsa."""
    bundle, theirs = case.sign(rekor=rekor, statement=statement), json.loads(other.trusted_root())
    assert not case.accepted(bundle, root=theirs)
    used = ["tlogs", "ctlogs", "certificateAuthorities", *(["timestampAuthorities"] if rekor == 2 else [])]
    for kind in used:
        assert not case.accepted(bundle, root=case.root | {kind: theirs[kind]}), kind
        assert not case.accepted(bundle, root=case.root | {kind: []}), kind
        assert case.accepted(bundle, root=case.root | {kind: theirs[kind] + case.root[kind]}), kind


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"',
        b"null",
    ],
)
def test_malformed_json(case: Case, raw: bytes) -> None:
    assert not case.accepted(raw)


def _edit(path: str, change: Callable[[Any], Any]) -> Callable[[Bundle], None]:
    def edit(bundle: Bundle) -> None:
        parent: Any = bundle
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            parent = parent[part]
        parent[last] = change(parent[last])

    return edit


def _drop(path: str) -> Callable[[Bundle], None]:
    def edit(bundle: Bundle) -> None:
        parent: Any = bundle
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            parent = parent[part]
        del parent[last]

    return edit


TLOG = "verificationMaterial.tlogEntries.0"
PROOF = f"{TLOG}.inclusionProof"
NOTE = f"{PROOF}.checkpoint.envelope"


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    """A change of the lines of a checkpoint: origin, size, root, an empty one, signatures."""
    return lambda note: "\n".join(change(note.split("\n")))


def _body(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        body = json.loads(base64.b64decode(text))
        change(body)
        return b64(json.dumps(body, separators=(",", ":"), sort_keys=True).encode())

    return edit


REFUSED: dict[str, Callable[[Bundle], None]] = {
    "unknown version": _edit("mediaType", lambda _: "application/vnd.dev.sigstore.bundle.v9.9+json"),
    "no media type": _drop("mediaType"),
    "no certificate": _drop("verificationMaterial.certificate"),
    "negative log index": _edit(f"{TLOG}.inclusionProof.logIndex", lambda _: "-1"),
    "no log entry": _edit("verificationMaterial.tlogEntries", lambda _: []),
    "two log entries": _edit("verificationMaterial.tlogEntries", lambda rows: rows * 2),
    "no inclusion proof": _drop(PROOF),
    "no checkpoint": _drop(f"{PROOF}.checkpoint"),
    "another root hash": _edit(f"{PROOF}.rootHash", flipped),
    "another tree size": _edit(f"{PROOF}.treeSize", lambda size: str(int(size) + 1)),
    "a proof of another entry": _edit(f"{PROOF}.logIndex", lambda index: str(int(index) - 1)),
    "a hash too many": _edit(f"{PROOF}.hashes", lambda hashes: [*hashes, b64(bytes(32))]),
    "a flipped hash": _edit(f"{PROOF}.hashes.0", flipped),
    "unknown kind of entry": _edit(f"{TLOG}.kindVersion.version", lambda _: "0.0.9"),
    "checkpoint without origin": _edit(NOTE, _lines(lambda x: x[1:])),
    "checkpoint with an empty origin": _edit(NOTE, _lines(lambda x: ["", *x[1:]])),
    "checkpoint without size": _edit(NOTE, _lines(lambda x: [x[0], *x[2:]])),
    "checkpoint without root": _edit(NOTE, _lines(lambda x: [*x[:2], *x[3:]])),
    "checkpoint of another root": _edit(NOTE, _lines(lambda x: [*x[:2], b64(bytes(32)), *x[3:]])),
    "checkpoint without signature": _edit(NOTE, _lines(lambda x: [*x[:4], ""])),
    "checkpoint signed by somebody else": _edit(
        NOTE, _lines(lambda x: [*x[:4], f"— elsewhere {b64(b'1234' + bytes(64))}", ""])
    ),
    "checkpoint with another key hint": _edit(
        NOTE, lambda note: f"{note.rpartition(' ')[0]} {b64(bytes(4) + base64.b64decode(note.split()[-1])[4:])}\n"
    ),
    "checkpoint with a bad signature": _edit(
        NOTE, lambda note: f"{note.rpartition(' ')[0]} {flipped(note.split()[-1])}\n"
    ),
}


@kinds
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_with_a_bundle(case: Case, rekor: int, statement: bool, name: str) -> None:
    case.sign(rekor=rekor)  # so that a proof has hashes
    bundle = case.sign(rekor=rekor, statement=statement)
    while not entry(bundle)["inclusionProof"].get("hashes"):
        bundle = case.sign(rekor=rekor, statement=statement)
    REFUSED[name](bundle)
    assert not case.accepted(bundle)


@kinds
def test_witnesses_beside_the_log(case: Case, rekor: int, statement: bool) -> None:
    """rekor2-checkpoint-cosigned, -multiple-cosigs, -origin-not-first: other signatures of a checkpoint do no harm."""
    bundle = case.sign(rekor=rekor, statement=statement)
    checkpoint = entry(bundle)["inclusionProof"]["checkpoint"]
    head, _, own = checkpoint["envelope"].partition("\n\n")
    witness = [f"— witness{n}.example {b64(bytes([n] * 4) + bytes(72))}\n" for n in (1, 2)]
    for lines in ([own, *witness], [*witness, own], [witness[0], own, witness[1]], [own, own]):
        checkpoint["envelope"] = f"{head}\n\n{''.join(lines)}"
        assert case.accepted(bundle)


@kinds
def test_a_bundle_of_parts_of_two(case: Case, rekor: int, statement: bool) -> None:
    """wrong-hashedrekord-*, dsse-mismatch-*, incorrect-public-key, CVE-2022-36056: every part is good, of another."""
    first, second = (case.sign(rekor=rekor, statement=statement) for _ in range(2))
    (case.folder / "artifact").write_bytes(b"another file\n")
    third = case.sign(rekor=rekor)
    (case.folder / "artifact").write_bytes(ARTIFACT)
    material = "verificationMaterial"
    for part in ("certificate", "tlogEntries", *(["timestampVerificationData"] if rekor == 2 else [])):
        for donor in (second, third):
            mixed = copy.deepcopy(first)
            mixed[material][part] = donor[material][part]
            assert not case.accepted(mixed), part
    content = "dsseEnvelope" if statement else "messageSignature"
    assert not case.accepted(first | {content: second[content]})
    assert not case.accepted(
        {k: v for k, v in first.items() if k != content} | {"messageSignature": third["messageSignature"]}
    )


@pytest.mark.parametrize("rekor", [1, 2])
def test_signatures_and_digests(case: Case, rekor: int) -> None:
    """signature-mismatch, invalid-base64-signature, message-digest-mismatch, wrong-material, dsse-invalid-sig."""
    message = case.sign(rekor=rekor)
    for path, value in (
        ("signature", flipped(message["messageSignature"]["signature"])),
        ("signature", "*"),
        ("signature", ""),
        ("messageDigest", {"algorithm": "SHA2_256", "digest": b64(bytes(32))}),
    ):
        assert not case.accepted(message | {"messageSignature": message["messageSignature"] | {path: value}})
    (case.folder / "artifact").write_bytes(b"another\n")
    words = ["verify-bundle", "--bundle", str(case.folder / "bundle.json"), "--certificate-identity", ALICE]
    words += ["--certificate-oidc-issuer", case.issuer, "--trusted-root", str(case.folder / "root.json")]
    assert case.folder.joinpath("bundle.json").write_text(json.dumps(message))
    assert cli.main([*words, str(case.folder / "artifact")]) == 1
    (case.folder / "artifact").write_bytes(ARTIFACT)
    signed = case.sign(rekor=rekor, statement=True)
    envelope = signed["dsseEnvelope"]
    for change in (
        {"signatures": [{"sig": flipped(_sig(signed)["sig"])}]},
        {"signatures": []},
        {"signatures": envelope["signatures"] * 2},
        {"payloadType": "application/json"},
        {"payload": b64(json.dumps(STATEMENT | {"predicate": {"x": 1}}).encode())},
    ):
        assert not case.accepted(signed | {"dsseEnvelope": envelope | change})


@pytest.mark.parametrize("rekor", [1, 2])
@pytest.mark.parametrize(
    "over",
    [
        {"_type": None},
        {"_type": "https://in-toto.io/Statement/v2"},
        {"subject": [{"name": "a", "digest": {"sha256": "00" * 32}}]},
        {"subject": [{"name": "a", "digest": {"sha512": DIGEST.hex()}}]},
    ],
)
def test_statements_about_something_else(case: Case, rekor: int, over: dict[str, Any]) -> None:
    """dsse-statement-missing-type_fail, dsse-statement-unknown-type_fail. Signing refuses what is no statement."""
    body = {k: v for k, v in (STATEMENT | over).items() if v is not None}
    payload = json.dumps(body).encode()
    (case.folder / "statement.json").write_bytes(payload)
    if "_type" in over:
        config = case.world.sigstore.trust_config(2 if rekor == 2 else 1)
        (case.folder / "trust.json").write_text(json.dumps(config))
        words = ["sign-bundle", "--in-toto", "--identity-token", case.world.sigstore.token(ALICE)]
        words += ["--bundle", str(case.folder / "bundle.json"), "--trust-config", str(case.folder / "trust.json")]
        assert cli.main([*words, str(case.folder / "statement.json")]) == 1
        return
    assert not case.accepted(case.sign(rekor=rekor, statement=True))


def test_identities(case: Case) -> None:
    bundle = case.sign()
    for identity in (ALICE + "x", ALICE[:-1], ALICE.upper()):
        assert not case.accepted(bundle, identity=identity)
    case.issuer += "/"
    assert not case.accepted(bundle)


@pytest.mark.parametrize("claim", LOOK_ALIKES)
def test_the_nine_look_alikes(case: Case, claim: str) -> None:
    """Certificates of workflows that look like the one that was asked for, at every one of which somebody stumbled."""
    case.world.sigstore.accept_issuer(GITHUB, "github")
    config = case.folder / "trust.json"
    config.write_text(json.dumps(case.world.sigstore.trust_config()))
    case.issuer = GITHUB
    for workflow, good in ((WORKFLOW, True), (claim, False)):
        token = case.world.sigstore.token("repo:acme/runbooks", **(CLAIMS | {"job_workflow_ref": workflow}))
        words = ["sign-bundle", "--identity-token", token, "--bundle", str(case.folder / "bundle.json")]
        assert cli.main([*words, "--trust-config", str(config), str(case.folder / "artifact")]) == 0
        bundle = (case.folder / "bundle.json").read_bytes()
        assert case.accepted(bundle, identity=f"https://github.com/{WORKFLOW}") is good


# Time: of the log (Rekor v1), of timestamp authorities (both)


def test_the_promise_of_a_log(case: Case) -> None:
    """set-invalid-signature_fail, integrated-time-in-future_fail."""
    bundle = case.sign(rekor=1)
    for change in (
        lambda e: e["inclusionPromise"].update(
            signedEntryTimestamp=flipped(e["inclusionPromise"]["signedEntryTimestamp"])
        ),
        lambda e: e.update(integratedTime=str(int(e["integratedTime"]) + 86_400)),
        lambda e: e.update(integratedTime=str(int(e["integratedTime"]) + 1)),
    ):
        wrong = copy.deepcopy(bundle)
        change(entry(wrong))
        assert not case.accepted(wrong)


def token(case: Case, signature: bytes, at: dt.datetime, *, certificates: bool = True) -> dict[str, str]:
    """A timestamp by the instance's own authority, over any signature, at any time."""
    instance = case.world.sigstore._instance
    builder = TimestampRequestBuilder().data(signature).hash_algorithm(HashAlgorithm.SHA256)
    request = builder.cert_request(cert_request=certificates).build().as_bytes()
    made = timestamp.respond(request, instance._tsa_key, instance._tsa_chain[0], at)
    return {"signedTimestamp": b64(made)}


def stamped(bundle: Bundle, *tokens: dict[str, str]) -> Bundle:
    out = copy.deepcopy(bundle)
    out["verificationMaterial"]["timestampVerificationData"] = {"rfc3161Timestamps": list(tokens)}
    return out


def test_timestamps(case: Case) -> None:
    """rekor2-no-timestamp, -timestamp-with-incorrect-time, -payload-mismatch, -with and -without-embedded-cert,
    -multiple-timestamps-one-outside-cert-validity, intoto-tsa-timestamp-outside-cert-validity."""
    bundle = case.sign()
    now = dt.datetime.now(dt.UTC)  # after the certificate was made; a token states whole seconds
    late, signature = now + dt.timedelta(days=1), signature_of(bundle)
    good = token(case, signature, now)
    assert case.accepted(stamped(bundle, good))
    assert case.accepted(stamped(bundle, token(case, signature, now, certificates=False)))
    assert case.accepted(stamped(bundle, good, token(case, signature, now)))
    for tokens in (
        [],
        [token(case, signature, late)],
        [good, token(case, signature, late)],
        [token(case, signature, late), good],
        [token(case, b"another signature", now)],
        [good, good],
        [{"signedTimestamp": b64(b"no token")}],
    ):
        assert not case.accepted(stamped(bundle, *tokens))
    first = case.sign(rekor=1)  # a log that states the time itself: a token that verifies must agree with it
    assert case.accepted(stamped(first, token(case, signature_of(first), dt.datetime.now(dt.UTC))))
    assert not case.accepted(stamped(first, token(case, signature_of(first), late)))


def test_windows_of_timestamp_authorities(case: Case) -> None:
    """timestamp-outside-trust-root-tsa-validity, -wrong-tsa-validity-borrow, tsa-validity-end-inclusive."""
    bundle = case.sign()
    raw = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"][0]["signedTimestamp"]
    at = decode_timestamp_response(base64.b64decode(raw)).tst_info.gen_time
    (own,) = case.root["timestampAuthorities"]

    def root(*authorities: dict[str, Any]) -> dict[str, Any]:
        return case.root | {"timestampAuthorities": list(authorities)}

    def window(start: dt.timedelta, end: dt.timedelta) -> dict[str, Any]:
        stated = {"start": (at + start).isoformat(), "end": (at + end).isoformat()}
        return {"validFor": stated}

    day, moment = dt.timedelta(days=1), dt.timedelta(0)
    assert case.accepted(bundle, root(own | window(-day, moment)))
    assert case.accepted(bundle, root(own | window(moment, day)))
    ended, none = own | window(-2 * day, -day), {"certChain": {"certificates": []}}
    assert not case.accepted(bundle, root(ended))
    assert not case.accepted(bundle, root(ended, own | window(-day, day) | none))
    assert not case.accepted(bundle, root(own | window(day, 2 * day)))


def test_a_timestamp_outside_the_certificate_of_its_authority(case: Case) -> None:
    """rekor2-timestamp-outside-tsa-cert-validity, -with-expired-cert-chain: only the time of the token is asked."""
    bundle = case.sign()
    now = dt.datetime.now(dt.UTC)
    top = ("tsa root", ec.generate_private_key(ec.SECP256R1()))
    key = ec.generate_private_key(ec.SECP256R1())
    for made, good in ((now, True), (now - certificate.LIFETIME - dt.timedelta(days=1), False)):
        chain = [
            certificate.timestamper(key, top, now=made),
            certificate.authority(top, top, path_length=0, now=made),
        ]
        request = TimestampRequestBuilder().data(signature_of(bundle)).hash_algorithm(HashAlgorithm.SHA256).build()
        raw = timestamp.respond(request.as_bytes(), key, chain[0], now)
        (own,) = case.root["timestampAuthorities"]
        row = own | {"certChain": {"certificates": [{"rawBytes": b64(certificate.der(c))} for c in chain]}}
        root = case.root | {"timestampAuthorities": [row | {"validFor": {"start": "2000-01-01T00:00:00Z"}}]}
        assert case.accepted(stamped(bundle, {"signedTimestamp": b64(raw)}), root) is good


@pytest.mark.parametrize("rekor", [1, 2])
def test_windows_of_logs(case: Case, rekor: int) -> None:
    """trust-root-tlog-missing-validity-start_fail, trust-root-tlog-validity-end-inclusive."""
    bundle = case.sign(rekor=rekor)
    data = bundle["verificationMaterial"].get("timestampVerificationData", {}).get("rfc3161Timestamps")
    if rekor == 1:
        at = dt.datetime.fromtimestamp(int(entry(bundle)["integratedTime"]), dt.UTC)
    else:
        at = decode_timestamp_response(base64.b64decode(data[0]["signedTimestamp"])).tst_info.gen_time
    for stated, good in (
        ({"start": "2020-01-01T00:00:00Z", "end": at.isoformat()}, True),
        ({"start": at.isoformat()}, True),
        ({"end": "2099-01-01T00:00:00Z"}, False),
        ({}, False),
        ({"start": "2020-01-01T00:00:00Z", "end": (at - dt.timedelta(seconds=1)).isoformat()}, False),
        ({"start": (at + dt.timedelta(seconds=1)).isoformat()}, False),
    ):
        root = copy.deepcopy(case.root)
        for row in root["tlogs"]:
            row["publicKey"]["validFor"] = stated
        assert case.accepted(bundle, root) is good, stated


def test_two_authorities_of_the_same_name(case: Case) -> None:
    """sct-duplicate-intermediate-name: the issuer of the certificate is found by its key, not by its name."""
    bundle = case.sign()
    (own,) = case.root["certificateAuthorities"]
    now = dt.datetime.now(dt.UTC)
    top, middle = (
        ("fulcio root", ec.generate_private_key(ec.SECP256R1())),
        ("fulcio intermediate", ec.generate_private_key(ec.SECP256R1())),
    )
    chain = [
        certificate.authority(middle, top, path_length=0, now=now),
        certificate.authority(top, top, path_length=1, now=now),
    ]
    decoy = own | {"certChain": {"certificates": [{"rawBytes": b64(certificate.der(c))} for c in chain]}}
    for rows in ([decoy, own], [own, decoy]):
        assert case.accepted(bundle, case.root | {"certificateAuthorities": rows})
    assert not case.accepted(bundle, case.root | {"certificateAuthorities": [decoy]})


def test_the_timestamp_authority_answers_stock_requests(case: Case) -> None:
    """What the other tests make by hand is what the instance serves."""
    request = TimestampRequestBuilder().data(b"x").hash_algorithm(HashAlgorithm.SHA256).build().as_bytes()
    headers = {"Content-Type": "application/timestamp-query"}
    asked = urllib.request.Request(f"{case.world.sigstore.url}/api/v1/timestamp", request, headers)
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert decode_timestamp_response(answer.read()).tst_info.gen_time <= dt.datetime.now(dt.UTC)
