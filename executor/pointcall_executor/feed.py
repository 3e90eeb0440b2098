"""The feed: what happened on this node as one stream of short items, for people. Reads; decides nothing.

Two sources. The log is durable: its items come exactly once, also across restarts of the executor. Changes of circuits
that no runbook handles have no entry; they are kept in memory, at most `KEPT_MAX` of them, and what was overwritten
before somebody asked is counted. What an auditor verifies is the log itself, not this view of it.
Spec: docs/spec/api.md section 9.
"""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from pointcall_attest.entry import Entry, Kind
from pointcall_attest.printable import shown
from pointcall_executor.agent_api.errors import RequestError
from pointcall_executor.core.event import CircuitEvent, KernelEvent
from pointcall_executor.core.event import Kind as Record

KEPT_MAX: Final = 1024  # changes of circuits: 64 circuits that change every second for 16 s
PAGE: Final = 200  # items in one answer
WINDOW: Final = 512  # entries looked through at once
TEXT_MAX: Final = 400
_CURSOR: Final = re.compile(r"(0|[1-9][0-9]{0,17})\.([0-9a-f]{16})\.(0|[1-9][0-9]{0,17})")

Level = Literal["info", "warning", "alarm"]


class Entries(Protocol):
    """What the feed needs of the journal; JournalReader has it."""

    @property
    def size(self) -> int: ...

    def entries(self, kind: Kind | None = None, run: str | None = None, start: int = 0, limit: int = 1000) -> Any: ...


@dataclass(frozen=True, slots=True)
class FeedItem:
    """One thing that happened. `index` and `recorded`: its log entry; `id` and `hint` where something was refused."""

    at: str
    kind: str
    level: Level
    text: str
    run: str = ""
    id: str = ""
    hint: str = ""
    index: int = 0
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Items, oldest first. `missed` changes of circuits were overwritten; `more`: there is more already."""

    items: tuple[FeedItem, ...]
    cursor: str
    missed: int = 0
    restarted: bool = False
    more: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a circuit, numbered from 0 in this life of the executor."""

    number: int
    at: datetime
    record: CircuitEvent


class Changes:
    """The last changes of circuits. `noted` is called on the loop thread and only appends."""

    def __init__(self, instance: str, wall_ns: Callable[[int], int]) -> None:
        """`instance`: 16 hex digits of this life; `wall_ns` makes a wall-clock time of a monotonic one."""
        self.instance, self._wall_ns = instance, wall_ns
        self._kept: collections.deque[Change] = collections.deque(maxlen=KEPT_MAX)
        self._adding = threading.Lock()
        self.count = 0

    def noted(self, record: KernelEvent) -> None:
        """Keep it if it is about a circuit."""
        if isinstance(record, CircuitEvent):
            at = datetime.fromtimestamp(self._wall_ns(record.at_ns) / 1e9, UTC)
            with self._adding:
                self._kept.append(Change(self.count, at, record))
                self.count += 1

    def since(self, number: int) -> tuple[tuple[Change, ...], int, int]:
        """Those from `number` on, how many of them are gone, and the number of the next one to come."""
        with self._adding:
            kept = tuple(c for c in self._kept if c.number >= number)
            return kept, max(0, self.count - number - len(kept)), self.count


@dataclass(frozen=True, slots=True)
class _Cursor:
    index: int
    instance: str
    number: int

    def __str__(self) -> str:
        return f"{self.index}.{self.instance}.{self.number}"


def _parse(text: str) -> _Cursor:
    found = _CURSOR.fullmatch(text)
    if found is None:
        want = "the cursor of the answer before, or nothing"
        raise RequestError("that is no cursor", id="api.cursor", want=want, got=shown(text, 60))
    return _Cursor(int(found[1]), found[2], int(found[3]))


def page(reader: Entries, changes: Changes, cursor: str, last: int) -> FeedPage:
    """What happened since `cursor`. RequestError `api.cursor` for one that no answer gave."""
    size = reader.size  # read first: what comes meanwhile is for the next page
    if not cursor:
        kept, _, number = changes.since(0)
        past = sorted([*_newest(reader, size, last), *map(_changed, kept)], key=lambda item: item.at)
        return FeedPage(
            tuple(past[max(0, len(past) - last) :] if last else ()), str(_Cursor(size, changes.instance, number))
        )
    at = _parse(cursor)
    index = min(at.index, size)  # a log that is shorter than the cursor is another one: go on from its end
    restarted = at.instance != changes.instance
    window = reader.entries(start=index, limit=WINDOW)
    items = [_item(entry) for entry in window if entry.index < size]
    following = min(index + WINDOW, size)
    found = [item for item in items if item is not None]
    if len(found) > PAGE:
        found = found[:PAGE]
        following = found[-1].index + 1
    kept, missed, number = changes.since(0 if restarted else at.number)
    merged = sorted([*found, *map(_changed, kept)], key=lambda item: item.at)
    following_cursor = _Cursor(following, changes.instance, number)
    return FeedPage(tuple(merged), str(following_cursor), missed, restarted, following < size)


def _newest(reader: Entries, size: int, last: int) -> list[FeedItem]:
    """At least the last so many items of the log, oldest first; it is read backwards in windows."""
    found: list[FeedItem] = []
    end = size
    while end > 0 and len(found) < last:
        start = max(0, end - WINDOW)
        window = [_item(e) for e in reader.entries(start=start, limit=WINDOW) if e.index < end]
        found = [i for i in window if i is not None] + found
        end = start
    return found


def _item(entry: Entry) -> FeedItem | None:
    """An entry as people read it; None where another entry says it better, or nobody on call asks for it."""
    body = entry.body
    match entry.kind:
        case "receipt":
            return _run(entry)
        case "refusal":
            text = f"{body['what']}: want {body['want']}, got {body['got']}"
            return _of(entry, "refusal", "warning", text, id=body["check"], hint=body["hint"])
        case "lost":
            text = f"{body['count']} events of the sensor {body['sensor']} could not be delivered"
            return _of(entry, "lost", "alarm", text)
        case "outcome":
            return _outcome(entry)
        case "config":
            return _config(entry)
        case "epoch-open":
            armed = (
                f"manifest {body['manifest'][:16]} sequence {body['sequence']}" if body["sequence"] else "no manifest"
            )
            return _of(entry, "epoch", "info", f"epoch {entry.epoch[:16]} opened: {armed}, evidence {body['tier']}")
        case "epoch-close":
            return _of(entry, "epoch", "info", f"epoch {entry.epoch[:16]} closed: {body['reason']}")
        case "proposal":
            return _of(entry, "proposal", "info", f"{body['name']} by {body['author']}: {body['state']}")
        case "prune" | "erase":
            return _of(entry, "config", "info", f"{entry.kind}: {body['reason']}")
        case _:  # intents are in their run or outcome; accesses are for the auditor
            return None


def _of(entry: Entry, kind: str, level: Level, text: str, *, id: str = "", hint: str = "") -> FeedItem:
    return FeedItem(
        entry.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        kind,
        level,
        shown(text, TEXT_MAX),
        entry.run or "",
        id,
        shown(hint),
        entry.index,
    )


def _run(entry: Entry) -> FeedItem:
    """One line for a run: event, decision, what became of it, how long it took from event to effect."""
    receipt = entry.receipt()
    event, book = receipt.trigger.event, receipt.runbook.name
    if receipt.decision.trap is not None:
        text, level = f"{book} on {event}: trapped ({receipt.decision.trap}); nothing was done", "alarm"
        return _of(entry, "run", level, text)  # type: ignore[arg-type]
    acts = [f"{a.action} {a.target}: {_became(a.outcome, a.guard.check)}" for a in receipt.actions]
    line = receipt.timeline_ns
    took = f" ({(line.confirmed - line.event) / 1e6:.1f} ms)" if line.confirmed is not None else ""
    bad = {a.outcome for a in receipt.actions} & {"failed", "unconfirmed"}
    refused = any(a.outcome == "refused" for a in receipt.actions)
    item = _of(entry, "run", "info", f"{book} on {event}: {'; '.join(acts) or 'nothing to do'}{took}")
    return replace(item, level="alarm" if bad else "warning" if refused else "info")


def _became(outcome: str, check: str) -> str:
    return f"held back by {check}" if outcome == "refused" else outcome


def _outcome(entry: Entry) -> FeedItem | None:
    """By hand, at arming, or left open by a crash: every other outcome is in the receipt of its run."""
    body = entry.body
    outcome = body["outcome"]
    if entry.run is not None and outcome != "unconfirmed":
        return None
    reason = _reason(body["detail"])
    text = f"{body['action']} {body['target']}: {outcome}{f' ({reason})' if reason else ''}"
    level: Level = "info" if outcome in ("applied", "monitored") else "alarm"
    return _of(entry, "action", level, text)


def _config(entry: Entry) -> FeedItem:
    what, detail = str(entry.body["what"]), entry.body["detail"]
    if what == "kernel programs":
        return _of(entry, "config", "info", f"armed: {len(detail)} programs in the kernel")
    reason = _reason(detail)
    level: Level = "warning" if what in ("paused", "disarmed") else "info"
    return _of(entry, "config", level, f"{what}{f': {reason}' if reason else ''}")


def _reason(detail: Mapping[str, Any]) -> str:
    return str(detail.get("reason", ""))


_WORDS: Final[Mapping[Record, tuple[str, Level]]] = {
    Record.CIRCUIT_OPENED: ("opened", "warning"),
    Record.CIRCUIT_REOPENED: ("opened again: the probe failed", "warning"),
    Record.CIRCUIT_CLOSED: ("closed", "info"),
}


def _changed(change: Change) -> FeedItem:
    record = change.record
    word, level = _WORDS.get(record.kind, (record.kind.name.removeprefix("CIRCUIT_").lower(), "info"))
    after = f" after {record.failures} failures" if record.kind is Record.CIRCUIT_OPENED else ""
    text = f"circuit to {record.destination} {word}{after}"
    return FeedItem(change.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "circuit", level, text, recorded=False)
