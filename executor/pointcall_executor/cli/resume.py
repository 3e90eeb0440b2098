"""`pointcall resume`: end a pause."""

from __future__ import annotations

import argparse

from pointcall_executor.cli import connection


def configure(parser: argparse.ArgumentParser) -> None:
    connection.add_reason(parser)


def run(args: argparse.Namespace) -> int:
    return connection.control(args, "Resume", reason=connection.reason(args))
