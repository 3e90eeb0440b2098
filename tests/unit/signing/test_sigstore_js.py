"""The other stock client: sigstore-js verifies what we sign, and what it signs at the private instance verifies here.

It needs node and the packages @sigstore/bundle@4 @sigstore/protobuf-specs @sigstore/sign@4 @sigstore/verify@3, in
a folder that the variable POINTCALL_SIGSTORE_JS names; without them these tests skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pointcall_attest.signature import verify_bundles
from pointcall_keys.signer import sign_file
from tests.unit.signing.world import ALICE, BOB, NOW, World, statement

SCRIPTS = Path(__file__).resolve().parent / "sigstore_js"
FOLDER = os.environ.get("POINTCALL_SIGSTORE_JS", "")
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not FOLDER, reason="POINTCALL_SIGSTORE_JS does not name a folder with sigstore-js"),
]


def node(script: str, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run one of the scripts with the packages of that folder."""
    environment = os.environ | {"NODE_PATH": str(Path(FOLDER) / "node_modules")}
    call = ["node", SCRIPTS / script, *words]
    return subprocess.run(call, env=environment, capture_output=True, timeout=60, check=False)


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "root.json"
    path.write_bytes(world.sigstore.trusted_root())
    return path


@pytest.mark.parametrize("rekor", [1, 2])
@pytest.mark.parametrize("kind", ["file", "statement"])
def test_sigstore_js_verifies_what_we_sign(world: World, root: Path, tmp_path: Path, rekor: int, kind: str) -> None:
    bundle, artifact = tmp_path / "b.json", tmp_path / "a"
    artifact.write_bytes(b"content")
    if kind == "file":
        config, token = world.sigstore.trust_config(2 if rekor == 2 else 1), world.sigstore.token(ALICE)
        bundle.write_bytes(sign_file(b"content", trust_config=config, token=token))
    else:
        bundle.write_bytes(world.sign(statement(), rekor=rekor))
    given = [artifact] if kind == "file" else []
    done = node("verify.cjs", root, bundle, ALICE, world.sigstore.issuer, *given)
    if rekor == 2 and kind == "statement" and b"TLOG_BODY_ERROR" in done.stderr:
        pytest.skip("this @sigstore/verify is older than DSSE on Rekor v2 (4.1.3 knows it)")
    assert done.stdout == b"verified\n", done.stderr
    assert node("verify.cjs", root, bundle, BOB, world.sigstore.issuer, *given).returncode != 0


@pytest.mark.parametrize("kind", ["message", "dsse"])
def test_what_sigstore_js_signs(world: World, root: Path, tmp_path: Path, kind: str) -> None:
    bundle, payload = tmp_path / "b.json", tmp_path / "manifest.json"
    payload.write_bytes(statement())
    done = node("sign.cjs", world.sigstore.url, world.sigstore.token(ALICE), payload, bundle, kind)
    assert done.returncode == 0, done.stderr
    given = [] if kind == "dsse" else [payload]
    assert node("verify.cjs", root, bundle, ALICE, world.sigstore.issuer, *given).stdout == b"verified\n"
    if kind == "dsse":
        raw, policy = root.read_bytes(), world.policy()
        signed = verify_bundles([bundle.read_bytes()], trusted_root=raw, policy=policy, at=NOW, in_process=True)
        assert signed.payload == statement()
