"""Checkpoints: a signed statement of a log's size and root. Text <-> Checkpoint, signatures, cosignatures.

The key of a log changes with every epoch, the origin does not: a verifier gets the key from the epoch-open entry.
Unknown signature lines are ignored, as C2SP demands; `verify` names the lines that it believed.
Spec: C2SP signed-note, tlog-checkpoint, tlog-cosignature; docs/spec/log.md section 3.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey

from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.log.tree import HASH_BYTES

LOG: Final = b"\x01"  # signature type: Ed25519 key of a log
COSIGNER: Final = b"\x04"  # signature type: Ed25519 key of a witness
COSIGNER_MLDSA: Final = b"\x06"  # signature type: ML-DSA-44 key of a witness
WITNESS_KINDS: Final = (COSIGNER, COSIGNER_MLDSA)
MAX_CHECKPOINT_BYTES: Final = 64 * 1024  # a checkpoint with 16 cosignatures has 2 kB, with ML-DSA-44 53 kB
MAX_SIZE: Final = 2**63 - 1
_KEY_BYTES: Final = {LOG: 32, COSIGNER: 32, COSIGNER_MLDSA: 1312}
_COSIGNATURE_BYTES: Final = {COSIGNER: 8 + 64, COSIGNER_MLDSA: 8 + 2420}
_ORIGIN: Final = r"[^\s+\x00-\x1f\x7f]{1,255}"
_BODY = re.compile(rf"({_ORIGIN})\n(0|[1-9][0-9]{{0,18}})\n([A-Za-z0-9+/]{{43}}=)\n")
_LINE = re.compile(rf"\u2014 ({_ORIGIN}) ([A-Za-z0-9+/]+={{0,2}})")
_VKEY = re.compile(rf"({_ORIGIN})\+([0-9a-f]{{8}})\+([A-Za-z0-9+/]+={{0,2}})")


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key of a log or witness: `kind` is LOG or one of WITNESS_KINDS, `public` the raw key."""

    name: str
    kind: bytes
    public: bytes

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + self.kind + self.public).digest()[:4]

    def __str__(self) -> str:
        """The C2SP verifier key: name, id and key in one line."""
        return f"{self.name}+{self.key_id.hex()}+{_b64(self.kind + self.public)}"

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """MalformedError `checkpoint.key` unless `text` is a verifier key in its one form."""
        found = _VKEY.fullmatch(text)
        raw = _unbase64(found[3], "checkpoint.key") if found else b""
        if found is None or len(raw) != 1 + _KEY_BYTES.get(raw[:1], len(raw)):
            want = "name+id+key (Ed25519, or ML-DSA-44 of a witness)"
            raise MalformedError("not a verifier key", id="checkpoint.key", want=want, got=text[:80])
        made = cls(found[1], raw[:1], raw[1:])
        if str(made) != text:
            raise MalformedError("a verifier key with a wrong id", id="checkpoint.key", want=str(made), got=text[:400])
        return made


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line. Not yet believed."""

    name: str
    key_id: bytes
    raw: bytes  # for a cosignature: 8 bytes of time, then the signature


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A well-formed checkpoint. Nothing in it may be believed before `verify`."""

    origin: str
    size: int
    root: bytes
    signatures: tuple[Signature, ...]
    body: bytes
    text: bytes

    @classmethod
    def parse(cls, text: bytes) -> Checkpoint:
        """MalformedError `checkpoint.size` or `checkpoint.form` unless this is one checkpoint with a signature."""
        if len(text) > MAX_CHECKPOINT_BYTES:
            raise MalformedError(
                "the checkpoint is too long", id="checkpoint.size", want=str(MAX_CHECKPOINT_BYTES), got=str(len(text))
            )
        try:
            note = text.decode()
        except UnicodeDecodeError:
            raise _form("not UTF-8") from None
        head, blank, tail = note.partition("\n\n")
        if not blank or not tail.endswith("\n"):
            raise _form("not origin, size, root and signature lines")
        lines = tuple(_signature(line) for line in tail[:-1].split("\n"))
        origin, size, root = parse_body(f"{head}\n".encode())
        return cls(origin, size, root, lines, f"{head}\n".encode(), text)

    def with_lines(self, lines: str) -> Checkpoint:
        """The same checkpoint with more signature lines."""
        return Checkpoint.parse(self.text + lines.encode())


def body(origin: str, size: int, root: bytes) -> bytes:
    """What is signed. AssertionError if the origin is not a C2SP name: it is ours."""
    text = f"{origin}\n{size}\n{_b64(root)}\n"
    assert _BODY.fullmatch(text), f"{origin!r} is no origin"
    return text.encode()


def parse_body(raw: bytes) -> tuple[str, int, bytes]:
    """Origin, size and root of a body. MalformedError `checkpoint.form`."""
    found = _BODY.fullmatch(raw.decode(errors="replace"))
    if found is None:
        raise _form("not origin, size and root")
    root = _unbase64(found[3], "checkpoint.form")
    if int(found[2]) > MAX_SIZE or len(root) != HASH_BYTES:
        raise _form("a size or root out of range")
    return found[1], int(found[2]), root


def sign(origin: str, size: int, root: bytes, key: Ed25519PrivateKey) -> bytes:
    """A checkpoint signed by the log's key."""
    signer = Verifier(origin, LOG, key.public_key().public_bytes_raw())
    text = body(origin, size, root)
    return text + b"\n" + _line(signer, key.sign(text)).encode()


WitnessKey: TypeAlias = Ed25519PrivateKey | MLDSA44PrivateKey


def cosigner(name: str, key: WitnessKey) -> Verifier:
    """The public key of a witness, as others configure it."""
    kind = COSIGNER if isinstance(key, Ed25519PrivateKey) else COSIGNER_MLDSA
    return Verifier(name, kind, key.public_key().public_bytes_raw())


def cosign(checkpoint: Checkpoint, name: str, key: WitnessKey, *, at_s: int) -> str:
    """The signature line of a witness that saw this checkpoint at `at_s` (Unix seconds)."""
    signer = cosigner(name, key)
    signature = key.sign(_cosigned(checkpoint, signer, at_s))
    return _line(signer, struct.pack(">Q", at_s) + signature)


def verify(checkpoint: Checkpoint, key: Verifier) -> Checkpoint:
    """Itself, if this key of the log signed it. VerifyError `checkpoint.signature` otherwise."""
    if checkpoint.origin != key.name or _signed_by(checkpoint, key) is None:
        raise VerifyError(
            "the checkpoint is not signed by this key",
            id="checkpoint.signature",
            want=str(key),
            got=f"{checkpoint.origin}, keys " + " ".join(s.key_id.hex() for s in checkpoint.signatures),
            hint="the log was changed, or the checkpoint is of another epoch",
        )
    return checkpoint


def cosigned_at(checkpoint: Checkpoint, witness: Verifier) -> int | None:
    """When this witness saw the checkpoint (Unix seconds), or None where it did not sign it."""
    assert witness.kind in WITNESS_KINDS, "a log's key is no witness"
    found = _signed_by(checkpoint, witness)
    return None if found is None else int.from_bytes(found.raw[:8])


def _signed_by(checkpoint: Checkpoint, key: Verifier) -> Signature | None:
    """The first valid signature line of this key."""
    return next((line for line in checkpoint.signatures if signed_by(checkpoint, line, key)), None)


def signed_by(checkpoint: Checkpoint, line: Signature, key: Verifier) -> bool:
    """Whether this line of the checkpoint is a valid signature of this key of a log or a witness."""
    if (line.name, line.key_id) != (key.name, key.key_id):
        return False
    signature, message = line.raw, checkpoint.body
    if key.kind in WITNESS_KINDS:
        at_s = int.from_bytes(line.raw[:8])
        longest = max(len(key.name.encode()), len(checkpoint.origin.encode()))
        if len(line.raw) != _COSIGNATURE_BYTES[key.kind] or at_s > MAX_SIZE or longest > 255:
            return False
        signature, message = line.raw[8:], _cosigned(checkpoint, key, at_s)
    try:
        if key.kind == COSIGNER_MLDSA:
            MLDSA44PublicKey.from_public_bytes(key.public).verify(signature, message)
        else:
            Ed25519PublicKey.from_public_bytes(key.public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _cosigned(checkpoint: Checkpoint, witness: Verifier, at_s: int) -> bytes:
    """What a witness signs: with Ed25519 a header and the note, with ML-DSA-44 a structure that names the witness."""
    if witness.kind == COSIGNER:
        return f"cosignature/v1\ntime {at_s}\n".encode() + checkpoint.body
    name, origin = witness.name.encode(), checkpoint.origin.encode()
    head = b"subtree/v1\n\0" + bytes([len(name)]) + name + struct.pack(">Q", at_s) + bytes([len(origin)]) + origin
    return head + struct.pack(">QQ", 0, checkpoint.size) + checkpoint.root


def _line(signer: Verifier, signature: bytes) -> str:
    return f"\u2014 {signer.name} {_b64(signer.key_id + signature)}\n"


def _signature(line: str) -> Signature:
    found = _LINE.fullmatch(line)
    raw = _unbase64(found[2], "checkpoint.form") if found else b""
    if found is None or len(raw) < 5:
        raise _form("a line that is no signature")
    return Signature(found[1], raw[:4], raw[4:])


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _unbase64(text: str, id: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if _b64(raw) != text:
        raise MalformedError("not base64 in its one form", id=id, got=text[:80])
    return raw


def _form(got: str) -> MalformedError:
    return MalformedError("not a checkpoint", id="checkpoint.form", want="a C2SP signed checkpoint", got=got)
