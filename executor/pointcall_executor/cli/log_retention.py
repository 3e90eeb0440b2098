"""`pointcall log prune` and `pointcall log erase`: what is kept no longer. By the running executor, or without one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_executor.cli import connection, output

if TYPE_CHECKING:
    from pointcall_executor.journal_reader import JournalReader
    from pointcall_executor.retention import Retained

API_TIMEOUT_S = 600.0  # every entry that goes is read once


def arguments(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The words of both verbs."""
    prune = verbs.add_parser(
        "prune", parents=[common], help="drop old entries; hashes, proofs and openings of epochs stay"
    )
    prune.add_argument("--minimum", type=int, metavar="INDEX", help="below this (default: all that is old enough)")
    prune.add_argument("--retention-days", type=int, metavar="N", help="a longer retention than the settings")
    prune.add_argument("--config", type=Path, metavar="FILE", help="the executor's settings: retention_days")
    prune.add_argument("--reason", default="retention", metavar="TEXT", help="stands in the log, sealed")

    erase = verbs.add_parser(
        "erase", parents=[common], help="delete clear texts beside the log; leaves and proofs stay"
    )
    erase.add_argument("what", nargs="*", metavar="RUN|INDEX", help="all entries of a run, or one entry")
    erase.add_argument("--older-than", type=int, metavar="DAYS", help="everything that is older")
    erase.add_argument("--reason", default="asked for", metavar="TEXT", help="stands in the log, sealed")


def _prune(args: argparse.Namespace) -> int:
    from pointcall_executor import retention
    from pointcall_executor.config import load
    from pointcall_executor.offline import recording

    if min(args.retention_days or 0, args.minimum or 0) < 0:
        raise output.UsageRefusal("an index and a retention are not negative", got=f"{args.minimum}")
    stated = {"minimum": args.minimum, "retention_days": args.retention_days}
    done = _by_executor(args, "Control/PruneLog", {k: v for k, v in stated.items() if v is not None})
    if done is None:
        days = args.retention_days
        if days is None or args.config is not None:
            days = retention.agreed(load(args.config).retention_days, days)
        now = datetime.now(UTC)
        with closing(_reader(args)) as reader:  # before an epoch is opened for nothing
            idle = retention.plan_prune(reader, args.minimum, days, now) == reader.minimum
            done = retention.Retained(reader.minimum, 0, days, (), ())
        if not idle:
            with recording(output.state_dir(args), "pruned") as recorder:
                done = retention.prune(recorder, args.minimum, days, args.reason, now)
    row = {
        "minimum": done.minimum,
        "pruned": done.pruned,
        "retention_days": done.retention_days,
        "index": next(iter(done.index), None),
    }
    _say(args, row, f"{done.pruned} entries pruned; the log begins at {done.minimum}, older hashes stay")
    return output.Exit.OK


def _erase(args: argparse.Namespace) -> int:
    from pointcall_executor import retention
    from pointcall_executor.offline import recording

    if bool(args.what) == (args.older_than is not None):
        raise output.UsageRefusal("name runs or entries, or --older-than DAYS", hint="`pointcall log list` shows them")
    age = {} if args.older_than is None else {"older_than_days": args.older_than}
    done = _by_executor(args, "Control/EraseLog", {"what": args.what, **age})
    if done is None:
        now = datetime.now(UTC)
        with closing(_reader(args)) as reader:
            idle = not retention.plan_erase(reader, args.what, args.older_than, now)[0]
            done = retention.Retained(reader.minimum, 0, 0, (), ())
        if not idle:
            with recording(output.state_dir(args), "erased") as recorder:
                done = retention.erase(recorder, args.what, args.older_than, args.reason, now)
    row = {"erased": list(done.erased), "index": list(done.index)}
    _say(args, row, f"the clear text of {len(done.erased)} entries is gone; proofs stay valid")
    return output.Exit.OK


def _by_executor(args: argparse.Namespace, method: str, fields: dict[str, Any]) -> Retained | None:
    """What a running executor did: it is the one writer of its log. None where there is none on its socket.

    EnvironmentRefusal `api.deadline` where it does not answer in time: it may still be doing it.
    """
    from pointcall_executor.retention import Retained

    socket = output.state_dir(args) / "run" / "operator.sock"
    if not socket.is_socket():
        return None
    from pointcall_executor.api.client import Client, UnreachableError

    try:
        with Client(socket, timeout_s=API_TIMEOUT_S) as client:
            done = client.call(method, reason=args.reason, **fields)
    except UnreachableError as refusal:
        if refusal.id == "api.deadline":
            raise connection.unreachable(refusal, socket, changes=True) from None
        return None
    return Retained(done.minimum, done.pruned, done.retention_days, tuple(done.erased), tuple(done.index))


def _reader(args: argparse.Namespace) -> JournalReader:
    from pointcall_executor.cli.log import open_journal

    return open_journal(args)


def _say(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    if args.json:
        output.print_json(row)
    else:
        sys.stdout.write(f"{text}\n")


VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {"prune": _prune, "erase": _erase}
