"""`pointcall log`: list, show, prove, export and check what the journal holds; prune and erase (log_retention.py)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli import log_retention, output

if TYPE_CHECKING:
    from pointcall_attest.entry import Entry, Kind
    from pointcall_executor.journal_reader import JournalReader

PAGE = 500
POLL_S = 0.25


def configure(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
    common.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="where all state lives")
    verbs = parser.add_subparsers(dest="log_verb", required=True, metavar="VERB")

    listing = verbs.add_parser("list", parents=[common], help="runs, or entries of one kind")
    listing.add_argument("--kind", metavar="KIND", help="an entry kind, or `all`; runs by default")
    listing.add_argument("--start", type=int, default=0, metavar="INDEX", help="from this entry on")
    listing.add_argument("--limit", type=int, metavar="N", help="at most this many")

    tail = verbs.add_parser("tail", parents=[common], help="the newest entries, and what follows")
    tail.add_argument("--lines", "-n", type=int, default=10, metavar="N", help="so many to begin with (10)")
    tail.add_argument("--follow", "-f", action="store_true", help="go on printing, also when the executor restarts")
    tail.add_argument("--kind", metavar="KIND", help="an entry kind; all by default")

    show = verbs.add_parser("show", parents=[common], help="one entry, decoded")
    show.add_argument("what", metavar="RUN|INDEX")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the leaf itself: a DSSE envelope")
    form.add_argument("--bundle", action="store_true", help="as a Sigstore bundle with a bare key")
    form.add_argument("--key", action="store_true", help="the key of its epoch, as PEM")

    stream = verbs.add_parser("stream", parents=[common], help="entries for a SIEM, one JSON object a line")
    stream.add_argument("--format", choices=("ocsf", "otel"), default="otel")
    stream.add_argument("--since", type=int, default=0, metavar="INDEX", help="from this entry on")
    stream.add_argument("--clear", action="store_true", help="with addresses and texts: nobody can erase them there")
    stream.add_argument("--check", type=Path, metavar="FILE", help="compare a copy (one object a line) with the log")

    prove = verbs.add_parser("prove", parents=[common], help="the C2SP proof file of one entry")
    prove.add_argument("what", metavar="RUN|INDEX")
    prove.add_argument("--out", type=Path, metavar="FILE", help="standard output by default")

    export = verbs.add_parser("export", parents=[common], help="everything that proves a run, for `pointcall verify`")
    export.add_argument("--run", required=True, metavar="RUN")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--since", type=Path, metavar="FILE", help="prove growth from a checkpoint that was seen before"
    )

    tiles = verbs.add_parser("tiles", parents=[common], help="write or extend a C2SP tile directory")
    tiles.add_argument("--out", required=True, type=Path, metavar="DIR")

    verbs.add_parser("check", parents=[common], help="verify every entry, signature, epoch and checkpoint")
    log_retention.arguments(verbs, common)


def run(args: argparse.Namespace) -> int:
    verbs = {
        "list": _list,
        "show": _show,
        "stream": _stream,
        "prove": _prove,
        "export": _export,
        "tiles": _tiles,
        "check": _check,
        "tail": _tail,
    }
    if args.log_verb in log_retention.VERBS:
        return log_retention.VERBS[args.log_verb](args)
    with closing(open_journal(args)) as reader:
        return verbs[args.log_verb](reader, args)


def open_journal(args: argparse.Namespace) -> JournalReader:
    """The journal of the state directory, for reading. EnvironmentRefusal `journal.absent` where there is none."""
    from pointcall_executor.journal_reader import JournalReader

    path = output.state_dir(args) / "journal.db"
    if not path.is_file():
        raise output.EnvironmentRefusal(
            "there is no journal",
            id="journal.absent",
            want=str(path),
            hint="has the executor run with this --state-dir?",
        )
    return JournalReader.open(path)


def _list(reader: JournalReader, args: argparse.Namespace) -> int:
    rows = (summary(entry) for entry in _entries(reader, args))
    if args.json:
        for row in rows:
            output.print_json(row)
        return output.Exit.OK
    from rich.table import Table

    table = Table("index", "at", "kind", "run", "what", box=None, pad_edge=False)
    for column in table.columns[:4]:
        column.no_wrap = True
    for row in rows:
        table.add_row(str(row["index"]), row["at"][:19] + "Z", row["kind"], row["run"] or "", row["what"])
    output.console().print(table)
    return output.Exit.OK


def _entries(reader: JournalReader, args: argparse.Namespace) -> Iterator[Entry]:
    kind = _kind(args.kind or "receipt")
    start, left = args.start, args.limit if args.limit is not None else sys.maxsize
    while left > 0 and (page := reader.entries(kind, start=start, limit=min(left, PAGE))):
        yield from page
        start, left = page[-1].index + 1, left - len(page)


def _kind(wanted: str) -> Kind | None:
    """The kind of that name; None for `all`."""
    from pointcall_attest.entry import KINDS

    kind = next((k for k in KINDS if k == wanted), None)
    if kind is None and wanted != "all":
        raise output.UsageRefusal(f"no entry is a {wanted!r}", want=", ".join(KINDS))
    return kind


def _tail(reader: JournalReader, args: argparse.Namespace) -> int:
    """The last entries of a kind, then each new one; every look is a new connection, so a restart does not matter."""
    kind = _kind(args.kind or "all")
    at = _first_of_last(reader, kind, max(args.lines, 0))
    for entry in _all(reader, kind, at):
        _line(entry, args)
        at = entry.index + 1
    while args.follow:
        time.sleep(POLL_S)
        with closing(open_journal(args)) as again:
            for entry in _all(again, kind, at):
                _line(entry, args)
                at = entry.index + 1
    return output.Exit.OK


def _first_of_last(reader: JournalReader, kind: Kind | None, count: int) -> int:
    """Where the last `count` entries of a kind begin."""
    size = reader.size
    span = count
    while span < size and len(reader.entries(kind, start=size - span, limit=count)) < count:
        span *= 2
    found = list(_all(reader, kind, max(0, size - span))) if count else []
    return found[-count].index if len(found) >= count > 0 else found[0].index if found else size


def _line(entry: Entry, args: argparse.Namespace) -> None:
    row = summary(entry)
    if args.json:
        output.print_json(row)
    else:
        sys.stdout.write(f"{row['index']:>8}  {row['at'][:19]}Z  {row['kind']:<11} {row['what']}\n")
        sys.stdout.flush()


def summary(entry: Entry) -> dict[str, Any]:
    """One line about an entry; for a run also what decided and what came of it."""
    from pointcall_attest.statement import rfc3339

    row: dict[str, Any] = {
        "run": entry.run,
        "index": entry.index,
        "kind": entry.kind,
        "at": rfc3339(entry.at),
        "epoch": entry.epoch,
        "leaf_hash": entry.leaf_hash.hex(),
    }
    if entry.closed:
        row["erased"] = True
    if entry.kind != "receipt":
        return row | {"what": _what(entry)}
    receipt = entry.receipt()
    done = [{"action": a.action, "target": a.target, "outcome": a.outcome} for a in receipt.actions]
    text = ", ".join(f"{a['action']} {a['target']} {a['outcome']}" for a in done) or "nothing to do"
    return row | {
        "runbook": receipt.runbook.name,
        "event": receipt.trigger.event,
        "mode": receipt.run.mode,
        "tier": receipt.attestation.tier,
        "actions": done,
        "what": f"{receipt.runbook.name}: {receipt.trigger.event} -> {text}",
    }


def _what(entry: Entry) -> str:
    names = (
        "what",
        "check",
        "action",
        "target",
        "outcome",
        "sensor",
        "count",
        "state",
        "role",
        "method",
        "reason",
        "tier",
    )
    return " ".join(str(entry.body[n]) for n in names if entry.body.get(n) not in (None, ""))[:120]


def _found(reader: JournalReader, what: str) -> Entry:
    return reader.entry(int(what)) if what.isdecimal() and len(what) < 19 else reader.receipt(what)


def _show(reader: JournalReader, args: argparse.Namespace) -> int:
    entry = _found(reader, args.what)
    if args.raw or args.bundle or args.key:
        sys.stdout.write(_form(reader, entry, args).decode())
        return output.Exit.OK
    row = summary(entry) | {"sealed": entry.commitment, "body": dict(entry.body)}
    if args.json:
        output.print_json(row)
    else:
        output.console().print_json(data=row)
    return output.Exit.OK


def _form(reader: JournalReader, entry: Entry, args: argparse.Namespace) -> bytes:
    from pointcall_attest.siem import epoch_pem, sigstore_bundle

    if args.raw:
        return entry.raw
    if args.bundle:
        return sigstore_bundle(entry.raw)
    opening = next(o for o in _all(reader, "epoch-open", 0) if o.epoch == entry.epoch)
    return epoch_pem(opening.body["public_key"])


def _stream(reader: JournalReader, args: argparse.Namespace) -> int:
    import json

    from pointcall_attest.siem import FORMATS, check_copy

    origin, export = reader.origin, FORMATS[args.format]
    entries = _all(reader, None, args.since)
    rows = ((e.index, e.leaf_hash.hex(), row) for e in entries for row in export(e, origin, clear=args.clear))
    if args.check is None:
        for _, _, row in rows:
            output.print_json(row)
        return output.Exit.OK
    with args.check.open() as lines:
        wrong = list(check_copy((_object(json.loads(line)) for line in lines), origin, rows))
    output.print_json({"identical": not wrong, "wrong": wrong})
    return output.Exit.REFUSED if wrong else output.Exit.OK


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _all(reader: JournalReader, kind: Kind | None, start: int) -> Iterator[Entry]:
    while page := reader.entries(kind, start=start, limit=PAGE):
        yield from page
        start = page[-1].index + 1


def _prove(reader: JournalReader, args: argparse.Namespace) -> int:
    from pointcall_executor.journal_reader import JournalError

    entry, head = _found(reader, args.what), reader.head()
    if head is None or head.size <= entry.index:
        raise JournalError(
            f"no checkpoint covers entry {entry.index} yet",
            id="journal.no_checkpoint",
            hint="the executor signs one within a second",
        )
    proof = reader.proof(entry.index, head).encode()
    if args.out is None:
        sys.stdout.write(proof.decode())
    else:
        args.out.write_bytes(proof)
    return output.Exit.OK


def _export(reader: JournalReader, args: argparse.Namespace) -> int:
    from pointcall_attest.log.checkpoint import Checkpoint
    from pointcall_attest.pack import export
    from pointcall_attest.trust import Roots

    since = Checkpoint.parse(args.since.read_bytes()) if args.since else None
    pack = export(reader, args.run, roots=Roots.open(output.state_dir(args) / "trust"), since=since)
    pack.write(args.out)
    files = pack.files()
    if args.json:
        output.print_json({"run": args.run, "out": str(args.out), "files": sorted(files)})
    else:
        sys.stdout.write(f"{args.out}: {len(files)} files; check them with `pointcall verify {args.out}`\n")
    return output.Exit.OK


def _tiles(reader: JournalReader, args: argparse.Namespace) -> int:
    from pointcall_executor.tile_folder import extend

    written, size = extend(args.out, reader)
    if args.json:
        output.print_json({"out": str(args.out), "written": written, "size": size})
    else:
        sys.stdout.write(f"{args.out}: {written} tiles written, {size} entries under its checkpoint\n")
    return output.Exit.OK


def _check(reader: JournalReader, args: argparse.Namespace) -> int:
    from pointcall_executor.journal_check import check_journal

    verdict = check_journal(reader)
    if args.json:
        output.print_json(verdict.as_dict() | {"entries": reader.size})
    else:
        output.print_verdict(verdict, title=f"{reader.path}: {reader.size} entries")
    return output.Exit.OK if verdict.passed else output.Exit.REFUSED
