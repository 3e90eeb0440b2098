"""`pointcall replay`: decide recorded runs again with the second implementation (and, if asked, with both)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.entry import Entry
    from pointcall_attest.replay import Replayed, Runner
    from pointcall_executor.journal_reader import JournalReader

PAGE = 500


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", nargs="?", help="one run")
    parser.add_argument("--all", action="store_true", help="every run in the journal")
    parser.add_argument("--since", type=int, default=0, metavar="INDEX", help="with --all: from this entry on")
    parser.add_argument("--both", action="store_true", help="also with the Wasmtime runner")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.log import open_journal

    if bool(args.run_id) == args.all:
        raise output.UsageRefusal("name one run, or --all", hint="`pointcall log list` shows the runs")
    total = different = erased = 0
    with closing(open_journal(args)) as reader:
        for engine, replayed in _replays(reader, args):
            total += 1
            different += replayed.different
            erased += replayed.erased
            _show(engine, replayed, args)
    if args.json and args.all:
        same = total - different - erased
        row = {"runs": total, "identical": same, "different": different}
        output.print_json(row | ({"erased": erased} if erased else {}))
    elif args.all:
        sys.stdout.write(f"{total - erased} decisions made again, {different} different\n")
        if erased:
            sys.stdout.write(f"{erased} runs cannot be decided again: their inputs were erased\n")
    return output.Exit.REFUSED if different else output.Exit.OK


def _replays(reader: JournalReader, args: argparse.Namespace) -> Iterator[tuple[str, Replayed]]:
    from pointcall_attest.replay import interpreter, replay_all

    engines = {"interpreter": interpreter} | ({"wasmtime": wasmtime} if args.both else {})
    for engine, make in engines.items():
        entries = _receipts(reader, args.since) if args.all else iter([reader.receipt(args.run_id)])
        for replayed in replay_all(entries, reader.blob, make):
            yield engine, replayed


def _receipts(reader: JournalReader, start: int) -> Iterator[Entry]:
    while page := reader.runs(start, PAGE):
        yield from page
        start = page[-1].index + 1


def wasmtime(module: bytes) -> Runner:
    from pointcall_executor.wasm import Runner as Wasmtime
    from pointcall_runbook.decision import Decided
    from pointcall_runbook.module import verify_module

    machine = Wasmtime(module, verify_module(module))

    def decide(event: str, args: tuple[int, ...], fuel_limit: int) -> Decided:
        return machine.decide(event, args)

    return decide


def _show(engine: str, replayed: Replayed, args: argparse.Namespace) -> None:
    if args.json:
        output.print_json({"engine": engine} | replayed.as_dict())
    elif replayed.different or not args.all:
        text = "identical" if replayed.identical else "DIFFERENT: " + "; ".join(map(str, replayed.differences))
        if replayed.erased:
            text = "cannot be decided again: its inputs were erased"
        sys.stdout.write(f"{replayed.run}  {engine}  {text}\n")
