"""`pointcall manifest diff OLD NEW`: what an update grants, revokes or changes. `show` prints one manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.manifest_diff import Change


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    diff = what.add_parser("diff", help="what an update grants, revokes or changes")
    diff.add_argument("old", metavar="OLD", type=Path, help="a manifest.json or its bundle")
    diff.add_argument("new", metavar="NEW", type=Path, help="a manifest.json or its bundle")
    show = what.add_parser("show", help="what one manifest says; nothing of it is verified")
    show.add_argument("old", metavar="MANIFEST", type=Path, help="a manifest.json or its bundle")
    for one in (diff, show):
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    from pointcall_attest.manifest_diff import differences
    from pointcall_executor.cli.output import Exit, print_json

    old = _read(args.old)
    if args.what == "show":
        print_json({"sha256": old.sha256, "subjects": dict(old.subjects)} | old.predicate.model_dump(mode="json"))
        return Exit.OK
    new = _read(args.new)
    changes = differences(old, new)
    if args.json:
        rows = [{"effect": c.effect, "text": c.text} for c in changes]
        print_json({"old": old.sha256, "new": new.sha256, "changes": rows})
    else:
        _print(changes)
    return Exit.OK


def _read(path: Path) -> Manifest:
    """The manifest in a file: the statement itself, or the payload of a bundle over it. Not verified."""
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.signature import MAX_BUNDLE_BYTES, unverified_payload

    with path.open("rb") as file:
        raw = file.read(MAX_BUNDLE_BYTES + 1)
    return Manifest.parse(unverified_payload(raw) or raw)


def _print(changes: tuple[Change, ...]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    colours = {"grants": "bold yellow", "revokes": "green", "changes": "cyan"}
    for change in changes:
        console.print(f"[{colours[change.effect]}]{change.effect:8}[/] ", end="")
        console.print(change.text, markup=False, soft_wrap=True)
    if not changes:
        console.print("no difference in what may happen")
