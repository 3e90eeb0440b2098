"""`pointcall mirror`: the central copy of many nodes' logs in PostgreSQL: ship to it, look at it, take a log out."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli import output

if TYPE_CHECKING:
    import psycopg


def configure(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
    common.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="where all state lives")
    common.add_argument(
        "address", metavar="ADDRESS", help="PostgreSQL connection string; its tables are made if missing"
    )
    verbs = parser.add_subparsers(dest="mirror_verb", required=True, metavar="VERB")
    verbs.add_parser("status", parents=[common], help="every log that is held, how far, and what was refused")
    verbs.add_parser("ship", parents=[common], help="send what is missing of this node's log, once")
    tiles = verbs.add_parser("tiles", parents=[common], help="write a log as a tile directory, for `pointcall verify`")
    tiles.add_argument("--log", required=True, metavar="ORIGIN")
    tiles.add_argument("--out", required=True, type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.mirror import connect

    verbs = {"status": _status, "ship": _ship, "tiles": _tiles}
    try:
        db = connect(args.address)
    except Exception as error:
        raise _unreachable(error) from error
    with closing(db):
        return verbs[args.mirror_verb](db, args)


def _unreachable(error: Exception) -> Exception:
    """A database that does not answer is the environment; our own refusals stay what they are."""
    from pointcall_runbook.errors import PointcallError

    if isinstance(error, PointcallError):
        return error
    return output.EnvironmentRefusal(
        "the mirror cannot be reached", id="mirror.unreachable", got=str(error).split("\n")[0][:200]
    )


def _status(db: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    from pointcall_executor.mirror import Mirror

    for row in Mirror(db).logs():
        if args.json:
            output.print_json(row)
        else:
            refused = f"  REFUSED: {row['refused']}" if row["refused"] else ""
            sys.stdout.write(f"{row['log']}  {row['size']} entries, {row['covered']} under a checkpoint{refused}\n")
    return output.Exit.OK


def _ship(db: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    from pointcall_executor.cli.log import open_journal
    from pointcall_executor.mirror import Mirror, ship

    with closing(open_journal(args)) as reader:
        held = ship(reader, Mirror(db))
        row = {"log": reader.origin, "size": held.size, "covered": held.covered}
    if args.json:
        output.print_json(row)
    else:
        sys.stdout.write(f"{row['log']}: {held.size} entries there, {held.covered} under a checkpoint\n")
    return output.Exit.OK


def _tiles(db: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    from pointcall_executor.mirror import Mirror
    from pointcall_executor.tile_folder import extend

    written, size = extend(args.out, Mirror(db).source(args.log))
    if args.json:
        output.print_json({"out": str(args.out), "written": written, "size": size})
    else:
        sys.stdout.write(f"{args.out}: {written} tiles written, {size} entries under its checkpoint\n")
    return output.Exit.OK
