"""Long-lived keys: in a file, behind PKCS#11, and what a policy makes of their bundles."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.admission import admit
from pointcall_attest.errors import MalformedError, RefusedError, VerifyError
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import SignedStatement, SignerIdentity, verify_bundles
from pointcall_executor import cli
from pointcall_keys.errors import KeysError
from pointcall_keys.long_lived import FileKey, TokenKey, policy_row, sign_with_key
from tests.unit.signing.world import BOB, NOW, TEE, World, sha256, statement

SOFTHSM = next((p for p in Path("/usr/lib").glob("**/libsofthsm2.so")), None)


@pytest.fixture
def key(tmp_path: Path) -> FileKey:
    return FileKey.make(tmp_path / "key.pem", b"secret")


def policy(*rows: dict[str, Any], **over: Any) -> TrustPolicy:
    body = {"format": "pointcall-trust-policy/v1", "keys": list(rows)}
    return TrustPolicy.parse(json.dumps(body | over).encode())


def verify(bundle: bytes, trust: TrustPolicy) -> SignedStatement:
    return verify_bundles([bundle], trusted_root=b"", policy=trust, at=NOW, in_process=True)


def test_a_key_in_a_file_signs_a_manifest(world: World, key: FileKey) -> None:
    trust = policy(policy_row("release", key))
    candidate = world.check([sign_with_key(statement(), key)], policy=trust, trusted_root=b"")
    admitted = admit(candidate, TEE)
    assert admitted.signed.signers == (SignerIdentity("key", sha256(key.spki)),)
    assert admitted.signed.signed_at is None


def test_the_child_knows_keys_too(key: FileKey) -> None:
    bundle, trust = sign_with_key(statement(), key), policy(policy_row("release", key))
    assert verify_bundles([bundle], trusted_root=b"", policy=trust, at=NOW).signed_at is None


def test_a_key_and_an_identity_together(world: World, key: FileKey) -> None:
    over = {"keys": [policy_row("release", key)], "min_signatures": 2}
    payload = statement()
    bundles = [world.sign(payload), sign_with_key(payload, key)]
    assert len(world.check(bundles, policy=world.policy(**over)).signed.signers) == 2
    with pytest.raises(RefusedError, match=r"manifest\.threshold"):
        world.check(bundles[1:], policy=world.policy(**over))


def test_what_a_policy_of_keys_refuses(world: World, key: FileKey, tmp_path: Path) -> None:
    other = FileKey.make(tmp_path / "other.pem", None)
    trust, bundle = policy(policy_row("release", key)), json.loads(sign_with_key(statement(), key))
    changed = json.loads(json.dumps(bundle))
    changed["dsseEnvelope"]["payload"] = base64.b64encode(statement(sequence=9)).decode()
    for wrong, raw in (
        ("manifest.signature", json.dumps(changed).encode()),
        ("manifest.signer", sign_with_key(statement(), other)),
        ("manifest.signer", world.sign(statement(), who=BOB)),
    ):
        with pytest.raises(VerifyError) as caught:
            verify(raw, trust)
        assert caught.value.id == wrong


def test_a_key_ends(key: FileKey) -> None:
    row = policy_row("release", key)
    assert verify(sign_with_key(statement(), key), policy(row | {"valid_until": "2099-01-01T00:00:00Z"}))
    with pytest.raises(VerifyError, match="no longer valid"):
        verify(sign_with_key(statement(), key), policy(row | {"valid_until": "2020-01-01T00:00:00Z"}))


def test_the_form_of_a_key_bundle_is_exact(key: FileKey) -> None:
    trust, good = policy(policy_row("release", key)), json.loads(sign_with_key(statement(), key))
    material, envelope = good["verificationMaterial"], good["dsseEnvelope"]
    for change in (
        {"mediaType": "application/vnd.dev.sigstore.bundle+json;version=0.1"},
        {"other": 1},
        {"verificationMaterial": material | {"tlogEntries": [{}]}},
        {"verificationMaterial": material | {"certificate": {}}},
        {"verificationMaterial": {"publicKey": {"hint": 7}}},
        {"verificationMaterial": {"publicKey": None}},
        {"dsseEnvelope": envelope | {"signatures": []}},
        {"dsseEnvelope": envelope | {"signatures": envelope["signatures"] * 2}},
        {"dsseEnvelope": envelope | {"payload": "*"}},
        {"dsseEnvelope": None},
    ):
        with pytest.raises(MalformedError) as caught:
            verify(json.dumps(good | change).encode(), trust)
        assert caught.value.id == "manifest.bundle"


def test_keys_in_files(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = FileKey.make(path, b"secret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert FileKey.load(path, b"secret").spki == made.spki
    for passphrase in (None, b"wrong"):
        with pytest.raises(KeysError) as caught:
            FileKey.load(path, passphrase)
        assert caught.value.id == "sign.key"
    with pytest.raises(KeysError, match="already"):
        FileKey.make(path, None)
    with pytest.raises(KeysError):
        FileKey.load(tmp_path / "missing.pem", None)


def test_a_statement_that_is_too_long(key: FileKey) -> None:
    with pytest.raises(KeysError) as caught:
        sign_with_key(b"x" * 200_000, key)
    assert caught.value.id == "sign.statement"


@pytest.mark.parametrize("public_key", ["", "*", "AAAA", "MCowBQYDK2VwAyEA" + "A" * 43 + "="])
def test_a_policy_takes_p256_keys_only(public_key: str) -> None:
    with pytest.raises(MalformedError) as caught:
        policy({"name": "release", "public_key": public_key})
    assert caught.value.id == "policy.malformed"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pkcs11", reason="the package python-pkcs11 is not installed")
    tool = shutil.which("softhsm2-util")
    if tool is None or SOFTHSM is None:
        pytest.skip("softhsm2 is not installed")
    (tmp_path / "tokens").mkdir()
    config = tmp_path / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(config))
    words = [tool, "--init-token", "--free", "--label", "pointcall", "--so-pin", "0000", "--pin", "1234"]
    subprocess.run(words, check=True, capture_output=True, env=os.environ | {"SOFTHSM2_CONF": str(config)})
    return SOFTHSM


def _sign_with_the_token_from_the_command_line(
    library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "m.json").write_bytes(statement())
    words = ["--pkcs11", str(library), "--token", "pointcall", "--label", "release"]
    assert cli.main(["sign", *words, "--policy-row", "hsm"]) == 2  # no PIN
    monkeypatch.setenv("POINTCALL_PKCS11_PIN", "1234")
    capsys.readouterr()
    assert cli.main(["sign", *words, "--policy-row", "hsm"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert cli.main(["sign", str(folder / "m.json"), *words]) == 0
    assert verify((folder / "m.sigstore.json").read_bytes(), policy(row)).payload == statement()


def test_a_key_behind_pkcs11(
    token: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pkcs11

    library = pkcs11.lib(str(token))
    library.reinitialize()
    with library.get_token(token_label="pointcall").open(rw=True, user_pin="1234") as session:
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}, local=True
        )
        parameters.generate_keypair(store=True, label="release")
        other = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: bytes.fromhex("06052b81040022")}, local=True
        )
        other.generate_keypair(store=True, label="p384")
    key = TokenKey.open(token, token="pointcall", label="release", pin="1234")
    candidate = world.check([sign_with_key(statement(), key)], policy=policy(policy_row("hsm", key)), trusted_root=b"")
    assert admit(candidate, TEE).signed.signers[0].identity == sha256(key.spki)
    key.close()
    _sign_with_the_token_from_the_command_line(token, tmp_path, monkeypatch, capsys)
    for label, name, pin in (("nobody", "pointcall", "1234"), ("p384", "pointcall", "1234"),
                             ("release", "other", "1234"), ("release", "pointcall", "9999")):  # fmt: skip
        with pytest.raises(KeysError) as caught:
            TokenKey.open(token, token=name, label=label, pin=pin)
        assert caught.value.id == "sign.key"


def test_sign_with_a_key_from_the_command_line(
    tmp_path: Path, key: FileKey, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_bytes(statement())
    call = ["sign", str(tmp_path / "manifest.json"), "--key", str(tmp_path / "key.pem")]
    assert cli.main(call) == 1  # no passphrase
    monkeypatch.setenv("POINTCALL_KEY_PASSPHRASE", "secret")
    assert cli.main(call) == 0
    bundle = (tmp_path / "manifest.sigstore.json").read_bytes()
    assert verify(bundle, policy(policy_row("release", key))).payload == statement()
    assert cli.main([*call, "--staging"]) == 2
    assert cli.main(["sign", call[1], "--pkcs11", "x.so"]) == 2


def test_a_library_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pkcs11", reason="the package python-pkcs11 is not installed")
    with pytest.raises(KeysError):
        TokenKey.open(tmp_path / "none.so", token="pointcall", label="release", pin="1234")
