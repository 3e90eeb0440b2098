"""Fuzz of every parser of this room: whatever comes in, only the declared error comes out.

Short in a normal run. `python -m tests.fuzz.log.test_log_fuzz SECONDS` goes on for longer and prints executions.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import canonical, dsse, entry, statement
from pointcall_attest.errors import MalformedError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import Checkpoint, Verifier
from pointcall_attest.log.proof import Consistency, Proof
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.pack import Pack
from pointcall_attest.receipt import Receipt
from pointcall_attest.sealing import Opening
from pointcall_keys.node import EpochKeys
from tests.unit.log import world

KEYS = EpochKeys.generate()
PAYLOAD = entry.payload(
    entry.OutcomeBody(action="a", target="b", outcome="failed", detail={"n": 1}, postcondition="", undo=None),
    at=world.NOW,
    ktime_ns=1,
    epoch=KEYS.id,
)
LEAF = KEYS.sign(PAYLOAD)
TREE = Tree(leaf_hash(b"%d" % i) for i in range(9))
NOTE = checkpoints.sign("pointcall.dev/log/n", 9, TREE.root(), KEYS._checkpoints)  # type: ignore[arg-type]
PROOF = Proof(3, tuple(TREE.inclusion(3)), Checkpoint.parse(NOTE)).encode()
CONSISTENCY = Consistency("pointcall.dev/log/n", 5, TREE.root(5), tuple(TREE.consistency(5))).encode()
PQ_VKEY = str(checkpoints.cosigner("witness.example/pq", MLDSA44PrivateKey.generate())).encode()
_BODY = entry.Intent(action="open_circuit", target="192.0.2.1:5", args={"a": "b"}, grant="open_circuit:192.0.2.1:5")
SEALED, _OPENING = entry.sealed(_BODY, at=world.NOW, ktime_ns=1, epoch=KEYS.id, salt=bytes(32))
assert _OPENING is not None
OPENING, SEALED_LEAF = _OPENING, KEYS.sign(SEALED)
SEALED_RECEIPT = world.unsigned_receipt(KEYS.id).sealed(bytes(32))[0]
VKEY = str(KEYS.verifier("pointcall.dev/log/n")).encode()

PARSERS: Final[dict[str, tuple[Callable[[bytes], object], bytes]]] = {
    "canonical": (lambda raw: canonical.loads(raw, max_bytes=100_000, what="it"), PAYLOAD),
    "dsse": (dsse.parse, LEAF),
    "dsse key": (dsse.public_key, KEYS.spki),
    "statement": (statement.parse, PAYLOAD),
    "entry": (lambda raw: entry.parse_entry(0, raw), LEAF),
    "signed payload": (lambda raw: entry.parse_entry(0, KEYS.sign(raw)), PAYLOAD),
    "receipt": (Receipt.parse, PAYLOAD.replace(b"entry/v1", b"recovery-run/v1")),
    "checkpoint": (Checkpoint.parse, NOTE),
    "verifier": (lambda raw: Verifier.parse(raw.decode("latin-1")), VKEY),
    "proof": (Proof.parse, PROOF),
    "ml-dsa verifier": (lambda raw: Verifier.parse(raw.decode("latin-1")), PQ_VKEY),
    "consistency": (Consistency.parse, CONSISTENCY),
    "opening": (Opening.parse, OPENING.encode()),
    "opened entry": (lambda raw: entry.parse_entry(0, SEALED_LEAF, Opening.parse(raw)), OPENING.encode()),
    "sealed payload": (lambda raw: entry.parse_entry(0, KEYS.sign(raw)), SEALED),
    "sealed receipt": (lambda raw: entry.parse_entry(0, KEYS.sign(raw)), SEALED_RECEIPT),
    "pack witnesses": (lambda raw: Pack.of({"pack.json": b"", "checkpoint": b"", "witnesses": raw}), PQ_VKEY + b"\n"),
    "pack name": (lambda raw: Pack.of({raw.decode("latin-1"): b""}), b"entries/1.json"),
    "pack run": (lambda raw: Pack.of({"pack.json": raw, "checkpoint": b""}), b'{"format":"pointcall-pack/v1"}'),
}


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, removed, repeated or inserted."""
    raw = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0:
                raw[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del raw[at : at + chance.randint(1, 8)]
            case 2:
                raw[at:at] = raw[at : at + chance.randint(1, 40)]
            case 3:
                raw[at:at] = chance.choice([b"\xff\xfe", b"9" * 30, b'"', b"{[", b"null", b"\n\n", b"1e9", b"\\u0000"])
            case _:
                raw[at : at + 4] = chance.randbytes(4)
    return bytes(raw)


def one(parse: Callable[[bytes], object], raw: bytes) -> None:
    try:
        parse(raw)
    except MalformedError as refusal:
        text = str(refusal)
        assert len(text) < 4000  # what is shown of hostile input is capped


@pytest.mark.parametrize("name", PARSERS)
def test_only_the_declared_error_comes_out(name: str) -> None:
    parse, seed = PARSERS[name]
    chance = random.Random(name)
    for _ in range(1500):
        one(parse, mutated(seed, chance))


@pytest.mark.parametrize("name", PARSERS)
@given(raw=st.binary(max_size=300))
def test_arbitrary_bytes(name: str, raw: bytes) -> None:
    one(PARSERS[name][0], raw)


def main() -> None:
    """The long mode."""
    seconds, count, chance = float(sys.argv[1]), 0, random.Random(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for parse, seed in PARSERS.values():
            one(parse, mutated(seed, chance))
            count += 1
    sys.stdout.write(f"{count} executions, 0 uncaught\n")


if __name__ == "__main__":
    main()
