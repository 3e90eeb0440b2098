"""`pointcall log prune` and `pointcall log erase`: what is kept no longer. On the log of a stopped executor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.entry import Entry
    from pointcall_executor.journal_reader import JournalReader
    from pointcall_executor.recorder import Recorder


def arguments(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The words of both verbs."""
    prune = verbs.add_parser(
        "prune", parents=[common], help="drop old entries; hashes, proofs and openings of epochs stay"
    )
    prune.add_argument("--minimum", type=int, metavar="INDEX", help="below this (default: all that is old enough)")
    prune.add_argument("--retention-days", type=int, metavar="N", help="state another retention than the settings")
    prune.add_argument("--config", type=Path, metavar="FILE", help="the executor's settings: retention_days")
    prune.add_argument("--reason", default="retention", metavar="TEXT", help="stands in the log, sealed")

    erase = verbs.add_parser(
        "erase", parents=[common], help="delete clear texts beside the log; leaves and proofs stay"
    )
    erase.add_argument("what", nargs="*", metavar="RUN|INDEX", help="all entries of a run, or one entry")
    erase.add_argument("--older-than", type=int, metavar="DAYS", help="everything that is older")
    erase.add_argument("--reason", default="asked for", metavar="TEXT", help="stands in the log, sealed")


def _prune(args: argparse.Namespace) -> int:
    from pointcall_executor.config import load
    from pointcall_executor.offline import recording
    from pointcall_executor.retention import check_retention, prunable

    days = load(args.config).retention_days if args.retention_days is None else args.retention_days
    if days < 0 or (args.minimum is not None and args.minimum < 0):
        raise output.UsageRefusal("a retention and an index are not negative", got=f"{days}, {args.minimum}")
    now = datetime.now(UTC)
    with _looking(args) as reader:  # before an epoch is opened for nothing
        before = reader.minimum
        minimum = prunable(reader, days, now) if args.minimum is None else args.minimum
        check_retention(reader, minimum, days, now)
    index = None
    if minimum != before:
        with recording(output.state_dir(args), "pruned") as recorder:
            index = recorder.prune(minimum, args.reason, days)
    row = {"minimum": minimum, "pruned": minimum - before, "retention_days": days, "index": index}
    _say(args, row, f"{row['pruned']} entries pruned; the log begins at {minimum}, older hashes stay")
    return output.Exit.OK


def _erase(args: argparse.Namespace) -> int:
    from pointcall_attest.entry import MAX_ERASED
    from pointcall_executor.offline import recording
    from pointcall_executor.retention import first_within

    if bool(args.what) == (args.older_than is not None):
        raise output.UsageRefusal("name runs or entries, or --older-than DAYS", hint="`pointcall log list` shows them")
    with _looking(args) as reader:
        named = [e for what in args.what for e in _named(reader, what)]
        below = 0
        if args.older_than is not None:
            inside = first_within(reader, args.older_than, datetime.now(UTC), start=reader.minimum)
            below = reader.size if inside is None else inside.index
            named = [e for e in _all(reader) if e.index < below]
    chosen = list({e.index: e for e in named if e.opening is not None}.values())
    indices: list[int] = []
    if chosen:
        with recording(output.state_dir(args), "erased") as recorder:
            indices = _record(recorder, chosen, args.reason, below, MAX_ERASED)
    row = {"erased": [e.index for e in chosen], "index": indices}
    _say(args, row, f"the clear text of {len(chosen)} entries is gone; proofs stay valid")
    return output.Exit.OK


def _record(recorder: Recorder, chosen: list[Entry], reason: str, below: int, most: int) -> list[int]:
    if below:
        return [recorder.erase((), reason, below=below)]
    return [recorder.erase(chosen[at : at + most], reason) for at in range(0, len(chosen), most)]


def _looking(args: argparse.Namespace) -> JournalReader:
    from pointcall_executor.cli.log import open_journal

    return open_journal(args)


def _named(reader: JournalReader, what: str) -> list[Entry]:
    """One entry by its index, or all of a run that has its receipt."""
    if what.isdecimal() and len(what) < 19:
        return [reader.entry(int(what))]
    return reader.entries(run=str(reader.receipt(what).run))


def _all(reader: JournalReader) -> Iterator[Entry]:
    start = 0
    while page := reader.entries(start=start, limit=500):
        yield from page
        start = page[-1].index + 1


def _say(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    if args.json:
        output.print_json(row)
    else:
        sys.stdout.write(f"{text}\n")


VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {"prune": _prune, "erase": _erase}
