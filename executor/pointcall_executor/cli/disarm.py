"""`pointcall disarm`: the running executor stops acting. The declared services go on running."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, help="goes into the log")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import Client
    from pointcall_executor.api.roles import Role
    from pointcall_executor.cli.output import Exit, print_json, state_dir

    with Client(state_dir(args) / "run" / f"{Role.OPERATOR.value}.sock") as client:
        answer = client.call("Control/Disarm", reason=args.reason)
    if args.json:
        print_json({"ok": True, "state": answer.state, "detail": answer.detail})
    else:
        print(f"{answer.state}: {answer.detail}")
    return Exit.OK
