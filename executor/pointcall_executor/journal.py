"""The journal: the only durable truth of a node. SQLite WAL, synchronous=FULL, one writer at a time, group commit.

A call returns when its entry is on disk. Who comes when nobody is writing commits in its own thread, which saves two
thread switches; who comes meanwhile is committed together with all others that wait.
On any storage error the journal stops for good: every waiting and later call raises, nothing is retried (a failed
fsync may have dropped the data), the daemon disarms and exits, and the next start verifies everything from disk.
Checkpoints only ever grow.
Not here: what entries say (attest), reading (journal_reader.py), who signs (keys). Spec: docs/spec/journal.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from pointcall_attest import entry
from pointcall_attest.entry import Erase, Outline, Prune, outline
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.sealing import Opening
from pointcall_executor.journal_reader import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    DamagedError,
    JournalError,
    JournalReader,
    check_format,
    damaged,
    verified_tree,
)

__all__ = ["DamagedError", "Journal", "JournalError", "JournalReader", "StorageError"]

MAX_BATCH: Final = 128  # entries of one commit: above it latency grows and throughput does not
CHECKPOINT_INTERVAL_S: Final = 1.0
FORGET_S: Final = 5.0  # how long an erasure waits for readers that still hold old pages
FORGET_STEP_MS: Final = 20  # how long one try may keep others from writing
PAGE_BYTES: Final = 4096
WAL_BYTES: Final = 1000 * PAGE_BYTES  # after 1000 pages SQLite moves them into the journal
LENGTHEN_CACHE_PAGES: Final = 10  # of what lengthens it some stay in the cache
MAX_BLOB_BYTES: Final = 64 * 1024 * 1024  # a manifest's file; the largest real one is a BPF blob of 60 kB

SignCheckpoint = Callable[[str, int, bytes], bytes]  # origin, size, root -> signed note

# One step per schema version. A step never changes an entry.
_MIGRATIONS: Final = (
    """
    create table meta(key text primary key, value text not null) strict, without rowid;
    create table entry(
      i integer primary key, leaf blob not null, kind text not null, run text, raw blob not null) strict;
    create index entry_run on entry(run) where run is not null;
    create index entry_kind on entry(kind, i);
    create table blob(sha256 blob primary key, data blob not null) strict;
    create table side(commitment blob primary key, salt blob not null, text text not null) strict;
    create table sequence(name text primary key, number integer not null, digest text not null) strict, without rowid;
    create table checkpoint(
      key_id text primary key, size integer not null, root blob not null, note blob not null) strict;
    """,
    # What opens an entry lies in its row: a page less to write than a table of its own. Nothing ever wrote to `side`.
    """
    drop table side;
    alter table entry add column salt blob;
    alter table entry add column text text;
    insert into meta values ('erased', '0');
    create table cosigned(key_id text primary key, size integer not null, note blob not null, witnesses text not null)
      strict;
    """,
)
assert len(_MIGRATIONS) == SCHEMA_VERSION


class StorageError(JournalError):
    """The disk failed. The journal has stopped and this process must not act any more."""

    id = "journal.storage"


@dataclass(slots=True)
class _Job:
    """Work inside the next transaction; `done` gets its result after the commit."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Journal(JournalReader):
    """The one writer of a journal, and a reader of it. Thread-safe."""

    def __init__(self, path: Path, writer: sqlite3.Connection, tree: Tree, lock: int) -> None:
        super().__init__(path)
        self._writer, self._lock = writer, lock
        self._log = tree  # what is durable
        self._leaves: list[bytes] = []  # what the open transaction adds
        self._checkpointed_s = float("-inf")
        self._noted: tuple[int, bytes | None] = (-1, None)  # the last checkpoint that is durable, and what it covers
        self._failure: BaseException | None = None
        self._closed = False
        self._queueing = threading.Lock()  # nothing is queued after the close
        self._writing = threading.Lock()  # held by the one thread that commits
        self._jobs: deque[_Job] = deque()
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(  # type: ignore[override]
        cls, path: Path, *, origin: str | None, connection: type[sqlite3.Connection] = sqlite3.Connection
    ) -> Self:
        """Open or create; every entry is verified from disk first.

        `origin` names the log in its checkpoints and can never change; None: that of a journal which is there already.
        `connection` is the SQLite connection class.
        JournalError `journal.busy`, `journal.format`, `journal.schema` or `journal.origin`; DamagedError names the
        first entry that is wrong; StorageError if the disk fails.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _locked(path)
        except OSError as error:
            raise _storage(error) from error
        try:
            writer = _connect(path, connection)
            try:
                _migrate(writer, path, origin)
                _lengthen(writer)
                return cls(path, writer, verified_tree(writer), lock)
            except BaseException:
                writer.close()
                raise
        except BaseException as error:
            os.close(lock)
            meant = _opening(error)
            if meant is error:
                raise  # `from` itself would be a cause without an end
            raise meant from error

    def require(self) -> None:
        """Raise what stopped the journal for good; nothing while it works."""
        if self._failure is not None:
            raise _stopped(self._failure)

    def append(self, leaf: bytes, opening: Opening | None = None) -> int:
        """The index of this entry, once it is durable. MalformedError for what no reader would accept.

        `opening` is what its commitment opens with; it is kept beside it, in the same transaction.
        """
        row = _row(leaf, opening)
        index: int = self._do(lambda: self._insert(*row))
        return index

    def submit(self, leaf: bytes, opening: Opening | None = None, outlined: Outline | None = None) -> Future[int]:
        """The same as `append` without waiting. The order of calls is the order of entries."""
        waiting = self.enqueue(leaf, opening, outlined)
        self._work.set()
        return waiting

    def enqueue(self, leaf: bytes, opening: Opening | None = None, outlined: Outline | None = None) -> Future[int]:
        """The same, not begun: whoever calls it calls `settle` next. For those whose lock must not be held while it is
        written. `outlined` is what the leaf says it is, where the caller has just made it: it is not read again."""
        row = _row(leaf, opening, outlined)
        return self._queue(lambda: self._insert(*row))

    def flush(self) -> None:
        """Return once everything that was queued before is durable, so that it can be read."""
        self._do(lambda: None)

    def put_blob(self, data: bytes) -> str:
        """Keep content durably; its name is its SHA-256 (hex). The same content is kept once."""
        assert len(data) <= MAX_BLOB_BYTES, f"{len(data)} bytes are no evidence, manifest or module"
        digest = hashlib.sha256(data)
        sql = "insert into blob values (?, ?) on conflict do nothing"
        self._do(lambda: self._writer.execute(sql, (digest.digest(), data)))
        return digest.hexdigest()

    def raise_sequence(self, name: str, number: int, digest: str) -> None:
        """Remember that this manifest was armed. JournalError `journal.sequence` if a higher one, or another with the
        same number, was armed before: the number never goes back."""
        self._do(lambda: self._raise_sequence(name, number, digest))

    def checkpoint(self, sign: SignCheckpoint, now_s: float, *, force: bool = False) -> bytes | None:
        """A signed checkpoint of all entries, durable before it is returned; None while the log is empty.

        At most one a second by `now_s` (any monotonic clock) unless `force`: within it, and where nothing was added,
        the last one is returned. Never signs a smaller tree, nor one that the last one is not a prefix of.
        """
        self.require()
        size, note = self._noted
        if size != self._log.size:  # an idle log costs no transaction
            size, note = self._noted = self._do(lambda: self._checkpoint(sign, now_s, force=force))
        return note

    def keep_cosigned(self, note: Checkpoint, witnesses: Sequence[str]) -> None:
        """Keep a checkpoint of this log with the cosignatures of witnesses, whose verifier keys are given in the order
        of their lines: the last one of each epoch key."""
        sql = (
            "insert into cosigned values (?, ?, ?, ?) on conflict(key_id) do update set size=?, note=?, witnesses=?"
            " where excluded.size >= size"
        )
        new = (note.size, note.text, "\n".join(witnesses))
        self._do(lambda: self._writer.execute(sql, (note.signatures[0].key_id.hex(), *new, *new)))

    def erase(self, leaf: bytes, opening: Opening | None = None, *, indices: Sequence[int] = ()) -> int:
        """Delete the clear texts and salts that this erase entry names, and append it, in one transaction.

        `indices` are the entries whose commitments it names. The leaves stay as they are, and so do all proofs. Call
        `forget` after it: until then the text is still in the write-ahead log.
        """
        body = entry.parse_entry(0, leaf, opening).typed()
        assert isinstance(body, Erase), "an erase entry says what is erased"
        index: int = self._do(lambda: self._erase(body, indices, _row(leaf, opening)))
        return index

    def prune(self, leaf: bytes, opening: Opening | None = None) -> int:
        """Drop the bytes and clear texts of entries below the minimum of this prune entry, and append it, in one
        transaction.

        Their hashes stay, so every root and proof stays valid; openings of epochs are kept, because later runs need
        them. JournalError `journal.prune` where the minimum is not covered by a checkpoint, or goes back. Call `forget`
        after it.
        """
        body = entry.parse_entry(0, leaf, opening).typed()
        assert isinstance(body, Prune), "a prune entry says how far"
        index: int = self._do(lambda: self._prune(body.minimum, _row(leaf, opening)))
        return index

    def forget(self, *, wait_s: float | None = None) -> None:
        """Overwrite what was deleted: move everything out of the write-ahead log and empty it.

        JournalError `journal.readers` where a reader holds the old pages for longer than `wait_s` (`FORGET_S` unless
        told, 0: one try): call it again.
        """
        wait_s = FORGET_S if wait_s is None else wait_s
        end = time.monotonic() + wait_s
        while True:
            with self._writing:
                try:
                    self._writer.execute(f"pragma busy_timeout = {FORGET_STEP_MS}")
                    (busy, _, _) = self._writer.execute("pragma wal_checkpoint(truncate)").fetchone()
                    if not busy:
                        _lengthen(self._writer)
                except sqlite3.Error as error:
                    self._failure = error
                    raise _storage(error) from error
            if not busy:
                return
            if time.monotonic() >= end:
                raise JournalError(
                    "deleted, but a reader still holds the old pages",
                    id="journal.readers",
                    want="no reader for a moment",
                    got=f"one for {wait_s:g} s",
                    hint="end the process that reads the journal, then ask again: nothing is lost by that",
                )
            time.sleep(FORGET_STEP_MS / 1000)

    def tree(self) -> Tree:
        """The tree of all durable entries: the writer's own, which only grows. Ask it for sizes that were committed."""
        return self._log

    def close(self) -> None:
        """Write what is queued, stop, release the file. May be called twice; raises nothing."""
        with self._queueing:
            first, self._closed = not self._closed, True
        if first:
            self._work.set()
            self._thread.join()
            with self._writing, suppress(sqlite3.Error):
                self._writer.close()
            os.close(self._lock)
        super().close()

    def _do(self, work: Callable[[], Any]) -> Any:
        """The result of the work, once it is durable."""
        return self.settle(self._queue(work))

    def settle(self, waiting: Future[Any]) -> Any:
        """Commit what is queued, in this thread if nobody else does; the result of `waiting`, once it is durable."""
        # An interrupt (Ctrl-C) is raised in the main thread only: it must not hit in the middle of a commit.
        if threading.current_thread() is not threading.main_thread() and self._writing.acquire(blocking=False):
            try:
                self._commit_queued()
            finally:
                self._writing.release()
        if self._jobs:  # what came meanwhile, or what another thread may have overlooked
            self._work.set()
        return waiting.result()

    def _queue(self, work: Callable[[], Any]) -> Future[Any]:
        if self._failure is not None:
            raise _stopped(self._failure)
        job = _Job(work)
        with self._queueing:
            assert not self._closed, "the journal is closed"
            self._jobs.append(job)
        return job.done

    def _write_all(self) -> None:
        """The writer thread: commits what nobody else does, until the journal is closed and nothing waits."""
        while not self._closed or self._jobs:
            self._work.wait()
            self._work.clear()
            while self._jobs:
                with self._writing:
                    self._commit_queued()

    def _commit_queued(self) -> None:
        """One transaction for what is queued; after a failure a refusal for each. The caller holds `_writing`."""
        batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))]
        try:
            if self._failure is None:
                results = self._commit(batch)
        except BaseException as error:  # whatever it was: nobody may wait for ever, and nothing more is written
            self._failure = error
        if self._failure is not None:
            for job in batch:
                job.done.set_exception(_stopped(self._failure))
            return
        for job, (value, refused) in zip(batch, results, strict=True):
            job.done.set_result(value) if refused is None else job.done.set_exception(refused)

    def _commit(self, batch: Sequence[_Job]) -> list[tuple[Any, JournalError | None]]:
        """Run the jobs in one durable transaction. A JournalError is the answer of one job; it wrote nothing."""
        results: list[tuple[Any, JournalError | None]] = []
        if not batch:
            return results
        self._leaves.clear()
        self._writer.execute("begin immediate")
        for job in batch:
            try:
                results.append((job.work(), None))
            except DamagedError:
                raise
            except JournalError as refused:
                results.append((None, refused))
        self._writer.execute("commit")
        self._log.extend(self._leaves)
        return results

    def _insert(self, leaf: bytes, kind: str, run: str | None, raw: bytes, opening: Opening | None) -> int:
        index = self._log.size + len(self._leaves)
        opens = (None, None) if opening is None else (opening.salt, opening.text)
        self._writer.execute("insert into entry values (?, ?, ?, ?, ?, ?, ?)", (index, leaf, kind, run, raw, *opens))
        self._leaves.append(leaf)
        return index

    def _raise_sequence(self, name: str, number: int, digest: str) -> None:
        row = self._writer.execute("select number, digest from sequence where name = ?", (name,)).fetchone()
        if row is not None and (number < row[0] or (number == row[0] and digest != row[1])):
            raise JournalError(
                f"manifest {name!r} may not go back",
                id="journal.sequence",
                want=f"a sequence above {row[0]}, or the manifest {row[1]} again",
                got=f"{number}, {digest}",
            )
        sql = "insert into sequence values (?, ?, ?) on conflict(name) do update set number = ?, digest = ?"
        self._writer.execute(sql, (name, number, digest, number, digest))

    def _erase(self, body: Erase, indices: Sequence[int], row: _Row) -> int:
        find = "select salt, text from entry where i = ? and text is not null"
        for index in indices:
            for salt, text in self._writer.execute(find, (index,)).fetchall():
                assert Opening(salt, text).commitment in body.commitments, f"entry {index} is not named"
            self._writer.execute("update entry set salt = null, text = null where i = ?", (index,))
        (erased,) = self._writer.execute("select value from meta where key = 'erased'").fetchone()
        if body.below > int(erased):
            span = (int(erased), body.below)
            self._writer.execute("update entry set salt = null, text = null where i >= ? and i < ?", span)
            self._writer.execute("update meta set value = ? where key = 'erased'", (str(body.below),))
        return self._insert(*row)

    def _prune(self, minimum: int, row: _Row) -> int:
        (lowest,) = self._writer.execute("select value from meta where key = 'minimum'").fetchone()
        covered, _, _ = self._last_checkpoint()
        if not int(lowest) <= minimum <= covered:
            raise JournalError(
                "the log cannot be pruned there",
                id="journal.prune",
                want=f"between {lowest} and {covered}, the size of the last checkpoint",
                got=str(minimum),
            )
        sql = "update entry set raw = x'', salt = null, text = null where i >= ? and i < ? and kind <> 'epoch-open'"
        self._writer.execute(sql, (int(lowest), minimum))
        self._writer.execute("update meta set value = ? where key = 'minimum'", (str(minimum),))
        return self._insert(*row)

    def _checkpoint(self, sign: SignCheckpoint, now_s: float, *, force: bool) -> tuple[int, bytes | None]:
        size, root, note = self._last_checkpoint()
        if self._log.size == size or (not force and now_s - self._checkpointed_s < CHECKPOINT_INTERVAL_S):
            return size, note
        if self._log.size < size or self._log.root(size) != root:
            raise damaged("the log", want=f"the {size} entries that were signed", got=f"{self._log.size} entries")
        note = sign(self._origin(), self._log.size, self._log.root())
        self._keep_checkpoint(Checkpoint.parse(note), size)
        self._checkpointed_s = now_s
        return self._log.size, note

    def _last_checkpoint(self) -> tuple[int, bytes, bytes | None]:
        row = self._writer.execute("select size, root, note from checkpoint order by size desc limit 1").fetchone()
        return (row[0], row[1], row[2]) if row else (0, self._log.root(0), None)

    def _keep_checkpoint(self, signed: Checkpoint, previous: int) -> None:
        assert (signed.origin, signed.size, signed.root) == (self._origin(), self._log.size, self._log.root())
        assert signed.size > previous, "a checkpoint only grows"
        sql = "insert into checkpoint values (?, ?, ?, ?) on conflict(key_id) do update set size=?, root=?, note=?"
        new = (signed.size, signed.root, signed.text)
        self._writer.execute(sql, (signed.signatures[0].key_id.hex(), *new, *new))

    def _origin(self) -> str:
        return str(self._writer.execute("select value from meta where key = 'origin'").fetchone()[0])


_Row: TypeAlias = tuple[bytes, str, str | None, bytes, Opening | None]  # leaf hash, kind, run, leaf


def _row(leaf: bytes, opening: Opening | None = None, outlined: Outline | None = None) -> _Row:
    """What is stored of a leaf; made in the caller's thread."""
    kind, run = outlined or outline(leaf)
    return leaf_hash(leaf), kind, run, leaf, opening


def _locked(path: Path) -> int:
    """The lock that one writer holds, as a file descriptor; the kernel drops it when the process ends."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise JournalError(
            "another process writes this journal",
            id="journal.busy",
            want="one writer",
            got=str(path),
            hint="is an executor running with the same --state-dir?",
        ) from None
    return lock


def _connect(path: Path, connection: type[sqlite3.Connection]) -> sqlite3.Connection:
    """The writing connection. The file is readable by its owner only, and its name is durable."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=connection)
    try:
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        db.execute("pragma secure_delete = on")
    except sqlite3.DatabaseError as error:
        db.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise JournalError("the file is no journal", id="journal.format", want="SQLite", got=str(error)) from error
    return db


def _migrate(db: sqlite3.Connection, path: Path, origin: str | None) -> None:
    """Bring the schema to this program's version, each step in one transaction, and check whose log it is."""
    version = int(db.execute("pragma user_version").fetchone()[0])
    if version == 0 and not db.execute("select 1 from sqlite_schema").fetchall():
        db.execute(f"pragma application_id = {APPLICATION_ID}")
    for step in range(version, SCHEMA_VERSION):
        db.executescript(f"begin immediate; {_MIGRATIONS[step]} pragma user_version = {step + 1}; commit")
    check_format(db, path)
    if origin is None:
        return
    db.execute("insert into meta values ('origin', ?), ('minimum', '0') on conflict do nothing", (origin,))
    (stored,) = db.execute("select value from meta where key = 'origin'").fetchone()
    if stored != origin:
        raise JournalError(
            "the journal belongs to another log",
            id="journal.origin",
            want=origin,
            got=stored,
            hint="each node has its own state directory",
        )


def _lengthen(db: sqlite3.Connection) -> None:
    """Give the write-ahead log its full length now, by pages of a table that is never committed. It is overwritten from
    its beginning after each checkpoint of SQLite; to sync a file that does not grow takes two thirds of the time.

    Where there is no room for it, it grows as it is needed, as far as it can.
    """
    (cached,) = db.execute("pragma cache_size").fetchone()
    db.execute(f"pragma cache_size = {LENGTHEN_CACHE_PAGES}")  # what does not fit in it goes to the log at once
    try:
        db.execute("savepoint long")
        db.execute(f"create table long as select zeroblob({WAL_BYTES + 4 * LENGTHEN_CACHE_PAGES * PAGE_BYTES})")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
    finally:
        if db.in_transaction:
            db.execute("rollback")
        db.execute(f"pragma cache_size = {cached}")


def _opening(error: BaseException) -> BaseException:
    """What an error while opening means to the caller."""
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return damaged("the journal", want="a whole database", got=str(error))
    return _storage(error) if isinstance(error, sqlite3.Error | OSError) else error


def _storage(error: BaseException) -> StorageError:
    return StorageError(
        f"the storage of the journal failed: {error}",
        want="a durable write",
        got=type(error).__name__,
        hint="free space or replace the disk, then start again: the journal is verified from disk",
    )


def _stopped(cause: BaseException) -> JournalError:
    """A fresh error for one caller of a journal that has stopped."""
    match cause:
        case DamagedError():
            error: JournalError = DamagedError(cause.message, want=cause.want, got=cause.got, hint=cause.hint)
        case sqlite3.Error() | OSError():
            error = _storage(cause)
        case _:
            error = JournalError("the journal has stopped after a bug", id="journal.stopped", got=repr(cause)[:200])
    error.__cause__ = cause
    return error
