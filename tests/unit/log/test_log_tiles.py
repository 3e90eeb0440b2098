"""Tile directories: paths of the specification, any growth, and every changed file found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log import tiles
from pointcall_attest.log.checkpoint import COSIGNER, Checkpoint, Verifier
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_executor.cli import main
from pointcall_executor.journal import DamagedError, JournalError
from pointcall_executor.tile_folder import extend
from tests.unit.log import world

KEY = Ed25519PrivateKey.generate()
RAW = [b"entry %d" % i for i in range(66_500)]
TREE = Tree(map(leaf_hash, RAW))


def entries(first: int, end: int) -> Sequence[bytes]:
    return RAW[first:end]


def directory(size: int, since: int = 0) -> dict[str, bytes]:
    return dict(tiles.files(TREE, entries, size, since=since))


def checkpoint(size: int) -> Checkpoint:
    return Checkpoint.parse(checkpoints.sign("pointcall.dev/log/t", size, TREE.root(size), KEY))


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ((0, 0, 256), "tile/0/000"),
        ((0, 0, 7), "tile/0/000.p/7"),
        ((1, 999, 256), "tile/1/999"),
        ((2, 1000, 256), "tile/2/x001/000"),
        ((0, 1_234_067, 256), "tile/0/x001/x234/067"),
        ((None, 1_234_067, 1), "tile/entries/x001/x234/067.p/1"),
    ],
)
def test_paths_of_the_specification(where: tuple[int | None, int, int], path: str) -> None:
    assert tiles.tile_path(*where) == path


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 512, 65_535, 65_536, 66_500])
def test_a_directory_reads_back(size: int) -> None:
    made = directory(size)
    assert list(tiles.read_all(made.__getitem__, checkpoint(size))) == RAW[:size]
    level_2 = [p for p in made if p.startswith("tile/2/")]
    assert level_2 == (["tile/2/000.p/1"] if size >= 65_536 else [])


@given(st.integers(1, 3000), st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_growing_writes_what_is_missing(size: int, since: int) -> None:
    since = min(since, size)
    grown = (directory(since) if since else {}) | directory(size, since)
    assert directory(size).items() <= grown.items()


def test_every_changed_file_is_found() -> None:
    made = directory(700)
    for path, raw in made.items():
        for spoiled in (raw[:-1], raw + b"\0", bytes([raw[-1] ^ 1]), raw[:-1] + bytes([raw[-1] ^ 1])):
            with pytest.raises(AttestError):
                list(tiles.read_all({**made, path: spoiled}.__getitem__, checkpoint(700)))
    other = Checkpoint.parse(checkpoints.sign("pointcall.dev/log/t", 700, TREE.root(699), KEY))
    with pytest.raises(VerifyError) as error:
        list(tiles.read_all(made.__getitem__, other))
    assert error.value.id == "log.tiles"


@given(st.binary(max_size=300))
def test_bundles_have_one_form(raw: bytes) -> None:
    try:
        assert tiles.bundle(tiles.parse_bundle(raw)) == raw
    except MalformedError as error:
        assert error.id == "log.bundle"  # noqa: PT017


def test_a_folder_grows_with_its_journal(tmp_path: Path) -> None:
    node, out = world.Node.boot(tmp_path), tmp_path / "tiles"
    with pytest.raises(JournalError) as error:
        extend(out, node.journal)
    assert error.value.id == "journal.no_checkpoint"
    for number in range(3):
        node.run(number)
        node.checkpoint()
        written, size = extend(out, node.journal)
        assert written
        note = Checkpoint.parse((out / "checkpoint").read_bytes())
        read = list(tiles.read_all(lambda path: (out / path).read_bytes(), note))
        assert read == [e.raw for e in node.journal.entries()]
        assert size == len(read) == note.size
    assert extend(out, node.journal) == (0, 10)
    node.journal.close()
    other = world.Node.boot(tmp_path / "other")
    for number in range(8):
        other.run(number)
    other.checkpoint()
    with pytest.raises(DamagedError):
        extend(out, other.journal)
    other.journal.close()


def test_a_tile_directory_is_verified_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node, out, seen = world.Node.boot(tmp_path), tmp_path / "tiles", tmp_path / "seen"
    node.run(0)
    node.checkpoint()
    extend(out, node.journal)
    seen.write_bytes((out / "checkpoint").read_bytes())
    node.run(1)
    node.checkpoint()
    extend(out, node.journal)
    node.journal.close()
    policy = tmp_path / "policy"
    policy.write_text("quorum none\n")
    assert main(["verify", str(out), "--since", str(seen), "--witnesses", str(policy), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["not_checked"] == []
    assert {c["id"] for c in verdict["checks"]} >= {"log.tiles", "log.epochs", "log.consistency", "log.witnesses"}
    stranger = Verifier("w", COSIGNER, KEY.public_key().public_bytes_raw())
    policy.write_text(f"witness w {stranger}\nquorum w\n")
    seen.write_bytes(checkpoints.sign(world.ORIGIN, 4, b"r" * 32, KEY))
    assert main(["verify", str(out), "--since", str(seen), "--witnesses", str(policy), "--json"]) == 1
    failed = [c["id"] for c in json.loads(capsys.readouterr().out)["checks"] if c["outcome"] == "fail"]
    assert failed == ["log.consistency", "log.witnesses"]
    bundle = out / "tile" / "entries" / "000.p" / "7"
    bundle.write_bytes(bundle.read_bytes()[:-1])
    assert main(["verify", str(out), "--json"]) == 1
    bundle.unlink()
    assert main(["verify", str(out), "--json"]) == 1
