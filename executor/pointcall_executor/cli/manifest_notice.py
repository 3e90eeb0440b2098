"""`pointcall manifest point|revoke|accept`: write a pointer or revocation to sign, and let a node take signed ones."""

from __future__ import annotations

import argparse
import datetime as dt
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.notice import Notices, PointerBody, RevocationBody
    from pointcall_attest.policy import TrustPolicy

SHA256 = re.compile(r"[0-9a-f]{64}")


def parsers(what: argparse._SubParsersAction[Any]) -> tuple[argparse.ArgumentParser, ...]:
    """The three sub-verbs and their words."""
    point = what.add_parser("point", help="write a pointer: for one ring, until then, this is the newest manifest")
    point.add_argument("manifest", metavar="MANIFEST", type=Path, help="a manifest.json or its bundle")
    point.add_argument("--ring", required=True, help="which nodes it is for")
    point.add_argument("--hours", type=float, default=24.0, help="how long it holds (default: 24)")
    point.add_argument("--artifact", metavar="sha256:HEX", help="where it travels as an OCI artifact")
    revoke = what.add_parser("revoke", help="write a revocation: these must never be armed again")
    revoke.add_argument("revoked", metavar="SHA256|FILE", nargs="+", help="manifests or files, or their digests")
    revoke.add_argument("--name", required=True, help="the series that it is about")
    revoke.add_argument("--reason", required=True, help="for the people who read it")
    for one in (point, revoke):
        one.add_argument("--issued", metavar="TIME", help="2026-11-23T00:00:00Z (default: now)")
        one.add_argument("--out", metavar="FILE", type=Path, required=True, help="the statement to sign")
    accept = what.add_parser("accept", help="verify signed notices by this node's trust policy and keep them for it")
    accept.add_argument("bundles", metavar="BUNDLE", type=Path, nargs="+", help="*.sigstore.json")
    return point, revoke, accept


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file: the statement itself, or the payload of a bundle over it. Not verified."""
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.signature import MAX_BUNDLE_BYTES, unverified_payload

    with path.open("rb") as file:
        raw = file.read(MAX_BUNDLE_BYTES + 1)
    return Manifest.parse(unverified_payload(raw) or raw)


def point(args: argparse.Namespace) -> int:
    from pointcall_attest.notice import PointerBody

    manifest, issued = read_manifest(args.manifest), _issued(args)
    fields = {"name": manifest.name, "ring": args.ring, "sequence": manifest.sequence, "manifest": manifest.sha256}
    ends = issued + dt.timedelta(hours=args.hours)
    return _write(args, lambda: PointerBody(**fields, artifact=args.artifact, issued=issued, expires=ends))


def revoke(args: argparse.Namespace) -> int:
    from pointcall_attest.notice import RevocationBody

    issued, digests = _issued(args), tuple(_digest(word) for word in args.revoked)
    return _write(args, lambda: RevocationBody(name=args.name, issued=issued, reason=args.reason, revoked=digests))


def accept(args: argparse.Namespace) -> int:
    """Keep what verifies, drop what expired; nothing is kept if anything given is wrong."""
    from pointcall_executor.cli.output import Exit, print_json, state_dir
    from pointcall_executor.notices import FOLDER, drop_notices, keep_notices, read_notices

    folder, now = state_dir(args) / FOLDER, dt.datetime.now(dt.UTC)
    policy, root = _trust(state_dir(args) / "trust")
    given, there = tuple(path.read_bytes() for path in args.bundles), read_notices(folder)
    found = _verified(given, there, policy, root, now)
    kept = keep_notices(folder, given)
    expired = {p.signed.payload for p in found.pointers if p.body.expires <= now}
    drop_notices(folder, _carrying(there, expired))
    lines = [_pointer_line(p.body) for p in found.pointers if p.signed.payload not in expired]
    lines += [f"revoked     {digest}  ({r.body.reason})" for r in found.revocations for digest in r.body.revoked]
    lines += [f"wrong       {what}: remove it, nothing is armed while it lies there" for what in found.wrong]
    if args.json:
        body = {"kept": [str(path) for path in kept], "revoked": sorted(found.revoked), "wrong": list(found.wrong)}
        print_json({"ok": not found.wrong} | body)
    else:
        print("\n".join([*lines, "a running executor takes them with the next manifest, epoch or SIGHUP"]))
    return Exit.REFUSED if found.wrong else Exit.OK


def pointed_at(args: argparse.Namespace) -> str:
    """The digest of the OCI artifact that the signed pointer in `args.pointer` names, by this node's trust policy."""
    from pointcall_attest.errors import VerifyError
    from pointcall_executor.cli.output import UsageRefusal, state_dir

    if "@" in args.reference:
        raise UsageRefusal("two digests", want="HOST/REPOSITORY with --pointer, or HOST/REPOSITORY@sha256:HEX")
    policy, root = _trust(state_dir(args) / "trust")
    found = _verified(tuple(p.read_bytes() for p in args.pointer), (), policy, root, dt.datetime.now(dt.UTC))
    artifacts = {pointer.body.artifact for pointer in found.pointers}
    if len(artifacts) != 1 or None in artifacts:
        raise VerifyError(
            "no pointer names one artifact",
            id="notice.useless",
            want="one signed pointer with an artifact",
            got=", ".join(map(str, artifacts)) or "none",
            hint="pointcall manifest point --artifact sha256:HEX",
        )
    (artifact,) = artifacts
    return str(artifact)


def _verified(
    given: tuple[bytes, ...], there: tuple[bytes, ...], policy: TrustPolicy, root: bytes, now: dt.datetime
) -> Notices:
    """Everything that the node would have. VerifyError `manifest.notices` or `notice.useless`."""
    from pointcall_attest.errors import VerifyError
    from pointcall_attest.notice import holds, verify_notices

    new = verify_notices(given, trusted_root=root, policy=policy, at=now, in_process=True)
    if new.wrong:
        raise VerifyError(
            "not signed as this node's policy demands",
            id="manifest.notices",
            want=f"notices by {policy.min_signatures} signers of the policy",
            got="; ".join(new.wrong)[:600],
        )
    for pointer in new.pointers:
        if not holds(pointer, now) or policy.ring not in (None, pointer.body.ring):
            raise VerifyError(
                "this pointer says nothing to this node",
                id="notice.useless",
                want=f"ring {policy.ring or 'any'}, holding now",
                got=_pointer_line(pointer.body),
            )
    return verify_notices({*there, *given}, trusted_root=root, policy=policy, at=now, in_process=True)


def _carrying(bundles: tuple[bytes, ...], payloads: set[bytes]) -> list[bytes]:
    from pointcall_attest.signature import unverified_payload

    return [raw for raw in bundles if unverified_payload(raw) in payloads]


def _pointer_line(body: PointerBody) -> str:
    from pointcall_attest.model import instant

    return f"newest      {body.name} sequence {body.sequence} in ring {body.ring} until {instant(body.expires)}"


def _trust(folder: Path) -> tuple[TrustPolicy, bytes]:
    from pointcall_attest.policy import TrustPolicy

    return TrustPolicy.parse((folder / "policy.json").read_bytes()), (folder / "trusted_root.json").read_bytes()


def _write(args: argparse.Namespace, make: Any) -> int:
    """The statement of the notice that `make` gives; what its model refuses is a usage error."""
    from pydantic import ValidationError

    from pointcall_attest.notice import notice_statement
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json

    try:
        body: PointerBody | RevocationBody = make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageRefusal(f"no such notice: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]) from None
    args.out.write_bytes(notice_statement(body))
    if args.json:
        print_json({"ok": True, "out": str(args.out)} | body.model_dump(mode="json"))
    else:
        print(f"wrote {args.out}\nnext: pointcall sign {args.out}")
    return Exit.OK


def _digest(word: str) -> str:
    """A digest, or that of a file; of a bundle, that of what it carries."""
    import hashlib

    from pointcall_attest.signature import unverified_payload

    if SHA256.fullmatch(word) and not Path(word).exists():
        return word
    raw = Path(word).read_bytes()
    return hashlib.sha256(unverified_payload(raw) or raw).hexdigest()


def _issued(args: argparse.Namespace) -> dt.datetime:
    from pointcall_executor.cli.build import start_of

    return start_of(args.issued, "--issued")
