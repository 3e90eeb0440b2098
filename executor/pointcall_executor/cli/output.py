"""How every verb prints: a table or JSON for a result, one form for an error, one table of exit codes."""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_attest.errors import MalformedError, RefusedError
from pointcall_attest.printable import shown
from pointcall_attest.verdict import Verdict
from pointcall_runbook.errors import PointcallError

if TYPE_CHECKING:
    from rich.console import Console

NODE: Final = Path("/var/lib/pointcall")  # where deploy/systemd keeps the state of a node
_NOT_OPENED: Final = frozenset((3, 8, 14, 23))  # SQLite's PERM, READONLY, CANTOPEN, AUTH
_OS_HINTS: Final = {
    errno.ENOENT: "is the path right? Relative ones begin where you are",
    errno.EACCES: "who may read or write there? Perhaps sudo",
    errno.EPERM: "this needs privileges; perhaps sudo",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
}
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
    """The one folder that holds all state of this installation. For root on a node it is the node's."""
    if args.state_dir:
        return Path(args.state_dir)
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base and os.geteuid() == 0 and NODE.is_dir():
        return NODE
    return Path(base or Path.home() / ".local" / "state") / "pointcall"


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
        case OSError():
            return Exit.ENVIRONMENT
        case _ if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_OPENED:
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
    told = error if isinstance(error, PointcallError) else _of_the_system(error)
    if as_json:
        with contextlib.suppress(OSError):  # what cannot be written to has no reader; the exit code is left
            print_json({"ok": False, "error": told.as_dict(), "exit": int(code)})
    else:
        sys.stderr.write(f"pointcall: error: {told}\n")
    return code


def _of_the_system(error: Exception) -> EnvironmentRefusal:
    """What the system or SQLite refused, in our form."""
    if not isinstance(error, OSError):
        hint = "who may read the state folder? Perhaps sudo"
        return EnvironmentRefusal("the log cannot be opened", id="environment.os", got=str(error), hint=hint)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    hint = _OS_HINTS.get(error.errno or 0, "")
    return EnvironmentRefusal(
        error.strerror or str(error), id="environment.os", got=", ".join(names) or str(error), hint=hint
    )


def speak_safely() -> None:
    """A terminal whose encoding lacks a character shows another one; that is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")


def console() -> Console:
    """A terminal for tables. A reader that went away is no failure, as everywhere else."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Quiet(highlight=False)


def closed_pipe() -> int:
    """The reader went away: say nothing more, and keep the interpreter from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK


def print_verdict(verdict: Verdict, *, title: str = "") -> None:
    """A verdict as a table: one line a check, failures with what was wanted and found."""
    from rich.table import Table
    from rich.text import Text

    terminal = console()
    heading = Text(shown(title)) if title else None
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")  # half a digest is none
    marks = {"pass": "[green]ok[/]", "fail": "[red]FAIL[/]", "not-checked": "[yellow]--[/]"}
    for check in verdict.checks:
        want, got = shown(check.expected, MAX_DETAIL_CHARS), shown(check.observed, MAX_DETAIL_CHARS)
        table.add_row(
            marks[check.outcome], check.id, Text(got if check.outcome != "fail" else f"want {want}\ngot  {got}")
        )
    terminal.print(table)
    if verdict.tier == "emulated":
        terminal.print("[bold yellow]EMULATED[/]: software-emulated TEE; no confidentiality or integrity claim")
    terminal.print(f"verdict: {'[green]accept[/]' if verdict.passed else '[red]reject[/]'}  tier: {verdict.tier}")


def verdict_exit(verdict: Verdict, *, allow_emulated: bool) -> Exit:
    """0 accepted, 1 refused, 3 accepted only if emulation is allowed."""
    if not verdict.passed:
        return Exit.REFUSED
    return Exit.EMULATED if verdict.tier == "emulated" and not allow_emulated else Exit.OK
