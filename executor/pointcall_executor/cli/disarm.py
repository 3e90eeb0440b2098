"""`pointcall disarm`: the running executor stops acting. The declared services go on running."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", metavar="TEXT", required=True, help="why; it goes into the log")


def run(args: argparse.Namespace) -> int:
    return connection.control(args, "Disarm", reason=connection.with_words(args.reason))
