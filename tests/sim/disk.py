"""The disk: what survives a crash, and a journal on it with the promises of the real one.

Group commit, failing commits (not persisted, or persisted and reported as failed), a full disk, crashes that lose what
is not yet synced, commits that a crash tears off. The real journal on real and failing file systems: tests/fault/log.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pointcall_executor.journal import JournalError, StorageError
from tests.sim.scheduler import MILLISECOND, SECOND, Process, Scheduler
from tests.sim.threads import Future

MAX_BATCH = 128


@dataclass(slots=True)
class Leaf:
    """An entry before it is bytes: what reconciling, and the auditor, read of one."""

    kind: str
    run: str | None
    body: dict[str, Any]
    epoch: str
    at: datetime = datetime(2026, 11, 23, tzinfo=UTC)
    index: int = -1
    closed: bool = False


@dataclass(slots=True)
class Disk:
    """What is durable."""

    entries: list[Leaf] = field(default_factory=list)
    by_kind: dict[str, list[Leaf]] = field(default_factory=dict)
    by_run: dict[str, list[Leaf]] = field(default_factory=dict)
    blobs: dict[str, None] = field(default_factory=dict)
    sequences: dict[str, tuple[int, str]] = field(default_factory=dict)
    signed: int = 0  # entries under the last checkpoint
    full: bool = False
    fail_one_in: int = 0  # commits
    slow_one_in: int = 0
    base_ns: int = MILLISECOND
    locked: Process | None = None

    def keep(self, leaves: Sequence[Leaf]) -> None:
        """They are durable from now on."""
        self.entries.extend(leaves)
        for leaf in leaves:
            self.by_kind.setdefault(leaf.kind, []).append(leaf)
            if leaf.run is not None:
                self.by_run.setdefault(leaf.run, []).append(leaf)


class Journal:
    """The one writer, as `pointcall_executor.journal.Journal` has it. `on_durable` sees every entry once it is kept."""

    def __init__(self, disk: Disk, scheduler: Scheduler, process: Process, on_durable: Callable[[Leaf], None]) -> None:
        if disk.locked is not None and not disk.locked.dead:
            raise JournalError("another process writes this journal", id="journal.busy")
        disk.locked = process
        self._disk, self._scheduler, self._process, self._on_durable = disk, scheduler, process, on_durable
        self._jobs: collections.deque[tuple[Callable[[], Any], Future]] = collections.deque()
        self._committing = False
        self._new: list[Leaf] = []
        self._failed: Exception | None = None
        self._closed = False
        self._checkpointed_s = float("-inf")
        self.commits = 0
        self.on_submit: Callable[[Leaf], None] = lambda _leaf: None

    @property
    def failed(self) -> bool:
        return self._failed is not None

    def require(self) -> None:
        if self._failed is not None:
            raise self._stopped()

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _queue(self, work: Callable[[], Any]) -> Future:
        self._scheduler.alive()
        if self._failed is not None:
            raise self._stopped()
        assert not self._closed, "the journal is closed"
        future = Future(self._scheduler)
        self._jobs.append((work, future))
        if not self._committing:
            self._begin()
        return future

    def _stopped(self) -> StorageError:
        return StorageError("the storage of the journal failed", got=str(self._failed))

    def _begin(self) -> None:
        disk, chance = self._disk, self._scheduler.random
        self._committing = True
        delay = int(disk.base_ns * (0.2 + chance.random()))
        if disk.slow_one_in and chance.random() * disk.slow_one_in < 1:
            delay += chance.randrange(5 * SECOND)
        self._scheduler.after(delay, self._commit)

    def _commit(self) -> None:
        if self._process.dead:
            return
        batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))]
        disk, chance = self._disk, self._scheduler.random
        failing = disk.full or (disk.fail_one_in and chance.random() * disk.fail_one_in < 1)
        self.commits += 1
        if failing:
            self._failed = OSError(28, "No space left on device") if disk.full else OSError(5, "Input/output error")
            if not disk.full and chance.random() < 0.5:  # persisted, and reported as failed
                self._write(batch)
            while self._jobs:
                batch.append(self._jobs.popleft())
            for _, future in batch:
                future.set_exception(self._stopped())
            return
        for future, value, refused in self._write(batch):
            if refused is None:
                future.set_result(value)
            else:
                future.set_exception(refused)
        self._committing = False
        if self._jobs:
            self._begin()

    def _write(self, batch: Sequence[tuple[Callable[[], Any], Future]]) -> list[tuple[Future, Any, Exception | None]]:
        done: list[tuple[Future, Any, Exception | None]] = []
        self._new = []
        for work, future in batch:
            try:
                done.append((future, work(), None))
            except JournalError as refused:
                done.append((future, None, refused))
        self._disk.keep(self._new)
        for leaf in self._new:
            self._on_durable(leaf)
        return done

    def lose_power(self) -> None:
        """The process dies: what is queued is gone, unless the commit under way had just reached the disk."""
        if self._committing and self._jobs and self._failed is None and self._scheduler.random.random() < 0.5:
            self._write([self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))])
        self._jobs.clear()

    def _insert(self, leaf: Leaf) -> int:
        leaf.index = len(self._disk.entries) + len(self._new)
        self._new.append(leaf)
        return leaf.index

    def submit(self, leaf: Leaf, _opening: object = None, _outlined: object = None) -> Future:
        self.on_submit(leaf)
        return self._queue(lambda: self._insert(leaf))

    def enqueue(self, leaf: Leaf, _opening: object = None, _outlined: object = None) -> Future:
        return self.submit(leaf)

    def settle(self, waiting: Future) -> Any:
        return waiting.result()

    def append(self, leaf: Leaf, _opening: object = None) -> int:
        index: int = self.submit(leaf).result()
        return index

    def put_blob(self, data: bytes) -> str:
        name = repr(data)
        self._queue(lambda: self._disk.blobs.setdefault(name)).result()
        return "0" * 64

    def blob(self, sha256: str) -> bytes:
        """None is kept: services here have no kinds."""
        raise JournalError(f"no content with digest {sha256}", id="journal.no_blob")

    def raise_sequence(self, name: str, number: int, digest: str) -> None:
        def raise_() -> None:
            known = self._disk.sequences.get(name)
            if known is not None and (number < known[0] or (number == known[0] and digest != known[1])):
                raise JournalError("a manifest may not go back", id="journal.sequence")
            self._disk.sequences[name] = (number, digest)

        self._queue(raise_).result()

    def checkpoint(self, sign: Callable[[str, int, bytes], Any], now_s: float, *, force: bool = False) -> Any:
        def sign_() -> Any:
            size = len(self._disk.entries)
            if size == self._disk.signed or (not force and now_s - self._checkpointed_s < 1.0):
                return self._disk.signed or None
            assert size > self._disk.signed, "a checkpoint only grows"
            self._disk.signed, self._checkpointed_s = size, now_s
            return sign("sim", size, b"")

        return self._queue(sign_).result()

    def close(self) -> None:
        self._scheduler.alive()
        while self._committing and self._failed is None:
            self._scheduler.sleep(MILLISECOND)
        self._closed = True
        self._disk.locked = None

    # ---- reading ---------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return len(self._disk.entries)

    def entries(self, kind: str | None = None, run: str | None = None, start: int = 0, limit: int = 1000) -> list[Leaf]:
        if run is not None:
            chosen = self._disk.by_run.get(run, [])
        elif kind is not None:
            chosen = self._disk.by_kind.get(kind, [])
        else:
            chosen = self._disk.entries[start : start + limit]
        return [leaf for leaf in chosen if leaf.index >= start and kind in (None, leaf.kind)][:limit]

    def latest(self, kind: str, limit: int, *, below: int = 1 << 62) -> list[Leaf]:
        return [leaf for leaf in self._disk.by_kind.get(kind, []) if leaf.index < below][-limit:]

    def highest_sequence(self, name: str) -> int | None:
        known = self._disk.sequences.get(name)
        return known[0] if known else None

    def sequence_digest(self, name: str) -> str | None:
        known = self._disk.sequences.get(name)
        return known[1] if known else None
