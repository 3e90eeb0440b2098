"""The edge of a tree: enough hashes to go on appending and to know the root, without the leaves. At most 63 of them.

It is how a mirror checks a log of any length in constant memory. Spec: RFC 6962 section 2.1; the complete subtrees of a
tree from left to right, a compact range from 0.
"""

from __future__ import annotations

from typing import Self

from pointcall_attest.errors import MalformedError
from pointcall_attest.log.tree import EMPTY_ROOT, HASH_BYTES, node_hash


class Frontier:
    """A tree of `size` leaves as the roots of its complete subtrees, largest first."""

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[bytes] = []

    def add(self, leaf: bytes) -> None:
        """Append one leaf hash."""
        self._subtrees.append(leaf)
        self.size += 1
        full = self.size
        while full % 2 == 0:
            right, left = self._subtrees.pop(), self._subtrees.pop()
            self._subtrees.append(node_hash(left, right))
            full //= 2

    def root(self) -> bytes:
        """The Merkle tree hash."""
        if not self._subtrees:
            return EMPTY_ROOT
        found, *rest = reversed(self._subtrees)
        for left in rest:
            found = node_hash(left, found)
        return found

    def encode(self) -> bytes:
        """Size (8 bytes) and hashes."""
        return self.size.to_bytes(8) + b"".join(self._subtrees)

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """The inverse of `encode`. MalformedError `log.frontier`."""
        made, size = cls(), int.from_bytes(raw[:8])
        if len(raw) != 8 + size.bit_count() * HASH_BYTES or size >= 2**63:
            raise MalformedError(
                "not a frontier", id="log.frontier", want="size and one hash a set bit", got=str(len(raw))
            )
        made.size = size
        made._subtrees = [raw[at : at + HASH_BYTES] for at in range(8, len(raw), HASH_BYTES)]
        return made
