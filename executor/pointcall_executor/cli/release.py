"""`pointcall release ADDRESS:PORT`: close a circuit now, whoever opened it."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("to", metavar="ADDRESS:PORT", help="an armed destination, [ADDRESS]:PORT for IPv6")
    connection.add_reason(parser)


def run(args: argparse.Namespace) -> int:
    address, port = connection.destination(args.to)
    reason = connection.reason(args)
    return connection.control(args, "ReleaseCircuit", address=address, port=port, reason=reason)
