"""`pointcall manifest restore`: what was armed here before, as the next manifest to sign; and what that was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def parsers(what: argparse._SubParsersAction[Any]) -> tuple[argparse.ArgumentParser, ...]:
    """The sub-verb and its words."""
    one = what.add_parser("restore", help="back to what was armed here before: the next manifest, to be signed")
    one.add_argument("digest", metavar="SHA256", nargs="?", help="which one (default: the one before what is armed)")
    one.add_argument("--list", action="store_true", help="what was armed here, oldest first")
    one.add_argument("--out", metavar="DIR", type=Path, help="where manifest.json and files/ go")
    one.add_argument("--days", type=int, default=90, metavar="N", help="how long it may be armed (default 90)")
    return (one,)


def restore(args: argparse.Namespace) -> int:
    """Write it, or say what there is. RollbackError where there is no such state."""
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json, state_dir
    from pointcall_executor.journal_reader import JournalReader
    from pointcall_executor.rollback import armed_before

    with JournalReader.open(state_dir(args) / "journal.db") as reader:
        history = armed_before(reader)
        if args.list:
            for row in history:
                (entry,) = reader.entries(start=row.index, limit=1)
                at = f"{entry.at:%Y-%m-%dT%H:%M:%SZ}"
                if args.json:
                    print_json({"sha256": row.sha256, "sequence": row.sequence, "entry": row.index, "at": at})
                else:
                    print(f"{row.sequence:>6}  {at}  {row.sha256}  entry {row.index}")
            return Exit.OK
        if args.out is None:
            raise UsageRefusal("where to?", want="--out DIR, or --list")
        if not 1 <= args.days <= 3660:
            raise UsageRefusal("a manifest ends", want="--days 1 to 3660", got=str(args.days))
        return _write(args, reader, history)


def _write(args: argparse.Namespace, reader: Any, history: Any) -> int:
    import datetime as dt
    import hashlib

    from pointcall_attest.manifest import Manifest
    from pointcall_executor.cli.output import Exit, print_json
    from pointcall_executor.rollback import last_good, successor

    chosen = args.digest if args.digest and history else last_good(history).sha256
    current = Manifest.parse(reader.blob(history[-1].sha256))
    start = dt.datetime.now(dt.UTC).replace(microsecond=0)
    made = successor(reader, chosen, current, not_before=start, expires=start + dt.timedelta(days=args.days))
    made.write(args.out)
    digest = hashlib.sha256(made.statement).hexdigest()
    if args.json:
        print_json({"ok": True, "manifest": digest, "restores": chosen, "out": str(args.out)})
    else:
        print(f"sequence {current.sequence + 1} restores {chosen}\nto sign: {args.out / 'manifest.json'}")
    return Exit.OK
