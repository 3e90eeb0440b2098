"""A `.tlog-proof` file: one entry's place in a log under a checkpoint, checkable without the log. Text <-> Proof.
And a consistency file: that a checkpoint is a growth of an earlier one, whose signature is left to who kept it.

Spec: C2SP tlog-proof, docs/spec/log.md section 4.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import MAX_CHECKPOINT_BYTES, MAX_SIZE, Checkpoint
from pointcall_attest.log.tree import MAX_PROOF, leaf_hash, verify_consistency, verify_inclusion

HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_PROOF_BYTES: Final = MAX_CHECKPOINT_BYTES + 64 + 45 * MAX_PROOF  # header, index, hashes of 44 characters
_HEAD = re.compile(rf"{re.escape(HEADER)}\nindex (0|[1-9][0-9]{{0,18}})\n((?:[A-Za-z0-9+/]{{43}}=\n){{0,{MAX_PROOF}}})")


@dataclass(frozen=True, slots=True)
class Proof:
    """A well-formed proof. It proves nothing before `verify`, and no more than its checkpoint."""

    index: int
    path: tuple[bytes, ...]
    checkpoint: Checkpoint

    def encode(self) -> bytes:
        """The text of the file."""
        hashes = "".join(base64.b64encode(h).decode() + "\n" for h in self.path)
        return f"{HEADER}\nindex {self.index}\n{hashes}\n".encode() + self.checkpoint.text

    @classmethod
    def parse(cls, text: bytes) -> Proof:
        """MalformedError `proof.size`, `proof.form` or `checkpoint.*` unless this is one proof file in its one form."""
        if len(text) > MAX_PROOF_BYTES:
            raise MalformedError(
                "the proof is too long", id="proof.size", want=str(MAX_PROOF_BYTES), got=str(len(text))
            )
        head, blank, rest = text.partition(b"\n\n")
        found = _HEAD.fullmatch(head.decode("latin-1") + "\n")
        if not blank or found is None or int(found[1]) > MAX_SIZE:
            raise _form("not header, index and hashes")
        try:
            path = tuple(base64.b64decode(line, validate=True) for line in found[2].split())
        except binascii.Error:
            raise _form("a hash that is not base64") from None
        made = cls(int(found[1]), path, Checkpoint.parse(rest))
        if made.encode() != text:
            raise _form("another form of the same proof")
        return made

    def verify(self, entry: bytes) -> None:
        """VerifyError `proof.inclusion` unless `entry` is at this index under this checkpoint's root.

        What is left to the caller: that the checkpoint is signed by the log's key.
        """
        if not verify_inclusion(self.index, self.checkpoint.size, leaf_hash(entry), self.path, self.checkpoint.root):
            raise VerifyError(
                "the entry is not in the log at this place",
                id="proof.inclusion",
                want=f"entry {self.index} of {self.checkpoint.size}",
                got=leaf_hash(entry).hex(),
                hint="the entry or the proof was changed, or they belong to different logs",
            )


@dataclass(frozen=True, slots=True)
class Consistency:
    """That a later tree of this log contains the tree of this size and root. Nothing before `holds`."""

    origin: str
    size: int
    root: bytes
    path: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The unsigned body of the earlier checkpoint, an empty line, one base64 hash a line."""
        hashes = "".join(base64.b64encode(h).decode() + "\n" for h in self.path)
        return checkpoints.body(self.origin, self.size, self.root) + b"\n" + hashes.encode()

    @classmethod
    def parse(cls, text: bytes) -> Consistency:
        """MalformedError `proof.size` or `proof.form` unless this is the one form of such a file."""
        if len(text) > MAX_PROOF_BYTES:
            raise MalformedError(
                "the proof is too long", id="proof.size", want=str(MAX_PROOF_BYTES), got=str(len(text))
            )
        head, blank, tail = text.partition(b"\n\n")
        try:
            origin, size, root = checkpoints.parse_body(head + b"\n")
            made = cls(origin, size, root, tuple(base64.b64decode(line, validate=True) for line in tail.split()))
        except (MalformedError, binascii.Error):
            raise _form("not an earlier checkpoint and hashes") from None
        if not blank or len(made.path) > MAX_PROOF or made.encode() != text:
            raise _form("another form of the same proof")
        return made

    def holds(self, later: Checkpoint) -> bool:
        """Whether the later checkpoint is a growth of this one. Whose signature it has is left to the caller."""
        return (
            later.origin == self.origin
            and self.size <= later.size
            and verify_consistency(self.size, later.size, self.root, later.root, self.path)
        )


def _form(got: str) -> MalformedError:
    return MalformedError("not a proof file", id="proof.form", want="a C2SP tlog-proof", got=got)
