"""`pointcall build DIR`: compile what DIR/manifest.yaml names and write the statement to sign, with its files."""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pointcall_keys.assemble import Assembled
    from pointcall_keys.provenance import Builder
    from pointcall_keys.recovery_manifest import RecoveryManifest

BLOBS: Final = Path(__file__).resolve().parent.parent / "blobs"
LOCAL: Final = "https://pointcall.dev/builder/local"  # somebody's machine: says nothing of who it was
MAX_YAML_BYTES: Final = 1024 * 1024


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder with manifest.yaml")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: DIR/build)")
    parser.add_argument("--sequence", type=int, help="number of this manifest (default: one above --previous, else 1)")
    parser.add_argument("--previous", metavar="FILE", type=Path, help="manifest.json that this one replaces")
    parser.add_argument("--not-before", metavar="TIME", help="start of validity, 2026-11-23T00:00:00Z (default: now)")
    parser.add_argument("--days", type=int, help="days of validity (default: spec.validDays)")
    parser.add_argument("--builder", metavar="URI", help="who builds (default: this CI job, or a local builder)")
    parser.add_argument(
        "--without-provenance", action="store_true", help="neither run the cases nor say who built what"
    )
    parser.add_argument(
        "--verify-reproducible", action="store_true", help="build again and compare with what is in --out"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print what each runbook may do and cost, and its code beside its source"
    )
    parser.add_argument("--blobs", metavar="DIR", type=Path, default=BLOBS, help="folder of the BPF blobs")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    out = args.out or args.dir / "build"
    if args.verify_reproducible:
        return _compare(args, out)
    assembled, sequence = _assemble(args)
    beside = {} if args.without_provenance else _provenance(args, assembled)
    assembled.write(out)
    _write_beside(out / "provenance", beside)
    if args.explain:
        _explain(args)
    digest = hashlib.sha256(assembled.statement).hexdigest()
    if args.json:
        files = {name: hashlib.sha256(content).hexdigest() for name, content in assembled.files.items()}
        print_json({"ok": True, "manifest": digest, "sequence": sequence, "out": str(out), "files": files})
    else:
        for name, content in assembled.files.items():
            print(f"{hashlib.sha256(content).hexdigest()}  {len(content):>8}  {name}")
        print(f"{digest}  sequence {sequence}  {out / 'manifest.json'}\nnext: pointcall sign {out}")
    return Exit.OK


def _assemble(args: argparse.Namespace) -> tuple[Assembled, int]:
    from pointcall_attest.manifest import Manifest
    from pointcall_keys.assemble import assemble

    source = read_manifest(args.dir / "manifest.yaml")
    old = Manifest.parse(args.previous.read_bytes()) if args.previous else None
    sequence = args.sequence or (old.sequence + 1 if old else 1)
    start = start_of(args.not_before, "--not-before")
    expires = start + dt.timedelta(days=args.days or source.spec.valid_days)
    previous = old.sha256 if old else None
    built = assemble(
        source, args.dir, args.blobs, sequence=sequence, not_before=start, expires=expires, previous=previous
    )
    return built, sequence


def _explain(args: argparse.Namespace) -> None:
    """Each runbook: capabilities, worst case, size, and its instructions below the source lines that they come from."""
    from pointcall_executor.cli.output import print_json
    from pointcall_keys.assemble import source_path
    from pointcall_runbook import compile_source, verify_module
    from pointcall_runbook.listing import listing

    for book in read_manifest(args.dir / "manifest.yaml").spec.runbooks:
        if book.source is not None:
            path = args.dir / source_path(book.source)
            source = path.read_text()
            compiled = compile_source(source, str(path))
            info, text = compiled.info, listing(compiled.wasm, lines=compiled.lines, source=source)
        else:
            wasm = (args.dir / str(book.module)).read_bytes()
            info, text = verify_module(wasm), listing(wasm)
        bounds = {handler.event: handler.fuel_bound for handler in info.handlers.values()}
        if args.json:
            facts = {"capabilities": list(info.capabilities), "fuel_bound": bounds, "bytes": info.size}
            print_json({"ok": True, "runbook": book.name, **facts, "listing": text})
            continue
        costs = ", ".join(f"{event} {bound}" for event, bound in sorted(bounds.items()))
        may = ", ".join(info.capabilities) or "nothing"
        print(f"{book.name}: {info.size} bytes, may {may}; worst case in fuel: {costs}\n\n{text}")


def _compare(args: argparse.Namespace, out: Path) -> int:
    """Build again with the sequence and dates of what is there, and compare every byte."""
    from pointcall_attest.manifest import Manifest
    from pointcall_executor.cli.output import Exit, print_json
    from pointcall_keys.assemble import assemble
    from pointcall_keys.errors import KeysError

    there = Manifest.parse((out / "manifest.json").read_bytes())
    body = there.predicate
    built = assemble(
        read_manifest(args.dir / "manifest.yaml"),
        args.dir,
        args.blobs,
        sequence=body.sequence,
        not_before=body.not_before,
        expires=body.expires,
        previous=body.previous,
    )
    wanted = {f"files/{name}": content for name, content in built.files.items()} | {"manifest.json": built.statement}
    wrong = [n for n, c in wanted.items() if not (out / n).is_file() or (out / n).read_bytes() != c]
    if wrong:
        raise KeysError(
            "building again gives other bytes",
            id="build.reproducible",
            want="the same",
            got=", ".join(sorted(wrong))[:300],
        )
    if args.json:
        print_json({"ok": True, "manifest": there.sha256, "files": sorted(wanted)})
    else:
        print(f"reproducible: {len(wanted)} files, manifest {there.sha256}")
    return Exit.OK


def _provenance(args: argparse.Namespace, assembled: Assembled) -> dict[str, bytes]:
    """What is said of each module, by file name. KeysError `build.tests` if a case fails: nothing is written then."""
    from pointcall_attest.manifest import Manifest
    from pointcall_keys.errors import KeysError
    from pointcall_keys.provenance import provenance, results_of_tests, run_cases

    manifest = Manifest.parse(assembled.statement)
    said = {f"{name}.json": s for name, s in provenance(assembled.files, manifest, _builder(args.builder)).items()}
    for book in read_manifest(args.dir / "manifest.yaml").spec.runbooks:
        cases, module = _cases(args.dir, book.source), manifest.runbook(book.name).module
        if not cases:
            continue
        passed, failed = run_cases(assembled.files[module], cases)
        if failed:
            raise KeysError(
                f"cases of {book.name} fail", id="build.tests", want="all pass", got=", ".join(failed)[:300],
                hint="`pointcall test` shows what was decided",
            )  # fmt: skip
        if passed:
            result = results_of_tests(module, assembled.files[module], cases, passed=passed, failed=failed)
            name = f"{book.name}.tests.json"
            if name in said:
                raise KeysError(
                    "two statements would have the same name", id="build.malformed", want="other names of runbooks",
                    got=name,
                )  # fmt: skip
            said[name] = result
    return said


def _write_beside(folder: Path, statements: dict[str, bytes]) -> None:
    """In place of those of an earlier build, which would be about other modules, and of their signatures."""
    for old in folder.glob("*.json"):
        old.unlink()
    if statements:
        folder.mkdir(parents=True, exist_ok=True)
    for name, statement in statements.items():
        (folder / name).write_bytes(statement)


def _builder(uri: str | None) -> Builder:
    """Who builds, and from what, as CI says in the environment. What it does not say is left out."""
    from pointcall_keys.provenance import Builder

    env = os.environ.get
    if repository := env("GITHUB_REPOSITORY"):
        server = env("GITHUB_SERVER_URL", "https://github.com")
        workflow, run = env("GITHUB_WORKFLOW_REF"), env("GITHUB_RUN_ID")
        invocation = f"{server}/{repository}/actions/runs/{run}" if run else None
        own = f"{server}/{workflow}" if workflow else LOCAL
        return Builder(uri or own, invocation, f"{server}/{repository}", env("GITHUB_SHA"))
    if project := env("CI_PROJECT_URL"):
        config, branch = env("CI_CONFIG_PATH"), env("CI_COMMIT_BRANCH")
        own = f"{project}//{config}@refs/heads/{branch}" if config and branch else LOCAL
        return Builder(uri or own, env("CI_JOB_URL"), project, env("CI_COMMIT_SHA"))
    return Builder(uri or LOCAL)


def _cases(base: Path, source: str | None) -> dict[str, bytes]:
    """The cases of a runbook that is a folder, by file name."""
    if source is None or source.endswith(".py"):
        return {}
    return {path.name: path.read_bytes() for path in sorted((base / source / "cases").glob("*.json"))}


def start_of(text: str | None, option: str) -> dt.datetime:
    """The instant that an option names, or now, in whole seconds. UsageRefusal for anything else."""
    from pointcall_executor.cli.output import UsageRefusal

    try:
        at = dt.datetime.fromisoformat(text) if text else dt.datetime.now(dt.UTC)
    except ValueError:
        raise UsageRefusal(f"{option} is not a time", want="2026-11-23T00:00:00Z", got=text or "") from None
    if at.tzinfo is None:
        raise UsageRefusal(f"{option} needs a time zone", want="2026-11-23T00:00:00Z", got=text or "")
    return at.astimezone(dt.UTC).replace(microsecond=0)


def read_manifest(path: Path) -> RecoveryManifest:
    """The RecoveryManifest in a YAML file: the safe subset, each key once."""
    import yaml

    from pointcall_attest.errors import MalformedError
    from pointcall_keys.recovery_manifest import RecoveryManifest

    class Loader(yaml.SafeLoader):
        """SafeLoader, except that a key that occurs twice is an error, and so are aliases."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not used in a manifest")
            node: yaml.Node | None = super().compose_node(parent, index)
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            out: dict[Any, Any] = super().construct_mapping(node, deep=True)
            if len(out) != len(node.value):
                raise yaml.YAMLError("a key occurs twice")
            return out

    with path.open("rb") as file:
        raw = file.read(MAX_YAML_BYTES + 1)
    if len(raw) > MAX_YAML_BYTES:
        raise MalformedError("the file is too long", id="build.malformed", want=f"<= {MAX_YAML_BYTES} bytes")
    try:
        data = yaml.load(raw, Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MalformedError(f"{path.name} is not YAML: {error}"[:300], id="build.malformed") from None
    return RecoveryManifest.parse(data)
