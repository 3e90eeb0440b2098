"""`pointcall acknowledge RUN`: somebody has seen the escalation of this run; nobody is called again because of it."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="as `pointcall approve --list` and `pointcall status` show it")
    parser.add_argument("--reason", required=True, help="goes into the log")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import Client
    from pointcall_executor.api.roles import Role
    from pointcall_executor.cli.output import Exit, print_json, state_dir

    with Client(state_dir(args) / "run" / f"{Role.OPERATOR.value}.sock") as client:
        answer = client.call("Control/Acknowledge", run=args.run, reason=args.reason)
    if args.json:
        print_json({"ok": True, "state": answer.state, "detail": answer.detail})
    else:
        print(answer.detail)
    return Exit.OK
