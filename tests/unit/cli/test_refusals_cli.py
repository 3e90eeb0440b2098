"""What a verb refuses before it does anything: each by its words alone, with its id and its exit code."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.verdict import Check, Verdict
from pointcall_executor import cli
from pointcall_executor.cli import output
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


# ---- the same form for every error ----------------------------------------------------------------------------------


def run_cli(*words: str, **over: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | over.pop("environment", {})
    where = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | over
    return subprocess.run(
        [sys.executable, "-m", "pointcall_executor.cli", *words], env=environment, text=True, timeout=60, **where
    )


@pytest.mark.parametrize("words", [("status", "--nosuch"), ("disarm",), ("log", "nosuch"), ("nosuch",)])
def test_words_that_do_not_fit_have_an_id_a_hint_and_their_json(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(words)) == Exit.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert "[cli." in said.err
    assert "hint: pointcall" in said.err
    assert cli.main([*words, "--json"]) == Exit.USAGE
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["exit"]) == (False, 2)
    assert found["error"]["id"] in ("cli.usage", "cli.verb")


def test_what_the_system_refuses_has_the_same_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", str(tmp_path / "none")]) == Exit.ENVIRONMENT
    said = capsys.readouterr().err
    assert said.startswith("pointcall: error: No such file or directory [environment.os]\n  got  " + str(tmp_path))
    assert "hint: is the path right?" in said


def test_a_log_that_may_not_be_read_is_no_bug(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    sqlite3.connect(tmp_path / "journal.db").close()
    (tmp_path / "journal.db").chmod(0o600)
    os.chown(tmp_path / "journal.db", 65534, 65534)
    confined = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "pointcall_executor.cli"]
    done = subprocess.run(
        [*confined, "log", "list", "--state-dir", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == Exit.ENVIRONMENT, done.stderr
    assert "Traceback" not in done.stderr
    assert "[environment.os]" in done.stderr


def test_a_reader_that_went_away_is_no_refusal() -> None:
    """Exit code 1 would say that a check failed."""
    read, write = os.pipe()
    os.close(read)
    done = run_cli("explain", "CircuitOpened", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (Exit.OK, "")


def test_a_terminal_without_the_characters_gets_others() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = "from pointcall_executor.cli import output as o; o.speak_safely(); o.console().print(chr(0x2026))"
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | plain | paths,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")


def test_a_verdict_has_whole_digests_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output.print_verdict(Verdict((Check.of("manifest.form", True, expected="x", observed="ab" * 48),)))
    text = capsys.readouterr().out
    assert "…" not in text
    assert "ab" * 48 in "".join(text.split())


def test_an_output_that_is_full_is_said_once() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_cli("log", "list", "--json", "--state-dir", "/nonexistent", stdout=full)
    assert done.returncode == Exit.ENVIRONMENT
    assert "Traceback" not in done.stderr


def test_root_on_a_node_means_the_state_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Namespace(state_dir=None)
    monkeypatch.setattr(output, "NODE", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert output.state_dir(none) == tmp_path
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert output.state_dir(none) == Path("/home/alice/.local/state/pointcall")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert output.state_dir(none) == Path("/elsewhere/pointcall")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(output, "NODE", tmp_path / "none")
    assert output.state_dir(none) == Path("/home/alice/.local/state/pointcall")
