"""What a person on call must see, as lines of text: what is wrong, what to do next, what is held back, what was done.

Pure: the status, the feed and the time come in. Every line says in words what its mark and colour say, so nothing is
lost on a terminal without colours. What is not known is said to be not known.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pointcall_executor.cli.connection import duration
from pointcall_executor.cli.status import WATCHING, arm_again, called, held_back, left, told_apart

Level = Literal["info", "warning", "alarm"]
MARKS: Final = {"info": " ", "warning": "!", "alarm": "‼"}
RECENT_S: Final = 900  # an alarm of the feed counts as wrong now for so long
HELD_S: Final = 900  # a refusal of the feed counts as held back for so long; what still waits is in the status
TODAY_S: Final = 72_000  # what is older is told with its date
SOON_S: Final = 86_400  # before a manifest ends
LATE_RENEWAL_MS: Final = 150_000  # renewing waits two minutes for runs in flight, and tries again every 30 s
PEOPLE_MAX: Final = 3  # escalations and approvals with a line of their own
LATE_COPY_S: Final = 60  # the default of the setting lag_seconds
UNSIGNED_MAX: Final = 1000  # entries after the newest checkpoint; one is made every second
_DIGEST: Final = re.compile(r"\b[0-9a-f]{40,}\b")
_LEVELS: Final = ("alarm", "warning", "info")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: how bad, what, and what to do about it (empty: nothing)."""

    level: Level
    text: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the executor said last. `status` None: it never answered. `away_since`: it does not answer since then."""

    status: Any | None
    items: Sequence[Any]
    now: datetime
    away_since: datetime | None = None
    away_why: str = ""  # what the last look failed with
    stuck: bool = False  # the core's loop did not turn between two looks
    socket: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """The four answers, and a headline."""

    headline: str
    level: Level
    wrong: tuple[Line, ...]
    held: tuple[Line, ...]
    done: tuple[Line, ...]

    @property
    def next(self) -> tuple[str, ...]:
        """What to do, the worst first, each once."""
        return tuple(dict.fromkeys(line.do for line in (*self.wrong, *self.held) if line.do))


def picture(seen: Seen) -> Picture:
    """Everything that is worth saying, the worst first."""
    wrong = sorted(_wrong(seen), key=lambda line: _LEVELS.index(line.level))
    held = tuple(_held(seen))
    level = wrong[0].level if wrong else "info"
    return Picture(_headline(seen), level, tuple(wrong), held, tuple(_done(seen.items, seen.now)))


def _headline(seen: Seen) -> str:
    status = seen.status
    if status is None:
        return "NO ANSWER  nothing is known about this node"
    state = "NO ANSWER" if seen.away_since else status.state.upper()
    armed = f"{status.manifest} #{status.sequence}" if status.manifest else "no manifest"
    tier = "EMULATED TEE" if status.tier == "emulated" else f"{status.platform} {status.tier}"
    return f"{status.node}  {state}  {armed}  {tier}  up {duration(status.uptime_ms / 1000)}"


def _wrong(seen: Seen) -> Iterable[Line]:
    status = seen.status
    if seen.away_since is not None:
        since = seen.away_since.strftime("%H:%M:%S")
        old = "" if status is None else " What you see below is from before."
        why = f" ({seen.away_why})" if seen.away_why else ""
        yield Line(
            "alarm", f"the executor does not answer since {since}{why}.{old}",
            "is it running? systemctl status pointcall; journalctl -u pointcall -n 50",
        )  # fmt: skip
    if status is None:
        return
    if seen.stuck:
        yield Line("alarm", "the core's loop does not turn: nothing is decided", "systemctl restart pointcall")
    yield from _people(status)
    yield from _state(status)
    yield from _manifest(status, seen.now)
    yield from _services(status.services)
    yield from _circuits(status.circuits)
    yield from _books(status)
    yield from _loss(status)
    yield from _copies(status)
    yield from _alarms(seen.items, seen.now)


def _people(status: Any) -> Iterable[Line]:
    """Who waits for a person, before anything else."""
    for kind, waiting in (("escalations wait for an answer", called(status)), ("actions wait", held_back(status))):
        for text, do in waiting[:PEOPLE_MAX]:
            yield Line("alarm", text, do)
        if len(waiting) > PEOPLE_MAX:
            yield Line("alarm", f"{len(waiting) - PEOPLE_MAX} more {kind}", "pointcall approve --list")


def _state(status: Any) -> Iterable[Line]:
    if status.state == "failed":
        yield Line("alarm", f"the executor failed: {status.reason}", "read the journal's disk, then restart pointcall")
    if status.state == "disarmed":
        why = f" ({status.reason})" if status.reason else ""
        yield Line("alarm", f"nothing is armed{why}: no runbook acts, no circuit protects", arm_again(status))


def _manifest(status: Any, now: datetime) -> Iterable[Line]:
    if not status.expires:
        return
    seconds = (datetime.fromisoformat(status.expires) - now).total_seconds()
    if seconds < SOON_S:
        level: Level = "alarm" if seconds < 3600 else "warning"
        text = f"the manifest ends in {duration(max(0, seconds))}; then everything is disarmed"
        yield Line(level, text, "sign and arm a newer manifest")


def _services(services: Iterable[Any]) -> Iterable[Line]:
    for s in services:
        again = f", recreated {s.restarts} time{'s' * (s.restarts != 1)} in 1 h" if s.restarts else ""
        if s.state not in ("running", "elsewhere"):
            yield Line(
                "alarm",
                f"service {s.name} does not run{again}",
                f"read why: services/{s.name}/output.log in the state folder",
            )
        elif s.health == "not accepting":
            yield Line(
                "alarm",
                f"service {s.name} runs (pid {s.pid}) but does not accept{again}",
                f"read services/{s.name}/output.log; is it busy or stuck?",
            )
        elif s.restarts >= 3:
            yield Line(
                "warning", f"service {s.name} was recreated {s.restarts} times in 1 h", f"why does {s.name} fail?"
            )


def _circuits(circuits: Iterable[Any]) -> Iterable[Line]:
    for c in circuits:
        if c.state != "closed":
            of = f" ({c.service})" if c.service else ""
            what = {"forced": "is held open", "half": "is half-open"}.get(c.state, "is open")
            refused = "would have been refused" if c.watch_only else "refused"
            yield Line("warning", f"circuit to {told_apart(c)}{of} {what}: {left(c)}; {c.refused} connects {refused}")


def _books(status: Any) -> Iterable[Line]:
    for book in status.runbooks:
        if book.state == "quarantined":
            text = f"runbook {book.name} trapped and is not asked any more"
            yield Line("alarm", text, f"arm a manifest with a fixed {book.name}")


def _loss(status: Any) -> Iterable[Line]:
    if status.lost_events:
        yield Line("warning", f"{status.lost_events} events were lost since arming: something may have been missed")
    life = status.epoch_life_ms
    if life and status.epoch_age_ms > life + min(LATE_RENEWAL_MS, life // 2):
        ends = f"; in {duration(status.evidence_left_ms / 1000)} everything is disarmed" if status.manifest else ""
        text = f"the evidence is {duration(status.epoch_age_ms / 1000)} old: it cannot be renewed{ends}"
        yield Line("alarm", text, "pointcall events --kind refusal")
    if status.signed_size and status.tree_size - status.signed_size > UNSIGNED_MAX:
        yield Line("warning", f"{status.tree_size - status.signed_size} entries wait for a checkpoint")


def _copies(status: Any) -> Iterable[Line]:
    for copy in status.copies:
        if copy.behind_ms / 1000 > LATE_COPY_S:
            since = duration(copy.behind_ms / 1000)
            yield Line("warning", f"{copy.name}: {copy.behind} entries behind for {since}", copy.error)


def _alarms(items: Sequence[Any], now: datetime) -> Iterable[Line]:
    for item in reversed(items):
        old = (now - datetime.fromisoformat(item.at)).total_seconds() > RECENT_S
        if item.level == "alarm" and not old:
            hint = f"pointcall log show {item.run}" if item.run else ""
            yield Line("alarm", f"{_when(item, now)} {item.text}", hint)


def _when(item: Any, now: datetime) -> str:
    """The time of day (UTC), with the date where that was not lately."""
    at = datetime.fromisoformat(item.at)
    old = (now - at).total_seconds() > TODAY_S
    return at.strftime("%Y-%m-%d %H:%M" if old else "%H:%M:%S")


def _held(seen: Seen) -> Iterable[Line]:
    status = seen.status
    if status is None:
        return
    if status.state == "paused":
        ends = duration(status.paused_left_ms / 1000)
        reason = status.reason or "no reason given"
        yield Line("warning", f"ALL ACTIONS PAUSED: {reason}; ends by itself in {ends}", "press r to resume")
    if status.storm_left_ms:
        text = f"storm: too many events; actions again in {duration(status.storm_left_ms / 1000)}"
        yield Line("warning", text, "find what storms before you raise the limit")
    monitored = [b.name for b in status.runbooks if b.mode == "monitor"]
    if status.mode == "monitor":
        yield Line("info", f"only watching (this node is in mode monitor): {WATCHING}")
    elif monitored:
        yield Line("info", f"only watching (mode monitor): {', '.join(monitored)}")
    for target in status.in_flight:
        yield Line("info", f"working on {target} now")
    waiting = {held.run for held in status.held_back}
    for item in reversed(seen.items):
        if item.kind != "refusal" or (seen.now - datetime.fromisoformat(item.at)).total_seconds() > HELD_S:
            continue
        if item.id == "guard.approval" and item.run not in waiting:
            continue  # it was given since, or nothing waits for it any more
        allowed = f"; allowed by: {item.hint}" if item.hint else ""
        yield Line("warning", f"{_when(item, seen.now)} [{item.id}] {item.text}{allowed}")


def _done(items: Sequence[Any], now: datetime) -> Iterable[Line]:
    for item in reversed(items):
        if item.kind in ("run", "action", "circuit", "config", "lost"):
            kind = "" if item.kind == "circuit" else f"{item.kind}: "
            yield Line(item.level, f"{_when(item, now)} {kind}{item.text}")


# ---- as a page ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the page, already as wide as it may be."""

    style: Literal["head", "title", "alarm", "warning", "info", "do"]
    text: str


def page(shown: Picture, width: int, height: int, now: datetime) -> tuple[Row, ...]:
    """The picture as at most `height` rows of at most `width` columns. What does not fit is counted, never hidden.

    Sections give way in this order: what was done, what is held back, what to do, what is wrong.
    """
    clock = now.astimezone(UTC).strftime("%H:%M:%SZ")
    head = Row("head", f"{_cut(shown.headline, width - len(clock) - 1):{width - len(clock) - 1}} {clock}")
    room = height - 1
    sections = (
        _Section("WRONG NOW", _rows(shown.wrong), "nothing is wrong", max(2, room // 3)),
        _Section("DO NEXT", [("do", f"→ {text}") for text in shown.next], "", max(2, room // 5)),
        _Section("HELD BACK", _rows(shown.held), "nothing is held back", max(2, room // 4)),
        _Section("LAST DONE", _rows(shown.done), "nothing yet", max(2, min(6, room // 4))),
    )
    sizes = [section.whole(width) for section in sections]
    for n in reversed(range(len(sections))):
        too_many = sum(sizes) - room
        sizes[n] -= max(0, min(too_many, sizes[n] - sections[n].least))
    rows = (row for section, size in zip(sections, sizes, strict=True) for row in section.drawn(width, size))
    return (head, *rows)[:height]


def _rows(lines: Iterable[Line]) -> list[tuple[str, str]]:
    return [(line.level, f"{MARKS[line.level]} {_DIGEST.sub(_short, line.text)}") for line in lines]


def _short(digest: re.Match[str]) -> str:
    """Nobody compares 64 digits on this page; the events have them whole."""
    return digest[0][:16] + "…"


@dataclass(frozen=True, slots=True)
class _Section:
    """A title with its rows (style, text); without rows it says `empty`, or is not there. `least`: how many rows of
    the page it keeps, its title included, where there is too little room."""

    title: str
    rows: Sequence[tuple[str, str]]
    empty: str
    least: int

    def whole(self, width: int) -> int:
        """How many rows of the page it takes with nothing cut."""
        if not self.rows:
            return 2 if self.empty else 0
        return 1 + sum(len(_wrapped(text, width)) for _, text in self.rows)

    def drawn(self, width: int, room: int) -> list[Row]:
        """In at most `room` rows. Lines are whole as long as there is room; what does not fit is counted."""
        if not self.rows and not self.empty:
            return []
        shown: list[Row] = []
        left_over = len(self.rows)
        space = room - 1 if self.whole(width) <= room else room - 2  # one row says how many more there are
        for style, text in self.rows:
            parts = _wrapped(text, width)
            if len(parts) > space - len(shown):
                if space - len(shown) < 1:
                    break
                keep = space - len(shown)
                parts = [*parts[: keep - 1], _cut(" ".join((parts[keep - 1], *map(str.strip, parts[keep:]))), width)]
            shown += [Row(style, _cut(part, width)) for part in parts]  # type: ignore[arg-type]
            left_over -= 1
        if left_over:
            shown.append(Row("info", _cut(f"  … and {left_over} more: pointcall events", width)))
        title = Row("title", f"── {self.title} ".ljust(width, "─")[:width])
        return [title, *(shown or [Row("info", _cut(f"  {self.empty}", width))])]


def _wrapped(text: str, width: int) -> list[str]:
    """In as many rows as it takes, the later ones indented."""
    found = textwrap.wrap(text, width, subsequent_indent="    ", drop_whitespace=False, break_on_hyphens=False)
    return found or [text]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
