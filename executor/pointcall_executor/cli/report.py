"""`pointcall report`: the log as a page, as JSON and as OSCAL; `pointcall report sample`: runs drawn for an auditor."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.entry import Entry
    from pointcall_attest.report import Known, Report
    from pointcall_attest.report.known import Trust
    from pointcall_executor.journal_reader import JournalReader

PAGE = 5_000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("page", "sample"), default="page", help="default: page")
    parser.add_argument("--n", type=int, default=25, help="sample: how many runs (default 25)")
    parser.add_argument("--seed", help="sample: the auditor's own words; the same seed draws the same runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: report/ of the state)")
    parser.add_argument("--trust", type=Path, metavar="DIR", help="whom you believe (default: trust/ of the state)")
    parser.add_argument("--controls", type=Path, metavar="FILE", help="your own control mapping (TOML)")
    parser.add_argument("--at", metavar="TIME", help="print this time (RFC 3339) as the time of making")


def run(args: argparse.Namespace) -> int:
    return _sample(args) if args.what == "sample" else _page(args)


def _page(args: argparse.Namespace) -> int:
    from pointcall_attest.report import render_html
    from pointcall_attest.report.oscal import assessment_results

    state = output.state_dir(args)
    made = _made(state, args)
    texts = {
        "report.html": render_html(made),
        "report.json": _json(made.as_dict()),
        "assessment-results.json": _json(assessment_results(made)),
    }
    out = args.out or state / "report"
    _write(out, texts)
    paths = dict(zip(("html", "json", "oscal"), (str(out / name) for name in texts), strict=True))
    _say(made, paths, as_json=args.json)
    return output.Exit.REFUSED if made.verdict.failed else output.Exit.OK


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _write(out: Path, texts: dict[str, str]) -> None:
    """The files and their sums, in the form that `sha256sum --check` reads."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    sums = (f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in texts.items())
    (out / "SHA256SUMS").write_text("".join(sums))


def _sample(args: argparse.Namespace) -> int:
    """Draw runs from all runs under the newest checkpoint; with --out, write the pack of each."""
    from pointcall_attest.report import sample
    from pointcall_executor.journal_reader import JournalReader

    if not args.seed or len(args.seed.encode()) > sample.MAX_SEED_BYTES or not 1 <= args.n <= sample.MAX_SAMPLE:
        raise output.UsageRefusal("a sample needs a seed and a size", want=f"--seed TEXT --n 1..{sample.MAX_SAMPLE}")
    with closing(JournalReader.open(output.state_dir(args) / "journal.db")) as reader:
        head = reader.head()
        if head is None:
            raise output.EnvironmentRefusal("the log has no checkpoint yet", id="report.checkpoint")
        runs = {e.index: str(e.run) for e in _entries(reader) if e.kind == "receipt" and e.index < head.size}
        drawn = sample.draw(runs, n=args.n, seed=args.seed, root=head.root)
        if args.out:
            _packs(reader, [runs[i] for i in drawn], args.out)
    rows = [{"entry": i, "run": runs[i]} for i in drawn]
    if args.json:
        body = {
            "population": len(runs),
            "tree_size": head.size,
            "root": head.root.hex(),
            "seed": args.seed,
            "sample": rows,
        }
        output.print_json(body)
    else:
        sys.stdout.writelines(f"{row['entry']:>10}  {row['run']}\n" for row in rows)
        sys.stdout.write(f"{len(drawn)} of {len(runs)} runs, under a tree of {head.size} entries\n")
    return output.Exit.OK


def _packs(reader: JournalReader, runs: list[str], out: Path) -> None:
    from pointcall_attest.pack import export

    for run_id in runs:
        export(reader, run_id).write(out / run_id)


def _made(state: Path, args: argparse.Namespace) -> Report:
    from pointcall_attest.report import build, controls
    from pointcall_executor.journal_reader import JournalReader

    frameworks = controls.parse(args.controls.read_bytes()) if args.controls else None
    with closing(JournalReader.open(state / "journal.db")) as reader:
        head = reader.head()
        entries = _entries(reader)
        known = _known(entries, reader, _trust(args.trust or state / "trust"))
        pruned = _pruned(entries, reader)
    return build(entries, head, now=_time(args.at), known=known, frameworks=frameworks, pruned=pruned)


def _entries(reader: JournalReader) -> list[Entry]:
    entries: list[Entry] = []
    while page := reader.entries(start=entries[-1].index + 1 if entries else 0, limit=PAGE):
        entries += page
    return entries


def _pruned(entries: list[Entry], reader: JournalReader) -> dict[int, bytes]:
    """The leaf hashes of the entries that were pruned."""
    there, tree = {e.index for e in entries}, reader.tree()
    return {i: tree.leaf(i) for i in range(reader.minimum) if i not in there}


def _known(entries: list[Entry], reader: JournalReader, trust: Trust | None) -> Known:
    from pointcall_attest.report.known import known

    return known(entries, reader.blob, trust=trust)


def _trust(folder: Path) -> Trust | None:
    from pointcall_attest.policy import TrustPolicy
    from pointcall_attest.report.known import Trust
    from pointcall_attest.trust import Roots

    policy, root = folder / "policy.json", folder / "trusted_root.json"
    if not (policy.is_file() and root.is_file()):
        return None
    return Trust(TrustPolicy.parse(policy.read_bytes()), root.read_bytes(), Roots.open(folder))


def _time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise output.UsageRefusal("--at is no time with a zone", want="2026-11-23T00:00:00Z", got=text[:60])
    return at


def _say(made: Report, paths: dict[str, str], *, as_json: bool) -> None:
    summary = {
        "entries": made.population.tree_size,
        "complete": made.complete,
        "tier": made.tier,
        "runs": len(made.runs),
        "refusals": len(made.refusals),
        "outcomes": dict(made.outcomes),
    }
    if as_json:
        output.print_json({"ok": not made.verdict.failed, **paths, **summary, "verdict": made.verdict.as_dict()})
        return
    output.print_verdict(made.verdict, title=f"report over {made.population.tree_size} entries")
    sys.stdout.write(f"{len(made.runs)} runs, {len(made.refusals)} refusals\n")
    sys.stdout.writelines(f"{path}\n" for path in paths.values())
