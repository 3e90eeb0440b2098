"""`pointcall doctor`: what this machine offers, what is missing, and what each missing thing is needed for.

With `--bundle`: everything that is needed to look at it elsewhere, without keys and without clear text of persons.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli import connection, output

if TYPE_CHECKING:
    from pointcall_executor.kernel.probe import Feature


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Probes the kernel by loading small programs; leaves nothing behind. Exit code 5 if something"
    parser.description += " required is missing."
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="write a support bundle (.tar.gz) without secrets")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the executor's settings, for the bundle")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.kernel.probe import missing, probe

    features = [*probe(), *_limits()]
    absent = missing(features)
    if args.bundle is not None:
        return _bundle(args, features)
    if args.json:
        rows = [dataclasses.asdict(feature) for feature in features]
        output.print_json({"ok": not absent, "kernel": platform.release(), "features": rows})
    else:
        _show(features, absent)
    return output.Exit.ENVIRONMENT if absent else output.Exit.OK


def _limits() -> list[Feature]:
    """What holds the limits of declared services."""
    from pointcall_executor.kernel.errors import KernelError
    from pointcall_executor.kernel.probe import Feature
    from pointcall_executor.services.groups import limit_place

    needs = {"memory": "`memory_bytes` of services", "pids": "`processes` of services that run as root"}
    found = []
    for controller, needed_for in needs.items():
        try:
            place = limit_place(controller)
        except (OSError, KernelError) as error:
            place, why = "", str(error)
        else:
            why = "no cgroup has this controller"
        found.append(Feature(f"cgroup.{controller}", bool(place), place or why, needed_for, required=False))
    return found


def _bundle(args: argparse.Namespace, features: list[Feature]) -> int:
    from pointcall_executor import support_bundle

    state = output.state_dir(args)
    contents = support_bundle.collect(state, args.config, features, lambda: _status(state))
    try:
        size = support_bundle.write(args.bundle, contents)
    except FileExistsError:
        raise output.UsageRefusal("something is there already", want="a new file", got=str(args.bundle)) from None
    rows = [{"name": content.name, "bytes": len(content.data)} for content in contents]
    if args.json:
        output.print_json({"ok": True, "bundle": str(args.bundle), "bytes": size, "contents": rows})
    else:
        for row in rows:
            print(f"{row['bytes']:>9}  {row['name']}")
        print(f"{size:>9}  {args.bundle}: read it before you send it")
    return output.Exit.OK


def _status(state: Path) -> Any:
    """What the executor answers now. UnreachableError where none runs."""
    from google.protobuf.json_format import MessageToDict

    from pointcall_executor.api.client import Client

    with Client(connection.socket_of(state / "run"), timeout_s=5) as client:
        status = client.call("Status/GetStatus")
    return MessageToDict(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _show(features: list[Feature], absent: list[Feature]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True, min_width=max(len(feature.id) for feature in features))
    table.add_column(overflow="fold")
    for feature in features:
        mark = "[green]ok[/]" if feature.present else "[red]MISSING[/]" if feature.required else "[yellow]absent[/]"
        table.add_row(mark, feature.id, feature.detail, f"[dim]{feature.needed_for}[/]")
    console = output.console()
    console.print(f"kernel {platform.release()} on {platform.machine()}")
    console.print(table)
    if absent:
        sys.stderr.write(f"pointcall: missing: {', '.join(f.id for f in absent)}\n")
        return
    others = ", ".join(f.id for f in features if not f.present)
    print("everything that is required is there" + (f"; what needs these is not possible: {others}" if others else ""))
