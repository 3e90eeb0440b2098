"""The central store: a copy of many nodes' logs in PostgreSQL that accepts only growth, and shipping to it.

A node sends exactly what is missing, in bounded batches, as often as it likes: a batch that is there already changes
nothing, a link that breaks loses nothing. The copy moves forward only under a checkpoint whose root is that of the
entries it holds; so it is a witness too, and a fork or a rollback is refused and stays visible.
mirror tables: trusted by their readers only as far as they check the log again. Spec: docs/spec/mirror.md.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pointcall_attest import dsse
from pointcall_attest.entry import outline, parse_entry
from pointcall_attest.errors import AttestError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import Checkpoint, Verifier
from pointcall_attest.log.frontier import Frontier
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.pack import opening_of, signer_of
from pointcall_executor.journal_reader import JournalReader
from pointcall_runbook.errors import PointcallError

if TYPE_CHECKING:
    import psycopg

_Row: TypeAlias = tuple[int, bytes, str, str | None, bytes]  # index, leaf hash, kind, run, raw

MAX_BATCH_ENTRIES: Final = 1_000
MAX_BATCH_BYTES: Final = 1024 * 1024
FEW_BYTES: Final = 64 * 1024  # sent without a round trip for each statement; more is quicker with COPY
MIN_BATCH_BYTES: Final = (
    8 * 1024
)  # what a link with 2 s latency that loses 30 % of its packets carries within the bounds
# Seconds for connecting, milliseconds for a link that does not answer to what we sent, seconds before we ask whether it
# is there at all while we wait for the answer.
_BOUNDS: Final = {
    "connect_timeout": "120", "tcp_user_timeout": "180000", "keepalives_idle": "60", "keepalives_interval": "20",
    # The same for the server's side: what a node that is gone has begun must not keep the next one waiting.
    "options": "-c statement_timeout=300000 -c idle_in_transaction_session_timeout=180000 -c tcp_user_timeout=180000"
    " -c tcp_keepalives_idle=60 -c tcp_keepalives_interval=20 -c tcp_keepalives_count=6",
}  # fmt: skip

BRIEF_S: Final = 10  # for a question that somebody waits for: to connect, and once more for the answer
_BRIEF: Final = {
    "connect_timeout": f"{BRIEF_S}", "tcp_user_timeout": f"{BRIEF_S * 1000}",
    "options": f"-c statement_timeout={BRIEF_S * 1000} -c tcp_user_timeout={BRIEF_S * 1000}"
    f" -c idle_in_transaction_session_timeout={BRIEF_S * 1000}",
}  # fmt: skip

_LEAST_ENTRY_BYTES: Final = 128

_SCHEMA: Final = """
create table if not exists log (
  origin text primary key, frontier bytea not null, checkpoint bytea, refused text);
create table if not exists entry (
  origin text not null references log, i bigint not null, leaf bytea not null, kind text not null, run text,
  raw bytea not null, primary key (origin, i));
create index if not exists entry_run on entry (run) where run is not null;
create table if not exists epoch (
  origin text not null references log, key_id bytea not null, verifier text not null, primary key (origin, key_id));
"""


class MirrorError(PointcallError):
    """The mirror refuses: what was sent is not a growth of what it has."""

    id = "mirror.error"


@dataclass(frozen=True, slots=True)
class Held:
    """What a mirror has of one log. `covered` entries are under a checkpoint, the rest waits for one."""

    size: int
    covered: int


@dataclass(slots=True)
class Pace:
    """How much of the log is sent at once: twice as much after each success, the least again after a failure."""

    batch_bytes: int = MIN_BATCH_BYTES

    def went(self) -> None:
        self.batch_bytes = min(self.batch_bytes * 2, MAX_BATCH_BYTES)

    def failed(self) -> None:
        self.batch_bytes = MIN_BATCH_BYTES


class Mirror:
    """One connection to a mirror database. The caller opens, reopens and closes the connection."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self._db = db

    def create(self) -> None:
        """Make the tables if they are not there."""
        with self._db.transaction():
            self._db.execute(_SCHEMA)

    def held(self, origin: str) -> Held:
        """How far the mirror is."""
        row = self._db.execute("select frontier, checkpoint from log where origin = %s", (origin,)).fetchone()
        if row is None:
            return Held(0, 0)
        covered = Checkpoint.parse(bytes(row[1])).size if row[1] else 0
        return Held(Frontier.parse(bytes(row[0])).size, covered)

    def put(self, origin: str, first: int, raws: Sequence[bytes]) -> Held:
        """Append entries from index `first` on; what is there already must be the same and is skipped.

        MirrorError `mirror.gap`, `mirror.fork` (another entry at a known index) or `mirror.entry` (one that is no
        entry, or opens an epoch with another key than its own). Durable on return. Other signatures are for readers.
        """
        few = sum(map(len, raws)) <= FEW_BYTES
        with self._db.pipeline() if few else nullcontext(), self._db.transaction():
            frontier, last = self._locked(origin)
            if first > frontier.size:
                raise MirrorError(
                    "entries are missing in between", id="mirror.gap", want=str(frontier.size), got=str(first)
                )
            known = min(frontier.size - first, len(raws))
            if known:
                self._compare(origin, first, raws[:known])
            store = self._insert if few else self._copy
            self._open_epochs(origin, store(origin, frontier, raws[known:]))
            self._db.execute("update log set frontier = %s where origin = %s", (frontier.encode(), origin))
        return Held(frontier.size, Checkpoint.parse(last).size if last else 0)

    def cover(self, text: bytes) -> Held:
        """Accept a checkpoint of everything that is held. MirrorError `mirror.checkpoint` where its size, root or
        signature is another; the refusal is remembered."""
        note = Checkpoint.parse(text)
        with self._db.pipeline(), self._db.transaction():
            frontier, last = self._locked(note.origin)
            why = self._objection(note, frontier, last)
            if why is None:
                self._db.execute("update log set checkpoint = %s where origin = %s", (note.text, note.origin))
            else:
                self._db.execute("update log set refused = %s where origin = %s", (why, note.origin))
        if why is not None:
            raise MirrorError(
                f"the checkpoint is refused: {why}",
                id="mirror.checkpoint",
                want=f"{frontier.size} {frontier.root().hex()}",
                got=f"{note.size} {note.root.hex()}",
                hint="the log was rolled back or forked, or another node uses its name",
            )
        return Held(frontier.size, note.size)

    def logs(self) -> list[dict[str, Any]]:
        """Every log that is held: its name, how far, and the last refusal."""
        rows = self._db.execute("select origin, refused from log order by origin").fetchall()
        out = []
        for origin, refused in rows:
            held = self.held(origin)
            out.append({"log": origin, "size": held.size, "covered": held.covered, "refused": refused})
        return out

    def verifiers(self, origin: str) -> list[Verifier]:
        """The checkpoint keys of the epochs of a log."""
        rows = self._db.execute("select verifier from epoch where origin = %s", (origin,)).fetchall()
        return [Verifier.parse(row[0]) for row in rows]

    def source(self, origin: str) -> MirroredLog:
        """A log as it is held, to be written as tiles. MirrorError `mirror.no_log`."""
        row = self._db.execute("select checkpoint from log where origin = %s", (origin,)).fetchone()
        if row is None:
            raise MirrorError("the mirror holds no such log", id="mirror.no_log", got=origin[:200])
        note = Checkpoint.parse(bytes(row[0])) if row[0] else None
        return MirroredLog(self._db, origin, note)

    def _locked(self, origin: str) -> tuple[Frontier, bytes | None]:
        """This log's row, locked until the transaction ends; made if it is new."""
        sql = (
            "insert into log (origin, frontier) values (%s, %s) on conflict (origin) do update set origin = log.origin"
            " returning frontier, checkpoint"
        )
        row = self._db.execute(sql, (origin, Frontier().encode())).fetchone()
        assert row is not None, "it was just made"
        return Frontier.parse(bytes(row[0])), row[1] and bytes(row[1])

    def _compare(self, origin: str, first: int, raws: Sequence[bytes]) -> None:
        sql = "select leaf from entry where origin = %s and i >= %s order by i limit %s"
        rows = self._db.execute(sql, (origin, first, len(raws))).fetchall()
        for index, ((leaf,), raw) in enumerate(zip(rows, raws, strict=True), first):
            if bytes(leaf) != leaf_hash(raw):
                raise MirrorError(
                    f"entry {index} is another one", id="mirror.fork", want=bytes(leaf).hex(), got=leaf_hash(raw).hex()
                )

    def _insert(self, origin: str, frontier: Frontier, raws: Sequence[bytes]) -> list[Verifier]:
        """As `_copy`, for few entries on a far link: nothing waits for an answer in between."""
        keys: list[Verifier] = []
        rows = [(origin, *_appended(frontier, raw, keys)) for raw in raws]
        if rows:
            self._db.cursor().executemany("insert into entry values (%s, %s, %b, %s, %s, %b)", rows)
        return keys

    def _copy(self, origin: str, frontier: Frontier, raws: Sequence[bytes]) -> list[Verifier]:
        """Append the entries to the table and to the frontier; the checkpoint keys of the epochs that open in them.

        The database stores what came while the next is parsed here."""
        keys: list[Verifier] = []
        if raws:
            sql = "copy entry (origin, i, leaf, kind, run, raw) from stdin with (format binary)"
            with self._db.cursor().copy(sql) as copy:
                copy.set_types(("text", "int8", "bytea", "text", "text", "bytea"))
                for raw in raws:
                    copy.write_row((origin, *_appended(frontier, raw, keys)))
        return keys

    def _open_epochs(self, origin: str, keys: Sequence[Verifier]) -> None:
        if keys:
            sql = "insert into epoch values (%s, %s, %s) on conflict do nothing"
            self._db.cursor().executemany(sql, [(origin, key.key_id, str(key)) for key in keys])

    def _objection(self, note: Checkpoint, frontier: Frontier, last: bytes | None) -> str | None:
        if last is not None and note.size < Checkpoint.parse(last).size:
            return f"size {note.size} was passed before"
        if note.size != frontier.size:
            return f"size {note.size}, {frontier.size} entries are held"
        if note.root != frontier.root():
            return f"another root at size {note.size}"
        return (
            None
            if any(_is_signed(note, key) for key in self.verifiers(note.origin))
            else "signed by no epoch of this log"
        )


class MirroredLog:
    """One log of a mirror as the source of a tile directory, up to its last checkpoint."""

    def __init__(self, db: psycopg.Connection[Any], origin: str, note: Checkpoint | None) -> None:
        self._db, self._origin, self._note = db, origin, note

    def head(self) -> Checkpoint | None:
        return self._note

    def tree(self) -> Tree:
        assert self._note is not None, "there is no checkpoint"
        sql = "select leaf from entry where origin = %s and i < %s order by i"
        return Tree(bytes(row[0]) for row in self._db.execute(sql, (self._origin, self._note.size)))

    def raws(self, first: int, end: int) -> list[bytes]:
        """The entries from `first` to `end`."""
        sql = "select raw from entry where origin = %s and i >= %s and i < %s order by i"
        return [bytes(row[0]) for row in self._db.execute(sql, (self._origin, first, end))]


def connect(address: str) -> psycopg.Connection[Any]:
    """A connection to a mirror, with its tables, that gives up on a dead link within bounded time.

    MirrorError `mirror.driver` without psycopg, `mirror.address` for what is no connection string; psycopg.Error where
    the database cannot be reached.
    """
    db = _opened(address, _BOUNDS)
    try:
        _make_tables(db)
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def briefly(address: str) -> Iterator[Mirror]:
    """A mirror for one short question. Errors as `connect`; over after twice `BRIEF_S` also where the link or the
    server says nothing at all."""
    with _opened(address, _BRIEF) as db, socket.socket(fileno=os.dup(db.fileno())) as line:
        cut = threading.Timer(BRIEF_S, _cut, (line,))  # the driver waits for an answer without end
        cut.daemon = True
        cut.start()
        try:
            _make_tables(db)
            yield Mirror(db)
        finally:
            cut.cancel()


def _cut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _opened(address: str, bounds: Mapping[str, str]) -> psycopg.Connection[Any]:
    try:
        import psycopg
        from psycopg import conninfo
    except ImportError as error:
        raise MirrorError(
            "the PostgreSQL driver is not installed",
            id="mirror.driver",
            want="psycopg",
            got=str(error),
            hint="install the extra `fleet`",
        ) from error
    try:
        words = conninfo.make_conninfo(address, **bounds)
    except psycopg.ProgrammingError:
        raise MirrorError("that is no connection string of PostgreSQL", id="mirror.address") from None
    return psycopg.connect(words, autocommit=True)


def _make_tables(db: psycopg.Connection[Any]) -> None:
    there = db.execute("select to_regclass('log'), to_regclass('entry'), to_regclass('epoch')").fetchone()
    if there is None or None in there:
        Mirror(db).create()


def ship(reader: JournalReader, mirror: Mirror, pace: Pace | None = None) -> Held:
    """Bring the mirror to the journal's latest checkpoint, sending exactly what it has not.

    Call it again after any failure, over a new connection, with the same `pace`: every batch that arrived stays, and
    the next is one that a bad link can carry. Errors of the connection pass through.
    """
    pace = pace or Pace()
    origin, head = reader.origin, reader.head()
    held = mirror.held(origin)
    if head is None or head.size <= held.covered:
        return held
    for first, raws in _batches(reader, held.size, head.size, pace):
        try:
            held = mirror.put(origin, first, raws)
        except Exception:
            pace.failed()
            raise
        pace.went()
    return mirror.cover(head.text) if held.size == head.size else held


def _batches(reader: JournalReader, start: int, end: int, pace: Pace) -> Iterator[tuple[int, list[bytes]]]:
    """The raw entries from `start` to `end`, in pieces that fit a batch."""
    while start < end:
        raws: list[bytes] = []
        limit = min(end - start, MAX_BATCH_ENTRIES, pace.batch_bytes // _LEAST_ENTRY_BYTES)
        for entry in reader.entries(start=start, limit=limit):
            if raws and sum(map(len, raws)) + len(entry.raw) > pace.batch_bytes:
                break
            if entry.index != start + len(raws):
                break  # a reader passes over what was pruned
            raws.append(entry.raw)
        if not raws:
            raise MirrorError(f"entry {start} was pruned before it was shipped", id="mirror.pruned", want=str(start))
        yield start, raws
        start += len(raws)


def _row(index: int, raw: bytes) -> _Row:
    try:
        kind, run = outline(raw)
    except AttestError as error:
        raise MirrorError(
            f"entry {index} is no entry", id="mirror.entry", got=f"{error.message} [{error.id}]"
        ) from None
    return index, leaf_hash(raw), kind, run, raw


def _appended(frontier: Frontier, raw: bytes, keys: list[Verifier]) -> _Row:
    """The row of the next entry, which is in the frontier now; its key is among `keys` if it opens an epoch."""
    index, leaf, kind, *_ = row = _row(frontier.size, raw)
    if kind == "epoch-open":
        keys.append(_checkpoint_key(index, raw))
    frontier.add(leaf)
    return row


def _checkpoint_key(index: int, raw: bytes) -> Verifier:
    """The checkpoint key of an opening that its own epoch key signed."""
    try:
        opening = opening_of(parse_entry(index, raw))
        key = dsse.public_key(base64.b64decode(opening.public_key))
        dsse.verify(dsse.parse(raw), key)
        if dsse.keyid_of(dsse.spki(key)) != dsse.parse(raw).keyid:
            raise MirrorError("an epoch opens with another key", id="mirror.entry", got=f"entry {index}")
        return signer_of(opening)
    except (AttestError, ValueError) as error:
        raise MirrorError(f"entry {index} opens no epoch", id="mirror.entry", got=str(error)[:200]) from None


def _is_signed(note: Checkpoint, key: Verifier) -> bool:
    try:
        checkpoints.verify(note, key)
    except AttestError:
        return False
    return True
