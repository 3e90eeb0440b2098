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


def with_words(given: str) -> str:
    """A reason that has to be given. UsageRefusal where it is empty."""
    if not given.strip():
        raise output.UsageRefusal("this needs a reason", want='--reason "why"', got=repr(given))
    return given


def reason_by(tool: str) -> str:
    """For what was decided at a screen, where nobody types a reason."""
    return f"from {tool} by {_user()}"


def _user() -> str:
    sudo = os.environ.get("SUDO_USER", "")
    return f"{_name()} for {sudo}" if sudo else _name()


def _name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def socket_of(folder: Path) -> Path:
    """The operator's socket if it can be opened or if there is no other, else the auditor's."""
    operator, auditor = folder / "operator.sock", folder / "auditor.sock"
    return auditor if not os.access(operator, os.W_OK) and os.access(auditor, os.F_OK) else operator


def unreachable(refusal: Any, socket: Path, *, changes: bool = False) -> output.EnvironmentRefusal:
    """The error of a verb whose executor does not answer: which of the reasons it is. `changes`: it asked for something
    to be done, which may still happen."""
    if refusal.id == "api.deadline":
        stuck = "it is stopped, stuck or very busy; `pointcall halt --reason ...` needs no answer"
        return output.EnvironmentRefusal(
            refusal.message, id=refusal.id, want=refusal.want, got=str(socket), hint=refusal.hint if changes else stuck
        )
    if (why := forbidden(socket)) is not None:
        return why
    if not os.access(socket.parent, os.F_OK):
        return output.EnvironmentRefusal(
            "no executor has run with this state folder", id=refusal.id, want=str(socket.parent), got="no such folder",
            hint="--state-dir DIR; `systemctl cat pointcall` shows which one",
        )  # fmt: skip
    folder = socket.parent.parent
    hint = f"systemctl status pointcall; what was last: pointcall log tail --state-dir {folder}"
    return output.EnvironmentRefusal(refusal.message, id=refusal.id, got=str(socket), hint=hint)


def forbidden(socket: Path) -> output.EnvironmentRefusal | None:
    """What to say where this user may not use the socket, whoever listens there; None where that is not known."""
    try:
        socket.lstat()
    except PermissionError:
        pass
    except OSError:
        return None
    else:
        if os.access(socket, os.W_OK):
            return None
    return output.EnvironmentRefusal(
        f"user {_name()} may not talk to the executor", id="api.permission", want="write access to the role's socket",
        got=str(socket), hint="sudo, or be in the group that the setting `groups` gives the role",
    )  # fmt: skip


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
        raise unreachable(refusal, output.state_dir(args) / "run" / "operator.sock", changes=True) from None
    if args.json:
        output.print_json({"ok": True, "state": answer.state, "detail": answer.detail})
    else:
        print(f"{answer.state}: {answer.detail}")
    return output.Exit.OK
