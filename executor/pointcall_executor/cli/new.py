"""`pointcall new NAME`: a folder with a runbook that compiles, a case that passes, and a README."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Final

from pointcall_executor.cli.output import Exit, UsageRefusal, print_json

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}\Z")

RUNBOOK: Final = '''"""Say in one line what this does, and for whom."""

from pointcall_runbook import NO_SERVICE, CircuitOpened, Decision, Recreate, parameter, runbook, seconds

MAX_RESTARTS = parameter(3, lo=0, hi=100)  # in the last hour


@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE or e.restarts >= MAX_RESTARTS:
        return []
    return [Recreate(service=e.service, grace=seconds(1))]
'''
CASES: Final = (
    {
        "name": "a refusing service is recreated",
        "event": "CircuitOpened",
        "fields": {"service": "api"},
        "calls": [{"action": "recreate", "args": {"service": "api", "grace": 1_000_000_000}}],
    },
    {"name": "nobody declared it", "event": "CircuitOpened", "fields": {}, "calls": []},
    {"name": "enough", "event": "CircuitOpened", "fields": {"service": "api", "restarts": 3}, "calls": []},
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="lower case, digits and dashes")
    parser.add_argument("--in", dest="parent", type=Path, default=Path(), metavar="DIR", help="where (default: here)")


def run(args: argparse.Namespace) -> int:
    folder = scaffold(args.parent, args.name)
    if args.json:
        print_json({"folder": str(folder)})
    else:
        sys.stdout.write(f"{folder}: edit runbook.py, then run\n  pointcall test {folder}\n")
    return Exit.OK


def scaffold(parent: Path, name: str) -> Path:
    """Write the folder. UsageRefusal for a bad name or a folder that exists."""
    folder = parent / name
    if not _NAME.match(name) or folder.exists():
        raise UsageRefusal(f"{name!r} is no new name", id="new.name", want="lower case, digits, dashes; no such folder")
    (folder / "cases").mkdir(parents=True)
    (folder / "runbook.py").write_text(RUNBOOK)
    (folder / "cases" / "cases.json").write_text(json.dumps(CASES, indent=2) + "\n")
    (folder / "README.md").write_text(f"# {name}\n\nWhat it is for, what it needs, what its codes mean.\n")
    return folder
