"""The verbs tail, prune and erase on the log of a stopped executor, and that they refuse while one runs."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_executor.api.backend import NodeStatus
from pointcall_executor.api.server import serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli import log_retention, main
from pointcall_executor.cli.output import Exit
from pointcall_executor.config import Config
from pointcall_executor.journal import Journal
from pointcall_executor.journal_check import check_journal
from pointcall_executor.journal_reader import JournalReader
from pointcall_executor.offline import recording
from pointcall_executor.recorder import Recorder
from tests.unit.api.fake_backend import STATUS
from tests.unit.log import world
from tests.unit.log.test_log_privacy import ADDRESS, SECRET, with_secrets

RUNS = 3


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stopped node: an old epoch with three runs, and one entry of today."""
    folder = tmp_path / "state"
    folder.mkdir()
    world.provision(folder)
    with monkeypatch.context() as patched:
        patched.setattr(world, "manifest", functools.partial(world.manifest, expires=world.NOW + timedelta(days=1)))
        patched.setattr(world, "NOW", world.NOW - timedelta(days=500))
        node = world.Node.boot(folder)
        for number in range(RUNS):
            node.run(number, with_secrets)
    node.append(entry.Lost(sensor="s", count=1))
    node.checkpoint()
    node.journal.close()
    return folder


@pytest.fixture
def call(state: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def go(*words: object) -> tuple[int, list[dict[str, Any]]]:
        code = main([*map(str, words), "--json", "--state-dir", str(state)])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return go


@pytest.fixture
def reader(state: Path) -> Iterator[JournalReader]:
    with closing(JournalReader.open(state / "journal.db")) as made:
        yield made


def refusal(rows: list[dict[str, Any]]) -> str:
    return str(rows[-1]["error"]["id"])


def test_prune_drops_what_is_old_and_nothing_else(call: Any, reader: JournalReader) -> None:
    runs = [e.run for e in reader.runs()]
    root = reader.tree().root(10)
    code, (row,) = call("log", "prune", "--minimum", 7)
    assert (code, row) == (0, {"minimum": 7, "pruned": 7, "retention_days": 400, "index": 12})
    assert reader.minimum == 7
    assert reader.entry(12).body == {"minimum": 7, "reason": "retention", "retention_days": 400}
    assert [e.run for e in reader.runs()] == runs[2:]
    assert reader.tree().root(10) == root
    assert check_journal(reader).passed
    assert call("verify", runs[2], "--allow-emulated", "--at", world.NOW.isoformat())[0] == 0
    code, (row,) = call("log", "prune")  # all that is old enough: the epoch of today stays
    assert (code, row["minimum"]) == (0, 10)
    code, (row,) = call("log", "prune")
    assert (code, row["pruned"], row["index"]) == (0, 0, None)
    assert [e.kind for e in reader.entries()][:2] == ["epoch-open", "lost"]
    assert check_journal(reader).passed


def test_prune_refuses_what_is_inside_the_retention(call: Any, reader: JournalReader, tmp_path: Path) -> None:
    size = reader.size
    code, rows = call("log", "prune", "--minimum", 11)
    assert (code, refusal(rows)) == (1, "log.retention")
    assert "--minimum 10" in rows[-1]["error"]["hint"]
    settings = tmp_path / "settings.toml"
    settings.write_text("retention_days = 600\n")
    code, rows = call("log", "prune", "--minimum", 1, "--config", settings)
    assert (code, refusal(rows)) == (1, "log.retention")
    assert call("log", "prune", "--minimum", -1)[0] == 2
    code, rows = call("log", "prune", "--minimum", 1, "--config", settings, "--retention-days", 599)
    assert (code, refusal(rows)) == (1, "log.retention")
    assert reader.size == size  # no epoch was opened for a refusal
    code, (row,) = call("log", "prune", "--minimum", 11, "--retention-days", 0)
    assert (code, row["retention_days"]) == (0, 0)
    code, rows = call("log", "prune", "--minimum", 3)
    assert (code, refusal(rows)) == (1, "journal.prune")


def test_erase_a_run(call: Any, reader: JournalReader, state: Path) -> None:
    runs = [str(e.run) for e in reader.runs()]
    members = [e.index for e in reader.entries(run=runs[0])]
    code, (row,) = call("log", "erase", runs[0], "--reason", "asked by a person")
    assert (code, row) == (0, {"erased": members, "index": [12]})
    assert check_journal(reader).passed
    _, (shown,) = call("log", "show", runs[0])
    assert shown["erased"]
    assert SECRET not in json.dumps(shown)
    code, (verdict,) = call("verify", runs[0], "--allow-emulated", "--at", world.NOW.isoformat())
    assert code == 0
    assert "entry.erased" in {c["id"] for c in verdict["checks"]}
    code, rows = call("replay", "--all")
    assert (code, rows[-1]) == (0, {"runs": RUNS, "identical": RUNS - 1, "different": 0, "erased": 1})
    assert call("log", "erase", runs[0])[1][0]["erased"] == []
    assert call("log", "erase", runs[1], reader.receipt(runs[2]).index)[0] == 0
    texts = b"".join(f.read_bytes() for f in state.glob("journal.db*"))
    assert texts.count(ADDRESS.encode()) == 0


def test_erase_by_age(call: Any, reader: JournalReader) -> None:
    code, (row,) = call("log", "erase", "--older-than", 400)
    assert (code, len(row["erased"])) == (0, 3 * RUNS)
    assert reader.entry(row["index"][0]).body["below"] == 10
    assert check_journal(reader).passed
    assert call("log", "erase", "--older-than", 400)[1][0] == {"erased": [], "index": []}


@pytest.mark.parametrize("words", [[], ["5", "--older-than", "3"]])
def test_erase_needs_to_know_what(words: list[str], call: Any) -> None:
    assert call("log", "erase", *words)[0] == 2


def test_erase_of_what_is_not_there(call: Any) -> None:
    assert refusal(call("log", "erase", "0" * 26)[1]) == "journal.no_run"
    assert refusal(call("log", "erase", "99")[1]) == "journal.no_entry"


def test_while_an_executor_runs_both_refuse(call: Any, state: Path, reader: JournalReader) -> None:
    run = reader.runs()[0].run
    with closing(Journal.open(state / "journal.db", origin=None)):
        for words in (["prune", "--minimum", 1], ["erase", run]):
            code, rows = call("log", *words)
            assert (code, refusal(rows)) == (1, "log.busy")
        assert call("log", "tail")[0] == 0
    assert call("log", "erase", run)[0] == 0


class Backend(ExecutorBackend):
    """What the log's verbs need; the rest of the node is not here."""

    def status(self) -> NodeStatus:
        return STATUS


def test_a_running_executor_does_both_over_its_socket(state: Path, call: Any, reader: JournalReader) -> None:
    """The verbs find its socket; its own setting of the retention counts."""
    run = str(reader.runs()[2].run)
    with closing(Journal.open(state / "journal.db", origin=None)) as journal:
        recorder, keys = Recorder(journal), world.EpochKeys.generate()
        recorder._keys = keys
        settings = Config(retention_days=300)
        executor: Any = SimpleNamespace(
            recorder=recorder, journal=journal, config=settings, record=recorder.record,
            now_ns=time.monotonic_ns, on_record=lambda _record: None, admitted=None, failure=None,
        )  # fmt: skip
        server = serve(Backend(executor), state / "run")
        try:
            code, (row,) = call("log", "prune", "--minimum", 4)
            assert (code, row) == (0, {"minimum": 4, "pruned": 4, "retention_days": 300, "index": 11})
            code, rows = call("log", "prune", "--minimum", 11)
            assert (code, refusal(rows)) == (1, "log.retention")
            for shorter in (0, 299):
                code, rows = call("log", "prune", "--minimum", 11, "--retention-days", shorter)
                assert (code, refusal(rows)) == (1, "log.retention")
                assert rows[-1]["error"]["want"] == "at least 300 days"
            code, (row,) = call("log", "prune", "--retention-days", 600)
            assert (code, row) == (0, {"minimum": 4, "pruned": 0, "retention_days": 600, "index": None})
            code, (row,) = call("log", "erase", run, "--reason", "asked")
            assert (code, row) == (0, {"erased": [7, 8, 9], "index": [12]})
            code, rows = call("log", "erase", "0" * 26)
            assert (code, refusal(rows)) == (1, "journal.no_run")
            code, (row,) = call("log", "erase", "--older-than", 400)
            assert (code, row["erased"]) == (0, [4, 5, 6])
        finally:
            server.stop()
    assert {c.id for c in check_journal(reader).failed} == {"entry.signature", "log.checkpoint"}  # no epoch was opened
    assert call("log", "erase", run)[1][0]["erased"] == []  # the socket is gone, nothing is left to do


@pytest.mark.parametrize("words", [["prune", "--minimum", 4], ["erase", "--older-than", 400]])
def test_an_executor_that_takes_longer_than_one_waits_is_not_said_to_be_away(
    state: Path, call: Any, reader: JournalReader, monkeypatch: pytest.MonkeyPatch, words: list[object]
) -> None:
    """It may still be doing it: what to do without one is not tried."""
    monkeypatch.setattr(log_retention, "API_TIMEOUT_S", 0.3)
    (state / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(state / "run" / "operator.sock"))
        mute.listen()
        with closing(Journal.open(state / "journal.db", origin=None)):
            code, rows = call("log", *words)
    assert (code, refusal(rows)) == (Exit.ENVIRONMENT, "api.deadline")
    assert "may still be done" in rows[-1]["error"]["hint"]
    assert reader.minimum == 0
    assert call("log", *words)[0] == 0  # nobody listens there any more


def test_the_offline_epoch_is_one_like_any_other(state: Path, reader: JournalReader, call: Any) -> None:
    with recording(state, "test") as recorder:
        recorder.record(entry.Config(what="by hand", detail={"text": SECRET}))
    kinds = [e.kind for e in reader.entries()][-3:]
    assert kinds == ["epoch-open", "config", "epoch-close"]
    assert check_journal(reader).passed
    head = reader.head()
    assert head is not None
    assert head.size == reader.size


def test_a_report_over_a_pruned_and_erased_log_is_complete(call: Any, reader: JournalReader, tmp_path: Path) -> None:
    runs = [str(e.run) for e in reader.runs()]
    assert call("log", "prune", "--minimum", 4)[0] == 0
    assert call("log", "erase", runs[1])[0] == 0
    code, (row,) = call("report", "--out", tmp_path / "report", "--at", world.NOW.isoformat())
    failed = [c["id"] for c in row["verdict"]["checks"] if c["outcome"] == "fail"]
    assert (code, row["runs"], row["complete"]) == (1, RUNS - 1, True)
    assert failed == ["report.evidence"]  # of the old epoch, which this world's certificates are too young for
    assert "erased" in "".join(f.read_text() for f in (tmp_path / "report").iterdir())


class Failing(sqlite3.Connection):
    """Fails the statement number `at` of those that write."""

    seen = 0
    at = -1

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        if sql.startswith(("insert", "begin", "commit", "update", "delete", "pragma wal")):
            Failing.seen += 1
            if Failing.seen == Failing.at:
                raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *args)  # type: ignore[arg-type]


def test_a_failed_write_at_any_step_leaves_a_valid_log(
    call: Any, state: Path, reader: JournalReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Journal.open.__func__  # type: ignore[attr-defined]
    opened = classmethod(lambda cls, path, *, origin: real(cls, path, origin=origin, connection=Failing))
    run = reader.runs()[0].run
    monkeypatch.setattr(Journal, "open", opened)
    failures = 0
    for words in (["erase", run], ["prune", "--minimum", 7]):
        for at in range(1, 100):
            Failing.seen, Failing.at = 0, at
            code, rows = call("log", *words)
            Failing.at = -1
            with closing(JournalReader.open(state / "journal.db")) as again:
                assert check_journal(again).passed, (words, at)
            if code == 0:
                break
            failures += 1
            assert refusal(rows) == "journal.storage", (words, at)
    assert failures > 20
    assert check_journal(reader).passed
    assert reader.minimum == 7


def test_tail_shows_the_newest(call: Any) -> None:
    assert [r["index"] for r in call("log", "tail", "-n", 3)[1]] == [8, 9, 10]
    assert [r["index"] for r in call("log", "tail", "--kind", "receipt", "-n", 2)[1]] == [6, 9]
    assert len(call("log", "tail", "-n", 99)[1]) == 11
    assert call("log", "tail", "-n", 0)[1] == []
    assert call("log", "tail", "--kind", "x")[0] == 2


def test_tail_follows_also_over_a_restart(state: Path) -> None:
    command = [sys.executable, "-m", "pointcall_executor.cli", "log", "tail", "-f", "-n", "1", "--json"]
    process = subprocess.Popen(
        [*command, "--state-dir", str(state)], stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["index"] == 10
        for number in range(2):  # two lives of an executor
            node = world.Node.boot(state)
            node.append(entry.Lost(sensor="s", count=number))
            node.journal.close()
        followed = [json.loads(process.stdout.readline()) for _ in range(4)]
        assert [r["index"] for r in followed] == [11, 12, 13, 14]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
