"""How every verb prints: a table or JSON for a result, one form for an error, one table of exit codes."""

from __future__ import annotations

import argparse
import enum
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from pointcall_attest.errors import MalformedError, RefusedError
from pointcall_attest.printable import shown
from pointcall_attest.verdict import Verdict
from pointcall_runbook.errors import PointcallError

MAX_DETAIL_CHARS: Final = 4096  # of one side of a check; evidence writes some of it


class Exit(enum.IntEnum):
    """docs/spec/cli.md lists them; scripts may rely on them."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    EMULATED = 3  # would be accepted, but only because emulation is allowed
    MALFORMED = 4
    ENVIRONMENT = 5  # a missing kernel feature, permission or file
    LOG = 65  # EX_DATAERR of sysexits.h: the log is not one that can be gone on with; only a person can mend that
    BUG = 70
    FAILED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a failure that a restart may mend


class EnvironmentRefusal(PointcallError):
    """This machine lacks something the verb needs; exit code 5."""

    id = "environment.missing"


class UsageRefusal(PointcallError):
    """The words of the call do not fit together; exit code 2."""

    id = "cli.usage"


def state_dir(args: argparse.Namespace) -> Path:
    """The one folder that holds all state of this installation."""
    if args.state_dir:
        return Path(args.state_dir)
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "pointcall"


def print_json(value: Any) -> None:
    """One JSON object on one line. Escaped throughout where the terminal's encoding could not hold a character."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def exit_of(error: BaseException) -> Exit:
    """The exit code of an error, by its type."""
    match error:
        case EnvironmentRefusal():
            return Exit.ENVIRONMENT
        case UsageRefusal():
            return Exit.USAGE
        case RefusedError():
            return Exit.REFUSED
        case MalformedError():
            return Exit.MALFORMED
        case PointcallError():
            if error.id.startswith("config."):
                return Exit.USAGE
            return Exit.MALFORMED if error.id.endswith("malformed") else Exit.REFUSED
        case PermissionError() | FileNotFoundError() | OSError():
            return Exit.ENVIRONMENT
        case _:
            return Exit.BUG


def failed(error: Exception, *, as_json: bool, code: Exit | None = None) -> int:
    """Print the error (never a traceback unless it is our bug) and return its exit code, which is by its type unless
    the caller knows better."""
    code = exit_of(error) if code is None else code
    if code is Exit.BUG:
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.write("pointcall: this is a bug; please report the lines above\n")
        return code
    body = error.as_dict() if isinstance(error, PointcallError) else {"id": "environment.os", "message": str(error)}
    if as_json:
        print_json({"ok": False, "error": body, "exit": int(code)})
    else:
        sys.stderr.write(f"pointcall: error: {error}\n")
    return code


def closed_pipe() -> int:
    """The reader went away: say nothing more, and keep the interpreter from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK


def print_verdict(verdict: Verdict, *, title: str = "") -> None:
    """A verdict as a table: one line a check, failures with what was wanted and found."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    heading = Text(shown(title)) if title else None
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, show_header=False)
    marks = {"pass": "[green]ok[/]", "fail": "[red]FAIL[/]", "not-checked": "[yellow]--[/]"}
    for check in verdict.checks:
        want, got = shown(check.expected, MAX_DETAIL_CHARS), shown(check.observed, MAX_DETAIL_CHARS)
        table.add_row(
            marks[check.outcome], check.id, Text(got if check.outcome != "fail" else f"want {want}\ngot  {got}")
        )
    console.print(table)
    if verdict.tier == "emulated":
        console.print("[bold yellow]EMULATED[/]: software-emulated TEE; no confidentiality or integrity claim")
    console.print(f"verdict: {'[green]accept[/]' if verdict.passed else '[red]reject[/]'}  tier: {verdict.tier}")


def verdict_exit(verdict: Verdict, *, allow_emulated: bool) -> Exit:
    """0 accepted, 1 refused, 3 accepted only if emulation is allowed."""
    if not verdict.passed:
        return Exit.REFUSED
    return Exit.EMULATED if verdict.tier == "emulated" and not allow_emulated else Exit.OK
