"""`pointcall arm DIR`: give the running executor another manifest. It verifies everything itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

ARM_SECONDS: Final = 600.0  # runs in flight may take two minutes to end, and services that start their time


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="*.sigstore.json and files/")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import UnreachableError
    from pointcall_executor.cli import connection
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json, state_dir
    from pointcall_executor.daemon import Bundle

    bundle = Bundle.read(args.folder)
    if not bundle.signatures:
        raise UsageRefusal("nothing to arm there", want="a *.sigstore.json file", got=str(args.folder))
    try:
        with connection.operator(args, timeout_s=ARM_SECONDS) as client:
            answer = client.call("Control/Arm", bundles=list(bundle.signatures), files=dict(bundle.files))
    except UnreachableError as refusal:
        raise connection.unreachable(refusal, state_dir(args) / "run" / "operator.sock", changes=True) from None
    failed = [(c.id, c.expected, c.observed, c.hint) for c in answer.checks if c.outcome == "fail"]
    if args.json:
        print_json({"ok": answer.armed, "manifest": answer.manifest_sha256, "failed": [f[0] for f in failed]})
    else:
        for check, want, got, hint in failed:
            print(f"refused: {check}\n  want {want}\n  got  {got}" + (f"\n  hint: {hint}" if hint else ""))
        if answer.armed:
            print(f"armed: manifest {answer.manifest_sha256}")
    return Exit.OK if answer.armed else Exit.REFUSED
