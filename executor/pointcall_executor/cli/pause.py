"""`pointcall pause`: no runbook acts for a while. Deciding, recording and the breaker in the kernel go on."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--for", dest="seconds", metavar="DURATION", default="10m", help="at most 24h (default 10m)")
    connection.add_reason(parser)


def run(args: argparse.Namespace) -> int:
    seconds = connection.seconds_of(args.seconds)
    return connection.control(args, "Pause", reason=connection.reason(args), seconds=seconds)
