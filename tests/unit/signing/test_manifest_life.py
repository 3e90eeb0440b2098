"""The life of a manifest in the verbs that people call: build, sign, approve, verify, point, accept, update, revoke."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import cli
from pointcall_executor.journal import Journal
from pointcall_executor.notices import MAX_FILES, drop_notices, keep_notices, read_notices
from tests.unit.signing.world import ALICE, BOB, World, declaration, sha256

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"
YAML = """
apiVersion: pointcall.dev/v1
kind: RecoveryManifest
metadata: {name: edge}
spec:
  runbooks:
    - name: crash-loop
      source: crash-loop
      grants:
        actions: [recreate, notify, escalate, remember, again]
        services: []
        channels: [ops, oncall]
  services:
    - {name: db, declaration: db.json}
  channels:
    - {name: ops, kind: log}
    - {name: oncall, kind: log}
"""
BUILDER = "https://ci.example/build"


class Site:
    """A source folder, what is built from it, and the state of one node."""

    def __init__(self, folder: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.world, self._capsys = folder, world, capsys
        self.out, self.state = folder / "out", folder / "state"
        shutil.copytree(LIBRARY / "crash-loop", folder / "crash-loop")
        (folder / "manifest.yaml").write_text(YAML)
        (folder / "db.json").write_bytes(declaration())
        (folder / "trust.json").write_text(json.dumps(world.sigstore.trust_config()))
        (self.state / "trust").mkdir(parents=True)
        (self.state / "trust/trusted_root.json").write_bytes(world.sigstore.trusted_root())
        self.policy()

    def policy(self, **over: Any) -> None:
        (self.state / "trust/policy.json").write_bytes(self.world.policy(**over).raw)

    def call(self, *words: object, code: int = 0) -> str:
        self._capsys.readouterr()
        got = cli.main([str(word) for word in words])
        said = self._capsys.readouterr()
        assert got == code, said
        return said.out + said.err

    def build(self, *words: object, code: int = 0) -> str:
        return self.call("build", self.folder, "--out", self.out, *words, code=code)

    def sign(self, *what: object, who: str = ALICE) -> str:
        token = self.world.sigstore.token(who)
        return self.call("sign", *what, "--trust-config", self.folder / "trust.json", "--identity-token", token)

    def verify(self, *words: object, code: int = 0) -> dict[str, str]:
        said = self.call("manifest", "verify", self.out, "--state-dir", self.state, "--json", *words, code=code)
        return {check["id"]: check["outcome"] for check in json.loads(said)["checks"]}

    def failed(self, *words: object) -> list[str]:
        return [name for name, outcome in self.verify(*words, code=1).items() if outcome == "fail"]

    def point(self, *words: object, out: str = "pointer.json") -> Path:
        path = self.folder / out
        self.call("manifest", "point", self.out / "manifest.json", "--ring", "canary", "--out", path, *words)
        self.sign(path)
        return path.with_suffix(".sigstore.json")

    def revoke(self, *words: object, out: str = "revocation.json") -> Path:
        path, why = self.folder / out, ("--name", "edge", "--reason", "a bad module")
        self.call("manifest", "revoke", *words, *why, "--out", path)
        self.sign(path)
        return path.with_suffix(".sigstore.json")

    def accept(self, *bundles: Path, code: int = 0) -> str:
        return self.call("manifest", "accept", *bundles, "--state-dir", self.state, code=code)


@pytest.fixture
def site(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(tmp_path, world, capsys)


def test_a_signed_build_is_verified(site: Site) -> None:
    site.build()
    assert site.failed() == ["manifest.unsigned"]
    site.sign(site.out)
    checks = site.verify()
    assert checks["manifest.signer"] == checks["module.grants"] == "pass"
    assert checks["provenance.tests"] == checks["provenance.builder"] == "pass"
    assert checks["manifest.notices"] == checks["admission.evidence"] == "not-checked"
    assert site.failed("--builder", BUILDER) == ["provenance.builder"]  # it was built here, by nobody in particular
    assert "edge sequence 1" in site.call("manifest", "verify", site.out, "--state-dir", site.state)
    module = site.out / "files/modules/crash-loop.wasm"
    module.write_bytes(module.read_bytes()[:-1] + b"\0")
    assert site.failed() == ["subject.digest"]


def test_a_second_identity_approves(site: Site) -> None:
    """CI signs, a person signs the same bytes; one alone, or one twice, is not enough."""
    site.policy(signers=[site.world.signer(ALICE), site.world.signer(BOB)], min_signatures=2)
    site.build()
    site.sign(site.out)
    site.sign(site.out / "manifest.json", "--out", site.out / "again.sigstore.json")
    assert site.failed() == ["manifest.threshold"]
    site.sign(site.out / "manifest.json", "--out", site.out / "approval.sigstore.json", who=BOB)
    assert site.verify()["manifest.threshold"] == "pass"


def test_the_next_manifest_rolls_forward_only(site: Site) -> None:
    site.build()
    site.sign(site.out)
    first, digest = site.folder / "first", sha256((site.out / "manifest.json").read_bytes())
    shutil.copytree(site.out, first)
    with Journal.open(site.state / "journal.db", origin="node.example/log") as journal:
        journal.raise_sequence("armed", 1, digest)
    site.build("--previous", first / "manifest.json")
    site.sign(site.out)
    assert site.verify()["manifest.previous"] == "pass"
    said = site.call("manifest", "diff", first / "manifest.json", site.out / "manifest.json")
    assert said.endswith("changes  sequence 1 -> 2\n")
    with Journal.open(site.state / "journal.db", origin="node.example/log") as journal:
        journal.raise_sequence("armed", 2, sha256((site.out / "manifest.json").read_bytes()))
    site.out = first
    assert site.failed() == ["manifest.sequence"]


def test_a_pointer_says_what_is_newest(site: Site) -> None:
    site.policy(require_pointer=True, ring="canary")
    site.build()
    site.sign(site.out)
    assert site.failed() == ["manifest.newest"]
    first = site.point()
    assert "sequence 1 in ring canary" in site.accept(first)
    assert site.verify()["manifest.newest"] == "pass"
    later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=25)
    assert site.failed("--at", later.isoformat()) == ["manifest.newest"]
    old = site.folder / "old"
    shutil.copytree(site.out, old)
    site.build("--previous", old / "manifest.json")
    site.sign(site.out)
    assert site.failed() == ["manifest.newest"]
    site.accept(site.point("--hours", "1", out="second.json"))
    assert site.verify()["manifest.newest"] == "pass"
    site.out = old
    assert site.failed() == ["manifest.newest"]  # although its own pointer still holds


def test_a_pointer_for_somebody_else_is_not_kept(site: Site) -> None:
    site.policy(ring="fleet")
    site.build()
    assert "notice.useless" in site.accept(site.point(), code=1)
    site.policy(ring="canary")
    assert "notice.useless" in site.accept(site.point("--issued", "2026-01-01T00:00:00Z"), code=1)
    assert read_notices(site.state / "notices") == ()


def test_expired_pointers_are_dropped(site: Site) -> None:
    site.build()
    old = site.point("--issued", "2026-01-01T00:00:00Z")
    keep_notices(site.state / "notices", [old.read_bytes()])
    new = site.point(out="new.json")
    site.accept(new)
    assert read_notices(site.state / "notices") == (new.read_bytes(),)
    site.accept(new)
    assert read_notices(site.state / "notices") == (new.read_bytes(),)


@pytest.mark.parametrize(
    "what", ["manifest.json", "manifest.sigstore.json", "files/modules/crash-loop.wasm", "files/services/db.json"]
)
def test_a_revocation_removes(site: Site, what: str) -> None:
    site.build()
    site.sign(site.out)
    assert site.verify()
    assert "a bad module" in site.accept(site.revoke(site.out / what))
    assert site.failed() == ["manifest.revoked"]


def test_a_revocation_of_something_else_removes_nothing(site: Site) -> None:
    site.build()
    site.sign(site.out)
    site.accept(site.revoke("00" * 32))
    assert site.verify()["manifest.revoked"] == "pass"


def test_notices_by_somebody_else(site: Site) -> None:
    site.build()
    site.sign(site.out)
    path = site.revoke("00" * 32).with_name("revocation.json")
    site.sign(path, who=BOB)
    assert "manifest.notices" in site.accept(path.with_suffix(".sigstore.json"), code=1)
    keep_notices(site.state / "notices", [path.with_suffix(".sigstore.json").read_bytes()])
    assert site.failed() == ["manifest.notices"]  # however it came there
    good = site.revoke("11" * 32, out="good.json")
    assert "nothing is armed while it lies there" in site.accept(good, code=1)


def test_words_of_notices_that_do_not_fit(site: Site) -> None:
    site.build()
    out = ("--out", site.folder / "x.json")
    point = ("manifest", "point", site.out / "manifest.json", *out)
    assert "cli.usage" in site.call(*point, "--ring", "a b", code=2)
    assert "cli.usage" in site.call(*point, "--ring", "a", "--hours", "-1", code=2)
    assert "cli.usage" in site.call(*point, "--ring", "a", "--artifact", "x", code=2)
    assert "cli.usage" in site.call(*point, "--ring", "a", "--issued", "now", code=2)
    revoke = ("manifest", "revoke", "00" * 32, "--name", "edge", *out)
    assert "cli.usage" in site.call(*revoke, "--reason", "\u202e", code=2)
    assert site.call("manifest", "revoke", "nothing", "--name", "edge", "--reason", "x", *out, code=5)
    said = json.loads(site.call(*revoke, "--reason", "x", "--json"))
    assert said["revoked"] == ["00" * 32]


def test_the_folder_of_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_folder: Path) -> list[str]:
        raise PermissionError

    folder = tmp_path / "notices"
    assert read_notices(folder) == ()
    assert len(keep_notices(folder, [b"a", b"b", b"a"])) == 3
    assert set(read_notices(folder)) == {b"a", b"b"}
    (folder / "a.sigstore.json").mkdir()
    assert set(read_notices(folder)) == {b"a", b"b", b""}  # what cannot be read is a notice that is wrong
    (folder / "a.sigstore.json").rmdir()
    (tmp_path / "file").write_bytes(b"")
    assert read_notices(tmp_path / "file") == ()  # a folder that is none holds nothing
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", denied)
        assert read_notices(folder) == (b"",)  # one that may not be read may hold a revocation
    drop_notices(folder, [b"a", b"c"])
    assert read_notices(folder) == (b"b",)
    keep_notices(folder, [b"%d" % n for n in range(MAX_FILES)])
    assert read_notices(folder)[-1] == b""
    assert not list(folder.glob("*.part"))


def test_a_notice_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is durable it has not the name of a notice; once it has, another failure does not take it back."""
    folder = tmp_path / "notices"
    real, calls = os.fsync, iter((OSError("disk full"), None, OSError("disk full")))

    def failing(handle: int) -> None:
        if error := next(calls):
            raise error
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for kept in ((), (b"a",)):
        with pytest.raises(OSError, match="disk full"):
            keep_notices(folder, [b"a"])
        assert read_notices(folder) == kept


# Provenance and test results


def test_provenance_beside_the_manifest(site: Site) -> None:
    site.build("--builder", BUILDER)
    assert sorted(p.name for p in (site.out / "provenance").iterdir()) == ["crash-loop.json", "crash-loop.tests.json"]
    said = site.sign(site.out)
    assert said.count("signed ") == 3
    checks = site.verify("--builder", BUILDER, "--require-provenance")
    assert {name: c for name, c in checks.items() if name.startswith("provenance.")} == {
        f"provenance.{name}": "pass" for name in ("signature", "module", "source", "builder", "tests")
    }
    assert site.failed("--builder", "https://elsewhere.example") == ["provenance.builder"]


def test_provenance_by_one_signer_is_enough(site: Site) -> None:
    """The threshold is for what arms."""
    site.policy(signers=[site.world.signer(ALICE), site.world.signer(BOB)], min_signatures=2)
    site.build("--builder", BUILDER)
    site.sign(site.out)
    site.sign(site.out / "manifest.json", "--out", site.out / "approval.sigstore.json", who=BOB)
    assert site.verify("--require-provenance")["provenance.signature"] == "pass"


def _edit(body: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for part in way:
        body = body[int(part) if part.isdigit() else part]
    body[last] = value


def _changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: _edit(body, path, value)


@pytest.mark.parametrize(
    ("file", "change", "wrong"),
    [
        ("crash-loop", _changed("subject.0.digest", {"sha256": "00" * 32}), ["provenance.module", "provenance.source"]),
        ("crash-loop", _changed("predicate.buildDefinition.internalParameters.compiler", "x"), ["provenance.source"]),
        (
            "crash-loop",
            _changed("predicate.buildDefinition.resolvedDependencies.0.digest", {"sha256": "00" * 32}),
            ["provenance.source"],
        ),
        ("crash-loop", _changed("predicate.buildDefinition.externalParameters.runbook", "x"), ["provenance.source"]),
        ("crash-loop", _changed("predicate.buildDefinition.externalParameters.abi", "rb2"), ["provenance.source"]),
        ("crash-loop", _changed("predicate.runDetails.builder.id", "x"), ["provenance.builder"]),
        ("crash-loop", _changed("predicate.buildDefinition.buildType", "x"), ["provenance.signature"]),
        ("crash-loop", _changed("predicate.more", 1), ["provenance.signature"]),
        ("crash-loop.tests", _changed("predicate.result", "FAILED"), ["provenance.tests"]),
        ("crash-loop.tests", _changed("predicate.failedTests", ["cases/x"]), ["provenance.tests"]),
        ("crash-loop.tests", _changed("predicate.passedTests", []), ["provenance.tests"]),
        ("crash-loop.tests", _changed("predicate.result", "GOOD"), ["provenance.signature"]),
        ("crash-loop.tests", _changed("subject.0.name", "modules/other.wasm"), ["provenance.module"]),
    ],
)
def test_one_wrong_statement_fails_its_check(
    site: Site, file: str, change: Callable[[dict[str, Any]], None], wrong: list[str]
) -> None:
    site.build("--builder", BUILDER)
    path = site.out / f"provenance/{file}.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(json.dumps(body, separators=(",", ":"), sort_keys=True))
    site.sign(site.out)
    found = site.failed("--builder", BUILDER, "--require-provenance")
    missing = {"provenance.source", "provenance.builder", "provenance.tests"}  # one that does not count is missing too
    assert set(wrong) <= set(found) <= {*wrong, *missing}


def test_provenance_by_somebody_else(site: Site) -> None:
    site.build("--builder", BUILDER)
    site.sign(site.out)
    site.sign(site.out / "provenance/crash-loop.json", who=BOB)
    assert site.failed() == ["provenance.signature"]
    (site.out / "provenance/crash-loop.sigstore.json").write_bytes(b"{}")
    assert site.failed() == ["provenance.signature"]
    (site.out / "provenance/crash-loop.sigstore.json").unlink()
    assert site.verify()["provenance.source"] == "not-checked"
    assert site.failed("--require-provenance") == ["provenance.source", "provenance.builder"]


def test_the_manifest_is_no_provenance(site: Site) -> None:
    site.build("--builder", BUILDER)
    site.sign(site.out)
    shutil.copy(site.out / "manifest.sigstore.json", site.out / "provenance/other.sigstore.json")
    assert site.failed() == ["provenance.signature"]


def test_a_build_whose_cases_fail(site: Site) -> None:
    cases = site.folder / "crash-loop/cases/cases.json"
    cases.write_text(cases.read_text().replace('"calls": []', '"calls": [{"action": "again", "args": {}}]', 1))
    said = site.build("--builder", BUILDER, code=1)
    assert "build.tests" in said
    assert "cases/no declared service" in said
    assert not site.out.exists()
    site.build("--without-provenance")  # then nothing is claimed of the cases
    site.sign(site.out)
    assert site.verify()["provenance.tests"] == "not-checked"


def test_a_later_build_leaves_no_older_provenance(site: Site) -> None:
    site.build("--builder", BUILDER)
    site.sign(site.out)
    source = site.folder / "crash-loop/runbook.py"
    source.write_text(source.read_text() + "\n")
    site.build("--builder", BUILDER)
    site.sign(site.out)
    assert site.verify("--require-provenance")["provenance.module"] == "pass"
    site.build("--without-provenance")
    site.sign(site.out)
    assert site.verify()["provenance.module"] == "pass"  # nothing is said, so nothing is about another module
    assert list((site.out / "provenance").iterdir()) == []


def test_runbooks_whose_statements_would_have_the_same_name(site: Site) -> None:
    text = YAML.replace(
        "  services:\n", "    - {name: crash-loop.tests, source: crash-loop, grants: {}}\n  services:\n"
    )
    (site.folder / "manifest.yaml").write_text(text)
    assert "build.malformed" in site.build("--builder", BUILDER, code=4)


def test_provenance_travels(site: Site) -> None:
    site.build("--builder", BUILDER)
    site.sign(site.out)
    archive = site.folder / "release.tar"
    site.call("manifest", "pack", site.out, "--out", archive)
    there = site.folder / "there"
    site.call("manifest", "unpack", archive, "--out", there)
    site.out = there
    assert site.verify("--builder", BUILDER, "--require-provenance")["provenance.tests"] == "pass"


# Keys


def test_a_key_for_sites_without_any_sigstore(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTCALL_KEY_PASSPHRASE", "secret")
    key = site.folder / "release.pem"
    row = json.loads(site.call("sign", "--key", key, "--make-key", "--policy-row", "release"))
    assert row == json.loads(site.call("sign", "--key", key, "--policy-row", "release"))
    body = {"format": "pointcall-trust-policy/v1", "keys": [row]}
    (site.state / "trust/policy.json").write_text(json.dumps(body))
    (site.state / "trust/trusted_root.json").write_text("{}")
    site.build("--builder", BUILDER)
    site.call("sign", site.out, "--key", key)
    assert site.verify("--require-provenance")["manifest.signature"] == "pass"
    site.call("manifest", "revoke", "00" * 32, "--name", "edge", "--reason", "x", "--out", site.folder / "r.json")
    site.call("sign", site.folder / "r.json", "--key", key)
    site.accept(site.folder / "r.sigstore.json")
    for words in (
        ("sign", "--policy-row", "x"),
        ("sign", site.out, "--key", key, "--policy-row", "x"),
        ("sign", "--make-key"),
        ("sign",),
        ("sign", site.out, "--out", "x", "--key", key),
    ):
        assert "cli.usage" in site.call(*words, code=2)
    assert "sign.key" in site.call("sign", "--key", key, "--make-key", "--policy-row", "x", code=1)
