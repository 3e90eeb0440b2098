"""Makes a release from one commit: sdist, wheel, bill of materials, digests; twice, in two places, and compares them.

  python -m deploy.release.release --out dist [--commit HEAD] [--once] [--sign WORD ...]

Only what is committed goes in: the commit is exported, BPF blobs and messages are made in the export, hatchling packs.
All times are that of the commit. `--sign` signs every file with `pointcall sign-bundle`, with the words that follow it.
Spec: docs/spec/release.md; SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
ROOMS: Final = ("runbooks", "attest", "keys", "executor")
SUMS: Final = "SHA256SUMS"


class ReleaseError(Exception):
    """A step failed, or two builds differ; the text says which."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--once", action="store_true", help="do not build a second time and compare")
    parser.add_argument(
        "--sign", nargs=argparse.REMAINDER, help="words for `pointcall sign-bundle`, as the last option"
    )
    args = parser.parse_args(words)
    try:
        release(args.out, args.commit, twice=not args.once)
        if args.sign is not None:
            sign(args.out, args.sign)
    except ReleaseError as error:
        sys.stderr.write(f"release: {error}\n")
        return 1
    sys.stdout.write((args.out / SUMS).read_text())
    return 0


def release(out: Path, commit: str, *, twice: bool = True) -> None:
    """All files of the release into `out`. ReleaseError, and nothing in `out`, if a second build gives other bytes."""
    if out.exists() and any(out.iterdir()):
        raise ReleaseError(f"{out} is not empty")
    with tempfile.TemporaryDirectory(prefix="release-") as place:
        first = build(Path(place) / "a", commit)
        if twice:
            same(first, build(Path(place) / "another/place", commit))
        shutil.copytree(first, out, dirs_exist_ok=True)


def build(place: Path, commit: str) -> Path:
    """One build in a folder of its own; the folder with its results."""
    tree, dist = place / "tree", place / "dist"
    tree.mkdir(parents=True)
    at = int(_run(["git", "log", "-1", "--format=%ct", commit], ROOT))
    export(commit, tree)
    make(tree)
    pack(tree, dist, at)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    from deploy.release.sbom import bill

    name = sdist.name.removesuffix(".tar.gz")
    (dist / f"{name}.cdx.json").write_bytes(bill(tree, sdist, wheel, dt.datetime.fromtimestamp(at, dt.UTC)))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(dist.iterdir())]
    (dist / SUMS).write_text("".join(lines))
    return dist


def export(commit: str, tree: Path) -> None:
    """Exactly the files of a commit."""
    archive = tree.parent / "tree.tar"
    _run(["git", "archive", "--format=tar", "-o", str(archive), commit], ROOT)
    _run(["tar", "-xf", str(archive), "-C", str(tree)], ROOT)


def make(tree: Path) -> None:
    """What the wheel carries and git does not: the BPF blobs and the messages of the API."""
    _run(
        ["make", "-s", "-C", "bpf", "all", f"OUT={tree}/executor/pointcall_executor/blobs", f"PYTHON={sys.executable}"],
        tree,
    )
    path = os.pathsep.join(str(tree / room) for room in ROOMS)
    _run([sys.executable, "-B", "-m", "pointcall_executor.api.generate"], tree, PYTHONPATH=path)


def pack(tree: Path, dist: Path, at: int) -> None:
    """Sdist and wheel of a source tree, all times `at` (seconds since 1970)."""
    words = [sys.executable, "-B", "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(dist)]
    _run(words, tree, SOURCE_DATE_EPOCH=str(at))


def same(first: Path, second: Path) -> None:
    """ReleaseError if two folders do not hold the same files."""
    here, there = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, second))
    wrong = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if wrong:
        raise ReleaseError(f"a second build gives other bytes: {', '.join(wrong)}")


def sign(out: Path, words: Sequence[str]) -> None:
    """A Sigstore bundle beside every file."""
    for path in sorted(out.iterdir()):
        bundle = path.with_name(f"{path.name}.sigstore.json")
        _run(
            [sys.executable, "-m", "pointcall_executor.cli", "sign-bundle", *words, "--bundle", str(bundle), str(path)],
            ROOT,
        )


def _run(words: Sequence[str], folder: Path, **more: str) -> str:
    done = subprocess.run(words, cwd=folder, env=os.environ | more, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(words[:6])}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
