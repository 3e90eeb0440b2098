"""`pointcall acknowledge RUN`: somebody has seen the escalation of this run; nobody is called again because of it."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="as `pointcall approve --list` shows it")
    connection.add_reason(parser)


def run(args: argparse.Namespace) -> int:
    return connection.control(args, "Acknowledge", run=args.run, reason=connection.reason(args))
