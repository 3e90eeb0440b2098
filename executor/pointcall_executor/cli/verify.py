"""`pointcall verify`: check a run offline, from its receipt down to the root key, or a whole log; each check named."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_attest.verdict import Tier
from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.log.checkpoint import Checkpoint
    from pointcall_attest.log.witness import WitnessPolicy
    from pointcall_attest.pack import Pack
    from pointcall_attest.pack_check import Trust
    from pointcall_attest.verdict import Check, Verdict
    from pointcall_executor.journal_reader import JournalReader

MAX_RECEIPT_BYTES = 65_535
_TIERS: Final[tuple[Tier, ...]] = ("none", "emulated", "hardware")  # the lowest first


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="RUN|FILE|DIR", help="a run of this node, its receipt, a pack, a tile directory, a state folder"
    )
    parser.add_argument("--allow-emulated", action="store_true", help="accept evidence of the emulated platform")
    parser.add_argument("--at", metavar="TIME", help="judge at this time (RFC 3339), not at that of the epoch")
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="of a run: show the evidence; of a state folder: appraise that of all epochs",
    )
    parser.add_argument("--since", type=Path, metavar="FILE", help="a checkpoint of this log that was seen before")
    parser.add_argument(
        "--witnesses", type=Path, metavar="FILE", help="a C2SP policy: which witnesses must have signed"
    )
    parser.add_argument("--trust", type=Path, metavar="DIR", help="your trust folder (default: that of the state)")


def run(args: argparse.Namespace) -> int:
    if (Path(args.what) / "tile").is_dir():
        return _log(args)
    if (Path(args.what) / "journal.db").is_file():
        return _journal(args)
    asked = _asked(args)
    pack = _pack(args, asked.since)
    trust = _trust(args)
    verdict = _by_own_word(pack, asked) if trust is None else _judged(pack, trust, asked)
    code = output.verdict_exit(verdict, allow_emulated=args.allow_emulated)
    evidence = _evidence(pack) if args.evidence else None
    if args.json:
        row = verdict.as_dict() | {"run": pack.run, "exit": int(code)}
        output.print_json(row if evidence is None else row | {"evidence": evidence})
    else:
        output.print_verdict(verdict, title=f"run {pack.run}")
        _print_evidence(evidence)
    return code


def _evidence(pack: Pack) -> dict[str, Any]:
    """What the evidence of the run's epoch says, field by field; whether it is believed stands in the checks."""
    from pointcall_attest.pack_check import evidence_of
    from pointcall_attest.shown import described

    return described(evidence_of(pack))


def _print_evidence(evidence: dict[str, Any] | None) -> None:

    if evidence is not None:
        output.console().print_json(data=evidence, default=str)


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


def _journal(args: argparse.Namespace) -> int:
    """A node's own log, read only: as `log check`, and growth, witnesses and the evidence of every epoch if asked."""
    from pointcall_attest.verdict import Verdict
    from pointcall_executor.journal_check import check_growth, check_journal
    from pointcall_executor.journal_reader import JournalReader

    asked = _asked(args)
    with closing(JournalReader.open(Path(args.what) / "journal.db")) as reader:
        checks = [*check_journal(reader).checks, *check_growth(reader, asked.since, asked.witnesses)]
        tier: Tier = "none"
        if args.evidence:
            more, tier = _epochs(reader, args)
            checks += more
    verdict = Verdict(tuple(checks), tier)
    code = output.verdict_exit(verdict, allow_emulated=args.allow_emulated)
    if args.json:
        output.print_json(verdict.as_dict() | {"log": args.what, "exit": int(code)})
    else:
        output.print_verdict(verdict, title=f"log {args.what}")
    return code


def _epochs(reader: JournalReader, args: argparse.Namespace) -> tuple[list[Check], Tier]:
    """One check for the evidence of each epoch, by the trust of the caller, and the lowest tier of them."""
    from pointcall_attest.policy import TrustPolicy
    from pointcall_attest.report.known import Trust as ReadersTrust
    from pointcall_attest.report.known import known
    from pointcall_attest.verdict import Check

    trust = _trust(args)
    if trust is None:
        raise _no_trust(args.trust or Path(args.what) / "trust")
    openings, start = [], 0
    while page := reader.entries("epoch-open", start=start):
        openings += page
        start = page[-1].index + 1
    readers = ReadersTrust(TrustPolicy.parse(trust.policy), trust.trusted_root, trust.roots)
    found = known(openings, reader.blob, trust=readers).appraisals
    checks = []
    for opening in openings:
        verdict = found.get(opening.index)
        passed = verdict is not None and verdict.passed and verdict.tier == opening.body["tier"]
        got = "no evidence" if verdict is None else ", ".join(c.id for c in verdict.failed) or verdict.tier
        want = f"entry {opening.index}: good evidence, {opening.body['tier']}"
        checks.append(Check.of("epoch.evidence", passed, expected=want, observed=got, spec="docs/spec/evidence.md"))
    tiers = {verdict.tier for verdict in found.values()}
    return checks, next((tier for tier in _TIERS if tier in tiers), "none")


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
    if (path.parent.parent / "pack.json").is_file():  # the receipt inside a pack
        return _with_receipt(Pack.read(path.parent.parent), path)
    with closing(open_journal(args)) as reader:
        if not path.is_file():
            return export(reader, args.what, since=since)
        return _of_receipt(path, reader, since)


def _of_receipt(path: Path, reader: JournalReader, since: Checkpoint | None) -> Pack:
    """The pack of the run whose receipt lies in a file, with the file's bytes in the place of the journal's."""
    from pointcall_attest.pack import export

    raw, run = _receipt(path)
    pack = export(reader, run, since=since)
    return replace(pack, entries={**pack.entries, reader.receipt(run).index: raw})


def _with_receipt(pack: Pack, path: Path) -> Pack:
    """A pack, where the file that was named is the receipt of its run. UsageRefusal for another of its files."""
    raw, run = _receipt(path)
    if run != pack.run:
        raise output.UsageRefusal("the file is of another run than its pack", want=pack.run, got=run)
    return replace(pack, entries={**pack.entries, int(path.stem): raw}) if path.stem.isdecimal() else pack


def _receipt(path: Path) -> tuple[bytes, str]:
    """The bytes of a receipt in a file, and its run. MalformedError `receipt.malformed` and whatever it is instead."""
    from pointcall_attest.entry import parse_entry
    from pointcall_attest.errors import MalformedError

    if path.stat().st_size > MAX_RECEIPT_BYTES:
        raise MalformedError(
            "the file is no receipt", id="receipt.malformed", want=f"{MAX_RECEIPT_BYTES} bytes at most"
        )
    raw = path.read_bytes()
    entry = parse_entry(0, raw)
    if entry.kind != "receipt" or entry.run is None:
        raise MalformedError("the file is no receipt", id="receipt.malformed", want="a receipt", got=entry.kind)
    return raw, entry.run


def _trust(args: argparse.Namespace) -> Trust | None:
    """The verifier's trust: the folder that was named, or this node's; None where there is none."""
    from pointcall_attest.pack_check import Trust
    from pointcall_attest.trust import Roots

    own = Path(args.what) if (Path(args.what) / "journal.db").is_file() else output.state_dir(args)
    folder = args.trust or own / "trust"
    if (folder / "policy.json").is_file():
        policy, root = (folder / "policy.json").read_bytes(), (folder / "trusted_root.json").read_bytes()
        return Trust(policy, root, Roots.open(folder))
    if args.trust is None:
        return None
    raise _no_trust(folder)


def _no_trust(folder: Path) -> output.EnvironmentRefusal:
    return output.EnvironmentRefusal(
        "there is no trust policy to judge by",
        id="trust.absent",
        want=str(folder / "policy.json"),
        hint="--trust DIR names a folder with policy.json and trusted_root.json",
    )


def _by_own_word(pack: Pack, asked: _Asked) -> Verdict:
    """The verdict by the policy and roots that the pack brings: its parts agree, whoever made them. Enough only for
    somebody who accepts emulated evidence, which claims nothing anyway; never for hardware: anybody who owns such a
    machine could bring a policy that accepts it."""
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
