"""Assembling a manifest from sources, and the verbs `build` and `sign` from end to end."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.admission import check_manifest
from pointcall_attest.errors import MalformedError
from pointcall_attest.manifest import Manifest
from pointcall_attest.signature import verify_bundles
from pointcall_executor import cli
from pointcall_keys.assemble import Assembled, assemble
from pointcall_keys.errors import KeysError
from pointcall_keys.provenance import PROVENANCE_TYPE, results_of_tests
from pointcall_keys.recovery_manifest import RecoveryManifest
from pointcall_runbook import verify_module
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import ALICE, NOW, World, declaration, sha256

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"

DAY = dt.timedelta(days=1)
SPEC: dict[str, Any] = {
    "runbooks": [
        {
            "name": "restart",
            "module": "restart.wasm",
            "grants": {"actions": ["recreate"], "services": ["db"]},
            "limits": {"perMinute": 3, "holdOffSeconds": 5},
        }
    ],
    "sensors": [{"name": "lifecycle", "params": {"window_ns": 1000}}],
    "services": [{"name": "db", "declaration": "db.json", "listen": [{"address": "::1", "port": 5432}]}],
    "guard": {"maxActionsPerMinute": 9},
    "minExecutor": "0.1.0",
}


def document(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "pointcall.dev/v1",
        "kind": "RecoveryManifest",
        "metadata": {"name": "edge"},
        "spec": SPEC | spec,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "restart.wasm").write_bytes(module())
    (tmp_path / "db.json").write_bytes(declaration())
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/lifecycle.blob").write_bytes(b"blob")
    return tmp_path


def build(folder: Path, **spec: Any) -> Assembled:
    source = RecoveryManifest.parse(document(**spec))
    return assemble(source, folder, folder / "blobs", sequence=7, not_before=NOW - DAY, expires=NOW + DAY)


def test_a_destination_with_a_circuit_of_its_own(folder: Path) -> None:
    circuit = {"threshold": 3, "cooldownMs": 250, "refuseErrno": "ECONNREFUSED", "abandoned": False}
    places = [{"address": "::1", "port": 5432, "circuit": circuit}]
    built = build(folder, services=[{"name": "db", "declaration": "db.json", "listen": places}])
    (row,) = Manifest.parse(built.statement).service("db").listen
    wanted = {"threshold": 3, "cooldown_ms": 250, "refuse_errno": "ECONNREFUSED", "abandoned": False}
    assert row.model_dump()["circuit"] == wanted


def test_what_is_assembled_can_be_admitted(world: World, folder: Path) -> None:
    built = build(folder)
    manifest = Manifest.parse(built.statement)
    assert manifest.runbook("restart").events == ("ProcessExited",)
    assert manifest.runbook("restart").limits.hold_off_seconds == 5
    assert manifest.sensors[0].params == {"window_ns": 1000}
    assert set(built.files) == {"modules/restart.wasm", "blobs/lifecycle.blob", "services/db.json"}
    assert world.check([world.sign(built.statement)], built.files).verdict.passed


def test_the_same_sources_give_the_same_bytes(folder: Path) -> None:
    assert build(folder) == build(folder)


def test_parts_that_do_not_fit(folder: Path) -> None:
    (folder / "web.json").write_bytes(declaration("web"))
    wrong: list[dict[str, Any]] = [
        {"services": [{"name": "db", "declaration": "web.json"}]},
        {"runbooks": [SPEC["runbooks"][0] | {"source": "x"}]},
        {"runbooks": SPEC["runbooks"] * 2},
        {"runbooks": [], "sensors": [], "services": []},
    ]
    for spec in wrong:
        with pytest.raises(MalformedError) as caught:
            build(folder, **spec)
        assert caught.value.id == "build.malformed"


def test_files_that_cannot_be_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "db.json"
    outside.write_bytes(declaration())
    (folder / "link.json").symlink_to(outside)
    for name in ("missing.json", "link.json"):
        with pytest.raises(KeysError) as caught:
            build(folder, services=[{"name": "db", "declaration": name}])
        assert caught.value.id == "build.file"


@pytest.mark.parametrize(
    "change",
    [
        {"apiVersion": "v1"},
        {"kind": "Pod"},
        {"metadata": {}},
        {"metadata": {"name": "../x"}},
        {"other": 1},
        {"spec": {"runbooks": [{}]}},
        {"spec": {"min_executor": "0.1.0"}},
        {"spec": {"minExecutor": "latest"}},
        {"spec": {"services": [{"name": "db", "declaration": "../db.json"}]}},
        {"spec": {"services": [{"name": "db", "declaration": "/etc/passwd"}]}},
        {"spec": {"services": [{"name": "db", "declaration": "a//b"}]}},
        {"spec": {"channels": [{"name": "a", "kind": "telepathy"}]}},
        {"spec": {"guard": {"maxActionsPerMinute": "10"}}},
        {"spec": {"validDays": 0}},
        {"spec": {1: 2}},
        {"spec": float("nan")},
        {"spec": object()},
    ],
)
def test_documents_that_are_no_recovery_manifest(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as caught:
        RecoveryManifest.parse(document() | change)
    assert caught.value.id == "build.malformed"


YAML = """
apiVersion: pointcall.dev/v1
kind: RecoveryManifest
metadata: {name: edge}
spec:
  runbooks:
    - name: restart
      module: restart.wasm
      grants: {actions: [recreate], services: [db]}
  services:
    - {name: db, declaration: db.json}
"""


def test_build_and_sign_from_the_command_line(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (folder / "manifest.yaml").write_text(YAML)
    out, config = tmp_path / "out", tmp_path / "trust.json"
    config.write_text(json.dumps(world.sigstore.trust_config()))
    assert cli.main(["build", str(folder), "--out", str(out), "--sequence", "7", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["manifest"] == sha256((out / "manifest.json").read_bytes())
    token = world.sigstore.token(ALICE)
    call = ["sign", str(out / "manifest.json"), "--trust-config", str(config), "--identity-token", token]
    assert cli.main(call) == 0
    files = {name: (out / "files" / name).read_bytes() for name in built["files"]}
    candidate = check_manifest(
        [(out / "manifest.sigstore.json").read_bytes()],
        files,
        policy=world.policy(),
        trusted_root=world.sigstore.trusted_root(),
        at=dt.datetime.now(dt.UTC),
        highest_sequence=None,
        executor_version="0.1.0",
        in_process=True,
    )
    assert candidate.verdict.passed
    assert cli.main(["build", str(folder), "--previous", str(out / "manifest.json"), "--json"]) == 0
    newer = Manifest.parse((folder / "build/manifest.json").read_bytes())
    assert (newer.sequence, newer.predicate.previous) == (8, built["manifest"])


def test_rebuilding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.yaml").write_text(YAML)
    call = ["build", str(folder)]
    assert cli.main([*call, "--sequence", "3", "--days", "5"]) == 0
    assert cli.main([*call, "--verify-reproducible"]) == 0
    (folder / "build/files/services/db.json").write_bytes(declaration(directory="/tmp"))
    (folder / "restart.wasm").write_bytes(module("OomKilled"))
    assert cli.main([*call, "--verify-reproducible"]) == 1
    err = capsys.readouterr().err
    assert "build.reproducible" in err
    assert "files/modules/restart.wasm, files/services/db.json, manifest.json" in err


def test_provenance(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_REPOSITORY", "acme/runbooks")
    monkeypatch.setenv("GITHUB_SHA", "ab" * 20)
    monkeypatch.setenv("GITHUB_RUN_ID", "17")
    (folder / "manifest.yaml").write_text(YAML)
    assert cli.main(["build", str(folder), "--builder", "https://ci.example/build"]) == 0
    path = folder / "build/provenance/restart.json"
    made = json.loads(path.read_bytes())
    assert made["subject"][0]["digest"]["sha256"] == sha256(module())
    run, definition = made["predicate"]["runDetails"], made["predicate"]["buildDefinition"]
    assert run["builder"]["id"] == "https://ci.example/build"
    assert run["metadata"]["invocationId"] == "https://github.com/acme/runbooks/actions/runs/17"
    assert definition["resolvedDependencies"][-1]["digest"] == {"gitCommit": "ab" * 20}
    (tmp_path / "trust.json").write_text(json.dumps(world.sigstore.trust_config()))
    words = ["sign", str(path), "--trust-config", str(tmp_path / "trust.json")]
    assert cli.main([*words, "--identity-token", world.sigstore.token(ALICE)]) == 0
    signed = verify_bundles(
        [path.with_suffix(".sigstore.json").read_bytes()],
        trusted_root=world.sigstore.trusted_root(),
        policy=world.policy(),
        at=dt.datetime.now(dt.UTC),
        in_process=True,
        predicate_type=PROVENANCE_TYPE,
    )
    assert signed.payload == path.read_bytes()


def test_a_test_result() -> None:
    result = json.loads(results_of_tests("modules/a.wasm", module(), {"a.json": b"[]"}, passed=["b", "a"], failed=[]))
    assert result["predicate"]["result"] == "PASSED"
    assert result["predicate"]["passedTests"] == ["a", "b"]
    assert (
        json.loads(results_of_tests("a", module(), {}, passed=["b"], failed=["a"]))["predicate"]["result"] == "FAILED"
    )
    with pytest.raises(AssertionError):
        results_of_tests("a", module(), {}, passed=[], failed=[])


@pytest.mark.parametrize("payload", [b"{}", b"[]", b'{"_type":"https://in-toto.io/Statement/v1","predicateType":"x"}'])
def test_sign_takes_our_statements_only(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "x.json").write_bytes(payload)
    assert cli.main(["sign", str(tmp_path / "x.json"), "--identity-token", "t"]) == 4


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n",
        "spec: &x {}\nother: *x\n",
        "!!python/object/apply:os.system [true]",
        "{" * 5000,
        "\x00",
        "- 1\n",
        "",
    ],
)
def test_yaml_that_is_refused(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.yaml").write_text(text)
    assert cli.main(["build", str(folder)]) == 4
    assert "build.malformed" in capsys.readouterr().err


def test_sign_without_any_identity(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI", "SIGSTORE_ID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    (folder / "manifest.json").write_bytes(build(folder).statement)
    assert cli.main(["sign", str(folder / "manifest.json")]) == 1
    assert "sign.token" in capsys.readouterr().err


def test_build_explains_what_a_runbook_may_do_and_cost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "fix").mkdir()
    source = (LIBRARY / "oom-recreate" / "runbook.py").read_text()
    (folder / "fix" / "runbook.py").write_text(source)
    text = YAML.replace(
        "    - name: restart\n", "    - {name: fix, source: fix, grants: {actions: [recreate]}}\n    - name: restart\n"
    )
    (folder / "manifest.yaml").write_text(text)
    assert cli.main(["build", str(folder), "--explain", "--json"]) == 0
    fix, restart, built = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (fix["runbook"], restart["runbook"], built["ok"]) == ("fix", "restart", True)
    info = verify_module((folder / "build/files/modules/fix.wasm").read_bytes())
    assert fix["capabilities"] == list(info.capabilities)
    assert fix["fuel_bound"] == {"OomKilled": info.handlers["OomKilled"].fuel_bound}
    assert "call rb1.recreate" in fix["listing"]
    shown = [line.split("|", 1)[1].strip() for line in fix["listing"].splitlines() if "|" in line]
    assert shown
    assert all(line in source for line in shown)
    assert cli.main(["build", str(folder), "--explain"]) == 0
    assert "worst case in fuel: OomKilled " in capsys.readouterr().out
