"""`pointcall events`: what happens on this node, as it happens: runs, refusals, circuits, losses.

Following survives restarts of the executor: items of the log come exactly once, and a time without an answer is said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from pointcall_executor.cli import connection, output

POLL_SECONDS: Final = 0.5
LAST_MAX: Final = 100  # as the API has it
RETRY_SECONDS: Final = 1.0
KINDS: Final = ("run", "refusal", "circuit", "lost", "action", "config", "epoch", "proposal", "connection")
MARKS: Final = {"info": " ", "warning": "!", "alarm": "‼"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted, also across restarts")
    parser.add_argument(
        "--last", type=int, default=20, metavar="N", help="begin with so many (default 20, of the last 100)"
    )
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the operator's or the auditor's socket")


def run(args: argparse.Namespace) -> int:
    folder = output.state_dir(args) / "run"
    show = _json if args.json else _line
    if not 0 <= args.last <= LAST_MAX:
        raise output.UsageRefusal("so many are not kept at hand", want=f"--last 0..{LAST_MAX}", got=str(args.last))

    shown = 0
    found = items(
        lambda: args.socket or connection.socket_of(folder), args.last, follow=args.follow, kinds=args.kind or KINDS
    )
    for item in found:
        show(item)
        shown += 1
    if args.kind and args.last and not shown:
        sys.stderr.write(f"pointcall: none of this kind among the last {LAST_MAX}; older ones: pointcall log list\n")
    return output.Exit.OK


def items(
    socket: Callable[[], Path],
    last: int,
    *,
    follow: bool,
    kinds: Collection[str] = KINDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Items of these kinds as plain values, oldest first, from the last so many of them on. Without `follow` it ends
    where it has caught up; with it, never.

    EnvironmentRefusal `api.unreachable` where nobody answers at the start and there is nothing to wait for.
    """
    from pointcall_executor.api.client import Client, UnreachableError

    cursor, away = "", False
    begin = last if set(kinds) == set(KINDS) else LAST_MAX  # the executor knows no kinds: what is no such is left out
    while True:
        path = socket()
        try:
            with Client(path, timeout_s=10) as client:
                while True:
                    answer = client.call("Events/ListEvents", cursor=cursor, last=0 if cursor else begin)
                    if away:
                        yield from _only(kinds, _ours("info", "the executor answers again"))
                        away = False
                    told = list(_only(kinds, *_of(answer)))
                    yield from told if cursor else told[len(told) - min(last, len(told)) :]
                    cursor = answer.cursor
                    if not answer.more:
                        if not follow:
                            return
                        sleep(POLL_SECONDS)
        except UnreachableError as refusal:
            said = connection.unreachable(refusal, path)
            if not follow or said.id == "api.permission":
                raise said from None
            if not away:
                words = f"no executor answers on {path}; circuits in the kernel may go on; waiting"
                yield from _only(kinds, _ours("alarm", words))
                away = True
            sleep(RETRY_SECONDS)


def _only(kinds: Collection[str], *items: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (item for item in items if item["kind"] in kinds)


def _of(answer: Any) -> Iterator[dict[str, Any]]:
    if answer.restarted:
        yield _ours("warning", "the executor was restarted")
    if answer.missed:
        yield _ours("warning", f"{answer.missed} changes of circuits were not seen: too many at once", kind="lost")
    fields = ("at", "kind", "level", "text", "run", "id", "hint", "index", "recorded")
    for item in answer.items:
        yield {name: getattr(item, name) for name in fields}


def _ours(level: str, text: str, *, kind: str = "connection") -> dict[str, Any]:
    """An item that this side of the socket adds."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    empty: dict[str, Any] = {"run": "", "id": "", "hint": "", "index": 0, "recorded": False}
    return {"at": at, "kind": kind, "level": level, "text": text} | empty


def _json(item: dict[str, Any]) -> None:
    output.print_json(item)


def _line(item: dict[str, Any]) -> None:
    about = f" [{item['id']}]" if item["id"] else f" {item['run']}" if item["run"] else ""
    sys.stdout.write(f"{item['at'][:19]}Z {MARKS[item['level']]} {item['kind']:10} {item['text']}{about}\n")
    if item["hint"]:
        sys.stdout.write(f"{'':34} allowed by: {item['hint']}\n")
    sys.stdout.flush()
