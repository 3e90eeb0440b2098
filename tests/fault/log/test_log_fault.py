"""Every write of the journal fails once: not persisted, or persisted but reported as failed. Then restart and check.

What was acknowledged must be there, the log must verify, and no two checkpoints may contradict each other.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import leaf_hash, verify_consistency
from pointcall_attest.sealing import Opening
from pointcall_executor.journal import Journal, JournalError, StorageError
from pointcall_executor.journal_check import check_journal
from pointcall_keys.node import EpochKeys
from tests.unit.log import world

MAX_STEPS = 90  # SQL statements of the story below; the test fails if there are more


SECRET = "psql --password=hunter2"


class Faulty(sqlite3.Connection):
    """Fails the statement number `at` of those that count, before or after it ran."""

    seen = 0
    at = -1
    persisted = False

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        if not sql.startswith(("insert", "begin", "commit", "update", "delete", "pragma wal_checkpoint")):
            return super().execute(sql, *args)  # type: ignore[arg-type]
        Faulty.seen += 1
        if Faulty.seen != Faulty.at:
            return super().execute(sql, *args)  # type: ignore[arg-type]
        if Faulty.persisted:
            super().execute(sql, *args)  # type: ignore[arg-type]
        raise sqlite3.OperationalError("disk I/O error")

    def executemany(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:  # type: ignore[override]
        for row in rows:
            cursor = self.execute(sql, row)
        return cursor


class Story:
    """What a node does in a life: epoch, content, checkpoints, roll, erase, prune. Remembers what it was told."""

    def __init__(self, path: Path) -> None:
        self.path, self.acknowledged, self.notes, self.sequence = path, {}, [], 0
        self.keys = EpochKeys.generate()
        self.acknowledged: dict[int, bytes] = {}
        self.notes: list[bytes] = []
        self.erased: set[int] = set()
        self.minimum = 0

    def live(self) -> None:
        journal = Journal.open(self.path, origin=world.ORIGIN, connection=Faulty)
        try:
            self._steps(journal)
        finally:
            journal.close()

    def _steps(self, journal: Journal) -> None:
        for number in range(3):
            self._append(journal, entry.Lost(sensor="s", count=number))
        journal.put_blob(b"evidence")
        journal.raise_sequence("m", 1, "a" * 64)
        self.sequence = 1
        self._checkpoint(journal, self.keys, 1.0)
        self._append(journal, entry.Lost(sensor="s", count=9))
        following = EpochKeys.generate()
        leaf = self.keys.certify_next(following, reason="roll", at=world.NOW, ktime_ns=2)
        self.acknowledged[journal.append(leaf)] = leaf
        self._checkpoint(journal, self.keys, 1.5)
        self.keys = following
        self._append(journal, entry.Lost(sensor="s", count=10))
        self._checkpoint(journal, following, 3.0)
        sealed = [self._append(journal, entry.Config(what="w", detail={"text": SECRET})) for _ in range(2)]
        named = (str(journal.entry(sealed[0]).commitment),)
        leaf, opening = self._leaf(entry.Erase(commitments=named, reason="asked"))
        self.acknowledged[journal.erase(leaf, opening, indices=sealed[:1])] = leaf
        self.erased.add(sealed[0])
        journal.forget()
        self._checkpoint(journal, following, 5.0)
        leaf, opening = self._leaf(entry.Prune(minimum=3, reason="old", retention_days=1))
        self.acknowledged[journal.prune(leaf, opening)] = leaf
        self.minimum = 3
        journal.forget()
        self._checkpoint(journal, following, 7.0)

    def _leaf(self, body: entry.Body) -> tuple[bytes, Opening | None]:
        payload, opening = entry.sealed(body, at=world.NOW, ktime_ns=1, epoch=self.keys.id, salt=os.urandom(32))
        return self.keys.sign(payload), opening

    def _append(self, journal: Journal, body: entry.Body) -> int:
        leaf, opening = self._leaf(body)
        index = journal.append(leaf, opening)
        self.acknowledged[index] = leaf
        return index

    def _checkpoint(self, journal: Journal, keys: EpochKeys, now_s: float) -> None:
        note = journal.checkpoint(keys.sign_checkpoint, now_s, force=True)
        assert note is not None
        self.notes.append(note)


def steps_of(folder: Path) -> int:
    Faulty.seen, Faulty.at = 0, -1
    Story(folder / "dry.db").live()
    return Faulty.seen


@pytest.mark.parametrize("persisted", [False, True], ids=["not persisted", "persisted"])
def test_restart_after_each_failed_write(persisted: bool, tmp_path: Path) -> None:
    steps = steps_of(tmp_path)
    assert 45 < steps < MAX_STEPS
    for at in range(1, steps + 1):
        story = Story(tmp_path / f"{at}.db")
        Faulty.seen, Faulty.at, Faulty.persisted = 0, at, persisted
        with pytest.raises(JournalError) as error:
            story.live()
        assert isinstance(error.value, StorageError), at
        Faulty.at = -1
        check_restart(story)


def check_restart(story: Story) -> None:
    journal = Journal.open(story.path, origin=world.ORIGIN)
    assert journal.minimum in (story.minimum, 3)
    for index, leaf in story.acknowledged.items():
        if index >= journal.minimum:
            assert journal.entry(index).raw == leaf
        assert journal.tree().leaf(index) == leaf_hash(leaf)
    assert all(journal.entry(index).closed for index in story.erased)
    assert (journal.highest_sequence("m") or 0) >= story.sequence
    story.notes.append(journal.checkpoint(EpochKeys.generate().sign_checkpoint, 9.0, force=True) or b"")
    tree, notes = journal.tree(), [Checkpoint.parse(n) for n in story.notes if n]
    for old, new in itertools.pairwise(notes):
        path = tree.consistency(old.size, new.size)
        assert verify_consistency(old.size, new.size, old.root, new.root, path)
    wrong = {c.id for c in check_journal(journal).failed} - {"entry.signature", "log.checkpoint"}
    assert not wrong  # the story opens no epoch, so nothing is signed by one; everything else must hold
    journal.close()


def test_a_signer_that_fails_stops_the_journal_without_a_checkpoint(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j.db", origin=world.ORIGIN)
    keys = EpochKeys.generate()
    journal.append(keys.sign(entry.payload(entry.Lost(sensor="s", count=1), at=world.NOW, ktime_ns=1, epoch=keys.id)))
    liars: list[Callable[[str, int, bytes], bytes]] = [
        lambda origin, size, root: keys.sign_checkpoint(origin, size + 1, root),
        lambda origin, size, root: keys.sign_checkpoint(origin, size, b"x" * 32),
        lambda origin, size, root: keys.sign_checkpoint("other.example/log", size, root),
    ]
    for liar in liars[:1]:
        with pytest.raises(JournalError) as error:
            journal.checkpoint(liar, 1.0)
        assert error.value.id == "journal.stopped"
    journal.close()
    for liar in liars[1:]:
        again = Journal.open(tmp_path / "j.db", origin=world.ORIGIN)
        with pytest.raises(JournalError):
            again.checkpoint(liar, 1.0)
        again.close()
    last = Journal.open(tmp_path / "j.db", origin=world.ORIGIN)
    assert last.head() is None
    last.close()
