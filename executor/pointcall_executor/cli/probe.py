"""`pointcall probe FILE.c`: run a diagnosis probe with the distribution's BCC. Unmeasured, and the log says so.

Outside the manifest in every way: it is compiled here and now, it decides nothing, no runbook sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pointcall_executor.cli import output


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compile and run a BCC program for diagnosis. It is not measured, and the log says so."
    parser.add_argument("file", metavar="FILE.c", type=Path, help="C as BCC takes it")
    parser.add_argument("--seconds", type=float, default=10.0, help="at most 3600 (default 10)")
    parser.add_argument("--table", action="append", default=[], metavar="NAME", help="print this table at the end")
    parser.add_argument("--reason", default="diagnosis", help="goes into the log")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.kernel import bcc_probe

    source = _source(args)
    if os.geteuid():
        raise output.EnvironmentRefusal("a probe needs root", hint="sudo")
    python = bcc_probe.find_interpreter()
    digest, rows = hashlib.sha256(source).hexdigest(), 0

    def show(row: dict[str, Any]) -> None:
        nonlocal rows
        rows += "line" in row
        output.print_json(row) if args.json else print(_line(row))

    record = _log(args, digest)
    how = record("begins")
    if not args.json:
        print(f"UNMEASURED: {args.file.name} sha256 {digest}; {how}")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            bcc_probe.run(args.file, args.seconds, args.table, show, python)
    finally:
        record("ended")
    if args.json:
        output.print_json({"ok": True, "measured": False, "sha256": digest, "rows": rows, "logged": how})
    return output.Exit.OK


def _source(args: argparse.Namespace) -> bytes:
    from pointcall_executor.kernel.bcc_probe import MAX_SECONDS, MAX_SOURCE_BYTES

    if not 0 < args.seconds <= MAX_SECONDS:
        raise output.UsageRefusal(f"a probe runs for at most {MAX_SECONDS:.0f} s", hint="--seconds 10")
    if not all(re.fullmatch(r"[A-Za-z_]\w{0,62}", name) for name in args.table):
        raise output.UsageRefusal("a table's name is a C identifier", hint="--table counts")
    raw: bytes = args.file.read_bytes()
    if len(raw) > MAX_SOURCE_BYTES:
        raise output.UsageRefusal("the probe is too long", hint=f"at most {MAX_SOURCE_BYTES} bytes")
    return raw


def _log(args: argparse.Namespace, digest: str) -> Callable[[str], str]:
    """What writes the entries: the running executor, else the state folder for the next one. Says which it was."""
    from pointcall_executor import probes
    from pointcall_executor.api.client import Client
    from pointcall_executor.api.roles import Role
    from pointcall_runbook.errors import PointcallError

    state = output.state_dir(args)
    socket = state / "run" / f"{Role.OPERATOR.value}.sock"

    def record(what: str) -> str:
        body = {"name": args.file.name, "sha256": digest, "what": what, "reason": args.reason}
        if socket.exists():
            try:
                with Client(socket) as client:
                    client.call("Control/RecordProbe", **body)
                return "the log has it"
            except PointcallError as error:
                if error.id != "api.unreachable":
                    raise
        probes.note(state, body | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        return "no executor runs: the next one writes it into the log"

    return record


def _line(row: dict[str, Any]) -> str:
    from pointcall_attest.printable import shown

    if "table" in row:
        return "\n".join([f"table {row['table']}", *(f"  {shown(k, 100)}: {shown(v, 100)}" for k, v in row["rows"])])
    if "line" in row:
        return f"{row['at']:.6f} {row['pid']} {shown(row['task'], 32)} {shown(row['line'], 400)}"
    return "attached" if row.get("attached") else "nothing of it attached by its name"
