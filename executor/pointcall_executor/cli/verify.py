"""`pointcall verify`: check one run offline, from its receipt down to the root key, each check named."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.log.checkpoint import Checkpoint
    from pointcall_attest.log.witness import WitnessPolicy
    from pointcall_attest.pack import Pack
    from pointcall_attest.pack_check import Trust
    from pointcall_attest.verdict import Verdict
    from pointcall_executor.journal_reader import JournalReader

MAX_RECEIPT_BYTES = 65_535


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="RUN|FILE|DIR", help="a run of this node, its receipt, a pack, or a tile directory"
    )
    parser.add_argument("--allow-emulated", action="store_true", help="accept evidence of the emulated platform")
    parser.add_argument("--at", metavar="TIME", help="judge at this time (RFC 3339), not at that of the epoch")
    parser.add_argument("--since", type=Path, metavar="FILE", help="a checkpoint of this log that was seen before")
    parser.add_argument(
        "--witnesses", type=Path, metavar="FILE", help="a C2SP policy: which witnesses must have signed"
    )
    parser.add_argument("--trust", type=Path, metavar="DIR", help="your trust folder (default: that of the state)")


def run(args: argparse.Namespace) -> int:
    if (Path(args.what) / "tile").is_dir():
        return _log(args)
    asked = _asked(args)
    pack = _pack(args, asked.since)
    trust = _trust(args)
    verdict = _by_own_word(pack, asked) if trust is None else _judged(pack, trust, asked)
    code = output.verdict_exit(verdict, allow_emulated=args.allow_emulated)
    if args.json:
        output.print_json(verdict.as_dict() | {"run": pack.run, "exit": int(code)})
    else:
        output.print_verdict(verdict, title=f"run {pack.run}")
    return code


def _log(args: argparse.Namespace) -> int:
    """A whole log as tiles: it is whole and signed by its own epochs; what those are worth is checked per run."""
    from pointcall_attest.log_check import check_tiles

    asked = _asked(args)
    verdict = check_tiles(lambda path: (Path(args.what) / path).read_bytes(), since=asked.since, policy=asked.witnesses)
    code = output.verdict_exit(verdict, allow_emulated=args.allow_emulated)
    if args.json:
        output.print_json(verdict.as_dict() | {"log": args.what, "exit": int(code)})
    else:
        output.print_verdict(verdict, title=f"log {args.what}")
    return code


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the caller wants judged: when, and against what it kept."""

    at: datetime | None
    since: Checkpoint | None
    witnesses: WitnessPolicy | None


def _asked(args: argparse.Namespace) -> _Asked:
    from pointcall_attest.log.checkpoint import Checkpoint
    from pointcall_attest.log.witness import WitnessPolicy

    since = Checkpoint.parse(args.since.read_bytes()) if args.since else None
    policy = WitnessPolicy.parse(args.witnesses.read_bytes()) if args.witnesses else None
    return _Asked(_at(args.at), since, policy)


def _judged(pack: Pack, trust: Trust, asked: _Asked) -> Verdict:
    from pointcall_attest.pack_check import verify_pack

    return verify_pack(pack, trust=trust, at=asked.at, in_process=True, witnesses=asked.witnesses, since=asked.since)


def _pack(args: argparse.Namespace, since: Checkpoint | None) -> Pack:
    from pointcall_attest.pack import Pack, export
    from pointcall_executor.cli.log import open_journal

    path = Path(args.what)
    if path.is_dir():
        return Pack.read(path)
    with closing(open_journal(args)) as reader:
        if not path.is_file():
            return export(reader, args.what, since=since)
        return _of_receipt(path, reader, since)


def _of_receipt(path: Path, reader: JournalReader, since: Checkpoint | None) -> Pack:
    """The pack of the run whose receipt lies in a file, with the file's bytes in the place of the journal's."""
    from pointcall_attest.entry import parse_entry
    from pointcall_attest.errors import MalformedError
    from pointcall_attest.pack import export

    if path.stat().st_size > MAX_RECEIPT_BYTES:
        raise MalformedError(
            "the file is no receipt", id="receipt.malformed", want=f"{MAX_RECEIPT_BYTES} bytes at most"
        )
    raw = path.read_bytes()
    entry = parse_entry(0, raw)
    if entry.kind != "receipt" or entry.run is None:
        raise MalformedError("the file is no receipt", id="receipt.malformed", want="a receipt", got=entry.kind)
    pack = export(reader, entry.run, since=since)
    return replace(pack, entries={**pack.entries, reader.receipt(entry.run).index: raw})


def _trust(args: argparse.Namespace) -> Trust | None:
    """The verifier's trust: the folder that was named, or this node's. None, where there is none, only for somebody who
    accepts emulated evidence, which claims nothing anyway."""
    from pointcall_attest.pack_check import Trust
    from pointcall_attest.trust import Roots

    folder = args.trust or output.state_dir(args) / "trust"
    if (folder / "policy.json").is_file():
        policy, root = (folder / "policy.json").read_bytes(), (folder / "trusted_root.json").read_bytes()
        return Trust(policy, root, Roots.open(folder))
    if args.trust is None and args.allow_emulated:
        return None
    raise output.EnvironmentRefusal(
        "there is no trust policy to judge by",
        id="trust.absent",
        want=str(folder / "policy.json"),
        hint="--trust DIR names a folder with policy.json and trusted_root.json",
    )


def _by_own_word(pack: Pack, asked: _Asked) -> Verdict:
    """The verdict by the policy and roots that the pack brings: its parts agree, whoever made them. Never for hardware:
    anybody who owns such a machine could bring a policy that accepts it."""
    from pointcall_attest.pack_check import own_trust
    from pointcall_attest.verdict import Check, Verdict

    verdict = _judged(pack, own_trust(pack), asked)
    why = "policy and roots are the pack's own: that says nothing of who made it; give --trust"
    source = Check.skipped("trust.source", why, spec="docs/spec/pack.md")
    if verdict.tier == "hardware":
        source = Check.of(
            "trust.source", False, expected="a trust policy of yours", observed="none", hint="--trust DIR"
        )
    return Verdict((source, *verdict.checks), verdict.tier, verdict.platform, verdict.claims)


def _at(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise output.UsageRefusal(f"--at {text!r} is no time", want="2026-11-23T00:00:00Z", got=str(error)) from None
    if at.tzinfo is None:
        raise output.UsageRefusal("--at needs a zone", want=f"{text}Z", got=text)
    return at
