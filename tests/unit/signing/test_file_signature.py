"""The verbs sign-bundle and verify-bundle, and bundles of long-lived keys with log entries."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime as dt
import hashlib
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.file_signature import verify_file, verify_file_with_key
from pointcall_executor import cli
from tests.unit.signing.mutation import flip, leaves, replaced
from tests.unit.signing.test_signature import ENDED
from tests.unit.signing.world import ALICE, BOB, World

ARTIFACT = b"the signed file\n"
DIGEST = hashlib.sha256(ARTIFACT).digest()


@pytest.fixture(autouse=True)
def _verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("verify-bundle", "sign-bundle"):
        monkeypatch.setitem(cli.VERBS, verb, verb)


@pytest.fixture
def folder(tmp_path: Path, world: World) -> Path:
    (tmp_path / "a.txt").write_bytes(ARTIFACT)
    config = world.sigstore.trust_config()
    (tmp_path / "trust.json").write_text(json.dumps(config))
    (tmp_path / "root.json").write_text(json.dumps(config["trustedRoot"]))
    (tmp_path / "signing.json").write_text(json.dumps(config["signingConfig"]))
    return tmp_path


def sign(folder: Path, world: World, *words: str, who: str = ALICE) -> int:
    call = ["sign-bundle", "--identity-token", world.sigstore.token(who), "--bundle", str(folder / "b.json"), *words]
    return cli.main([*call, str(folder / "a.txt")])


def verify(folder: Path, world: World, *, identity: str = ALICE, issuer: str | None = None, what: str = "") -> int:
    call = ["verify-bundle", "--bundle", str(folder / "b.json"), "--certificate-identity", identity]
    call += ["--certificate-oidc-issuer", issuer or world.sigstore.issuer, "--trusted-root", str(folder / "root.json")]
    return cli.main([*call, what or str(folder / "a.txt")])


@pytest.mark.parametrize("apart", [False, True])
def test_sign_and_verify(folder: Path, world: World, apart: bool) -> None:
    both = ["--trust-config", str(folder / "trust.json")]
    halves = ["--trusted-root", str(folder / "root.json"), "--signing-config", str(folder / "signing.json")]
    assert sign(folder, world, *(halves if apart else both)) == 0
    assert verify(folder, world) == 0
    assert verify(folder, world, what=f"sha256:{DIGEST.hex()}") == 0
    assert verify(folder, world, what=f"sha256:{bytes(32).hex()}") != 0
    assert verify(folder, world, identity=BOB) != 0
    assert verify(folder, world, issuer="https://elsewhere.example") != 0
    (folder / "a.txt").write_bytes(ARTIFACT + b"x")
    assert verify(folder, world) != 0


def test_files_win_over_staging(folder: Path, world: World) -> None:
    """The conformance suite gives both: the flag for the suite as a whole, the files for one test."""
    halves = ["--trusted-root", str(folder / "root.json"), "--signing-config", str(folder / "signing.json")]
    assert sign(folder, world, "--staging", *halves) == 0
    words = ["verify-bundle", "--staging", "--bundle", str(folder / "b.json"), "--certificate-identity", ALICE]
    words += ["--certificate-oidc-issuer", world.sigstore.issuer, "--trusted-root", str(folder / "root.json")]
    assert cli.main([*words, str(folder / "a.txt")]) == 0


def test_a_file_that_is_called_like_a_digest(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    monkeypatch.chdir(folder)
    name = f"sha256:{bytes(32).hex()}"
    (folder / name).write_bytes(ARTIFACT)
    assert verify(folder, world, what=name) == 0


def test_a_private_bundle_does_not_verify_with_the_public_roots(folder: Path, world: World) -> None:
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    words = ["verify-bundle", "--bundle", str(folder / "b.json"), "--certificate-identity", ALICE]
    words += ["--certificate-oidc-issuer", world.sigstore.issuer, str(folder / "a.txt")]
    assert cli.main(words) == 1
    assert cli.main([*words, "--staging"]) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["verify-bundle", "--bundle", "b", "a"],
        ["verify-bundle", "--bundle", "b", "--certificate-identity", "x", "a"],
        ["verify-bundle", "--bundle", "b", "--key", "k", "--certificate-identity", "x", "a"],
        ["sign-bundle", "--bundle", "b", "--identity-token", "t", "--staging", "--trust-config", "c", "a"],
        ["sign-bundle", "--bundle", "b", "--identity-token", "t", "--trusted-root", "c", "a"],
    ],
)
def test_words_that_do_not_fit_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert "cli.usage" in capsys.readouterr().err


def test_the_last_moment_of_a_timestamp_authority_counts(folder: Path, world: World) -> None:
    """The library takes the end of this window for the first moment after it."""
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    from rfc3161_client import decode_timestamp_response

    bundle = json.loads((folder / "b.json").read_bytes())
    (token,) = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    at = decode_timestamp_response(base64.b64decode(token["signedTimestamp"])).tst_info.gen_time
    root = json.loads((folder / "root.json").read_bytes())
    for end, code in ((at, 0), (at.replace(year=at.year - 1), 1)):
        root["timestampAuthorities"][0]["validFor"] = {
            "start": "2020-01-01T00:00:00Z",
            "end": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        (folder / "root.json").write_text(json.dumps(root))
        assert verify(folder, world) == code


def test_two_timestamps_over_the_same_signature(folder: Path, world: World) -> None:
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    bundle = json.loads((folder / "b.json").read_bytes())
    tokens = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    tokens.append(_another_token(world, base64.b64decode(bundle["messageSignature"]["signature"])))
    (folder / "b.json").write_text(json.dumps(bundle))
    assert verify(folder, world) == 0


def _another_token(world: World, signature: bytes) -> dict[str, str]:
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    builder = TimestampRequestBuilder().data(signature).hash_algorithm(HashAlgorithm.SHA256)
    request = builder.build().as_bytes()
    headers = {"Content-Type": "application/timestamp-query"}
    asked = urllib.request.Request(f"{world.sigstore.url}/api/v1/timestamp", request, headers)
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return {"signedTimestamp": b64(answer.read())}


def test_an_ed25519_log() -> None:
    log = ed25519.Ed25519PrivateKey.generate()
    good, root = message_bundle("0.0.2"), copy.deepcopy(ROOT)
    root["tlogs"][0]["publicKey"] |= {"rawBytes": b64(der(log)), "keyDetails": "PKIX_ED25519"}
    proof = good["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]
    text = f"rekor.test\n1\n{proof['rootHash']}\n"
    proof["checkpoint"]["envelope"] = f"{text}\n— rekor.test {b64(LOG_ID[:4] + log.sign(text.encode()))}\n"
    by_key(good, root=root)
    with pytest.raises(VerifyError):
        by_key(good)


def test_a_retired_authority(folder: Path, world: World) -> None:
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    root = json.loads((folder / "root.json").read_bytes())
    root["certificateAuthorities"][0]["validFor"] = ENDED
    (folder / "root.json").write_text(json.dumps(root))
    assert verify(folder, world) == 1


# Long-lived keys and their log entries: a log of one leaf, as the conformance suite builds its own


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def der(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


KEY = ec.generate_private_key(ec.SECP256R1())
LOG = ec.generate_private_key(ec.SECP256R1())
SHA256 = ec.ECDSA(hashes.SHA256())
LOG_ID = hashlib.sha256(der(LOG)).digest()
ROOT: dict[str, Any] = {
    "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
    "tlogs": [
        {
            "baseUrl": "https://rekor.test",
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": b64(der(LOG)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": "2020-01-01T00:00:00Z"},
            },
            "logId": {"keyId": b64(LOG_ID)},
        }
    ],
}


def entry(body: dict[str, Any]) -> dict[str, Any]:
    raw = rfc8785.dumps(body)
    root = hashlib.sha256(b"\0" + raw).digest()
    text = f"rekor.test\n1\n{b64(root)}\n"
    note = f"{text}\n— rekor.test {b64(LOG_ID[:4] + LOG.sign(text.encode(), SHA256))}\n"
    return {
        "logIndex": "0",
        "logId": {"keyId": b64(LOG_ID)},
        "kindVersion": {"kind": body["kind"], "version": body["apiVersion"]},
        "integratedTime": "0",
        "inclusionProof": {
            "logIndex": "0",
            "rootHash": b64(root),
            "treeSize": "1",
            "hashes": [],
            "checkpoint": {"envelope": note},
        },
        "canonicalizedBody": b64(raw),
    }


def statement(**over: Any) -> bytes:
    body = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "a.txt", "digest": {"sha256": DIGEST.hex()}}],
        "predicateType": "https://example.com/test",
        "predicate": {},
    }
    return json.dumps({k: v for k, v in (body | over).items() if v is not None}).encode()


def envelope(payload: bytes, key: Any = KEY) -> tuple[dict[str, Any], bytes, bytes]:
    kind = b"application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = key.sign(pae) if isinstance(key, ed25519.Ed25519PrivateKey) else key.sign(pae, SHA256)
    return (
        {"payload": b64(payload), "payloadType": kind.decode(), "signatures": [{"sig": b64(signature)}]},
        pae,
        signature,
    )


def bundle(content: dict[str, Any], *entries: dict[str, Any]) -> dict[str, Any]:
    material = {"publicKey": {"hint": "x"}, "tlogEntries": list(entries)}
    return {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial": material} | content


def message_bundle(version: str = "") -> dict[str, Any]:
    signature = KEY.sign(ARTIFACT, SHA256)
    content = {"messageDigest": {"algorithm": "SHA2_256", "digest": b64(DIGEST)}, "signature": b64(signature)}
    bodies = {"0.0.1": _hashedrekord_v1(DIGEST, signature), "0.0.2": _hashedrekord_v2(DIGEST, signature)}
    return bundle({"messageSignature": content}, *([entry(bodies[version])] if version else []))


def _hashedrekord_v1(digest: bytes, signature: bytes) -> dict[str, Any]:
    spec = {
        "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
        "signature": {"content": b64(signature), "publicKey": {"content": b64(pem(KEY))}},
    }
    return {"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec}


def _hashedrekord_v2(digest: bytes, signature: bytes) -> dict[str, Any]:
    verifier = {"keyDetails": "PKIX_ECDSA_P256_SHA_256", "publicKey": {"rawBytes": b64(der(KEY))}}
    spec = {
        "data": {"algorithm": "SHA2_256", "digest": b64(digest)},
        "signature": {"content": b64(signature), "verifier": verifier},
    }
    return {"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": {"hashedRekordV002": spec}}


def dsse_bundle(kind: str, payload: bytes | None = None) -> dict[str, Any]:
    content, pae, signature = envelope(payload or statement())
    payload_hash = {"algorithm": "sha256", "value": hashlib.sha256(payload or statement()).hexdigest()}
    signed = [{"signature": b64(signature), "verifier": b64(pem(KEY))}]
    twice = {"sig": b64(b64(signature).encode()), "publicKey": b64(pem(KEY))}
    wrapped = {"envelope": {"payloadType": "x", "signatures": [twice]}, "payloadHash": payload_hash}
    bodies: dict[str, dict[str, Any]] = {
        "dsse": {"apiVersion": "0.0.1", "kind": "dsse", "spec": {"payloadHash": payload_hash, "signatures": signed}},
        "intoto": {"apiVersion": "0.0.2", "kind": "intoto", "spec": {"content": wrapped}},
        "hashedrekord": _hashedrekord_v2(hashlib.sha256(pae).digest(), signature),
    }
    return bundle({"dsseEnvelope": content}, *([entry(bodies[kind])] if kind else []))


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "message": message_bundle,
    "message, v1": lambda: message_bundle("0.0.1"),
    "message, v2": lambda: message_bundle("0.0.2"),
    "statement": lambda: dsse_bundle(""),
    "statement, dsse": lambda: dsse_bundle("dsse"),
    "statement, intoto": lambda: dsse_bundle("intoto"),
    "statement, v2": lambda: dsse_bundle("hashedrekord"),
}


def by_key(value: dict[str, Any] | bytes, digest: bytes = DIGEST, key: Any = KEY, root: Any = ROOT) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    verify_file_with_key(raw, digest, key=pem(key), trusted_root=None if root is None else json.dumps(root).encode())


@pytest.mark.parametrize("kind", GOOD)
def test_key_bundles(kind: str) -> None:
    good = GOOD[kind]()
    by_key(good)
    for wrong in (
        lambda: by_key(good, bytes(32)),
        lambda: by_key(good, key=LOG),
        lambda: by_key(json.dumps(good).replace("publicKey", "certificate").encode()),
    ):
        with pytest.raises(AttestError):
            wrong()


@pytest.mark.parametrize(
    ("make", "digest", "check"),
    [
        (lambda: dsse_bundle("", b"{}"), DIGEST, "bundle.statement"),
        (lambda: dsse_bundle("", b"not json"), DIGEST, "bundle.statement"),
        (lambda: dsse_bundle("", statement(predicateType="")), DIGEST, "bundle.statement"),
        (lambda: dsse_bundle(""), bytes(32), "bundle.subject"),
        (lambda: message_bundle() | {"messageSignature": {"signature": b64(bytes(70))}}, DIGEST, "bundle.signature"),
        (lambda: _by_certificate(message_bundle()), DIGEST, "bundle.signature"),
    ],
)
def test_what_is_wrong_with_a_key_bundle_is_named(make: Callable[[], Any], digest: bytes, check: str) -> None:
    with pytest.raises(AttestError) as caught:
        by_key(make(), digest)
    assert caught.value.id == check


def _by_certificate(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"verificationMaterial": {"certificate": {"rawBytes": ""}}}


@pytest.mark.parametrize("row", ["certificateAuthorities", "tlogs", "ctlogs"])
def test_an_authority_that_had_ended_before_the_signature(folder: Path, world: World, row: str) -> None:
    """The library takes a signature of any time; the windows of the root are looked at here."""
    assert sign(folder, world, "--trust-config", str(folder / "trust.json")) == 0
    bundle = (folder / "b.json").read_bytes()

    def verified(root: Any) -> None:
        raw = json.dumps(root).encode()
        verify_file(bundle, DIGEST, trusted_root=raw, identity=ALICE, issuer=world.sigstore.issuer)

    root = json.loads((folder / "root.json").read_bytes())
    verified(root)
    for item in root[row]:
        of = item if row == "certificateAuthorities" else item["publicKey"]
        of["validFor"] = {"start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z"}
    with pytest.raises(VerifyError) as caught:
        verified(root)
    assert caught.value.id == "bundle.window"


@pytest.mark.parametrize("kind", [k for k in GOOD if "," in k])
def test_the_log_of_a_key_bundle_must_be_of_the_root(kind: str) -> None:
    good = GOOD[kind]()
    no_start, other = copy.deepcopy(ROOT), copy.deepcopy(ROOT)
    del no_start["tlogs"][0]["publicKey"]["validFor"]["start"]
    other["tlogs"][0]["publicKey"]["rawBytes"] = b64(der(KEY))
    roots: list[Any] = [None, {"tlogs": []}, {}, no_start, other]
    for root in roots:
        with pytest.raises(VerifyError) as caught:
            by_key(good, root=root)
        assert caught.value.id == "bundle.log"


# The index and id of a log entry are hints; what they hint at is verified. The hint of the key is ours to ignore.
HINTS = {"logIndex", "keyId", "integratedTime", "hint"}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("change", [flip, lambda _: None, lambda _: 7, lambda _: [], lambda _: "!"])
def test_every_changed_field_of_a_key_bundle(kind: str, change: Callable[[Any], Any]) -> None:
    good = GOOD[kind]()
    for path, value in leaves(good):
        try:
            by_key(replaced(good, path, change(value)))
        except (MalformedError, VerifyError):
            continue
        nothing = path[-1] == "tlogEntries" or change(value) in (value, None)
        assert path[-1] in HINTS or nothing, path


def test_a_promise_is_verified_where_there_is_one() -> None:
    good = message_bundle("0.0.1")
    logged = good["verificationMaterial"]["tlogEntries"][0]
    logged["integratedTime"] = "1790000000"
    stated = {"body": logged["canonicalizedBody"], "integratedTime": 1790000000, "logID": LOG_ID.hex(), "logIndex": 0}
    logged["inclusionPromise"] = {"signedEntryTimestamp": b64(LOG.sign(rfc8785.dumps(stated), SHA256))}
    by_key(good)
    at = dt.datetime.fromtimestamp(1790000000, dt.UTC)
    root = copy.deepcopy(ROOT)
    for end, refused in ((at, False), (at - dt.timedelta(seconds=1), True)):
        root["tlogs"][0]["publicKey"]["validFor"]["end"] = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        with pytest.raises(VerifyError) if refused else contextlib.nullcontext():
            by_key(good, root=root)
    logged["integratedTime"] = "1790000001"
    with pytest.raises(VerifyError, match="promise"):
        by_key(good)


def test_a_checkpoint_is_named_as_its_signature() -> None:
    """Rekor v2 signs as its origin, Rekor v1 as its origin without the number of the tree."""
    for origin, name, good in (
        ("rekor.test", "rekor.test", True),
        ("rekor.test - 17", "rekor.test", True),
        ("rekor.test", "elsewhere.test", False),
        ("elsewhere.test - 17", "rekor.test", False),
        ("rekor.test", "", False),
        ("", "", False),
    ):
        value = message_bundle("0.0.2")
        proof = value["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]
        text = f"{origin}\n1\n{proof['rootHash']}\n"
        proof["checkpoint"]["envelope"] = f"{text}\n— {name} {b64(LOG_ID[:4] + LOG.sign(text.encode(), SHA256))}\n"
        with contextlib.nullcontext() if good else pytest.raises(VerifyError):
            by_key(value)


def test_timestamps_beside_a_key(world: World) -> None:
    """They prove nothing that a key needs; one that does not verify may be there to mislead somebody else."""
    authorities = json.loads(world.sigstore.trusted_root())["timestampAuthorities"]
    root = ROOT | {"timestampAuthorities": authorities}
    value = message_bundle("0.0.2")
    signature = base64.b64decode(value["messageSignature"]["signature"])
    good, wrong = _another_token(world, signature), _another_token(world, b"another signature")

    def stamped(*tokens: Any) -> dict[str, Any]:
        return copy.deepcopy(value) | {
            "verificationMaterial": value["verificationMaterial"]
            | {"timestampVerificationData": {"rfc3161Timestamps": list(tokens)}}
        }

    by_key(stamped(good), root=root)
    by_key(stamped(good, _another_token(world, signature)), root=root)
    by_key(stamped(), root=root)
    for tokens in ([wrong], [good, wrong], [good, good], [{"signedTimestamp": "AAAA"}], [{}], [7], [good] * 33):
        with pytest.raises(VerifyError) as caught:
            by_key(stamped(*tokens), root=root)
        assert caught.value.id == "bundle.timestamp"
    ended = [row | {"validFor": ENDED} for row in authorities]
    no_root = [row | {"certChain": {"certificates": row["certChain"]["certificates"][:1]}} for row in authorities]
    for rows in ([], ended, no_root):
        with pytest.raises(VerifyError) as caught:
            by_key(stamped(good), root=ROOT | {"timestampAuthorities": rows})
        assert caught.value.id == "bundle.timestamp"
    with pytest.raises(VerifyError):
        by_key(stamped(good), root=None)
    log_ended = copy.deepcopy(root)
    log_ended["tlogs"][0]["publicKey"]["validFor"] = ENDED
    by_key(value, root=log_ended)  # nothing says when: the window cannot be asked
    with pytest.raises(VerifyError) as caught:
        by_key(stamped(good), root=log_ended)
    assert caught.value.id == "bundle.log"


@pytest.mark.parametrize(
    "over",
    [
        {"_type": None},
        {"_type": "https://in-toto.io/Statement/v2"},
        {"subject": []},
        {"predicateType": None},
        {"subject": [{"digest": {"sha256": "00" * 32}}]},
    ],
)
def test_statements_that_say_something_else(over: dict[str, Any]) -> None:
    with pytest.raises(VerifyError):
        by_key(dsse_bundle("hashedrekord", statement(**over)))


def test_other_kinds_of_keys(tmp_path: Path) -> None:
    edwards = ed25519.Ed25519PrivateKey.generate()
    by_key(bundle({"dsseEnvelope": envelope(statement(), edwards)[0]}), key=edwards)
    with pytest.raises(VerifyError, match="Ed25519"):
        by_key(message_bundle(), key=edwards)
    with pytest.raises(MalformedError) as caught:
        by_key(message_bundle(), key=rsa.generate_private_key(65537, 2048))
    assert caught.value.id == "bundle.key"


def test_key_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a.txt", ARTIFACT), ("key.pub", pem(KEY)), ("root.json", json.dumps(ROOT).encode())):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "b.json").write_text(json.dumps(dsse_bundle("intoto")))
    words = ["verify-bundle", "--bundle", str(tmp_path / "b.json"), "--key", str(tmp_path / "key.pub")]
    words += ["--trusted-root", str(tmp_path / "root.json"), str(tmp_path / "a.txt"), "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == DIGEST.hex()
    (tmp_path / "key.pub").write_bytes(pem(LOG))
    assert cli.main(words) == 1
