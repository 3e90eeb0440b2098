"""`pointcall simulate RUNBOOK`: what a runbook would have done on recorded events. Nothing is done.

Events come from the journal of this node, or from a file with one JSON object a line in the form of a case without
`calls`: {"event": ..., "fields": {...}}. Parameters have their defaults and slots their initial values unless a line
says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pointcall_executor.cli.output import Exit, print_json, state_dir
from pointcall_executor.cli.runbook_source import compiled, refused, source_file

if TYPE_CHECKING:
    from pointcall_attest.receipt import Receipt
    from pointcall_runbook.interpreter import Interpreter
    from pointcall_runbook.module import ModuleInfo

Lines: TypeAlias = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One event: where it was found, its raw arguments (None: the runbook does not handle it), a service's name."""

    where: str
    event: str
    args: tuple[int, ...] | None
    service: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runbook", type=Path, help="a runbook (.py), a module (.wasm) or a folder with a runbook.py")
    parser.add_argument("--events", type=Path, metavar="FILE", help="JSON lines (default: the journal of this node)")
    parser.add_argument("--why", action="store_true", help="show the source lines that each decision went through")


def run(args: argparse.Namespace) -> int:
    from pointcall_runbook.compiler import CompileError
    from pointcall_runbook.interpreter import Interpreter

    try:
        wasm, lines = _loaded(source_file(args.runbook))
    except CompileError as error:
        return refused(error, as_json=args.json)
    interpreter = Interpreter(wasm)
    found = (
        _from_file(args.events, interpreter.info) if args.events else _from_journal(state_dir(args), interpreter.info)
    )
    for recorded in found:
        row = simulated(interpreter, recorded, lines)
        if args.json:
            print_json(row)
        else:
            sys.stdout.write(_text(row, why=args.why))
    return Exit.OK


def _loaded(path: Path) -> tuple[bytes, Lines]:
    """The module, and the source line of each instruction where there is a source."""
    if path.suffix != ".py":
        return path.read_bytes(), ()
    runbook = compiled(path)
    return runbook.wasm, runbook.lines


def simulated(interpreter: Interpreter, recorded: Recorded, lines: Lines) -> dict[str, Any]:
    """The decision on one event, as plain data."""
    from pointcall_runbook.case import readable
    from pointcall_runbook.listing import lines_of

    head = {"where": recorded.where, "event": recorded.event}
    if recorded.args is None:
        return head | {"calls": [], "skipped": "not handled"}
    trace: list[tuple[int, bool]] = []
    decided = interpreter.run(recorded.event, recorded.args, trace=trace)
    names = _names(interpreter.info, recorded.service)
    calls = [readable(call, names) for call in decided.calls]
    return head | {"calls": calls, "fuel": decided.fuel, "why": lines_of(lines, trace)}


def _from_file(path: Path, info: ModuleInfo) -> Iterator[Recorded]:
    from pointcall_runbook.case import CaseError, parse_cases

    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
            event, named = str(row["event"]), row.get("fields", {}).get("service")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CaseError(f"{where} is not an event", want='{"event": ..., "fields": {...}}') from None
        if event not in info.handlers:
            yield Recorded(where, event, None)
            continue
        (case,) = parse_cases(json.dumps({**row, "name": where, "calls": []}).encode(), info)
        yield Recorded(where, event, case.args, named if isinstance(named, str) else "")


def _from_journal(state: Path, info: ModuleInfo) -> Iterator[Recorded]:
    """The recorded runs, oldest first. JournalError where there is no journal."""
    from pointcall_executor.journal_reader import JournalReader

    with JournalReader.open(state / "journal.db") as reader:
        start = 0
        while page := reader.entries(kind="receipt", start=start):
            yield from (_from_receipt(entry.receipt(), info) for entry in page if not entry.closed)
            start = page[-1].index + 1


def _from_receipt(receipt: Receipt, info: ModuleInfo) -> Recorded:
    from pointcall_runbook.vocabulary import EVENTS, arity, service

    where, event = f"run {receipt.run.id}", receipt.trigger.event
    if event not in info.handlers:
        return Recorded(where, event, None)
    own = tuple(receipt.inputs.values[: arity(EVENTS[event])])
    named = next((a.target for a in receipt.actions if a.target and service(a.target).number in own), "")
    return Recorded(where, event, info.arguments(own, info.defaults, info.initial), named)


def _names(info: ModuleInfo, named: str) -> dict[int, str]:
    from pointcall_runbook.vocabulary import channel, service

    known = {service(n).number: n for n in info.services} | {channel(n).number: n for n in info.channels}
    return known | ({service(named).number: named} if named else {})


def _text(row: dict[str, Any], *, why: bool) -> str:
    shown = "; ".join(f"{c['action']} {c['args']}" for c in row["calls"]) or row.get("skipped", "nothing")
    lines = f"     by lines {', '.join(map(str, row['why']))}\n" if why and row.get("why") else ""
    return f"{row['where']} {row['event']}: {shown}\n{lines}"
