"""`pointcall doctor`: what this machine offers, what is missing, and what each missing thing is needed for."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_executor.kernel.probe import Feature


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Probes the kernel by loading small programs; leaves nothing behind. Exit code 5 if something"
    parser.description += " required is missing."


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.kernel.probe import missing, probe

    features = probe()
    absent = missing(features)
    if args.json:
        rows = [dataclasses.asdict(feature) for feature in features]
        output.print_json({"ok": not absent, "kernel": platform.release(), "features": rows})
    else:
        _show(features, absent)
    return output.Exit.ENVIRONMENT if absent else output.Exit.OK


def _show(features: list[Feature], absent: list[Feature]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True, min_width=max(len(feature.id) for feature in features))
    for feature in features:
        mark = "[green]ok[/]" if feature.present else "[red]MISSING[/]" if feature.required else "[yellow]absent[/]"
        table.add_row(mark, feature.id, feature.detail, f"[dim]{feature.needed_for}[/]")
    console = Console(highlight=False)
    console.print(f"kernel {platform.release()} on {platform.machine()}")
    console.print(table)
    if absent:
        sys.stderr.write(f"pointcall: missing: {', '.join(f.id for f in absent)}\n")
