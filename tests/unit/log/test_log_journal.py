"""The journal: durable, gapless, never back; what is changed on disk is found and named."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from pointcall_attest import entry
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import verify_consistency
from pointcall_executor.journal import WAL_BYTES, DamagedError, Journal, JournalError, JournalReader, StorageError
from pointcall_executor.journal_check import check_journal
from pointcall_executor.journal_reader import connect_read_only
from pointcall_keys.node import EpochKeys
from tests.unit.log import world

ORIGIN = world.ORIGIN


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    yield made
    made.journal.close()


def leaves(keys: EpochKeys, count: int) -> list[bytes]:
    bodies = (entry.Lost(sensor="s", count=i) for i in range(count))
    return [keys.sign(entry.payload(b, at=world.NOW, ktime_ns=1, epoch=keys.id)) for b in bodies]


def test_entries_are_numbered_without_a_gap_and_read_back(node: world.Node) -> None:
    run = node.run()
    assert [e.kind for e in node.journal.entries()] == ["epoch-open", "intent", "outcome", "receipt"]
    assert [e.index for e in node.journal.entries(run=run)] == [1, 2, 3]
    assert node.journal.receipt(run) == node.journal.entry(3) == node.journal.runs()[0]
    assert node.journal.size == 4
    assert node.journal.entries(start=2, limit=1) == [node.journal.entry(2)]


def test_a_reader_sees_what_is_durable_while_the_writer_works(node: world.Node) -> None:
    with JournalReader.open(node.journal.path) as reader:
        assert reader.size == 1
        node.run()
        assert reader.size == 4
        assert reader.origin == ORIGIN
        assert reader.tree().root() == node.journal.tree().root()


def wal_bytes(journal: Journal) -> int:
    return journal.path.with_name(journal.path.name + "-wal").stat().st_size


def test_the_write_ahead_log_has_its_full_length_before_the_first_entry(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "journal.db", origin=ORIGIN)) as journal:
        full = wal_bytes(journal)
        assert full >= WAL_BYTES
        for leaf in leaves(EpochKeys.generate(), 50):
            journal.append(leaf)
        assert wal_bytes(journal) == full
        assert journal.path.stat().st_size < WAL_BYTES / 10  # nothing of it is in the journal
        journal.forget()
        assert wal_bytes(journal) >= WAL_BYTES
        assert journal.size == 50


def test_a_journal_works_where_its_log_cannot_be_lengthened(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "journal.db", origin=ORIGIN, connection=Short)) as journal:
        for number, leaf in enumerate(leaves(EpochKeys.generate(), 3)):
            assert journal.append(leaf) == number
        assert wal_bytes(journal) < WAL_BYTES
    with JournalReader.open(tmp_path / "journal.db") as reader:
        assert reader.tree().size == 3


def test_a_disk_that_fails_while_the_log_is_lengthened_is_not_overlooked(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Journal.open(tmp_path / "journal.db", origin=ORIGIN, connection=Torn)


class Short(sqlite3.Connection):
    """There is no room to lengthen its log."""

    code = sqlite3.SQLITE_FULL

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        if sql.startswith("create table long"):
            error = sqlite3.OperationalError("it cannot be written")
            error.sqlite_errorcode = self.code
            raise error
        return super().execute(sql, *args)  # type: ignore[arg-type]


class Torn(Short):
    """The disk fails at that moment."""

    code = sqlite3.SQLITE_IOERR


def test_a_reader_may_be_shared_between_threads(node: world.Node) -> None:
    for number in range(30):
        node.run(number)
    with JournalReader.open(node.journal.path) as reader, ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(lambda _: reader.tree().root(91), range(64)))
    assert set(roots) == {node.journal.tree().root()}


def test_a_reader_cannot_write(node: world.Node) -> None:
    with closing(connect_read_only(node.journal.path)) as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("delete from entry")


def test_a_reader_works_after_the_writer_has_gone(node: world.Node) -> None:
    node.run()
    node.journal.close()
    with JournalReader.open(node.journal.path) as reader:
        assert len(reader.runs()) == 1


def test_reopening_continues(tmp_path: Path) -> None:
    first = world.Node.boot(tmp_path)
    first.run()
    first.checkpoint()
    root = first.journal.tree().root()
    first.journal.close()
    again = world.Node.boot(tmp_path)
    assert again.journal.tree().root(4) == root
    again.run(1)
    assert check_journal(again.journal).passed
    again.journal.close()


def test_many_callers_share_commits(node: world.Node) -> None:
    made = leaves(node.keys, 200)
    indices: list[int] = []
    threads = [
        threading.Thread(target=lambda part=made[i::8]: indices.extend(node.journal.append(x) for x in part))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(indices) == list(range(1, 201))
    assert {node.journal.entry(i).raw for i in indices} == set(made)


def test_what_no_reader_accepts_is_never_written(node: world.Node) -> None:
    with pytest.raises(MalformedError):
        node.journal.append(b"{}")
    assert node.journal.size == 1


def test_blobs_are_kept_once_by_digest(node: world.Node) -> None:
    name = node.journal.put_blob(b"content")
    assert name == node.journal.put_blob(b"content")
    assert node.journal.blob(name) == b"content"
    assert node.journal.has_blob(name)
    with pytest.raises(JournalError) as error:
        node.journal.blob("0" * 64)
    assert error.value.id == "journal.no_blob"


def test_a_sequence_never_goes_back(node: world.Node) -> None:
    journal = node.journal
    assert journal.highest_sequence("m") is None
    journal.raise_sequence("m", 3, "a" * 64)
    journal.raise_sequence("m", 3, "a" * 64)
    for number, digest in ((2, "a" * 64), (3, "b" * 64)):
        with pytest.raises(JournalError) as error:
            journal.raise_sequence("m", number, digest)
        assert error.value.id == "journal.sequence"
    journal.raise_sequence("m", 9, "b" * 64)
    assert journal.highest_sequence("m") == 9
    journal.append(*leaves(node.keys, 1))  # a refusal of one caller does not stop the journal


def test_checkpoints_grow_at_most_once_a_second(node: world.Node) -> None:
    journal, keys = node.journal, node.keys
    first = journal.checkpoint(keys.sign_checkpoint, 10.0)
    assert first is not None
    node.run()
    assert journal.checkpoint(keys.sign_checkpoint, 10.9) == first
    second = journal.checkpoint(keys.sign_checkpoint, 11.0)
    assert second is not None
    old, new = Checkpoint.parse(first), Checkpoint.parse(second)
    path = journal.tree().consistency(old.size, new.size)
    assert verify_consistency(old.size, new.size, old.root, new.root, path)
    assert journal.checkpoint(keys.sign_checkpoint, 99.0) == second  # nothing was added
    assert journal.head() == new
    node.run(1)
    forced = journal.checkpoint(keys.sign_checkpoint, 99.1, force=True)
    assert forced is not None
    assert Checkpoint.parse(forced).size == 7


def test_a_checkpoint_of_an_idle_log_costs_no_transaction(node: world.Node) -> None:
    journal, keys = node.journal, node.keys
    first = journal.checkpoint(keys.sign_checkpoint, 10.0)
    statements: list[str] = []
    journal._writer.set_trace_callback(statements.append)
    assert journal.checkpoint(keys.sign_checkpoint, 20.0) == first
    assert journal.checkpoint(keys.sign_checkpoint, 20.0, force=True) == first
    assert statements == []
    node.run()
    second = journal.checkpoint(keys.sign_checkpoint, 30.0)
    assert second is not None
    assert Checkpoint.parse(second).size == journal.size
    assert statements


def test_an_empty_log_has_no_checkpoint(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j.db", origin=ORIGIN)
    assert journal.checkpoint(EpochKeys.generate().sign_checkpoint, 1.0) is None
    assert journal.head() is None
    journal.close()


def test_every_epoch_keeps_its_last_checkpoint(node: world.Node) -> None:
    node.checkpoint()
    following = EpochKeys.generate()
    node.journal.append(node.keys.certify_next(following, reason="roll", at=world.NOW, ktime_ns=9))
    node.journal.checkpoint(node.keys.sign_checkpoint, 0.0, force=True)
    following_node = world.Node.epoch(node.journal, previous=None)
    following_node.checkpoint()
    assert [c.size for c in node.journal.checkpoints()] == [2, 3]


def test_wiped_keys_sign_nothing() -> None:
    keys = EpochKeys.generate()
    keys.wipe()
    keys.wipe()
    assert keys.wiped
    with pytest.raises(AssertionError):
        keys.sign(b"x")
    with pytest.raises(AssertionError):
        keys.sign_checkpoint(ORIGIN, 1, b"r" * 32)


def test_one_writer_only(node: world.Node) -> None:
    with pytest.raises(JournalError) as error:
        Journal.open(node.journal.path, origin=ORIGIN)
    assert error.value.id == "journal.busy"


def test_another_origin_is_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path / "j.db", origin=ORIGIN).close()
    with pytest.raises(JournalError) as error:
        Journal.open(tmp_path / "j.db", origin="other.example/log")
    assert error.value.id == "journal.origin"


def test_the_file_is_private(node: world.Node) -> None:
    assert stat.S_IMODE(os.stat(node.journal.path).st_mode) == 0o600  # noqa: PTH116


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"not a database, and long enough to be looked at" * 40)
    (tmp_path / "empty.db").write_bytes(b"")
    sqlite3.connect(tmp_path / "other.db").execute("create table t(x)").connection.close()
    for name in ("text.db", "other.db"):
        with pytest.raises(JournalError) as error:
            Journal.open(tmp_path / name, origin=ORIGIN)
        assert error.value.id == "journal.format"
    for name, expected in (("text.db", "journal.format"), ("empty.db", "journal.format"), ("no.db", "journal.absent")):
        with pytest.raises(JournalError) as error:
            JournalReader.open(tmp_path / name)
        assert error.value.id == expected


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    Journal.open(path, origin=ORIGIN).close()
    change(path, "pragma user_version = 99")
    for open_ in (lambda: Journal.open(path, origin=ORIGIN), lambda: JournalReader.open(path)):
        with pytest.raises(JournalError) as error:
            open_()
        assert error.value.id == "journal.schema"


def change(path: Path, script: str) -> None:
    """What somebody with access to the file does."""
    db = sqlite3.connect(path)
    db.executescript(script)
    db.close()


DAMAGE = {
    "a changed entry": ("update entry set raw = cast(replace(raw, 'a', 'b') as blob) where i = 2", "entry 2"),
    "an emptied entry": ("update entry set raw = x'' where i = 1", "entry 1"),
    "a removed entry": ("delete from entry where i = 2", "entry 2"),
    "the last entry removed": ("delete from entry where i = 6", "entry 6"),
    "two swapped": ("update entry set i = -i where i in (4, 5); update entry set i = 9 + i where i < 0", "before 7"),
    "a changed checkpoint root": ("update checkpoint set root = zeroblob(32)", "checkpoint of size 7"),
    "a checkpoint from the future": ("update checkpoint set size = 99", "checkpoint of size 99"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_on_opening_and_named(what: str, tmp_path: Path) -> None:
    node = world.Node.boot(tmp_path)
    node.run()
    node.run(1)
    node.checkpoint()
    node.journal.close()
    script, named = DAMAGE[what]
    change(node.journal.path, script)
    with pytest.raises(DamagedError) as error:
        Journal.open(node.journal.path, origin=ORIGIN)
    assert named in error.value.message
    assert error.value.id == "journal.damaged"
    with JournalReader.open(node.journal.path) as reader:
        assert not check_journal(reader).passed


HIDDEN = {
    "a kind": ("update entry set kind = 'lost' where i = 3", "journal.entries"),
    "a run": ("update entry set run = null where i = 3", "journal.entries"),
    "a blob": ("update blob set data = x'00'", "journal.blobs"),
    "an unsigned checkpoint": (
        "update checkpoint set note = cast(replace(note, 'test', 'tesu') as blob)",
        "log.checkpoint",
    ),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_the_check_finds_what_opening_does_not_look_at(what: str, node: world.Node) -> None:
    node.run()
    node.checkpoint()
    node.journal.close()
    script, failed = HIDDEN[what]
    change(node.journal.path, script)
    with JournalReader.open(node.journal.path) as reader:
        assert [c.id for c in check_journal(reader).failed] == [failed]


def epoch_spoils() -> dict[str, tuple[Callable[[world.Node], object], str]]:
    stranger = EpochKeys.generate()

    def close(node: world.Node) -> None:
        node.journal.append(node.keys.certify_next(None, reason="end", at=world.NOW, ktime_ns=9))

    return {
        "a stranger's entry": (lambda n: n.journal.append(leaves(stranger, 1)[0]), "entry.signature"),
        "an entry after the close": (lambda n: (close(n), n.run()), "log.epochs"),
        "an epoch that nobody vouched for": (
            lambda n: (close(n), world.Node.epoch(n.journal, previous=n.keys)),
            "log.epochs",
        ),
        "a stranger's checkpoint": (
            lambda n: n.journal.checkpoint(stranger.sign_checkpoint, 1.0, force=True),
            "log.checkpoint",
        ),
    }


@pytest.mark.parametrize("what", epoch_spoils())
def test_the_chain_of_epochs_is_checked(what: str, node: world.Node) -> None:
    spoil, failed = epoch_spoils()[what]
    spoil(node)
    assert [c.id for c in check_journal(node.journal).failed] == [failed]


class Failing(sqlite3.Connection):
    """A connection whose disk can be made to fail."""

    broken = False

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        if Failing.broken and sql == "commit":
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *args)  # type: ignore[arg-type]


def test_after_a_storage_error_every_call_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path / "j.db", origin=ORIGIN, connection=Failing)
    keys = EpochKeys.generate()
    first, second = leaves(keys, 2)
    journal.append(first)
    monkeypatch.setattr(Failing, "broken", True)
    waiting = [journal.submit(second) for _ in range(3)]
    for future in waiting:
        with pytest.raises(StorageError):
            future.result()
    monkeypatch.setattr(Failing, "broken", False)
    for call in (
        lambda: journal.append(second),
        lambda: journal.put_blob(b"x"),
        lambda: journal.raise_sequence("m", 1, "d"),
        lambda: journal.checkpoint(keys.sign_checkpoint, 5.0),
    ):
        with pytest.raises(StorageError):
            call()
    journal.close()
    again = Journal.open(tmp_path / "j.db", origin=ORIGIN)
    assert again.size == 1
    again.close()
