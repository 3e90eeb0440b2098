"""`pointcall top`: watch this node, full screen: what is wrong, what was done, what is held back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pointcall_executor.cli import connection, output


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the operator's or the auditor's socket")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (default 1)")


def run(args: argparse.Namespace) -> int:
    try:
        from pointcall_executor.live import view
    except ImportError as missing:
        raise output.EnvironmentRefusal(
            "the library of the live view is not installed",
            id="top.missing",
            got=str(missing),
            hint="pip install 'pointcall[executor]'; `pointcall status` and `pointcall events -f` need nothing",
        ) from None
    if args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise output.EnvironmentRefusal(
            "the live view needs a terminal", id="top.terminal", want="standard input and output at a terminal",
            got="--json" if args.json else "a pipe or a file", hint="pointcall status, pointcall events -f",
        )  # fmt: skip
    folder = output.state_dir(args) / "run"
    socket = args.socket or connection.socket_of(folder)
    if (refusal := connection.forbidden(socket)) is not None:
        raise refusal
    view.watch(socket, every_s=max(0.2, args.every))
    return output.Exit.OK
