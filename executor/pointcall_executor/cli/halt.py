"""`pointcall halt`: the kill switch. It works without the executor's help, and lasts until a person clears it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

ASK_SECONDS: Final = 2.0
KILL_SECONDS: Final = 5.0
OF_A_NODE: Final = ("run", "journal.db", "trust", "manifest", "halt.json")  # each of them is in a node's state folder


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reason", metavar="TEXT", help="hold the node still; the reason is shown to everybody")
    what.add_argument("--clear", action="store_true", help="end the halt; nothing is armed by that")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.connection import with_words
    from pointcall_executor.cli.output import Exit, print_json, state_dir
    from pointcall_executor.halt import clear, halt, now

    state = state_dir(args).absolute()  # pins are named after it, as `pointcall run` sees it
    _must_be_a_node(state)
    if args.clear:
        said = "the halt is over; arm a manifest" if clear(state) else "there was no halt"
    else:
        halt(state, with_words(args.reason), now())
        said = f"halted: {_let_go(state)}"
    if args.json:
        print_json({"ok": True, "detail": said})
    else:
        print(said)
    return Exit.OK


def _must_be_a_node(state: Path) -> None:
    """A halt that lands in another folder holds nothing still; who typed it would go back to sleep.

    EnvironmentRefusal `halt.state`. OSError where that cannot be seen.
    """
    from pointcall_executor.cli.output import EnvironmentRefusal

    for name in OF_A_NODE:
        try:
            (state / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return
    raise EnvironmentRefusal(
        "NOT HALTED: this is no node's state folder", id="halt.state", want="the folder that `pointcall run` has",
        got=str(state), hint="--state-dir DIR; `systemctl cat pointcall` shows which one",
    )  # fmt: skip


def _let_go(state: Path) -> str:
    """The executor sees the file by itself; one that does not say so in time is killed, and pins are removed."""
    from pointcall_executor.halt import kill_executor
    from pointcall_executor.node import Pins

    if _disarmed(state):
        Pins(state).drop()  # of an earlier executor, where this one has armed nothing
        return "the executor has let go"
    done = kill_executor(state, within=KILL_SECONDS)
    Pins(state).drop()
    return f"{done}; nothing of it is left in the kernel"


def _disarmed(state: Path) -> bool:
    import time

    from pointcall_executor.api.client import Client
    from pointcall_executor.api.roles import Role
    from pointcall_runbook.errors import PointcallError

    deadline = time.monotonic() + ASK_SECONDS
    try:
        with Client(state / "run" / f"{Role.OPERATOR.value}.sock", timeout_s=ASK_SECONDS) as client:
            while time.monotonic() < deadline:
                if client.call("Status/GetStatus").state in ("disarmed", "failed"):
                    return True
                time.sleep(0.1)
    except PointcallError:
        return False
    return False
