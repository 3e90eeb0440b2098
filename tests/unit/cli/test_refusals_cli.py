"""What a verb refuses before it does anything: each by its words alone, with its id and its exit code."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_executor import cli
from pointcall_executor.cli.output import Exit
from pointcall_executor.cli.verify import MAX_RECEIPT_BYTES
from pointcall_executor.demo import story
from pointcall_executor.journal import Journal
from pointcall_executor.journal_reader import JournalError
from pointcall_executor.kernel import probe as probes
from pointcall_executor.offline import recording
from tests.unit.log import world


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = cli.main([str(words[0]), "--json", *map(str, words[1:])])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)["error"]["id"]


def test_a_verb_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recover-everything"]) == Exit.USAGE
    assert "[cli.verb]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Upper", "two words", "-x", "../out", "", "there"])
def test_a_runbook_needs_a_new_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert refused(capsys, "new", "--in", tmp_path, "--", name) == (Exit.USAGE, "new.name")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "test", tmp_path / "none") == (Exit.ENVIRONMENT, "environment.missing")


@pytest.mark.parametrize("content", ["retention_days = 0", "no_such_setting = 1", "node = ", "epoch_minutes = 1441"])
def test_settings_that_are_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(content)
    world.provision(tmp_path)
    with closing(Journal.open(tmp_path / "journal.db", origin=world.ORIGIN)):
        pass
    words = ("log", "prune", "--config", settings, "--state-dir", tmp_path)
    assert refused(capsys, *words) == (Exit.USAGE, "config.invalid")


def test_a_log_without_an_epoch_cannot_say_who_writes(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "journal.db", origin=world.ORIGIN)):
        pass
    with pytest.raises(JournalError) as caught, recording(tmp_path, "pruned"):
        raise AssertionError("never")
    assert caught.value.id == "log.empty"


def test_a_verifier_without_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = world.Node.boot(tmp_path / "state")
    run = node.run(0)
    node.checkpoint()
    node.journal.close()
    (tmp_path / "empty").mkdir()
    words = ("verify", run, "--state-dir", tmp_path / "state", "--trust", tmp_path / "empty")
    assert refused(capsys, *words) == (Exit.ENVIRONMENT, "trust.absent")


def test_a_file_that_is_no_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, other = tmp_path / "large.json", tmp_path / "other.json"
    large.write_bytes(b" " * (MAX_RECEIPT_BYTES + 1))
    node = world.Node.boot(tmp_path / "state")
    other.write_bytes(node.journal.entry(0).raw)  # signed, and something else
    node.journal.close()
    for path in (large, other):
        assert refused(capsys, "verify", path, "--state-dir", tmp_path / "state") == (
            Exit.MALFORMED,
            "receipt.malformed",
        )


def test_a_mirror_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg", reason="psycopg, of the extra `fleet`, is missing")
    address = "host=127.0.0.1 port=1 connect_timeout=2"
    assert refused(capsys, "mirror", "status", address) == (Exit.ENVIRONMENT, "mirror.unreachable")


def test_the_demo_says_what_the_kernel_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = probes.Feature("ring", False, "not permitted", "a test")
    monkeypatch.setattr(story, "probe", lambda: [absent])
    words = ("demo", "--require-kernel", "--state-dir", tmp_path)
    assert refused(capsys, *words) == (Exit.ENVIRONMENT, "demo.kernel")


def test_the_demo_fails_where_its_client_does_not_see_what_it_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real client, and nobody who listens."""
    monkeypatch.setattr(story, "PATIENCE_SECONDS", 1.0)
    (tmp_path / "cgroup.procs").touch()
    group: Any = SimpleNamespace(path=tmp_path)
    client = story.Client(1, group)
    try:
        with pytest.raises(story.DemoError) as caught:
            client.until("OK")
    finally:
        client.close()
    assert (caught.value.id, caught.value.want) == ("demo.failed", "OK")


def test_another_drill_blob_than_the_one_that_was_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (probes.BLOBS / "drill.blob").exists():
        pytest.skip("the drill blob is not built")
    words = ("drill", "--cgroup", tmp_path, "--to", "127.0.0.1:1", "--first", "1", "--sha256", "0" * 64)
    assert refused(capsys, *words) == (Exit.REFUSED, "kernel.blob.digest")
