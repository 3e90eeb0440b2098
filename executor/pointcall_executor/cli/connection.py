"""How verbs reach the running executor: a role's socket, durations, reasons, and what an answer looks like."""

from __future__ import annotations

import argparse
import getpass
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_executor.api.client import Client

_DURATION: Final = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s?)?")
_UNITS_S: Final = (3600, 60, 1)


def seconds_of(text: str) -> int:
    """`90`, `45s`, `10m`, `1h30m` in seconds. UsageRefusal for anything else, and for nothing at all."""
    found = _DURATION.fullmatch(text)
    total = sum(int(n or 0) * unit for n, unit in zip(found.groups(), _UNITS_S, strict=True)) if found else 0
    if not total:
        raise output.UsageRefusal("that is no duration", want="45s, 10m or 1h30m", got=text[:40])
    return total


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 9 min 30 s, 2 h 5 min, 3 d 4 h."""
    left = int(seconds)
    for above, unit, small, name in ((86_400, 3600, "h", "d"), (3600, 60, "min", "h"), (60, 1, "s", "min")):
        if left >= above:
            rest = left % above // unit
            return f"{left // above} {name}" + (f" {rest} {small}" if rest else "")
    return f"{left} s"


def destination(text: str) -> tuple[str, int]:
    """`ADDRESS:PORT`, with an IPv6 address in brackets. UsageRefusal where there is no port."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5:
        raise output.UsageRefusal("that is no destination", want="ADDRESS:PORT or [ADDRESS]:PORT", got=text[:80])
    return host.strip("[]"), int(port)


def add_reason(parser: argparse.ArgumentParser) -> None:
    """`--reason`, which goes into the log."""
    parser.add_argument("--reason", metavar="TEXT", default="", help="why; it goes into the log")


def reason(args: argparse.Namespace) -> str:
    """What was given, or at least who did not say why."""
    return args.reason or f"no reason given by {_user()}"


def reason_by(tool: str) -> str:
    """For what was decided at a screen, where nobody types a reason."""
    return f"from {tool} by {_user()}"


def _user() -> str:
    sudo = os.environ.get("SUDO_USER", "")
    try:
        return f"{getpass.getuser()} for {sudo}" if sudo else getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def socket_of(folder: Path) -> Path:
    """The operator's socket if it can be opened, else the auditor's."""
    operator = folder / "operator.sock"
    return operator if os.access(operator, os.W_OK) else folder / "auditor.sock"


def unreachable(refusal: Any, socket: Path) -> output.EnvironmentRefusal:
    """The error of a verb whose executor does not answer."""
    if refusal.id == "api.deadline":
        return output.EnvironmentRefusal(
            refusal.message, id=refusal.id, want=refusal.want, got=str(socket), hint=refusal.hint
        )
    hint = "is `pointcall run` running with this --state-dir? Its journal says what was last: pointcall log list"
    return output.EnvironmentRefusal(refusal.message, id=refusal.id, got=str(socket), hint=hint)


def operator(args: argparse.Namespace, *, timeout_s: float = 30) -> Client:
    """A client on the operator's socket."""
    from pointcall_executor.api.client import Client
    from pointcall_executor.api.roles import Role

    return Client(output.state_dir(args) / "run" / f"{Role.OPERATOR.value}.sock", timeout_s)


def control(args: argparse.Namespace, method: str, **fields: Any) -> int:
    """Call `Control/<method>`, print the state after it, exit 0. ApiError or EnvironmentRefusal."""
    from pointcall_executor.api.client import UnreachableError

    try:
        with operator(args) as client:
            answer = client.call(f"Control/{method}", **fields)
    except UnreachableError as refusal:
        raise unreachable(refusal, output.state_dir(args) / "run" / "operator.sock") from None
    if args.json:
        output.print_json({"ok": True, "state": answer.state, "detail": answer.detail})
    else:
        print(f"{answer.state}: {answer.detail}")
    return output.Exit.OK
