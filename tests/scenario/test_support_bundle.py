"""The support bundle of an installation in which secrets and people were planted everywhere."""

from __future__ import annotations

import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor import cli
from pointcall_executor.cli.output import Exit
from pointcall_executor.kernel import probe
from pointcall_executor.kernel.probe import Feature
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.support_bundle import Content, archive, redacted
from tests.lab import Lab
from tests.scenario.test_loop_story import Watched, opened


def made_key(form: PrivateFormat) -> str:
    """A private key that is made now and used for nothing."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, form, NoEncryption()).decode()


def body_of(key: str) -> list[str]:
    """The lines of a key that must not be anywhere."""
    return [line for line in key.splitlines() if line and not line.startswith("-----")]


KEY = made_key(PrivateFormat.PKCS8)
PLANTED = (
    *body_of(KEY), "PLANTED", "hunter2-planted", "jane.doe@example.com", "Jane Doe's page",
    "eyJhbGciOiJFUzI1NiJ9.planted.sig",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel grants is another test's; here it only takes time."""
    monkeypatch.setattr(probe, "probe", lambda: [Feature("machine", True, "x86_64", "reading the ring")])


@pytest.fixture
def bundle(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """An installation that ran, with secrets where people put them; its bundle, unpacked, and what was printed."""
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        watched.happen(opened())
        executor.pause("password=hunter2-planted asked by jane.doe@example.com", 60)
        executor.disarm("token: eyJhbGciOiJFUzI1NiJ9.planted.sig")
    (lab.state / "services/api").mkdir(parents=True, exist_ok=True)
    (lab.state / "services/api/output.log").write_text(f"Jane Doe's page\n{KEY}\n")
    (lab.state / "trust/extra.key").write_text(KEY)
    settings = tmp_path / "pointcall.toml"
    settings.write_text(
        'node = "lab"\nmirror = "host=PLANTED.example password=\'PLANTED two\'"\n'
        'otlp = "http://PLANTED.example:4318"\n[mtls]\naddress = "0.0.0.0:1"\ncertificate = "/PLANTED"\n'
        'key = "/PLANTED"\nclient_roots = "/PLANTED"\nroles = { "spiffe://PLANTED/a" = "auditor" }\n'
    )
    out = tmp_path / "support.tar.gz"
    words = ["doctor", "--bundle", str(out), "--config", str(settings), "--json", "--state-dir", str(lab.state)]
    assert cli.main(words) == Exit.OK
    printed = json.loads(capsys.readouterr().out)
    with tarfile.open(fileobj=io.BytesIO(out.read_bytes())) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert out.stat().st_mode & 0o077 == 0
    return found, printed


def test_planted_secrets_do_not_appear_and_what_is_needed_does(bundle: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    found, printed = bundle
    everything = b"\n".join(found.values()).decode()
    assert [word for word in PLANTED if word in everything] == []
    assert platform.node() not in everything
    assert sorted(row["name"] for row in printed["contents"]) == sorted(n.split("/", 1)[1] for n in found)
    feed = [json.loads(line) for line in found["pointcall-support/log/feed.jsonl"].splitlines()]
    assert {"run", "config", "epoch"} <= {item["kind"] for item in feed}
    assert any("[person removed]" in item["text"] and "[secret removed]" in item["text"] for item in feed)
    settings = json.loads(found["pointcall-support/settings.json"])
    assert (settings["node"], settings["otlp"], settings["mtls"], settings["mirror"]) == ("lab", "set", "set", "set")
    listing = json.loads(found["pointcall-support/state-folder.json"])
    assert {"journal.db", "trust/policy.json", "services/api/output.log"} <= {row["name"] for row in listing}
    status = json.loads(found["pointcall-support/status.json"])
    assert status["id"] == "api.unreachable"  # no executor runs: said in its place


def test_nothing_is_overwritten(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    assert cli.main(["doctor", "--bundle", str(tmp_path / "x"), "--state-dir", str(lab.state)]) == Exit.USAGE
    assert (tmp_path / "x").read_text() == "mine"


def test_without_an_installation_there_is_a_bundle_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--bundle", str(tmp_path / "b"), "--state-dir", str(tmp_path / "none")]) == Exit.OK
    assert "read it before you send it" in capsys.readouterr().out


def test_the_same_contents_give_the_same_bytes_in_the_same_order() -> None:
    two = [Content("b", b"2"), Content("a", b"1")]
    assert archive(two) == archive(list(reversed(two)))
    with tarfile.open(fileobj=io.BytesIO(archive(two))) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["pointcall-support/a", "pointcall-support/b"]
    assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}


SECRETS = (
    "Authorization: Bearer PLANTEDPLANTED",
    "ghp_PLANTEDPLANTEDPLANTED",
    "AKIAPLANTEDPLANTED00",
    "https://user:PLANTED@host/x",
    '{"api_key": "PLANTED"}',
    "SECRET=PLANTED",
    "PLANTED@example.org",
)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", ["{}", "before {} after", 'reason="{}"'])
def test_what_a_secret_looks_like_is_removed(secret: str, around: str) -> None:
    assert "PLANTED" not in redacted(around.format(secret))


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_private_key_is_removed_also_where_its_end_is_missing(form: PrivateFormat, cut_off: bool) -> None:
    key = made_key(form)
    text = key[: key.index("-----END")] if cut_off else key
    assert all(line in text for line in body_of(key))
    assert [line for line in body_of(key) if line in redacted(f"before\n{text}")] == []


@given(st.text())
def test_removing_twice_changes_nothing_more(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)
