"""`pointcall manifest`: `diff` says what an update grants, revokes or changes; verify, show; push, pull, pack, unpack;
point, revoke and accept for notices; restore for what was armed before."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import manifest_notice, manifest_restore, manifest_verify

if TYPE_CHECKING:
    from pointcall_attest.declaration import ServiceDeclaration
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.manifest_change import Change
    from pointcall_keys.registry import Account


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    diff = what.add_parser("diff", help="what an update grants, revokes or changes")
    diff.add_argument("old", metavar="OLD", type=Path, help="a manifest.json or its bundle")
    diff.add_argument("new", metavar="NEW", type=Path, help="a manifest.json or its bundle")
    show = what.add_parser("show", help="what one manifest says; nothing of it is verified")
    show.add_argument("old", metavar="MANIFEST", type=Path, help="a manifest.json or its bundle")
    push = what.add_parser("push", help="send a build with its signatures to an OCI registry")
    push.add_argument("dir", metavar="DIR", type=Path, help="manifest.json, files/ and *.sigstore.json")
    push.add_argument("reference", metavar="HOST/REPOSITORY")
    pull = what.add_parser("pull", help="fetch one by its digest; nothing of it is verified")
    pull.add_argument("reference", metavar="HOST/REPOSITORY[@sha256:HEX]")
    pull.add_argument(
        "--pointer", metavar="BUNDLE", type=Path, nargs="+", help="a signed pointer that says which digest"
    )
    pack = what.add_parser("pack", help="write a build with its signatures as one file, an OCI archive")
    pack.add_argument("dir", metavar="DIR", type=Path, help="manifest.json, files/ and *.sigstore.json")
    unpack = what.add_parser("unpack", help="the inverse of pack; nothing of it is verified")
    unpack.add_argument("archive", metavar="FILE", type=Path)
    for one in (pull, pack, unpack):
        one.add_argument("--out", metavar="PATH", type=Path, required=True)
    own = manifest_verify.parsers(what) + manifest_notice.parsers(what) + manifest_restore.parsers(what)
    for one in (diff, show, push, pull, pack, unpack, *own):
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
        one.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="where all state lies")


def run(args: argparse.Namespace) -> int:
    verbs = {"diff": _diff, "show": _show, "push": _push, "pull": _pull, "pack": _pack, "unpack": _unpack}
    notices = {"point": manifest_notice.point, "revoke": manifest_notice.revoke, "accept": manifest_notice.accept}
    own = {"verify": manifest_verify.verify, "restore": manifest_restore.restore}
    return (verbs | notices | own)[args.what](args)


def _show(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.manifest_notice import read_manifest
    from pointcall_executor.cli.output import Exit, print_json

    old = read_manifest(args.old)
    print_json({"sha256": old.sha256, "subjects": dict(old.subjects)} | old.predicate.model_dump(mode="json"))
    return Exit.OK


def _push(args: argparse.Namespace) -> int:
    from pointcall_keys.registry import Reference, push
    from pointcall_keys.release import Release

    where = push(Release.read(args.dir), Reference.parse(args.reference), _account())
    return _done(args, {"reference": str(where)}, f"pushed {where}")


def _pull(args: argparse.Namespace) -> int:
    from pointcall_keys.registry import Reference, pull

    where = Reference.parse(args.reference)
    if args.pointer:
        where = Reference(where.host, where.name, manifest_notice.pointed_at(args))
    release = pull(where, _account())
    release.write(args.out)
    return _done(args, {"out": str(args.out)}, f"pulled to {args.out}; verify it before you arm it")


def _pack(args: argparse.Namespace) -> int:
    from pointcall_keys.archive import write_archive
    from pointcall_keys.release import Release

    release = Release.read(args.dir)
    args.out.write_bytes(write_archive(release))
    return _done(
        args, {"digest": release.encode().digest, "out": str(args.out)}, f"{release.encode().digest}  {args.out}"
    )


def _unpack(args: argparse.Namespace) -> int:
    from pointcall_keys.archive import MAX_ARCHIVE_BYTES, read_archive

    with args.archive.open("rb") as file:
        digest, release = read_archive(file.read(MAX_ARCHIVE_BYTES + 1))
    release.write(args.out)
    return _done(args, {"digest": digest, "out": str(args.out)}, f"{digest} to {args.out}; verify it before you arm it")


def _account() -> Account | None:
    """From the environment: a password has no place in a list of processes."""
    from pointcall_keys.registry import Account

    name, password = (os.environ.get(f"POINTCALL_REGISTRY_{part}") for part in ("USER", "PASSWORD"))
    return Account(name, password) if name and password else None


def _done(args: argparse.Namespace, value: dict[str, str], text: str) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    if args.json:
        print_json({"ok": True} | value)
    else:
        print(text)
    return Exit.OK


def _diff(args: argparse.Namespace) -> int:
    from pointcall_attest.manifest_diff import differences
    from pointcall_executor.cli.manifest_notice import read_manifest
    from pointcall_executor.cli.output import Exit, print_json

    old, new = read_manifest(args.old), read_manifest(args.new)
    changes = differences(old, new, (_declarations(args.old, old), _declarations(args.new, new)))
    if args.json:
        rows = [{"effect": c.effect, "text": c.text} for c in changes]
        print_json({"old": old.sha256, "new": new.sha256, "changes": rows})
    else:
        _print(changes)
    return Exit.OK


def _declarations(path: Path, manifest: Manifest) -> dict[str, ServiceDeclaration]:
    """The service declarations in `files/` beside a manifest, as far as they are those that it names."""
    import hashlib

    from pointcall_attest.declaration import ServiceDeclaration

    found = {}
    for service in manifest.services:
        file = path.parent / "files" / service.declaration
        raw = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(raw).hexdigest() == service.digest:
            found[service.name] = ServiceDeclaration.parse(raw)
    return found


def _print(changes: tuple[Change, ...]) -> None:

    from pointcall_executor.cli.output import console as terminal

    console = terminal()
    colours = {"grants": "bold yellow", "revokes": "green", "changes": "cyan"}
    for change in changes:
        console.print(f"[{colours[change.effect]}]{change.effect:8}[/] ", end="")
        console.print(change.text, markup=False, soft_wrap=True)
    if not changes:
        console.print("no difference in what may happen")
