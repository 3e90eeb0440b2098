"""`pointcall propose`: submit a runbook as a proposal, list the open ones, or export one as a patch for reviewers."""

from __future__ import annotations

import argparse
import getpass
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli import connection, output

if TYPE_CHECKING:
    from pointcall_executor.agent_api.proposal import Proposal

MAX_FILE_BYTES = 64 * 1024


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the runbook source to submit")
    what.add_argument("--list", action="store_true", help="list the open proposals")
    what.add_argument("--export", metavar="ID", help="write a proposal as a patch that `git am` applies")
    parser.add_argument("--name", help="name of the runbook (default: that of its folder or file)")
    parser.add_argument("--rationale", help="why it should exist; a reviewer reads this first")
    parser.add_argument("--author", help="who proposes it (default: your login)")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the executor's socket (default: the agent's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --export: where to write the patch")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args)
    return _export(args) if args.export else _submit(args)


def _submit(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import Client, UnreachableError

    if not args.rationale:
        raise output.UsageRefusal("a proposal needs a reason", want="--rationale TEXT")
    socket = args.socket or output.state_dir(args) / "run" / "agent.sock"
    fields = {
        "name": args.name or _name(args.file),
        "rationale": args.rationale,
        "author": args.author or getpass.getuser(),
    }
    try:
        with Client(socket) as client:
            made = client.call("Proposals/SubmitProposal", source=_source(args.file), **fields)
    except UnreachableError as refusal:
        raise connection.unreachable(refusal, socket, changes=True) from None
    _show(made, as_json=args.json)
    return output.Exit.OK if made.state == "open" else output.Exit.REFUSED


def _source(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise output.UsageRefusal("the file is not UTF-8 text", id="proposal.malformed", got=str(path)) from None


def _name(path: Path) -> str:
    return (path.absolute().parent.name if path.stem == "runbook" else path.stem).replace("_", "-")


def _show(made: Any, *, as_json: bool) -> None:
    from google.protobuf.json_format import MessageToDict
    from rich.markup import escape

    if as_json:
        output.print_json(MessageToDict(made, preserving_proto_field_name=True))
        return
    console = output.console()
    marks = {"pass": "[green]ok[/]", "fail": "[red]FAIL[/]", "not-checked": "[yellow]--[/]"}
    for check in made.checks:
        console.print(f"{marks[check.outcome]}  {check.id}  {escape(check.observed)}")
    for capability in made.capabilities:
        actions = ", ".join(capability.actions) or "nothing"
        console.print(f"on {capability.event}: {actions}, at most {capability.fuel_bound} fuel")
    changed = sum(not d.same for d in made.differences)
    console.print(f"simulated on {made.simulated} recorded events, decides differently on {changed}")
    console.print(f"proposal {made.id}: {made.state}")


def _stored(args: argparse.Namespace) -> tuple[Proposal, ...]:
    from pointcall_executor.agent_api.inbox import Inbox

    return Inbox(output.state_dir(args) / "proposals").all()


def _list(args: argparse.Namespace) -> int:
    for proposal in _stored(args):
        if args.json:
            output.print_json(
                proposal.model_dump(include={"id", "name", "author", "submitted", "state", "source_sha256"})
            )
        else:
            sys.stdout.write(f"{proposal.id}  {proposal.submitted}  {proposal.name}  by {proposal.author}\n")
    return output.Exit.OK


def _export(args: argparse.Namespace) -> int:
    """Read from the inbox of the state folder, so it works without a running executor."""
    from pointcall_executor.agent_api import patch
    from pointcall_executor.agent_api.inbox import Inbox

    proposal = Inbox(output.state_dir(args) / "proposals").find(args.export)
    if proposal is None:
        raise output.UsageRefusal(
            "no such proposal", id="api.not-found", got=args.export, hint="pointcall propose --list"
        )
    text = patch.render(proposal, datetime.fromisoformat(proposal.submitted).astimezone(UTC))
    out = args.out or Path(f"{proposal.name}.patch")
    out.write_text(text, encoding="utf-8", newline="\n")
    if args.json:
        output.print_json({"id": proposal.id, "patch": str(out), "files": sorted(patch.files(proposal))})
    else:
        sys.stdout.write(f"{out}\n")
    return output.Exit.OK
