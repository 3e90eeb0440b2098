"""The recorder: the one hand that writes the log. Signs entries with the keys of the running epoch, and changes epochs.

Signing and queueing an entry is one step against a change of epoch: no entry names one epoch and is signed by another,
and none of an epoch comes after its close. Time and randomness of the process are read here, at the shell.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_attest.commitment import SALT_BYTES
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.receipt import Receipt
from pointcall_attest.sealing import HIDDEN, Opening
from pointcall_attest.statement import MAX_TEXT
from pointcall_executor.journal import Journal
from pointcall_keys.node import EpochKeys

RECONCILED_MAX: Final = 4096  # entries of a kind that are looked through for open ends at start
PAUSE_MAX: Final = timedelta(days=1)  # the longest that can be asked for: how long one lasts whose text was erased
RECONCILED: Final[tuple[entry.Kind, ...]] = ("intent", "outcome", "config")


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that was asked for; `until` is wall-clock time."""

    reason: str
    until: datetime


@dataclass(slots=True)
class Left:
    """What an earlier executor left in force, as its log says."""

    paused: Pause | None = None
    disarmed: str | None = None  # why, where a person disarmed and nobody has armed since
    settled: int | None = None  # the index of the entry that said that, or that something was armed
    escalations: dict[str, int] = field(default_factory=dict)  # run -> code, of those that nobody acknowledged
    acted: list[tuple[str, str, datetime]] = field(default_factory=list)  # (action, target, when), oldest first
    failed: set[int] = field(default_factory=set)  # places in `acted` of what was not done as it should have been

    def passed_over(self, refused: Collection[int]) -> None:
        """What was not begun leaves its target as the one before it left it, as core/guard.py `settled` has it; that it
        was let through counts.

        The log cannot tell of one that was called off before its intent was written: that counted only while it ran.
        Nor does it say when the machine started: what failed before that and was refused after it is failed still.
        """
        before: dict[tuple[str, str], int] = {}
        for place, (action, target, _) in enumerate(self.acted):
            if place in refused and before.get((action, target)) not in self.failed:
                self.failed.discard(place)
            before[(action, target)] = place

    def note(self, item: entry.Entry) -> None:
        """One `config` entry, in the order of the log. What it means holds also where its text was erased."""
        detail: Mapping[str, Any] = item.body["detail"]
        match item.body["what"]:
            case "paused" if item.closed:
                self.paused = Pause("its reason was erased", item.at + PAUSE_MAX)
            case "paused":
                self.paused = Pause(str(detail["reason"]), datetime.fromisoformat(str(detail["until"])))
            case "resumed":
                self.paused = None
            case "disarmed" if item.closed:
                self.disarmed, self.settled = "its reason was erased", item.index
            case "disarmed" if detail.get("stays") == "yes":
                self.disarmed, self.settled = str(detail["reason"]), item.index
            case "kernel programs":  # written at every arming; while it stays disarmed, a person asked for it
                self.disarmed, self.settled = None, item.index
            case "escalated":
                self.escalations[str(detail.get("run", item.run))] = int(detail.get("code", 0))
            case "acknowledged":
                self.escalations.pop(str(detail.get("run", item.run)), None)


def disarmed(reason: str, *, stays: bool) -> entry.Config:
    """The entry that nothing is armed any more. `stays`: a person asked for it, so it holds until a person arms."""
    detail: dict[str, JsonValue] = {"reason": reason}
    return entry.Config(what="disarmed", detail=detail | ({"stays": "yes"} if stays else {}))


def refused(check: str, what: str, want: str, got: str, hint: str) -> entry.Refusal:
    """The entry of a refusal. An entry's texts are bounded; what was wanted or found may be long."""
    return entry.Refusal(check=check, what=what[:1000], want=want[:1000], got=got[:1000], hint=hint[:1000])


def ended(gone: Mapping[str, Sequence[str]], mode: str) -> entry.Config:
    """The entry that what an earlier executor left in force is so no more: kind -> how many, and which."""
    detail = {what: f"{len(targets)}: {', '.join(targets)}"[:MAX_TEXT] for what, targets in gone.items()}
    return entry.Config(what="ended at start", detail={"mode": mode, **detail})


class Recorder:
    """Thread-safe. Any failure of the journal reaches the caller, or `watch` for what nobody waited for."""

    def __init__(self, journal: Journal, chance: Callable[[int], bytes] = os.urandom) -> None:
        self.journal, self._chance = journal, chance
        self._keys: EpochKeys | None = None
        self._lock = threading.RLock()
        self._salts = b""
        self._unobserved: collections.deque[Future[int]] = collections.deque()  # its appends and pops are atomic

    @property
    def keys(self) -> EpochKeys:
        """The keys of the running epoch."""
        assert self._keys is not None, "no epoch is open"
        return self._keys

    def _salt(self) -> bytes:
        """32 random bytes, drawn in advance: a system call here would give up the interpreter lock at a bad time."""
        if len(self._salts) < SALT_BYTES:
            self._salts = self._chance(SALT_BYTES * 128)
        drawn, self._salts = self._salts[:SALT_BYTES], self._salts[SALT_BYTES:]
        return drawn

    def record(self, body: entry.Body, run: str | None = None) -> int:
        """Append an entry; its index, once it is durable."""
        with self._lock:
            waiting = self.journal.enqueue(*self._signed(body, run))
        return int(self.journal.settle(waiting))

    def submit(self, body: entry.Body, run: str | None = None) -> None:
        """Append without waiting; a failure is raised by the next `watch`."""
        with self._lock:
            waiting = self.journal.submit(*self._signed(body, run))
        self._unobserved.append(waiting)

    def receipt(self, receipt: Receipt) -> int:
        """Append a receipt; its index, once it is durable."""
        with self._lock:
            payload, opening = receipt.sealed(self._salt())
            waiting = self.journal.enqueue(self.keys.sign(payload), opening, ("receipt", receipt.run.id))
        return int(self.journal.settle(waiting))

    def erase(self, entries: Sequence[entry.Entry], reason: str, *, below: int = 0, forget: bool = True) -> int:
        """Delete the clear texts of these entries and of all below an index, and say so; the index of the entry.

        At most `entry.MAX_ERASED` at once. JournalError `journal.readers` where old pages are still read. Not `forget`:
        the caller calls `journal.forget` next.
        """
        named = [e for e in entries if e.opening is not None and e.index >= below]
        body = entry.Erase(commitments=tuple(str(e.commitment) for e in named), reason=reason, below=below)
        with self._lock:
            leaf, opening, _ = self._signed(body)
            index = self.journal.erase(leaf, opening, indices=[e.index for e in named])
        if forget:
            self.journal.forget()
        return index

    def prune(self, minimum: int, reason: str, retention_days: int) -> int:
        """Drop the entries below an index, and say so; the index of the entry. The caller checks the retention.

        JournalError `journal.prune` beyond the last checkpoint or back, `journal.readers` as for `erase`.
        """
        body = entry.Prune(minimum=minimum, reason=reason, retention_days=retention_days)
        going = self._disarmed_below(minimum)  # reading far back may take a while: only what is rare is looked at twice
        with self._lock:
            if going is not None:
                self.journal.flush()  # who has armed meanwhile may have written that, and not yet durably
                going = self._disarmed_below(minimum)
            if going is not None:
                self.record(disarmed(going, stays=True))
            leaf, opening, _ = self._signed(body)
            index = self.journal.prune(leaf, opening)
        self.journal.forget()
        return index

    def _disarmed_below(self, minimum: int) -> str | None:
        """Why a person has disarmed, where that holds still and only an entry below an index says it."""
        left = self._disarmed()
        return left.disarmed if left.settled is not None and left.settled < minimum else None

    def _signed(self, body: entry.Body, run: str | None = None) -> tuple[bytes, Opening | None, entry.Outline]:
        """The leaf of an entry with what is personal sealed, its opening, and what it is. The caller holds the lock."""
        keys, at, ktime_ns = self.keys, datetime.now(UTC), time.monotonic_ns()
        payload, opening = entry.sealed(body, at=at, ktime_ns=ktime_ns, epoch=keys.id, run=run, salt=self._salt())
        return keys.sign(payload), opening, entry.outline_of(body, run)

    def watch(self) -> None:
        """Raise the failure of any entry that nobody waited for, or of the journal itself, whoever met it first."""
        self.journal.require()
        for _ in range(len(self._unobserved)):
            future = self._unobserved.popleft()
            if future.done():
                future.result()
            else:
                self._unobserved.append(future)

    def checkpoint(self, *, force: bool = False) -> Checkpoint | None:
        """A signed checkpoint if one is due; `force`: one that covers everything there is."""
        with self._lock:
            note = self.journal.checkpoint(self.keys.sign_checkpoint, time.monotonic(), force=force)
        return Checkpoint.parse(note) if note else None

    def roll(self, keys: EpochKeys, opening: Callable[[str | None], bytes], reason: str) -> None:
        """Close the running epoch and open the next: the old key vouches for the new one and is wiped.

        `opening` makes the epoch-open leaf from the id of the epoch before (None: there is none).
        """
        with self._lock:
            old = self._keys
            if old is not None:
                self._close(old, keys, reason)
            self.journal.append(opening(old.id if old else None))
            self._keys = keys
            if old is not None:
                old.wipe()

    def _close(self, old: EpochKeys, following: EpochKeys | None, reason: str) -> None:
        leaf = old.certify_next(following, reason=reason, at=datetime.now(UTC), ktime_ns=time.monotonic_ns())
        self.journal.append(leaf)
        self.journal.checkpoint(old.sign_checkpoint, time.monotonic(), force=True)

    def close(self, reason: str) -> None:
        """Close the last epoch; its keys are wiped."""
        with self._lock:
            self._close(self.keys, None, reason)
            self.keys.wipe()

    def _recent(self) -> list[entry.Entry]:
        """The last entries of each kind that matters. Notifications have outcomes and no intents, so the outcomes may
        not reach as far back as the intents: what is missing is looked up run by run."""
        intents, outcomes, configs = (self.journal.latest(kind, RECONCILED_MAX) for kind in RECONCILED)
        since = outcomes[0].index if len(outcomes) == RECONCILED_MAX else 0
        runs = dict.fromkeys(item.run for item in intents if item.index < since and item.run is not None)
        older = [item for run in runs for item in self.journal.entries("outcome", run) if item.index < since]
        return [item for item in intents if item.index >= since or item.run is not None] + older + outcomes + configs

    def _disarmed(self, below: int = 1 << 62) -> Left:
        """Whether a person has disarmed, as far back as it takes: that has no end, however much was written since."""
        while True:
            entries, left = self.journal.latest("config", RECONCILED_MAX, below=below), Left()
            for item in entries:
                left.note(item)
            if left.settled is not None or len(entries) < RECONCILED_MAX:
                return left
            below = entries[0].index

    def reconcile(self) -> Left:
        """Give every intent that a crash left without its outcome an `unconfirmed` one, and say what is still in force.

        Looks through the last `RECONCILED_MAX` entries of each kind that matters; far fewer can be open at once.
        """
        recent = self._recent()
        opened: dict[tuple[str | None, str, str], int] = {}
        places: dict[tuple[str | None, str, str], int] = {}  # in `left.acted`
        refused: set[int] = set()  # places of what was let through and then not begun
        left = Left()
        for item in sorted(recent, key=lambda each: each.index):
            if item.kind in ("intent", "outcome"):
                key = (item.run, str(item.body["action"]), str(item.body["target"]))
                if item.kind == "outcome" and key[2] == HIDDEN and not opened.get(key):  # erased, its intent was not
                    key = next((k for k, count in opened.items() if count > 0 and k[:2] == key[:2]), key)
                # an outcome whose intent is out of sight says nothing about a later intent of the same words
                opened[key] = max(0, opened.get(key, 0) + (1 if item.kind == "intent" else -1))
                if item.kind == "intent" and item.run is not None:
                    places[key] = len(left.acted)
                    left.failed.add(places[key])  # until an outcome says otherwise
                    left.acted.append((str(item.body["action"]), str(item.body["target"]), item.at))
                elif item.kind == "outcome" and item.body["outcome"] == "applied":
                    left.failed.discard(places.get(key, -1))
                elif item.kind == "outcome" and item.body["outcome"] == "refused" and key in places:
                    refused.add(places[key])
            else:
                left.note(item)
        left.passed_over(refused)
        configs = [item.index for item in recent if item.kind == "config"]
        if left.settled is None and len(configs) >= RECONCILED_MAX:
            left.disarmed = self._disarmed(below=configs[0]).disarmed
        for run, action, target in (key for key, count in opened.items() if count > 0):
            if target == HIDDEN:
                continue  # nobody can say any more what an erased one was about
            detail: dict[str, JsonValue] = {"reason": "the executor ended before it knew"}
            body = entry.OutcomeBody(
                action=action, target=target, outcome="unconfirmed", detail=detail, postcondition="", undo=None
            )
            self.record(body, run)
        return left
