"""The private instance: loopback only, stable URL, and refusals instead of crashes whatever a client sends."""

from __future__ import annotations

import datetime as dt
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pointcall_keys.errors import KeysError
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_keys.signer import sign_file, sign_statement
from tests.unit.signing.world import ALICE, World, statement

NOW = dt.datetime.now(dt.UTC)


def clock() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def ask(world: World, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(world.sigstore.url.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "10.0.0.1", "example.org", "localhost", ""])
def test_it_serves_loopback_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(KeysError) as caught:
        PrivateSigstore.start(tmp_path, clock=clock, host=host)
    assert caught.value.id == "sigstore.address"


def test_a_restart_keeps_the_url_and_the_trusted_root(tmp_path: Path) -> None:
    with PrivateSigstore.start(tmp_path, clock=clock) as first:
        url, root = first.url, first.trusted_root()
        sign_statement(statement(), trust_config=first.trust_config(), token=first.token(ALICE))
    with PrivateSigstore.start(tmp_path, clock=clock) as again:
        assert (again.url, again.trusted_root()) == (url, root)
        sign_statement(statement(), trust_config=again.trust_config(), token=again.token(ALICE))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with PrivateSigstore.start(tmp_path, clock=clock) as first:
        port = first.url.rsplit(":", 1)[1]
    with socket.create_server(("127.0.0.1", int(port))), pytest.raises(KeysError, match=port) as caught:
        PrivateSigstore.start(tmp_path, clock=clock)
    assert caught.value.id == "sigstore.port"


def test_keys_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    with PrivateSigstore.start(tmp_path / "s", clock=clock):
        pass
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    keys = list((tmp_path / "s").glob("*.pem"))
    assert len(keys) == 8
    assert {stat.S_IMODE(k.stat().st_mode) for k in keys} == {0o600}


def test_a_key_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with PrivateSigstore.start(tmp_path, clock=clock):
        pass
    (tmp_path / "rekor2.pem").write_bytes((tmp_path / "rekor1.pem").read_bytes())
    with pytest.raises(ValueError, match=r"rekor2\.pem"):
        PrivateSigstore.start(tmp_path, clock=clock)


@pytest.mark.parametrize(
    "path",
    [
        "/oidc/.well-known/openid-configuration",
        "/oidc/keys",
        "/trusted_root.json",
        "/client_trust_config.json",
        "/api/v2/trustBundle",
    ],
)
def test_its_pages(world: World, path: str) -> None:
    status, page = ask(world, "GET", path)
    assert status == 200
    assert isinstance(page, dict)


@pytest.mark.parametrize("path", ["/", "/api", "/../etc/passwd", "/api/v2/signingCert/"])
def test_unknown_pages(world: World, path: str) -> None:
    assert ask(world, "GET", path)[0] == 404
    assert ask(world, "POST", path, b"{}")[0] == 404


@pytest.mark.parametrize(
    "path", ["/api/v2/signingCert", "/api/v2/log/entries", "/api/v1/log/entries", "/api/v1/timestamp"]
)
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"\xff", b'{"kind": "dsse", "spec": {}}', b"[" * 5000])
def test_nonsense_is_refused(world: World, path: str, body: bytes) -> None:
    status, answer = ask(world, "POST", path, body)
    assert status in (400, 401)
    assert answer["message"]


def test_a_long_body_is_refused(world: World) -> None:
    assert ask(world, "POST", "/api/v2/log/entries", b"", **{"Content-Length": str(2 << 20)})[0] == 413


def refused_token(world: World, token: str) -> str:
    with pytest.raises(KeysError) as caught:
        sign_file(b"x", trust_config=world.sigstore.trust_config(), token=token)
    return caught.value.id


def test_tokens_that_are_not_accepted(world: World, other: PrivateSigstore) -> None:
    good = world.sigstore.token(ALICE)
    assert refused_token(world, good[:-8] + "AAAAAAAA") == "sign.failed"  # signature
    assert refused_token(world, other.token(ALICE)) == "sign.failed"  # issuer
    assert refused_token(world, other.token(ALICE, iss=world.sigstore.issuer)) == "sign.failed"  # somebody else's key
    assert refused_token(world, world.sigstore.token(ALICE, aud="other")) == "sign.token"
    assert refused_token(world, world.sigstore.token(ALICE, ttl_s=-100)) == "sign.token"
    assert refused_token(world, "x.y.z") == "sign.token"
    assert refused_token(world, "") == "sign.token"


def test_the_stock_command_line(world: World, tmp_path: Path) -> None:
    """The command line of the Sigstore project, unmodified, signs here and verifies with the root that we write."""
    (tmp_path / "trust.json").write_text(json.dumps(world.sigstore.trust_config()))
    (tmp_path / "a.txt").write_bytes(b"content")
    stock = [sys.executable, "-m", "sigstore", "--trust-config", str(tmp_path / "trust.json")]
    token = ["--identity-token", world.sigstore.token(ALICE)]
    named = ["--cert-identity", ALICE, "--cert-oidc-issuer", world.sigstore.issuer]
    environment = os.environ | {"HOME": str(tmp_path)}
    for words in (["sign", *token, str(tmp_path / "a.txt")], ["verify", "identity", *named, str(tmp_path / "a.txt")]):
        done = subprocess.run([*stock, *words], capture_output=True, env=environment, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    assert b"OK" in done.stdout + done.stderr


def test_it_runs_as_a_process(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pointcall_keys.private_sigstore", str(tmp_path / "s")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as served:
        assert served.stdout is not None
        url = served.stdout.readline().strip()
        config = json.loads((tmp_path / "s/trust_config.json").read_text())
        token = subprocess.run([*call, "--token", ALICE], env=environment, capture_output=True, check=True, timeout=30)
        bundle = sign_file(b"x", trust_config=config, token=token.stdout.decode().strip())
        assert bundle
        assert config["signingConfig"]["caUrls"][0]["url"] == url
        served.terminate()
        assert served.wait(timeout=10) == 0


def test_an_email_must_be_verified(world: World) -> None:
    world.sigstore.accept_issuer("https://mail.example", "email")
    claims = {"iss": "https://mail.example", "email": "sre@example.org"}
    assert refused_token(world, world.sigstore.token("1", **claims)) == "sign.failed"
    token = world.sigstore.token("1", email_verified=True, **claims)
    assert sign_file(b"x", trust_config=world.sigstore.trust_config(), token=token)


def test_errors_of_signing(world: World) -> None:
    token, config = world.sigstore.token(ALICE), world.sigstore.trust_config()
    for statement_, trust, wrong in (
        (b"x" * 200_000, config, "sign.statement"),
        (b"not a statement", config, "sign.failed"),
        (statement(), {}, "sign.config"),
    ):
        with pytest.raises(KeysError) as caught:
            sign_statement(statement_, trust_config=trust, token=token)
        assert caught.value.id == wrong
