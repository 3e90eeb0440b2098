"""`pointcall status`: what is armed on this node and what happened, asked of the running executor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pointcall_executor.cli import output


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="a role's socket (default: the operator's or auditor's)"
    )


def run(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    from pointcall_executor.api.client import Client, UnreachableError

    socket = args.socket or _socket(output.state_dir(args) / "run")
    try:
        with Client(socket) as client:
            status = client.call("Status/GetStatus")
            runs = client.call("Runs/ListRuns", page_size=5).runs
    except UnreachableError as refusal:
        raise output.EnvironmentRefusal(
            refusal.message, id=refusal.id, got=str(socket), hint="is `pointcall run` running with this --state-dir?"
        ) from None
    if args.json:
        options: dict[str, Any] = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
        output.print_json(MessageToDict(status, **options) | {"last_runs": [MessageToDict(r, **options) for r in runs]})
    else:
        _show(status, runs)
    return output.Exit.OK


def _socket(folder: Path) -> Path:
    """The operator's socket if it can be opened, else the auditor's."""
    import os

    operator = folder / "operator.sock"
    return operator if os.access(operator, os.W_OK) else folder / "auditor.sock"


def _show(status: Any, runs: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    colour = {"armed": "green", "paused": "yellow"}.get(status.state, "red")
    console.print(
        f"[bold]{status.node}[/]  [{colour}]{status.state}[/]{' (' + status.reason + ')' if status.reason else ''}"
    )
    if status.tier == "emulated":
        console.print("[bold yellow]EMULATED[/]: software-emulated TEE; no confidentiality or integrity claim")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text in _facts(status):
        table.add_row(name, text, style=None)
    console.print(table)
    for title, header, rows in _tables(status, runs):
        _print_table(console, title, header, rows)


def _facts(status: Any) -> list[tuple[str, str]]:
    return [
        ("manifest", f"{status.manifest or 'none'}, sequence {status.sequence}, {status.manifest_sha256[:16]}"),
        ("signed by", ", ".join(status.signers) or "nobody"),
        ("expires", status.expires or "never"),
        ("evidence", f"{status.platform}, {status.tier}"),
        ("epoch", status.epoch[:16]),
        ("log", f"{status.tree_size} entries, {status.runs} runs, {status.refusals} refusals"),
        ("lost", f"{status.lost_events} events"),
        ("executor", status.executor),
    ]


def _tables(status: Any, runs: Any) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        (
            "runbooks",
            ("name", "version", "mode", "on", "may", "fuel"),
            [
                (b.name, b.version, b.mode, ", ".join(b.events), ", ".join(b.capabilities), str(b.fuel_bound))
                for b in status.runbooks
            ],
        ),
        (
            "services",
            ("name", "kind", "state", "restarts"),
            [(s.name, s.kind, s.state, str(s.restarts)) for s in status.services],
        ),
        (
            "circuits",
            ("destination", "state", "refused"),
            [(f"{c.address}:{c.port}", c.state, str(c.refused)) for c in status.circuits],
        ),
        (
            "last runs",
            ("run", "started", "runbook", "event", "actions"),
            [
                (
                    r.id,
                    r.started[:19],
                    r.runbook,
                    r.event,
                    ", ".join(f"{a.action} {a.target}: {a.outcome}" for a in r.actions),
                )
                for r in runs
            ],
        ),
    ]


def _print_table(console: Any, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(name, header_style="dim")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
