"""RFC 6962 Merkle tree over hash tiles: append, root, proofs, and their verification. No I/O, no signatures.

Only the hashes at every eighth level are kept (32 bytes a leaf and 1/256 more); what lies between is folded when it
is needed. Spec: RFC 6962 section 2.1 (same as RFC 9162), C2SP tlog-tiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

HASH_BYTES: Final = 32
TILE_WIDTH: Final = 256
TILE_BYTES: Final = TILE_WIDTH * HASH_BYTES
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
MAX_PROOF: Final = 64  # hashes: enough for 2**63 leaves, and one more for consistency
_sha256 = hashlib.sha256


def leaf_hash(entry: bytes) -> bytes:
    """The hash of an entry as a leaf."""
    return _sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return _sha256(b"\1" + left + right).digest()


class Tree:
    """A growing tree. `levels[L]` is the concatenated hashes at tile level L; each covers 256**L leaves."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self.size = 0
        self.levels: list[bytearray] = [bytearray()]
        self.extend(leaves)

    def add(self, leaf: bytes) -> None:
        """Append one leaf hash."""
        assert len(leaf) == HASH_BYTES, "a leaf hash has 32 bytes"
        self.levels[0] += leaf
        self.size += 1
        level, count = 0, self.size
        while count % TILE_WIDTH == 0:
            if level + 1 == len(self.levels):
                self.levels.append(bytearray())
            self.levels[level + 1] += _fold(self.levels[level][-TILE_BYTES:])
            level, count = level + 1, count // TILE_WIDTH

    def extend(self, leaves: Iterable[bytes]) -> None:
        """Append many leaf hashes."""
        for leaf in leaves:
            self.add(leaf)

    def leaf(self, index: int) -> bytes:
        """The leaf hash at an index. IndexError beyond the end."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        return bytes(self.levels[0][index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def root(self, size: int | None = None) -> bytes:
        """The Merkle tree hash of the first `size` leaves (all by default)."""
        return self._range(0, self._checked(size))

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The audit path of a leaf in the tree of `size` leaves, leaf side first."""
        lo, hi = 0, self._checked(size)
        if not 0 <= index < hi:
            raise IndexError(index)
        path = []
        while hi - lo > 1:
            middle = lo + _split(hi - lo)
            if index < middle:
                path.append(self._range(middle, hi))
                hi = middle
            else:
                path.append(self._range(lo, middle))
                lo = middle
        return path[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """The proof that the tree of `old` leaves is a prefix of that of `size` leaves. Empty for 0 and for equal."""
        hi = self._checked(size)
        if not 0 <= old <= hi:
            raise IndexError(old)
        return self._consistency(old, 0, hi, complete=True) if old else []

    def _consistency(self, old: int, lo: int, hi: int, *, complete: bool) -> list[bytes]:
        if old == hi - lo:
            return [] if complete else [self._range(lo, hi)]
        k = _split(hi - lo)
        if old <= k:
            return [*self._consistency(old, lo, lo + k, complete=complete), self._range(lo + k, hi)]
        return [*self._consistency(old - k, lo + k, hi, complete=False), self._range(lo, lo + k)]

    def _range(self, lo: int, hi: int) -> bytes:
        n = hi - lo
        if n == 0:
            return EMPTY_ROOT
        if n & (n - 1) == 0 and lo % n == 0:
            return self._subtree(n.bit_length() - 1, lo // n)
        k = _split(n)
        return node_hash(self._range(lo, lo + k), self._range(lo + k, hi))

    def _subtree(self, height: int, index: int) -> bytes:
        level, k = divmod(height, 8)
        start = (index << k) * HASH_BYTES
        return _fold(self.levels[level][start : start + (HASH_BYTES << k)])

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise IndexError(size)
        return size


def verify_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> bool:
    """Whether `leaf` (its hash) is at `index` of the tree with this size and root. RFC 9162 section 2.1.3.2."""
    if not 0 <= index < size or len(path) > MAX_PROOF:
        return False
    fn, sn, r = index, size - 1, leaf
    for p in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = node_hash(p, r)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = node_hash(r, p)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == root


def verify_consistency(old: int, size: int, old_root: bytes, root: bytes, path: Sequence[bytes]) -> bool:
    """Whether the tree (old, old_root) is a prefix of (size, root). RFC 9162 section 2.1.4.2.

    From the empty tree everything has grown: true for old = 0 with the empty root and no path.
    """
    if old == 0:
        return not path and old_root == EMPTY_ROOT and size >= 0
    if old == size:
        return not path and old_root == root
    if not 0 < old < size or len(path) > MAX_PROOF:
        return False
    nodes = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not nodes:
        return False
    fn, sn = old - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = nodes[0]
    for node in nodes[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr, sr = node_hash(node, fr), node_hash(node, sr)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = node_hash(sr, node)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and fr == old_root and sr == root


def _fold(tile: bytes | bytearray) -> bytes:
    """The root of a complete subtree given as concatenated hashes."""
    hashes = [bytes(tile[i : i + HASH_BYTES]) for i in range(0, len(tile), HASH_BYTES)]
    while len(hashes) > 1:
        hashes = [_sha256(b"\1" + hashes[i] + hashes[i + 1]).digest() for i in range(0, len(hashes), 2)]
    return hashes[0]


def _split(n: int) -> int:
    """The largest power of two below n."""
    return 1 << (n - 1).bit_length() - 1
