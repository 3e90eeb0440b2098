"""Releases travel: as an OCI artifact through a real registry, as one file, and back through stock tools."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.errors import MalformedError
from pointcall_executor import cli
from pointcall_keys.archive import read_archive, write_archive
from pointcall_keys.errors import KeysError
from pointcall_keys.registry import Account, Reference, pull, push
from pointcall_keys.release import EMPTY_TYPE, TITLE, Release, digest
from tests.unit.signing.world import ALICE, BOB, World, files, statement


@pytest.fixture(scope="session")
def release(world: World) -> Release:
    beside = {"restart.json": b"{}", "restart.sigstore.json": world.sign(statement())}
    return Release(statement(), (world.sign(statement()),), files(), beside)


def decode(image: dict[str, Any] | bytes, blobs: dict[str, bytes]) -> Release:
    raw = image if isinstance(image, bytes) else json.dumps(image).encode()
    return Release.decode(raw, lambda name, _: blobs.get(name, b""))


# The artifact


def test_encode_and_decode(release: Release) -> None:
    encoded = release.encode()
    assert encoded == release.encode()
    assert decode(encoded.image, dict(encoded.blobs)) == release
    image = json.loads(encoded.image)
    assert image["config"]["mediaType"] == EMPTY_TYPE
    assert {layer["mediaType"] for layer in image["layers"]} == {
        "application/vnd.in-toto+json",
        "application/vnd.dev.sigstore.bundle.v0.3+json",
        "application/wasm",
        "application/vnd.pointcall.bpf.v1",
        "application/json",
    }


def test_a_blob_that_is_not_what_the_manifest_says(release: Release) -> None:
    encoded = release.encode()
    for layer in json.loads(encoded.image)["layers"]:
        for wrong in (b"", encoded.blobs[layer["digest"]] + b"x", encoded.blobs[layer["digest"]][:-1] + b"\xff"):
            with pytest.raises(MalformedError) as caught:
                decode(encoded.image, dict(encoded.blobs) | {layer["digest"]: wrong})
            assert caught.value.id == "release.digest"


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.pop("layers"),
        lambda i: i["layers"].clear(),
        lambda i: i["layers"].pop(0),
        lambda i: i["layers"].append(i["layers"][0]),
        lambda i: i["layers"][2]["annotations"].update({TITLE: "files/../x"}),
        lambda i: i["layers"][2]["annotations"].update({TITLE: "/etc/passwd"}),
        lambda i: i["layers"][2]["annotations"].update({TITLE: "other"}),
        lambda i: i["layers"][2]["annotations"].clear(),
        lambda i: i["layers"][2].update({"size": 1 << 40}),
        lambda i: i["layers"][2].update({"digest": "sha512:00"}),
        lambda i: i["layers"][2].update({"urls": ["http://elsewhere"]}),
        lambda i: i["layers"].extend([i["layers"][2]] * 1200),
        lambda i: i.update({"artifactType": "application/wasm"}),
        lambda i: i.update({"schemaVersion": 1}),
        lambda i: i.update({"subject": {}}),
    ],
)
def test_manifests_that_are_no_release(release: Release, change: Callable[[dict[str, Any]], Any]) -> None:
    encoded = release.encode()
    image = json.loads(encoded.image)
    change(image)
    with pytest.raises(MalformedError) as caught:
        decode(image, dict(encoded.blobs))
    assert caught.value.id == "release.form"


def test_a_release_that_is_too_large_is_refused_before_it_is_fetched(release: Release) -> None:
    image = json.loads(release.encode().image)
    for n in range(5):
        row = {"mediaType": "x", "digest": digest(bytes([n])), "size": 16 * 1024 * 1024}
        image["layers"].append(row | {"annotations": {TITLE: f"files/{n}"}})

    def never(name: str, size: int) -> bytes:
        raise AssertionError("fetched")

    with pytest.raises(MalformedError, match="too large"):
        Release.decode(json.dumps(image).encode(), never)


# One file


def test_archive(release: Release) -> None:
    raw = write_archive(release)
    assert raw == write_archive(release)
    assert read_archive(raw) == (release.encode().digest, release)


def tar(*members: tuple[str, bytes], **fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


INDEX = json.dumps({"manifests": [{"digest": "sha256:" + "00" * 32}]}).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x" * 2000,
        tar(),
        tar(("index.json", b"{}")),
        tar(("index.json", b'{"manifests": []}')),
        tar(("index.json", INDEX)),
        tar(("index.json", INDEX), ("index.json", INDEX)),
        tar(("../index.json", INDEX)),
        tar(("/etc/passwd", INDEX)),
        tar(("blobs/sha256/" + "00" * 32, b"x"), ("index.json", INDEX)),
        tar(("index.json", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar(("index.json", b""), type=tarfile.LNKTYPE, linkname="oci-layout"),
        tar(("index.json", b""), type=tarfile.FIFOTYPE),
        tar(*[(f"blobs/sha256/{n:064x}", b"") for n in range(1100)]),
    ],
)
def test_files_that_are_no_archive(raw: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        read_archive(raw)
    assert caught.value.id in ("release.form", "release.digest")


def test_every_flipped_byte_of_an_archive_is_found_or_harmless(release: Release) -> None:
    raw = write_archive(release)
    for at in range(0, len(raw), 61):
        changed = raw[:at] + bytes([raw[at] ^ 0x20]) + raw[at + 1 :]
        try:
            assert read_archive(changed) == (release.encode().digest, release)
        except MalformedError:
            continue


def test_a_folder(release: Release, tmp_path: Path) -> None:
    release.write(tmp_path / "a")
    assert Release.read(tmp_path / "a") == release
    for call in (lambda: release.write(tmp_path / "a"), lambda: Release.read(tmp_path / "b")):
        with pytest.raises(KeysError) as caught:
            call()
        assert caught.value.id == "build.file"


# A real registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("docker-registry") or shutil.which("registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    folder = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with subprocess.Popen(
        [program, "serve", folder / "config.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as served:
        _wait_for(port)
        yield f"127.0.0.1:{port}"
        served.terminate()


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the registry did not start")


def test_push_and_pull(registry: str, release: Release) -> None:
    where = push(release, Reference.parse(f"{registry}/acme/edge"))
    assert where.digest == release.encode().digest
    assert pull(where) == release
    assert push(release, where) == where  # nothing is uploaded twice
    missing = Reference.parse(f"{registry}/acme/edge@sha256:{'00' * 32}")
    with pytest.raises(KeysError) as caught:
        pull(missing)
    assert caught.value.id == "registry.answer"


def test_a_stock_client_reads_it_back(registry: str, release: Release, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    where = push(release, Reference.parse(f"{registry}/acme/edge"))
    source = f"docker://{where}"
    words = ["skopeo", "inspect", "--raw", "--tls-verify=false", source]
    raw = subprocess.run(words, check=True, capture_output=True, timeout=60).stdout
    assert raw == release.encode().image
    words = ["skopeo", "copy", "--preserve-digests", "--src-tls-verify=false", "--insecure-policy", source]
    subprocess.run([*words, f"oci-archive:{tmp_path / 'a.tar'}"], check=True, capture_output=True, timeout=60)
    assert read_archive((tmp_path / "a.tar").read_bytes()) == (where.digest, release)


def test_a_stock_client_writes_our_archive_into_a_registry(registry: str, release: Release, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    (tmp_path / "a.tar").write_bytes(write_archive(release))
    words = ["skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false", "--insecure-policy"]
    target = f"docker://{registry}/acme/offline:latest"
    subprocess.run([*words, f"oci-archive:{tmp_path / 'a.tar'}", target], check=True, capture_output=True, timeout=60)
    assert pull(Reference.parse(f"{registry}/acme/offline@{release.encode().digest}")) == release


def test_the_verbs(
    registry: str, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.VERBS, "manifest", "manifest")
    release.write(tmp_path / "in")
    assert cli.main(["manifest", "push", str(tmp_path / "in"), f"{registry}/acme/verbs", "--json"]) == 0
    where = json.loads(capsys.readouterr().out)["reference"]
    assert cli.main(["manifest", "pull", where, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["manifest", "pack", str(tmp_path / "out"), "--out", str(tmp_path / "a.tar")]) == 0
    assert cli.main(["manifest", "unpack", str(tmp_path / "a.tar"), "--out", str(tmp_path / "back")]) == 0
    assert Release.read(tmp_path / "back") == release
    assert cli.main(["manifest", "pull", f"{registry}/acme/verbs:latest", "--out", str(tmp_path / "x")]) == 1


def test_a_pointer_says_what_to_pull(
    registry: str, release: Release, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site without Kubernetes knows a repository and a trust policy, and follows the signed pointer of its ring."""
    state, config = tmp_path / "state", tmp_path / "trust.json"
    (state / "trust").mkdir(parents=True)
    (state / "trust/policy.json").write_bytes(world.policy(ring="canary").raw)
    (state / "trust/trusted_root.json").write_bytes(world.sigstore.trusted_root())
    config.write_text(json.dumps(world.sigstore.trust_config()))
    release.write(tmp_path / "in")
    where = push(release, Reference.parse(f"{registry}/acme/pointed"))

    def pointer(who: str, *words: str) -> str:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        point = ["manifest", "point", str(tmp_path / "in/manifest.json"), "--out", str(out), *words]
        assert cli.main(point) == 0
        call = ["sign", str(out), "--trust-config", str(config), "--identity-token", world.sigstore.token(who)]
        assert cli.main(call) == 0
        return str(out.with_suffix(".sigstore.json"))

    def pull_by(bundle: str, reference: str = f"{registry}/acme/pointed") -> int:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["manifest", "pull", reference, "--pointer", bundle, "--state-dir", str(state), "--out", str(out)]
        code = cli.main(words)
        assert (code == 0) == out.exists()
        return code or int(Release.read(out) != release)

    named = ["--artifact", str(where.digest)]
    assert pull_by(pointer(ALICE, "--ring", "canary", *named)) == 0
    capsys.readouterr()
    for bundle, wrong in (
        (pointer(BOB, "--ring", "canary", *named), "manifest.notices"),
        (pointer(ALICE, "--ring", "fleet", *named), "notice.useless"),
        (pointer(ALICE, "--ring", "canary"), "notice.useless"),
        (pointer(ALICE, "--ring", "canary", "--issued", "2026-01-01T00:00:00Z", *named), "notice.useless"),
        (pointer(ALICE, "--ring", "canary", "--artifact", f"sha256:{'00' * 32}"), "registry.answer"),
    ):
        assert pull_by(bundle) == 1
        assert wrong in capsys.readouterr().err
    assert pull_by(pointer(ALICE, "--ring", "canary", *named), f"{registry}/acme/pointed@{where.digest}") == 2


# A registry that lies


class _Liar(BaseHTTPRequestHandler):
    answers: dict[str, tuple[int, dict[str, str], bytes]]
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.seen.append((path, self.headers.get("Authorization", "")))
        status, headers, body = self.answers.get(path, (404, {}, b""))
        if headers.get("WWW-Authenticate") and self.headers.get("Authorization"):
            status, headers, body = self.answers["authorized"]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[tuple[str, type[_Liar]]]:
    handler = type("Handler", (_Liar,), {"answers": {}, "seen": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def ask(host: str, image: bytes, account: Account | None = None) -> Release:
    return pull(Reference.parse(f"{host}/a@{digest(image)}"), account)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises((KeysError, MalformedError)) as caught:
        call()
    return caught.value.id


def test_a_registry_that_gives_something_else(liar: tuple[str, type[_Liar]], release: Release) -> None:
    host, handler = liar
    image, name = release.encode().image, f"/v2/a/manifests/{release.encode().digest}"
    for answer, wrong in (
        ((200, {}, image + b" "), "registry.answer"),
        ((200, {}, b"x" * (600 * 1024)), "registry.answer"),
        ((500, {}, image), "registry.answer"),
        ((307, {"Location": f"http://{host}{name}"}, b""), "registry.answer"),
        ((307, {"Location": "http://192.0.2.1/x"}, b""), "registry.network"),
        ((307, {"Location": "file:///etc/passwd"}, b""), "registry.network"),
        ((401, {"WWW-Authenticate": "Negotiate"}, b""), "registry.login"),
        ((401, {"WWW-Authenticate": 'Bearer realm="http://192.0.2.1/token"'}, b""), "registry.network"),
        ((200, {}, image), "registry.answer"),  # and then no blobs
    ):
        handler.answers[name] = answer
        assert refused(lambda: ask(host, image)) == wrong


def test_credentials_stay_with_the_registry(liar: tuple[str, type[_Liar]], release: Release) -> None:
    host, handler = liar
    encoded = release.encode()
    name = f"/v2/a/manifests/{encoded.digest}"
    handler.answers |= {
        name: (401, {"WWW-Authenticate": f'Bearer realm="http://{host}/token",service="s"'}, b""),
        "/token": (200, {}, b'{"token": "T"}'),
        "authorized": (307, {"Location": f"http://{host.replace('127.0.0.1', '127.0.0.2')}/x"}, b""),
    }
    assert refused(lambda: ask(host, encoded.image, Account("u", "p"))) == "registry.network"  # nobody is there
    assert [a.split(" ")[0] for _, a in handler.seen] == ["", "Basic", "Bearer"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host/",
        "host/A",
        "host/a:latest",
        "host/a@sha256:00",
        "host/a@sha512:" + "0" * 128,
        "h/a/../b",
        "https://host/a",
        "host/a b",
        "host:999999/a",
        "h/" + "a" * 600,
    ],
)
def test_references(text: str) -> None:
    assert refused(lambda: Reference.parse(text)) == "registry.reference"


def test_a_pull_needs_a_digest() -> None:
    assert refused(lambda: pull(Reference.parse("127.0.0.1:9/a"))) == "registry.reference"


def test_a_registry_that_is_not_there() -> None:
    assert refused(lambda: ask("127.0.0.1:9", b"x")) == "registry.network"


def test_the_digest_is_plain_sha256() -> None:
    assert digest(b"x") == "sha256:" + hashlib.sha256(b"x").hexdigest()
