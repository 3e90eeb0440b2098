"""`pointcall inspect FILE`: what a module, runbook, blob or manifest grants and costs. Nothing runs or is verified."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_executor.cli import inspected
from pointcall_executor.cli.output import Exit, print_json
from pointcall_executor.cli.runbook_source import compiled, refused, source_file

if TYPE_CHECKING:
    from pointcall_runbook.module import ModuleInfo

MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # twice the largest blob; a bundle is smaller


def configure(parser: argparse.ArgumentParser) -> None:
    what = "a runbook (.py, or its folder), a module (.wasm), a blob (.blob), or a manifest.json and its bundle"
    parser.add_argument("file", type=Path, metavar="FILE", help=what)
    parser.add_argument("--listing", action="store_true", help="show a module's instructions beside the source lines")


def run(args: argparse.Namespace) -> int:
    from pointcall_runbook.compiler import CompileError

    path = source_file(args.file)
    try:
        body = _described(path, listed=args.listing)
    except CompileError as error:
        return refused(error, as_json=args.json)
    if args.json:
        print_json(body)
    else:
        forms = {"module": text, "blob": inspected.blob_text, "manifest": inspected.manifest_text}
        sys.stdout.write(forms[body["kind"]](body))
    return Exit.OK


def _described(path: Path, *, listed: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES)
    match path.suffix:
        case ".py":
            return _source(path, listed=listed)
        case ".blob":
            return inspected.blob_described(raw)
        case ".json":
            return inspected.manifest_described(raw)
        case _:
            return _module(raw, listed=listed)


def _source(path: Path, *, listed: bool) -> dict[str, Any]:
    from pointcall_runbook.listing import listing

    runbook = compiled(path)
    shown = {"listing": listing(runbook.wasm, lines=runbook.lines, source=path.read_text())} if listed else {}
    return described(runbook.info) | shown


def _module(raw: bytes, *, listed: bool) -> dict[str, Any]:
    from pointcall_runbook.listing import listing
    from pointcall_runbook.module import verify_module

    return described(verify_module(raw)) | ({"listing": listing(raw)} if listed else {})


def described(info: ModuleInfo) -> dict[str, Any]:
    """A module as plain data."""
    return {
        "kind": "module",
        "sha256": info.sha256,
        "size": info.size,
        "abi": info.abi,
        "compiler": info.compiler,
        "source_sha256": info.source_sha256,
        "handlers": [
            {"event": h.event, "actions": list(h.capabilities), "fuel_bound": h.fuel_bound}
            for h in info.handlers.values()
        ],
        "capabilities": list(info.capabilities),
        "services": list(info.services),
        "channels": list(info.channels),
        "parameters": [{"name": p.name, "lo": p.lo, "hi": p.hi, "default": p.default} for p in info.parameters],
        "remembered": [{"name": s.name, "lo": s.lo, "hi": s.hi, "initial": s.initial} for s in info.slots],
    }


def text(body: dict[str, Any]) -> str:
    """The form for people."""
    out = [f"module {body['sha256']}", f"  {body['size']} bytes, by {body['compiler'] or 'another toolchain'}"]
    for handler in body["handlers"]:
        actions = ", ".join(handler["actions"]) or "nothing"
        out.append(f"  on {handler['event']}: may call {actions}; at most {handler['fuel_bound']} fuel")
    out += [f"  parameter {p['name']} = {p['default']}, {p['lo']}..{p['hi']}" for p in body["parameters"]]
    out += [f"  remembers {s['name']}, {s['lo']}..{s['hi']}, {s['initial']} at first" for s in body["remembered"]]
    for kind in ("services", "channels"):
        out += [f"  names {kind}: {', '.join(body[kind])}"] if body[kind] else []
    return "\n".join(out) + "\n" + (f"\n{body['listing']}\n" if "listing" in body else "")
