"""Back to the last good manifest: what was armed before is restored from the journal by digest, signed and armed."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.manifest import Manifest
from pointcall_attest.manifest_diff import differences
from pointcall_executor.cli import main
from pointcall_executor.daemon import Executor
from pointcall_executor.journal import JournalReader
from pointcall_executor.journal_reader import DamagedError, JournalError
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.rollback import RollbackError, armed_before, last_good, restore, successor
from pointcall_keys.assemble import Assembled
from tests.lab import Lab, now
from tests.scenario.test_loop_story import declare, spec


@pytest.fixture
def executor(lab: Lab) -> Iterator[Executor]:
    with lab.executor(RecordedNode()) as executor:
        yield executor


def arm(lab: Lab, executor: Executor, sequence: int, **environment: str) -> Manifest:
    body: dict[str, Any] = spec(lab)
    declare(lab, environment=environment)
    return executor.arm(lab.sign(lab.assemble(body, sequence))).manifest


def test_what_was_armed_before_comes_back_as_a_newer_manifest(lab: Lab, executor: Executor) -> None:
    good = arm(lab, executor, 1, COLOUR="green")
    bad = arm(lab, executor, 5, COLOUR="red")
    with JournalReader.open(lab.state / "journal.db") as reader:
        history = armed_before(reader)
        assert [(row.sha256, row.sequence) for row in history] == [(good.sha256, 1), (bad.sha256, 5)]
        assert last_good(history).sha256 == good.sha256
        start = now().replace(microsecond=0)
        made = successor(
            reader, good.sha256, bad, not_before=start - timedelta(hours=1), expires=start + timedelta(days=1)
        )
    again = executor.arm(lab.sign(made)).manifest
    assert (again.sequence, again.predicate.previous) == (6, bad.sha256)
    assert again.subjects == good.subjects
    assert again.services == good.services
    assert {c.text.split()[0] for c in differences(good, again)} <= {"sequence", "expires"}
    assert executor.admitted is not None
    assert executor.admitted.declarations["api"].process.environment == {"COLOUR": "green"}


def test_what_was_never_armed_cannot_be_restored(lab: Lab, executor: Executor) -> None:
    arm(lab, executor, 1)
    planted = executor.journal.put_blob(b"content that somebody put there")
    with JournalReader.open(lab.state / "journal.db") as reader:
        for digest in ("0" * 64, "not a digest", planted):
            with pytest.raises(RollbackError) as refusal:
                restore(reader, digest)
            assert refusal.value.id == "rollback.unknown"
        with pytest.raises(RollbackError) as refusal:
            last_good(armed_before(reader))
        assert refusal.value.id == "rollback.none"
    with pytest.raises(RollbackError):
        last_good([])


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("delete from blob where sha256 = ?", JournalError),
        ("update blob set data = x'78' where sha256 = ?", DamagedError),
    ],
)
def test_a_part_that_is_gone_or_changed_is_not_restored(
    lab: Lab, executor: Executor, sql: str, error: type[JournalError]
) -> None:
    good = arm(lab, executor, 1, COLOUR="green")
    arm(lab, executor, 3, COLOUR="red")
    with sqlite3.connect(lab.state / "journal.db") as db:
        db.execute(sql, (bytes.fromhex(good.subjects["services/api.json"]),))
    db.close()
    with JournalReader.open(lab.state / "journal.db") as reader, pytest.raises(error):
        restore(reader, good.sha256)


def test_what_was_revoked_since_stays_revoked(lab: Lab, executor: Executor, tmp_path: Path) -> None:
    good = arm(lab, executor, 1)
    current = arm(lab, executor, 3, COLOUR="red")
    revoking = Manifest(
        current.payload, current.sha256, current.subjects, current.predicate.model_copy(update={"revoked": ("a" * 64,)})
    )
    with JournalReader.open(lab.state / "journal.db") as reader:
        made = successor(reader, good.sha256, revoking, not_before=now() - timedelta(hours=1), expires=now())
    assert Manifest.parse(made.statement).predicate.revoked == ("a" * 64,)


def test_the_verb_writes_what_is_to_be_signed(
    lab: Lab, executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, out = ["--state-dir", str(lab.state)], str(tmp_path / "out")
    assert main(["manifest", "restore", "--out", out, *state]) == 1
    assert "rollback.none" in capsys.readouterr().err
    good = arm(lab, executor, 1, COLOUR="green")
    bad = arm(lab, executor, 5, COLOUR="red")
    assert main(["manifest", "restore", "--list", "--json", *state]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["sha256"], row["sequence"]) for row in rows] == [(good.sha256, 1), (bad.sha256, 5)]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["at"]) for row in rows)
    assert main(["manifest", "restore", "--list", *state]) == 0
    assert capsys.readouterr().out.startswith(f"     1  {rows[0]['at']}  {good.sha256}  entry ")
    assert main(["manifest", "restore", *state]) == 2
    assert main(["manifest", "restore", "0" * 64, "--out", out, *state]) == 1
    capsys.readouterr()
    assert main(["manifest", "restore", "--out", out, "--json", *state]) == 0
    assert json.loads(capsys.readouterr().out)["restores"] == good.sha256
    files = {str(p.relative_to(f"{out}/files")): p.read_bytes() for p in Path(out, "files").rglob("*") if p.is_file()}
    again = executor.arm(lab.sign(Assembled(Path(out, "manifest.json").read_bytes(), files))).manifest
    assert (again.sequence, again.subjects) == (6, good.subjects)
