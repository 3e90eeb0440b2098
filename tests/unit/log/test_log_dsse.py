"""DSSE: one form, every flipped bit found, and the same answer from securesystemslib."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from pointcall_attest import dsse
from pointcall_attest.errors import AttestError, MalformedError, VerifyError

KEY = ec.generate_private_key(ec.SECP256R1())
KEYID = dsse.keyid_of(dsse.spki(KEY.public_key()))
LEAF = dsse.sign(b'{"a":1}', KEY, keyid=KEYID)


@given(st.binary(min_size=1, max_size=500))
def test_what_was_signed_reads_back_and_verifies(payload: bytes) -> None:
    envelope = dsse.parse(dsse.sign(payload, KEY, keyid=KEYID))
    assert dsse.verify(envelope, KEY.public_key()) == payload
    assert envelope.keyid == KEYID


def test_every_flipped_bit_is_found_except_in_the_hint() -> None:
    """The key id is a hint; entry.parse_entry compares it with the epoch that was signed."""
    hint = LEAF.index(KEYID.encode())
    for at in set(range(len(LEAF))) - set(range(hint, hint + len(KEYID))):
        for bit in range(8):
            raw = bytearray(LEAF)
            raw[at] ^= 1 << bit
            with pytest.raises(AttestError):
                dsse.verify(dsse.parse(bytes(raw)), KEY.public_key())


def test_another_library_verifies_it() -> None:
    key = SSlibKey.from_crypto(KEY.public_key(), keyid=KEYID)
    assert Envelope.from_dict(json.loads(LEAF)).verify([key], 1)


def test_another_key_is_refused() -> None:
    with pytest.raises(VerifyError) as error:
        dsse.verify(dsse.parse(LEAF), ec.generate_private_key(ec.SECP256R1()).public_key())
    assert error.value.id == "dsse.signature"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        LEAF + b"\n",
        LEAF[:-1],
        LEAF.replace(b"in-toto", b"in-tata"),
        LEAF.replace(b'"payload":', b'"payload": '),
        LEAF.replace(b'"signatures":[', b'"signatures":[{"keyid":"","sig":""},'),
        LEAF.replace(base64.b64encode(b'{"a":1}'), b"eyJhIjoxfR=="),
        json.dumps(json.loads(LEAF)).encode(),
    ],
)
def test_another_form_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        dsse.parse(raw)
    assert error.value.id == "dsse.form"


def test_the_cap() -> None:
    with pytest.raises(MalformedError) as error:
        dsse.parse(b"x" * (dsse.MAX_LEAF_BYTES + 1))
    assert error.value.id == "dsse.size"
    assert len(dsse.sign(b"x" * dsse.MAX_PAYLOAD_BYTES, KEY, keyid=KEYID)) <= dsse.MAX_LEAF_BYTES


def foreign_keys() -> list[bytes]:
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    good = dsse.spki(KEY.public_key())
    compressed = KEY.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    return [
        b"",
        good[:-1],
        good + b"\0",
        compressed,
        ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form),
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*form),
    ]


@pytest.mark.parametrize("der", foreign_keys())
def test_only_p256_keys_in_their_one_form(der: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        dsse.public_key(der)
    assert error.value.id == "dsse.key"
