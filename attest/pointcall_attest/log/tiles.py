"""The tile directory of a log, as static files that any C2SP client reads: paths, bundles, and checking all of it.

Everything here is derived from entries and checkpoint and can be made again; a full tile never changes.
Spec: C2SP tlog-tiles, docs/spec/log.md section 2. No I/O: files are (path, bytes), looked up through a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.tree import HASH_BYTES, TILE_WIDTH, Tree, leaf_hash

MAX_ENTRY_BYTES: Final = 65_535
CHECKPOINT_PATH: Final = "checkpoint"

Entries: TypeAlias = Callable[[int, int], Sequence[bytes]]  # first index, end -> raw entries
Lookup: TypeAlias = Callable[[str], bytes]


def tile_path(level: int | None, index: int, width: int) -> str:
    """Where a tile lies; `level` None is an entry bundle. `width` below 256 is a partial tile."""
    parts = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        parts.append(f"x{index % 1000:03d}")
    partial = "" if width == TILE_WIDTH else f".p/{width}"
    return f"tile/{'entries' if level is None else level}/{'/'.join(reversed(parts))}{partial}"


def files(tree: Tree, entries: Entries, size: int, *, since: int = 0) -> Iterator[tuple[str, bytes]]:
    """Every tile of the tree of `size` leaves, entry bundles included; with `since` only those that a directory of that
    size has not. The checkpoint is not among them: it is written last, when all the others are durable."""
    assert since <= size <= tree.size, "a directory only grows"
    for index, width in _tiles(size, since):
        first = index * TILE_WIDTH
        yield tile_path(None, index, width), bundle(entries(first, first + width))
    for level, hashes in enumerate(tree.levels):
        for index, width in _tiles(size >> 8 * level, since >> 8 * level):
            first = index * TILE_WIDTH * HASH_BYTES
            yield tile_path(level, index, width), bytes(hashes[first : first + width * HASH_BYTES])


def bundle(entries: Sequence[bytes]) -> bytes:
    """Entries in one file: 16-bit big-endian length and bytes, each."""
    assert all(len(e) <= MAX_ENTRY_BYTES for e in entries), "an entry fits 16 bits of length"
    return b"".join(len(e).to_bytes(2) + e for e in entries)


def parse_bundle(raw: bytes) -> list[bytes]:
    """The inverse of `bundle`. MalformedError `log.bundle` unless the bytes are exactly whole entries."""
    out, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 2])
        if at + 2 + length > len(raw):
            raise MalformedError("not an entry bundle", id="log.bundle", want="whole entries", got=f"{len(raw)} bytes")
        out.append(raw[at + 2 : at + 2 + length])
        at += 2 + length
    if len(out) > TILE_WIDTH:
        raise MalformedError("not an entry bundle", id="log.bundle", want=f"at most {TILE_WIDTH}", got=str(len(out)))
    return out


def read_all(lookup: Lookup, checkpoint: Checkpoint) -> Iterator[bytes]:
    """Every entry of a tile directory, in order; after the last one the whole directory has been checked.

    VerifyError `log.tiles` where a tile is not that of these entries, or the root not that of the checkpoint. The
    caller has checked the checkpoint's signature. KeyError of `lookup` passes through.
    """
    tree = Tree()
    for index, width in _tiles(checkpoint.size, 0):
        path = tile_path(None, index, width)
        found = parse_bundle(lookup(path))
        if len(found) != width:
            raise _wrong(path, f"{width} entries", str(len(found)))
        tree.extend(map(leaf_hash, found))
        yield from found
    for path, want in files(tree, lambda first, end: (), checkpoint.size):
        if "/entries/" not in path and lookup(path) != want:
            raise _wrong(path, "the hashes of these entries", "other hashes")
    if tree.root() != checkpoint.root:
        raise _wrong(CHECKPOINT_PATH, f"root {checkpoint.root.hex()}", tree.root().hex())


def _tiles(count: int, since: int) -> Iterator[tuple[int, int]]:
    """(index, width) of the tiles over `count` hashes, from the first one that changes after `since`."""
    if count == since and since:
        return
    for index in range(since // TILE_WIDTH, (count + TILE_WIDTH - 1) // TILE_WIDTH):
        yield index, min(TILE_WIDTH, count - index * TILE_WIDTH)


def _wrong(path: str, want: str, got: str) -> VerifyError:
    return VerifyError(
        f"{path} is not of this log", id="log.tiles", want=want, got=got, hint="the directory was changed"
    )
