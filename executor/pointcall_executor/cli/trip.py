"""`pointcall trip ADDRESS:PORT`: refuse connects to a destination, for a time that always ends."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("to", metavar="ADDRESS:PORT", help="an armed destination, [ADDRESS]:PORT for IPv6")
    parser.add_argument("--for", dest="seconds", metavar="DURATION", default="1m", help="at most 1h (default 1m)")
    connection.add_reason(parser)


def run(args: argparse.Namespace) -> int:
    address, port = connection.destination(args.to)
    seconds = connection.seconds_of(args.seconds)
    reason = connection.reason(args)
    return connection.control(args, "TripCircuit", address=address, port=port, seconds=seconds, reason=reason)
