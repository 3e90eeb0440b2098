"""`pointcall approve RUN`: a second person's signed word for one action that the guard holds back.

Signing and handing in may be two steps on two machines: `--out FILE` signs only, `--hand-in FILE` hands in only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointcall_executor.api.client import Client


def configure(parser: argparse.ArgumentParser) -> None:
    from pointcall_executor.cli.sign import add_signing_options

    parser.add_argument("run", metavar="RUN", nargs="?", help="which run; --list shows what waits")
    parser.add_argument("--list", action="store_true", help="what waits for a person")
    parser.add_argument("--index", metavar="N", type=int, default=None, help="which call of the run (default: the one)")
    parser.add_argument("--minutes", metavar="N", type=int, default=10, help="how long it holds, 1 to 60 (default 10)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="sign only, do not hand it in")
    parser.add_argument("--statement", metavar="FILE", type=Path, help="write what is to be signed, and stop")
    parser.add_argument("--hand-in", metavar="FILE", type=Path, help="hand in a bundle that was signed elsewhere")
    add_signing_options(parser)


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import UnreachableError
    from pointcall_executor.cli.connection import operator, unreachable
    from pointcall_executor.cli.output import UsageRefusal, state_dir

    if not args.list and args.hand_in is None and args.run is None:
        raise UsageRefusal("which run?", want="RUN, --list or --hand-in FILE", hint="pointcall approve --list")
    try:
        with operator(args) as client:
            return _listed(client, as_json=args.json) if args.list else _approve(args, client)
    except UnreachableError as refusal:
        raise unreachable(refusal, state_dir(args) / "run" / "operator.sock", changes=not args.list) from None


def _approve(args: argparse.Namespace, client: Client) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    bundle = args.hand_in.read_bytes() if args.hand_in else _signed(args, client)
    if bundle is None:
        return Exit.OK
    answer = client.call("Control/Approve", bundle=bundle)
    if args.json:
        print_json({"ok": True, "state": answer.state, "detail": answer.detail})
    else:
        print(f"approved: {answer.detail}")
    return Exit.OK


def _listed(client: Client, *, as_json: bool) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    waiting = client.call("Status/ListWaiting")
    held = [_plain(h) for h in waiting.held_back]
    called = [{"run": c.run, "code": c.code} for c in waiting.called]
    if as_json:
        print_json({"held_back": held, "called": called})
        return Exit.OK
    for one in held:
        print(f"{one['run']} call {one['index']}: {one['runbook']} wants {one['action']} {one['target']}")
        print(f"  after {one['event']}, {one['age_seconds']} s ago; pointcall approve {one['run']}")
    for call in called:
        print(
            f"{call['run']}: a person was called, code {call['code']}; pointcall acknowledge {call['run']} --reason ..."
        )
    if not held and not called:
        print("nothing waits for a person")
    return Exit.OK


def _plain(held: Any) -> dict[str, Any]:
    names = ("run", "index", "runbook", "action", "target", "event", "age_seconds", "manifest_sha256", "node")
    return {name: getattr(held, name) for name in names} | {"args": list(held.args)}


def _signed(args: argparse.Namespace, client: Client) -> bytes | None:
    """The signed approval of what waits; None where the person wanted a file only."""
    import datetime as dt

    from pointcall_attest.approval import ApprovalBody, approval_statement
    from pointcall_executor.cli.output import UsageRefusal
    from pointcall_executor.cli.sign import signed_with

    if not 1 <= args.minutes <= 60:
        raise UsageRefusal("an approval is soon over", want="--minutes 1 to 60", got=str(args.minutes))
    found = [h for h in client.call("Status/ListWaiting").held_back if h.run == args.run]
    chosen = [h for h in found if args.index is None or h.index == args.index]
    if len(chosen) != 1:
        got = ", ".join(f"call {h.index}: {h.action} {h.target}" for h in found) or "nothing of this run waits"
        raise UsageRefusal("which call?", want="--index of one that waits", got=got, hint="pointcall approve --list")
    one, now = chosen[0], dt.datetime.now(dt.UTC).replace(microsecond=0)
    body = ApprovalBody(
        node=one.node,
        run=one.run,
        index=one.index,
        runbook=one.runbook,
        action=one.action,
        args=tuple(one.args),
        issued=now,
        expires=now + dt.timedelta(minutes=args.minutes),
    )
    statement = approval_statement(body, manifest=one.manifest_sha256)
    if not args.json:
        print(f"{one.runbook} wants {one.action} {one.target}, after {one.event} {one.age_seconds} s ago")
    if args.statement:
        args.statement.write_bytes(statement)
        print(json.dumps({"statement": str(args.statement)}) if args.json else f"to sign: {args.statement}")
        return None
    bundle = signed_with(args, statement)
    if args.out:
        args.out.write_bytes(bundle)
        print(json.dumps({"bundle": str(args.out)}) if args.json else f"bundle {args.out}: hand it in with --hand-in")
        return None
    return bundle
