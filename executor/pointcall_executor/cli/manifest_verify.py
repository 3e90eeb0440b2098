"""`pointcall manifest verify`: everything that a node would check before it arms, except its own evidence.

It verifies in this process, which ends with it; a node does so in a child.
"""

from __future__ import annotations

import argparse
import datetime as dt
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointcall_attest.admission import Candidate
    from pointcall_attest.policy import TrustPolicy
    from pointcall_attest.verdict import Verdict


def parsers(what: argparse._SubParsersAction[Any]) -> tuple[argparse.ArgumentParser, ...]:
    """The sub-verb and its words."""
    one = what.add_parser("verify", help="would this trust policy let it be armed? Signatures, files, provenance")
    one.add_argument("dir", metavar="DIR", type=Path, help="*.sigstore.json, files/ and, if it is there, provenance/")
    one.add_argument(
        "--trust", metavar="DIR", type=Path, help="policy.json and trusted_root.json (default: this node's)"
    )
    one.add_argument("--notices", metavar="DIR", type=Path, help="signed notices (default: this node's)")
    one.add_argument("--at", metavar="TIME", help="judge at this time (default: now)")
    one.add_argument("--builder", metavar="URI", help="every module must be built by this builder")
    one.add_argument("--require-provenance", action="store_true", help="every module has provenance and passed cases")
    return (one,)


def verify(args: argparse.Namespace) -> int:
    from pointcall_attest.errors import RefusedError
    from pointcall_executor.cli.output import Exit, print_json, print_verdict, state_dir

    policy, root = _trust(args.trust or state_dir(args) / "trust")
    name = str(args.dir)
    try:
        candidate = _candidate(args, policy, root)
        name = f"{candidate.manifest.name} sequence {candidate.manifest.sequence}"
        verdict = candidate.verdict.joined([_provenance(args, candidate, root), _unasked()])
    except RefusedError as refusal:
        verdict = refusal.verdict
    if args.json:
        print_json(verdict.as_dict())
    else:
        print_verdict(verdict, title=name)
    return Exit.OK if verdict.passed else Exit.REFUSED


def _trust(folder: Path) -> tuple[TrustPolicy, bytes]:
    from pointcall_attest.policy import TrustPolicy

    return TrustPolicy.parse((folder / "policy.json").read_bytes()), (folder / "trusted_root.json").read_bytes()


def _candidate(args: argparse.Namespace, policy: TrustPolicy, root: bytes) -> Candidate:
    from pointcall_attest.admission import check_manifest
    from pointcall_attest.notice import verify_notices
    from pointcall_executor import VERSION
    from pointcall_executor.cli.output import state_dir
    from pointcall_executor.notices import FOLDER, read_notices
    from pointcall_executor.session import Bundle

    bundle, at = Bundle.read(args.dir), _at(args)
    raw = read_notices(args.notices or state_dir(args) / FOLDER)
    highest, digest = _armed_before(args)
    return check_manifest(
        bundle.signatures,
        bundle.files,
        policy=policy,
        trusted_root=root,
        at=at,
        highest_sequence=highest,
        highest_digest=digest,
        executor_version=VERSION,
        notices=verify_notices(raw, trusted_root=root, policy=policy, at=at, in_process=True),
        in_process=True,
    )


def _armed_before(args: argparse.Namespace) -> tuple[int | None, str | None]:
    """Sequence and digest of the newest manifest that this node has armed, if it is one."""
    from pointcall_executor.cli.log import open_journal
    from pointcall_executor.cli.output import state_dir
    from pointcall_executor.daemon import ARMED

    if not (state_dir(args) / "journal.db").is_file():
        return None, None
    with closing(open_journal(args)) as journal:
        return journal.highest_sequence(ARMED), journal.sequence_digest(ARMED)


def _provenance(args: argparse.Namespace, candidate: Candidate, root: bytes) -> Verdict:
    from pointcall_attest.provenance_check import check_provenance

    bundles = [path.read_bytes() for path in sorted((args.dir / "provenance").glob("*.sigstore.json"))]
    return check_provenance(
        bundles,
        candidate.manifest,
        candidate.modules,
        trusted_root=root,
        policy=candidate.policy,
        at=_at(args),
        builder=args.builder,
        demanded=args.require_provenance,
        in_process=True,
    )


def _unasked() -> Verdict:
    """What only a node can show."""
    from pointcall_attest.admission import SPEC
    from pointcall_attest.verdict import Check, Verdict

    names = ("admission.evidence", "admission.tier")
    return Verdict(tuple(Check.skipped(name, "asked of the node, when it arms", spec=SPEC) for name in names))


def _at(args: argparse.Namespace) -> dt.datetime:
    from pointcall_executor.cli.build import start_of

    return start_of(args.at, "--at")
