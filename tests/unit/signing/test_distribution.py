"""Our own releases: exactly the tracked files, the same bytes anywhere, a true bill of materials, signatures."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy.release import release
from pointcall_executor import cli
from tests.unit.signing.world import ALICE, World

pytest.importorskip("hatchling", reason="hatchling is not installed")
pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")

from deploy.release import sbom

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "runbooks/pointcall_runbook/": "pointcall_runbook/",
    "attest/pointcall_attest/": "pointcall_attest/",
    "keys/pointcall_keys/": "pointcall_keys/",
    "executor/pointcall_executor/": "pointcall_executor/",
    "runbooks/library/": "pointcall_runbook/library/",
}
AT = 1_760_000_000
pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a git checkout"),
]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


def copied(place: Path) -> Path:
    """The tracked files as they are now, in a folder of their own."""
    for name in tracked():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    return {new + n.removeprefix(old) for n in tracked() for old, new in PACKAGES.items() if n.startswith(old)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of the tracked files, in folders of different depth; their results."""
    places = []
    for deep in ("a", "another/deeper/place"):
        place = tmp_path_factory.mktemp("dist") / deep
        release.pack(copied(place / "tree"), place / "dist", AT)
        places.append(place / "dist")
    return places[0], places[1]


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_sdist_and_wheel_are_the_same_anywhere(built: tuple[Path, Path]) -> None:
    release.same(*built)
    assert len(list(built[0].iterdir())) == 2


def test_the_sdist_holds_exactly_the_tracked_files(built: tuple[Path, Path]) -> None:
    with tarfile.open(one(built[0], "*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        times = {member.mtime for member in archive if member.isfile()}
    assert names == {*tracked(), "PKG-INFO"}
    assert times == {AT}


def test_a_wheel_built_from_the_sdist_holds_exactly_the_tracked_files(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheels = []
    for name in ("one", "two/three"):
        with tarfile.open(one(built[0], "*.tar.gz")) as archive:
            archive.extractall(tmp_path / name, filter="data")
        (tree,) = (tmp_path / name).iterdir()
        release.pack(tree, tmp_path / name / "dist", AT)
        wheels.append(one(tmp_path / name / "dist", "*.whl"))
    assert in_wheel(wheels[0]) == expected()
    assert wheels[0].read_bytes() == wheels[1].read_bytes() == one(built[0], "*.whl").read_bytes()
    with zipfile.ZipFile(wheels[0]) as archive:
        for old, new in PACKAGES.items():
            for name in (n for n in tracked() if n.startswith(old)):
                assert archive.read(new + name.removeprefix(old)) == (ROOT / name).read_bytes(), name


def test_two_builds_that_differ_are_no_release(built: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(built[0], tmp_path / "other")
    one(tmp_path / "other", "*.whl").write_bytes(b"another")
    with pytest.raises(release.ReleaseError, match="whl"):
        release.same(built[0], tmp_path / "other")
    one(tmp_path / "other", "*.whl").unlink()
    with pytest.raises(release.ReleaseError, match="whl"):
        release.same(built[0], tmp_path / "other")


# The bill of materials


def bill(built: tuple[Path, Path]) -> tuple[bytes, dict[str, Any]]:
    at = dt.datetime.fromtimestamp(AT, dt.UTC)
    raw = sbom.bill(ROOT, one(built[0], "*.tar.gz"), one(built[0], "*.whl"), at)
    body: dict[str, Any] = json.loads(raw)
    return raw, body


def test_the_bill_of_materials_is_valid_and_the_same_again(built: tuple[Path, Path]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    raw, body = bill(built)
    assert raw == bill(built)[0]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(raw.decode()) is None
    assert body["metadata"]["timestamp"].startswith("2025-10-09T08:53:20")


def test_the_bill_lists_what_is_installed_and_what_is_inside(built: tuple[Path, Path]) -> None:
    _, body = bill(built)
    pinned = sbom.pins((ROOT / "requirements.txt").read_text())
    libraries = {c["name"]: c for c in body["components"] if c["type"] == "library"}
    assert {"cryptography", "sigstore", "pydantic", "wasmtime", "grpcio"} <= set(libraries)
    assert not {"hatchling", "grpcio-tools", "pytest"} & set(libraries)  # they build; they are not in a release
    for name, component in libraries.items():
        assert component["version"] == pinned[name].version
        assert component["purl"] == f"pkg:pypi/{name}@{pinned[name].version}"
    files = {c["name"] for c in body["components"] if c["type"] == "file"}
    wheel = one(built[0], "*.whl")
    assert files == {name for name in in_wheel(wheel) if not name.endswith(".py")}
    needs = {row["ref"]: set(row.get("dependsOn", ())) for row in body["dependencies"]}
    root = body["metadata"]["component"]
    assert f"sigstore@{pinned['sigstore'].version}" in needs[root["bom-ref"]]
    assert f"cffi@{pinned['cffi'].version}" in needs[f"cryptography@{pinned['cryptography'].version}"]
    stated = {row["url"]: row["hashes"][0]["content"] for row in root["externalReferences"]}
    assert stated == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in built[0].iterdir()}


def test_every_need_of_a_run_is_pinned(built: tuple[Path, Path]) -> None:
    """What the metadata of the wheel asks for is in the bill."""
    import email

    with zipfile.ZipFile(one(built[0], "*.whl")) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    asked = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need or "'executor'" in need]
    listed = {c["name"] for c in bill(built)[1]["components"] if c["type"] == "library"}
    names = {found[0].lower() for need in asked if (found := re.match(r"[A-Za-z0-9._-]+", need))}
    assert names <= listed
    assert len(names) >= 10


# The whole of it


def test_a_signed_release(world: World, tmp_path: Path) -> None:
    """From the last commit: built twice with BPF blobs and messages, compared, signed, and verified file by file."""
    for tool in ("clang", "llvm-strip", "bpftool"):
        if shutil.which(tool, path="/usr/sbin:/usr/bin:/bin") is None:
            pytest.skip(f"{tool} is not installed")
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    (tmp_path / "trust.json").write_text(json.dumps(world.sigstore.trust_config()))
    (tmp_path / "root.json").write_bytes(world.sigstore.trusted_root())
    out = tmp_path / "dist"
    words = ["--sign", "--trust-config", str(tmp_path / "trust.json"), "--identity-token", world.sigstore.token(ALICE)]
    assert release.main(["--out", str(out), *words]) == 0
    files = sorted(p for p in out.iterdir() if not p.name.endswith(".sigstore.json"))
    assert [p.suffix for p in files] == ["", ".whl", ".json", ".gz"]
    for path in files:
        call = ["verify-bundle", "--bundle", f"{path}.sigstore.json", "--certificate-identity", ALICE]
        call += ["--certificate-oidc-issuer", world.sigstore.issuer, "--trusted-root", str(tmp_path / "root.json")]
        assert cli.main([*call, str(path)]) == 0
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name != "SHA256SUMS"}
    made = {name for name in in_wheel(one(out, "*.whl")) if "/generated/" in name or "/blobs/" in name}
    assert "pointcall_executor/blobs/breaker.blob" in made
    assert "pointcall_executor/api/generated/pointcall_pb2.py" in made
    assert release.main(["--out", str(out)]) == 1  # not into a folder with something in it


def test_a_commit_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--out", str(tmp_path / "dist"), "--commit", "nothing"]) == 1
    assert "git log" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()
