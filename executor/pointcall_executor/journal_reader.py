"""Reading the journal: entries, runs, blobs, checkpoints, proofs. Never writes; safe while the daemon runs.

journal.db is not trusted: who can write it can stop the node, but cannot make an entry that verifies. What is read is
parsed again and compared with its columns; whether it is authentic is for `pointcall verify` and `log check`.
Not here: the writer (journal.py). Spec: docs/spec/journal.md.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

from pointcall_attest.entry import Entry, Kind, parse_entry
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.proof import Consistency, Proof
from pointcall_attest.log.tree import HASH_BYTES, Tree, leaf_hash
from pointcall_attest.sealing import Opening
from pointcall_runbook.errors import PointcallError

APPLICATION_ID: Final = 0x50434A4C  # "PCJL" in the file's header, so that `file` and we can tell it
SCHEMA_VERSION: Final = 2
MAX_PAGE: Final = 10_000  # entries in one answer: 35 MB of receipts
_ENTRIES: Final = "select i, leaf, kind, run, raw, salt, text from entry where"
_CHECKPOINTS: Final = "select key_id, size, root, note from checkpoint"


class JournalError(PointcallError):
    """The journal cannot do what was asked."""

    id = "journal.error"


class DamagedError(JournalError):
    """What is on disk is not what was written. The message names the entry."""

    id = "journal.damaged"


class JournalReader:
    """A read-only view of a journal. May be shared between threads; each answer is one consistent snapshot."""

    def __init__(self, path: Path, db: sqlite3.Connection | None = None) -> None:
        self.path, self._db = path, db  # connected on first use where it is None
        self._reading = threading.Lock()
        self._growing = threading.Lock()
        self._tree = Tree()

    @classmethod
    def open(cls, path: Path) -> Self:
        """JournalError `journal.absent`, `journal.format` or `journal.schema` if there is no journal we can read."""
        if not path.is_file():
            raise JournalError(
                "there is no journal", id="journal.absent", want=str(path), hint="has the executor run here?"
            )
        db = connect_read_only(path)
        try:
            check_format(db, path)
        except JournalError:
            db.close()
            raise
        return cls(path, db)

    def close(self) -> None:
        """May be called twice."""
        if self._db is not None:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def origin(self) -> str:
        """The name of this log in its checkpoints."""
        return str(self._one("select value from meta where key = 'origin'")[0])

    @property
    def size(self) -> int:
        """How many entries there are. They are numbered from 0 without a gap."""
        return int(self._one("select coalesce(max(i) + 1, 0) from entry")[0])

    @property
    def minimum(self) -> int:
        """Entries below it were pruned: only their hashes are there, and the openings of epochs."""
        return int(self._one("select value from meta where key = 'minimum'")[0])

    def entry(self, index: int) -> Entry:
        """JournalError `journal.no_entry` beyond the end or `journal.pruned`; DamagedError if the bytes changed."""
        rows = self._all(f"{_ENTRIES} i = ?", index)
        if not rows:
            raise JournalError(f"there is no entry {index}", id="journal.no_entry", want=f"below {self.size}")
        if not rows[0][4] and index < self.minimum:
            raise JournalError(f"entry {index} was pruned", id="journal.pruned", want=f"{self.minimum} or above")
        return _entry(rows[0])

    def entries(
        self, kind: Kind | None = None, run: str | None = None, start: int = 0, limit: int = 1000
    ) -> list[Entry]:
        """Entries from index `start` on, oldest first, at most `limit`; only of one kind or one run if asked.

        Pruned ones are left out. Sealed ones are opened where their clear text is there."""
        where: list[str] = ["i >= ?", "length(raw) > 0"]
        values: list[int | str] = [start]
        for column, wanted in (("kind", kind), ("run", run)):
            if wanted is not None:
                where.append(f"{column} = ?")
                values.append(wanted)
        sql = f"{_ENTRIES} {' and '.join(where)} order by i limit ?"
        return [_entry(row) for row in self._all(sql, *values, min(limit, MAX_PAGE))]

    def latest(self, kind: Kind, limit: int, *, below: int = 1 << 62) -> list[Entry]:
        """The last `limit` entries of one kind, of those below an index, oldest first, whatever the limit of a page."""
        sql = f"{_ENTRIES} kind = ? and i < ? and length(raw) > 0 order by i desc limit ?"
        return [_entry(row) for row in reversed(self._all(sql, kind, below, limit))]

    def raws(self, first: int, end: int) -> list[bytes]:
        """The bytes of the entries from `first` to `end` that were not pruned."""
        return [entry.raw for entry in self.entries(start=first, limit=end - first) if entry.index < end]

    def runs(self, start: int = 0, limit: int = 1000) -> list[Entry]:
        """The receipts, oldest first."""
        return self.entries("receipt", start=start, limit=limit)

    def receipt(self, run: str) -> Entry:
        """The receipt of a run. JournalError `journal.no_run` if there is none."""
        found = self.entries("receipt", run, limit=1)
        if not found:
            raise JournalError(
                f"no receipt of run {run[:40]!r}", id="journal.no_run", hint="`pointcall log list` shows the runs"
            )
        return found[0]

    def blob(self, sha256: str) -> bytes:
        """Content by its digest (hex). JournalError `journal.no_blob`; DamagedError if it changed."""
        rows = self._all("select data from blob where sha256 = ?", bytes.fromhex(sha256))
        if not rows:
            raise JournalError(f"no content with digest {sha256}", id="journal.no_blob")
        data = bytes(rows[0][0])
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(f"the content {sha256}", want=sha256, got=hashlib.sha256(data).hexdigest())
        return data

    def has_blob(self, sha256: str) -> bool:
        return bool(self._all("select 1 from blob where sha256 = ?", bytes.fromhex(sha256)))

    @property
    def erased(self) -> int:
        """The clear texts of all entries below it were erased for their age; single ones above may be, too."""
        return int(self._one("select value from meta where key = 'erased'")[0])

    def stray_openings(self) -> list[int]:
        """Indices of clear texts whose entry was pruned: nothing we write leaves one."""
        return [int(row[0]) for row in self._all("select i from entry where length(raw) = 0 and text is not null")]

    def cosigned(self) -> list[tuple[Checkpoint, tuple[str, ...]]]:
        """Checkpoints that witnesses signed, smallest tree first, each with the verifier keys of its witnesses."""
        rows = self._all("select note, witnesses from cosigned order by size")
        try:
            return [(Checkpoint.parse(bytes(note)), tuple(keys.split("\n"))) for note, keys in rows]
        except MalformedError as error:
            raise damaged("a cosigned checkpoint", want="a checkpoint", got=error.id) from error

    def blobs(self) -> list[str]:
        """The digests (hex) of all content."""
        return [bytes(row[0]).hex() for row in self._all("select sha256 from blob order by sha256")]

    def highest_sequence(self, name: str) -> int | None:
        """The highest sequence of this manifest that was ever armed here, or None."""
        rows = self._all("select number from sequence where name = ?", name)
        return int(rows[0][0]) if rows else None

    def count(self, kind: str) -> int:
        """How many entries of a kind there are."""
        return int(self._one("select count(*) from entry where kind = ?", kind)[0])

    def sequence_digest(self, name: str) -> str | None:
        """SHA-256 (hex) of the manifest that had the highest sequence, or None."""
        rows = self._all("select digest from sequence where name = ?", name)
        return str(rows[0][0]) if rows else None

    def checkpoints(self) -> list[Checkpoint]:
        """The last checkpoint of every epoch key, smallest tree first."""
        return [_checkpoint(row) for row in self._all(f"{_CHECKPOINTS} order by size")]

    def head(self) -> Checkpoint | None:
        """The latest checkpoint."""
        rows = self._all(f"{_CHECKPOINTS} order by size desc limit 1")
        return _checkpoint(rows[0]) if rows else None

    def tree(self) -> Tree:
        """The Merkle tree of all entries now, from their stored leaf hashes; it only grows."""
        with self._growing:
            rows = self._all("select leaf from entry where i >= ? order by i", self._tree.size)
            self._tree.extend(bytes(row[0]) for row in rows)
            return self._tree

    def proof(self, index: int, checkpoint: Checkpoint) -> Proof:
        """The place of an entry under a checkpoint of this log. AssertionError if the checkpoint does not cover it."""
        assert index < checkpoint.size, f"a checkpoint of size {checkpoint.size} does not cover entry {index}"
        return Proof(index, tuple(self.tree().inclusion(index, checkpoint.size)), checkpoint)

    def consistency(self, since: Checkpoint, checkpoint: Checkpoint) -> Consistency:
        """The proof of growth from an earlier checkpoint to one of this log. It holds only if there was growth.

        AssertionError where the earlier one is larger."""
        assert since.size <= checkpoint.size, f"{since.size} entries are not before {checkpoint.size}"
        path = self.tree().consistency(since.size, checkpoint.size)
        return Consistency(since.origin, since.size, since.root, tuple(path))

    def _one(self, sql: str, *values: Any) -> Any:
        return self._all(sql, *values)[0]

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._reading:
            try:
                self._db = self._db or connect_read_only(self.path)
                return self._db.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise DamagedError(
                    f"the journal cannot be read: {error}", got=str(self.path), hint="restore it from the mirror"
                ) from error


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. Works on a folder without write permission while no writer has it open."""
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        db.execute("select 1 from sqlite_schema").fetchall()
    except sqlite3.OperationalError:  # no -wal file, and none can be made: nobody is writing
        db.close()
        return sqlite3.connect(uri + "&immutable=1", uri=True, isolation_level=None, check_same_thread=False)
    except sqlite3.DatabaseError:  # not a database: check_format says so
        pass
    return db


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """JournalError unless this is a journal of the schema that this program reads."""
    try:
        application, version = (
            db.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
    except sqlite3.DatabaseError as error:
        raise JournalError("the file is no journal", id="journal.format", want="SQLite", got=str(error)) from error
    if application != APPLICATION_ID:
        raise JournalError(
            "the file is no journal", id="journal.format", want=hex(APPLICATION_ID), got=hex(application)
        )
    if version != SCHEMA_VERSION:
        raise JournalError(
            f"the journal at {path} has another schema",
            id="journal.schema",
            want=str(SCHEMA_VERSION),
            got=str(version),
            hint="an older journal is migrated when the executor opens it; a newer one needs a newer pointcall",
        )


def damaged(what: str, *, want: str, got: str) -> DamagedError:
    """The error for something on disk that is not what was written."""
    return DamagedError(
        f"{what} is not what was written",
        want=want,
        got=got,
        hint="the storage failed or somebody changed it; keep the file, compare with the mirror, start a new journal",
    )


def _entry(row: tuple[int, bytes, str, str | None, bytes, bytes | None, str | None]) -> Entry:
    index, leaf, kind, run, raw, salt, text = row
    opening = Opening(bytes(salt), text) if salt is not None and text is not None else None
    try:
        found = parse_entry(index, bytes(raw), opening)
    except MalformedError as error:
        if error.id == "entry.opening" and leaf_hash(raw) == leaf:
            raise damaged(
                f"the clear text of entry {index}", want="what the leaf committed to", got=error.got
            ) from error
        raise damaged(f"entry {index}", want="a log entry", got=error.id) from error
    if (found.leaf_hash, found.kind, found.run) != (leaf, kind, run):
        raise damaged(f"entry {index}", want=f"{kind} {run} {leaf.hex()}", got=f"{found.kind} {found.run}")
    return found


def _checkpoint(row: tuple[str, int, bytes, bytes]) -> Checkpoint:
    key_id, size, root, note = row
    try:
        found = Checkpoint.parse(bytes(note))
    except MalformedError as error:
        raise damaged(f"the checkpoint of size {size}", want="a checkpoint", got=error.id) from error
    if (found.signatures[0].key_id.hex(), found.size, found.root) != (key_id, size, root):
        raise damaged(f"the checkpoint of size {size}", want=f"{size} {root.hex()}", got=f"{found.size}")
    return found


def verified_tree(db: sqlite3.Connection) -> Tree:
    """The tree of what is on disk: every leaf hashed again, every checkpoint compared. DamagedError names the entry."""
    tree, due = Tree(), [_checkpoint(row) for row in db.execute(f"{_CHECKPOINTS} order by size desc")]
    (minimum,) = db.execute("select value from meta where key = 'minimum'").fetchone()
    for index, leaf, kind, raw in db.execute("select i, leaf, kind, raw from entry order by i"):
        if index != tree.size:
            raise damaged(f"entry {tree.size}", want=f"entry {tree.size}", got=f"entry {index}")
        pruned = not raw and index < int(minimum) and kind != "epoch-open"
        if len(leaf) != HASH_BYTES or (not pruned and leaf_hash(raw) != leaf):
            raise damaged(f"entry {index}", want=leaf.hex(), got=leaf_hash(raw).hex())
        tree.add(leaf)
        while due and due[-1].size == tree.size:
            signed = due.pop()
            if tree.root() != signed.root:
                raise damaged(f"an entry before {tree.size}", want=f"root {signed.root.hex()}", got=tree.root().hex())
    if due:
        raise damaged(f"entry {tree.size}", want=f"{due[0].size} entries, as signed", got=f"{tree.size} entries")
    return tree
