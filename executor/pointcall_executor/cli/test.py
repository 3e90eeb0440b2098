"""`pointcall test DIR`: run the cases of a runbook, show what they reach, and find inputs for the rest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli.output import Exit, print_json
from pointcall_executor.cli.runbook_source import compiled, refused, source_file

if TYPE_CHECKING:
    from pointcall_runbook.case import Case
    from pointcall_runbook.compiler import Compiled
    from pointcall_runbook.coverage import Coverage


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="a folder with runbook.py and cases/*.json"
    )
    parser.add_argument("--no-search", action="store_true", help="do not look for inputs that reach more branches")
    parser.add_argument("--require-branches", action="store_true", help="fail where the cases leave a branch out")


def run(args: argparse.Namespace) -> int:
    from pointcall_runbook.compiler import CompileError

    worst = Exit.OK
    for folder in args.folders:
        try:
            body = tested(folder, compiled(source_file(folder)), search=not args.no_search)
        except CompileError as error:
            return refused(error, as_json=args.json)
        failed = bool(body["failed"]) or (args.require_branches and bool(body["missing"]))
        worst = Exit.REFUSED if failed else worst
        if args.json:
            print_json(body)
        else:
            sys.stdout.write(text(body))
    return worst


def tested(folder: Path, runbook: Compiled, *, search: bool) -> dict[str, Any]:
    """Run all cases of a folder. Raises CaseError for a malformed one."""
    from pointcall_runbook import coverage
    from pointcall_runbook.case import parse_cases

    cases = [
        c for path in sorted((folder / "cases").glob("*.json")) for c in parse_cases(path.read_bytes(), runbook.info)
    ]
    reached = coverage.Coverage(runbook)
    failed = [f for case in cases if (f := _failure(case, runbook, reached)) is not None]
    body = {
        "runbook": folder.name,
        "cases": len(cases),
        "failed": failed,
        "coverage": dict(coverage.summary(reached)),
        "missing": [{"line": line, "condition": truth} for line, truth, _ in reached.missing],
    }
    return body | {"found": _found(reached) if search and body["missing"] else []}


def _failure(case: Case, runbook: Compiled, reached: Coverage) -> dict[str, Any] | None:
    from pointcall_runbook.interpreter import Interpreter

    trace: list[tuple[int, bool]] = []
    decided = Interpreter(runbook.wasm).run(case.event, case.args, trace=trace)
    reached.add(trace)
    if decided.calls == case.calls:
        return None
    want, got = (_readable(calls, runbook) for calls in (case.calls, decided.calls))
    return {"case": case.name, "want": want, "got": got}


def _readable(calls: Any, runbook: Compiled) -> list[dict[str, Any]]:
    from pointcall_runbook.case import readable
    from pointcall_runbook.vocabulary import channel, service

    names = {service(n).number: n for n in runbook.info.services}
    names |= {channel(n).number: n for n in runbook.info.channels}
    return [readable(call, names) for call in calls]


def _found(reached: Coverage) -> list[dict[str, Any]]:
    from pointcall_runbook.coverage import search

    return [{"event": f.event, "args": [str(a) for a in f.args]} for f in search(reached)]


def text(body: dict[str, Any]) -> str:
    """The form for people."""
    c = body["coverage"]
    out = [f"{body['runbook']}: {body['cases'] - len(body['failed'])} of {body['cases']} cases pass"]
    out.append(f"  lines {c['lines_reached']}/{c['lines']}, branches {c['branches_reached']}/{c['branches']}")
    for failure in body["failed"]:
        out += [f"  FAIL {failure['case']}", f"    want {failure['want']}", f"    got  {failure['got']}"]
    out += [f"  line {m['line']}: no case makes this {str(m['condition']).lower()}" for m in body["missing"]]
    out += [f"  found an input for {f['event']}: {', '.join(f['args'])}" for f in body["found"]]
    return "\n".join(out) + "\n"
