"""Checkpoints and proof files: one form, the right key, and tlog-scales as the second reader."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tlog_scales import signing
from tlog_scales.signing import Vkey
from tlog_scales.tlog import Checkpoint as TheirCheckpoint

from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import COSIGNER, LOG, Checkpoint, Verifier
from pointcall_attest.log.proof import Proof
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.log.witness import WitnessPolicy

VECTORS = Path(__file__).resolve().parents[2] / "vectors/log"
ORIGIN = "pointcall.dev/log/n1"
KEY = Ed25519PrivateKey.generate()
VERIFIER = Verifier(ORIGIN, LOG, KEY.public_key().public_bytes_raw())
TREE = Tree(leaf_hash(b"%d" % i) for i in range(300))
NOTE = checkpoints.sign(ORIGIN, 300, TREE.root(), KEY)
PQ = MLDSA44PrivateKey.generate()
WITNESS = Ed25519PrivateKey.generate()
WITNESS_KEY = Verifier("witness.example/w1", COSIGNER, WITNESS.public_key().public_bytes_raw())
PROOF = Proof(123, tuple(TREE.inclusion(123)), Checkpoint.parse(NOTE))


def test_what_was_signed_verifies() -> None:
    found = checkpoints.verify(Checkpoint.parse(NOTE), VERIFIER)
    assert (found.origin, found.size, found.root) == (ORIGIN, 300, TREE.root())


def test_tlog_scales_verifies_it() -> None:
    TheirCheckpoint.from_text(NOTE.decode()).verify(Vkey.from_string(str(VERIFIER)))


def test_every_flipped_bit_is_found() -> None:
    for at in range(len(NOTE) * 8):
        raw = bytearray(NOTE)
        raw[at // 8] ^= 1 << at % 8
        with pytest.raises(AttestError):
            checkpoints.verify(Checkpoint.parse(bytes(raw)), VERIFIER)


def test_another_key_or_origin_is_refused() -> None:
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    for key in (Verifier(ORIGIN, LOG, other), Verifier("x", LOG, VERIFIER.public), Verifier(ORIGIN, COSIGNER, other)):
        with pytest.raises(VerifyError) as error:
            checkpoints.verify(Checkpoint.parse(NOTE), key)
        assert error.value.id == "checkpoint.signature"


def test_verifier_keys_have_one_form() -> None:
    assert Verifier.parse(str(VERIFIER)) == VERIFIER
    text = str(VERIFIER)
    wrong_id = text.replace("+" + VERIFIER.key_id.hex(), "+00000000")
    for bad in ("", text + "\n", wrong_id, text[:-4], text.replace(ORIGIN, "a b"), f"{ORIGIN}+00000000+AAAA"):
        with pytest.raises(MalformedError) as error:
            Verifier.parse(bad)
        assert error.value.id == "checkpoint.key"


def test_a_cosignature_says_who_and_when() -> None:
    seen = Checkpoint.parse(NOTE)
    both = seen.with_lines(checkpoints.cosign(seen, WITNESS_KEY.name, WITNESS, at_s=1_700_000_000))
    assert checkpoints.cosigned_at(both, WITNESS_KEY) == 1_700_000_000
    assert checkpoints.verify(both, VERIFIER) is both
    assert checkpoints.cosigned_at(seen, WITNESS_KEY) is None
    stranger = Verifier("witness.example/w2", COSIGNER, WITNESS_KEY.public)
    assert checkpoints.cosigned_at(both, stranger) is None


def test_a_cosignature_by_ml_dsa_says_who_and_when() -> None:
    key, seen = MLDSA44PrivateKey.generate(), Checkpoint.parse(NOTE)
    witness = checkpoints.cosigner("witness.example/pq", key)
    assert Verifier.parse(str(witness)) == witness
    assert witness.kind == checkpoints.COSIGNER_MLDSA
    both = seen.with_lines(checkpoints.cosign(seen, witness.name, key, at_s=1_700_000_000))
    assert checkpoints.cosigned_at(both, witness) == 1_700_000_000
    assert checkpoints.verify(both, VERIFIER) is both
    # the signed structure names the witness: the same key under another name signs something else
    other = Verifier("witness.example/px", witness.kind, witness.public)
    line = checkpoints.cosign(seen, witness.name, key, at_s=1).split()
    renamed = base64.b64encode(other.key_id + base64.b64decode(line[2])[4:]).decode()
    assert checkpoints.cosigned_at(seen.with_lines(f"\u2014 {other.name} {renamed}\n"), other) is None


def test_ml_dsa_cosignatures_are_those_of_another_implementation() -> None:
    key, seen = MLDSA44PrivateKey.generate(), Checkpoint.parse(NOTE)
    witness = checkpoints.cosigner("witness.example/pq", key)
    theirs = signing.MLDSA44CosignatureSigner(witness.name, key)
    parsed = TheirCheckpoint.from_text(NOTE.decode())
    assert theirs.vkey.serialize() == str(witness)
    line = theirs.sign(parsed).serialize() + "\n"
    assert checkpoints.cosigned_at(seen.with_lines(line), witness) is not None
    ours = checkpoints.cosign(seen, witness.name, key, at_s=1_700_000_000)
    verifier = signing.MLDSA44CosignatureVerifier(theirs.vkey)
    verifier.verify_note(signing.NoteSignature.from_line(ours.strip()), parsed)


def test_the_ml_dsa_vector() -> None:
    """A checkpoint that another implementation cosigned with a key that is gone: tests/vectors/log."""
    key, _, note = (VECTORS / "ml-dsa-44-cosigned.txt").read_text().partition("\n\n")
    witness = Verifier.parse(key.removeprefix("key: "))
    assert checkpoints.cosigned_at(Checkpoint.parse(note.encode()), witness) == 1795402800


@pytest.mark.parametrize("bit", range(0, 8 * (8 + 2420), 997))
def test_a_changed_bit_of_an_ml_dsa_cosignature_is_no_signature(bit: int) -> None:
    seen = Checkpoint.parse(NOTE)
    witness = checkpoints.cosigner("witness.example/pq", PQ)
    raw = bytearray(base64.b64decode(checkpoints.cosign(seen, witness.name, PQ, at_s=1_700_000_000).split()[2]))
    raw[4 + bit // 8] ^= 1 << bit % 8
    forged = f"\u2014 {witness.name} {base64.b64encode(raw).decode()}\n"
    assert checkpoints.cosigned_at(seen.with_lines(forged), witness) is None


def test_a_quorum_of_both_kinds_of_witnesses() -> None:
    seen, pq = Checkpoint.parse(NOTE), checkpoints.cosigner("witness.example/pq", PQ)
    text = f"witness a {WITNESS_KEY}\nwitness b {pq}\ngroup both all a b\nquorum both\n"
    policy = WitnessPolicy.parse(text.encode())
    one = seen.with_lines(checkpoints.cosign(seen, WITNESS_KEY.name, WITNESS, at_s=1))
    two = one.with_lines(checkpoints.cosign(seen, pq.name, PQ, at_s=2))
    assert not policy.met_by(one)
    assert policy.met_by(two)
    assert policy.signers(two) == {"a": 1, "b": 2}


def test_a_cosignature_of_another_time_is_none() -> None:
    seen = Checkpoint.parse(NOTE)
    line = checkpoints.cosign(seen, WITNESS_KEY.name, WITNESS, at_s=1_700_000_000)
    raw = bytearray(base64.b64decode(line.split()[2]))
    raw[11] ^= 1
    forged = f"\u2014 {WITNESS_KEY.name} {base64.b64encode(raw).decode()}\n"
    assert checkpoints.cosigned_at(seen.with_lines(forged), WITNESS_KEY) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        NOTE[:-1],
        NOTE + b"\n",
        NOTE.replace(b"\n300\n", b"\n0300\n"),
        NOTE.replace(b"\n300\n", b"\n-1\n"),
        NOTE.replace(b"\n300\n", b"\n9999999999999999999\n"),
        NOTE.replace(b"\n300\n", "\n३००\n".encode()),
        NOTE.replace(b"\n\n", b"\nextension\n\n"),
        NOTE.replace(b"\n\n", b"\n"),
        NOTE.replace("\u2014".encode(), b"-"),
        NOTE.replace(b"\n300", b"\r\n300"),
        b"\xff" + NOTE,
    ],
)
def test_another_form_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        Checkpoint.parse(text)
    assert error.value.id == "checkpoint.form"


def test_the_caps() -> None:
    with pytest.raises(MalformedError) as error:
        Checkpoint.parse(b"x" * 70_000)
    assert error.value.id == "checkpoint.size"
    with pytest.raises(MalformedError) as error:
        Proof.parse(b"x" * 80_000)
    assert error.value.id == "proof.size"


@given(st.integers(0, 299), st.integers(1, 300))
@settings(deadline=None)
def test_proof_files_read_back_and_verify(index: int, size: int) -> None:
    index = index % size
    note = Checkpoint.parse(checkpoints.sign(ORIGIN, size, TREE.root(size), KEY))
    made = Proof(index, tuple(TREE.inclusion(index, size)), note)
    again = Proof.parse(made.encode())
    assert again == made
    again.verify(b"%d" % index)
    with pytest.raises(VerifyError) as error:
        again.verify(b"forged")
    assert error.value.id == "proof.inclusion"


def test_every_flipped_bit_of_a_proof_is_found() -> None:
    text = PROOF.encode()
    for at in range(len(text) * 8):
        raw = bytearray(text)
        raw[at // 8] ^= 1 << at % 8
        with pytest.raises(AttestError):
            _check(bytes(raw))


def _check(text: bytes) -> None:
    found = Proof.parse(text)
    checkpoints.verify(found.checkpoint, VERIFIER)
    found.verify(b"123")


def test_another_form_of_a_proof_is_refused() -> None:
    text = PROOF.encode()
    for bad in (b"", text.replace(b"@v1", b"@v2"), text.replace(b"index 123", b"index 0123"), text[1:], text + b"x"):
        with pytest.raises(MalformedError):
            Proof.parse(bad)
