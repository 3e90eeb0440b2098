"""How long entries and their clear texts are kept: what is old enough to go, and what must stay. Reads only.

Times are those that entries state; the log's order is trusted more than its clock, so an index may go only if every
entry below it is old enough. Not here: doing it (recorder.py). Spec: docs/spec/journal.md section 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from pointcall_attest.entry import Entry
from pointcall_attest.statement import rfc3339
from pointcall_executor.journal_reader import JournalError, JournalReader

PAGE = 500


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
