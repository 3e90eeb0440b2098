"""How long entries and their clear texts are kept: what is old enough to go, what must stay, and letting it go.

Times are those that entries state; the log's order is trusted more than its clock, so an index may go only if every
entry below it is old enough. Spec: docs/spec/journal.md section 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pointcall_attest.entry import MAX_ERASED, Entry
from pointcall_attest.statement import rfc3339
from pointcall_executor.journal_reader import JournalError, JournalReader
from pointcall_executor.recorder import Recorder

PAGE = 500


@dataclass(frozen=True, slots=True)
class Retained:
    """What went. `minimum`: where the log begins now; `index`: the entries that say so, none if there was nothing."""

    minimum: int
    pruned: int
    retention_days: int
    erased: tuple[int, ...]
    index: tuple[int, ...]


def prune(recorder: Recorder, minimum: int | None, days: int, reason: str, now: datetime) -> Retained:
    """Drop the entries below an index, by default all that are older than so many days.

    JournalError `log.retention` for what must be kept, `journal.prune` for what goes back or beyond the end.
    """
    recorder.checkpoint(force=True)
    reader, before = recorder.journal, recorder.journal.minimum
    wanted = plan_prune(reader, minimum, days, now)
    index = () if wanted == before else (recorder.prune(wanted, reason, days),)
    return Retained(wanted, wanted - before, days, (), index)


def agreed(setting: int, asked: int | None) -> int:
    """The retention in days: what was asked for may be longer than the node's setting, never shorter.

    JournalError `log.retention`: who may prune is not who set what must be kept.
    """
    if asked is not None and asked < setting:
        raise JournalError(
            "the retention of this node is longer",
            id="log.retention",
            want=f"at least {setting} days",
            got=f"{asked} days",
            hint="retention_days of the settings says what must be kept",
        )
    return setting if asked is None else asked


def plan_prune(reader: JournalReader, minimum: int | None, days: int, now: datetime) -> int:
    """The index to prune to. JournalError `log.retention`."""
    wanted = prunable(reader, days, now) if minimum is None else minimum
    check_retention(reader, wanted, days, now)
    return wanted


def erase(recorder: Recorder, what: Sequence[str], older_than: int | None, reason: str, now: datetime) -> Retained:
    """Delete the clear texts of these runs and entries, or of everything that is older than so many days.

    JournalError `journal.no_run` or `journal.no_entry`."""
    reader = recorder.journal
    chosen, below = plan_erase(reader, what, older_than, now)
    index: list[int] = []
    if below and chosen:
        index = [recorder.erase((), reason, below=below)]
    elif chosen:
        pieces = [chosen[at : at + MAX_ERASED] for at in range(0, len(chosen), MAX_ERASED)]
        index = [recorder.erase(piece, reason) for piece in pieces]
    return Retained(reader.minimum, 0, 0, tuple(e.index for e in chosen), tuple(index))


def plan_erase(
    reader: JournalReader, what: Sequence[str], older_than: int | None, now: datetime
) -> tuple[list[Entry], int]:
    """The entries that have a clear text to erase, and the index below which all are meant (0: only those named)."""
    if older_than is None:
        named = {e.index: e for word in what for e in _named(reader, word)}
        return [e for e in named.values() if e.opening is not None], 0
    start = max(reader.minimum, reader.erased)
    inside = first_within(reader, older_than, now, start=start)
    below = reader.size if inside is None else inside.index
    return [e for e in _entries(reader, start) if e.index < below and e.opening is not None], below


def _named(reader: JournalReader, what: str) -> list[Entry]:
    """One entry by its index, or all of a run that has its receipt."""
    if what.isascii() and what.isdecimal() and len(what) < 19:
        return [reader.entry(int(what))]
    return reader.entries(run=str(reader.receipt(what).run))


def first_within(reader: JournalReader, days: int, now: datetime, *, start: int = 0) -> Entry | None:
    """The first entry that is younger than so many days, None if there is none."""
    limit = now - timedelta(days=days)
    return next((entry for entry in _entries(reader, start) if entry.at > limit), None)


def prunable(reader: JournalReader, days: int, now: datetime) -> int:
    """The highest index below which every entry is older than so many days."""
    inside = first_within(reader, days, now, start=reader.minimum)
    return reader.size if inside is None else inside.index


def check_retention(reader: JournalReader, minimum: int, days: int, now: datetime) -> None:
    """JournalError `log.retention` where an entry below `minimum` must still be kept."""
    inside = first_within(reader, days, now, start=reader.minimum)
    if inside is not None and inside.index < minimum:
        raise JournalError(
            f"entry {inside.index} must still be kept",
            id="log.retention",
            want=f"entries older than {days} days",
            got=f"one of {rfc3339(inside.at)}",
            hint=f"--minimum {inside.index} is the highest that the retention allows",
        )


def _entries(reader: JournalReader, start: int) -> Iterator[Entry]:
    while page := reader.entries(start=start, limit=PAGE):
        yield from page
        start = page[-1].index + 1
