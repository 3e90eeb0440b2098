"""The transparency logs (as Rekor v2 and v1): an append-only file, an RFC 6962 tree over it, signed checkpoints.

Nobody witnesses it and nobody monitors it: a lab, not a log to rely on.
Spec: RFC 6962 section 2.1, C2SP tlog-checkpoint, Rekor `hashedrekord` 0.0.1 and 0.0.2, `dsse` 0.0.1.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import threading
from pathlib import Path
from typing import Any, Final

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_keys.private_sigstore.certificate import sha256, spki

PREHASHED: Final = ec.ECDSA(Prehashed(hashes.SHA256()))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


class LogFile:
    """The entries of one log, one base64 line each, durable before a proof is given out."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self._path = path
        self._lock = threading.Lock()
        self._tree = Tree(leaf_hash(unb64(line)) for line in path.read_text().split())

    def append(self, entry: bytes) -> tuple[int, int, bytes, list[bytes]]:
        """(index, tree size, root hash, audit path) of the entry, now stored."""
        with self._lock:
            with self._path.open("a") as file:
                file.write(b64(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._tree.add(leaf_hash(entry))
            size = self._tree.size
            return size - 1, size, self._tree.root(), self._tree.inclusion(size - 1)


def _note(text: str, signer: str, key_id: bytes, signature: bytes) -> str:
    return f"{text}\n— {signer} {b64(key_id[:4] + signature)}\n"


class LogV2:
    """Rekor v2: Ed25519 checkpoints; the time comes from the timestamp authority."""

    def __init__(self, path: Path, key: ed25519.Ed25519PrivateKey, origin: str) -> None:
        self.key, self._origin, self._file = key, origin, LogFile(path)
        raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.id = sha256(origin.encode() + b"\n\x01" + raw)  # signed-note key id; algorithm byte 1 is Ed25519

    def add(self, request: dict[str, Any]) -> dict[str, Any]:
        """The TransparencyLogEntry for a hashedRekordRequestV002 whose signature fits. InvalidSignature otherwise."""
        asked = request["hashedRekordRequestV002"]
        verifier = asked["signature"]["verifier"]
        certificate = x509.load_der_x509_certificate(unb64(verifier["x509Certificate"]["rawBytes"]))
        _verify(certificate, asked["signature"]["content"], unb64(asked["digest"]), PREHASHED)
        body = rfc8785.dumps(
            {
                "apiVersion": "0.0.2",
                "kind": "hashedrekord",
                "spec": {
                    "hashedRekordV002": {
                        "data": {"algorithm": "SHA2_256", "digest": asked["digest"]},
                        "signature": {
                            "content": asked["signature"]["content"],
                            "verifier": {
                                "keyDetails": verifier["keyDetails"],
                                "x509Certificate": {"rawBytes": verifier["x509Certificate"]["rawBytes"]},
                            },
                        },
                    }
                },
            }
        )
        index, size, root, path = self._file.append(body)
        return {
            "logIndex": str(index),
            "logId": {"keyId": b64(self.id)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "inclusionProof": {
                "logIndex": str(index),
                "rootHash": b64(root),
                "treeSize": str(size),
                "hashes": [b64(h) for h in path],
                "checkpoint": {"envelope": self._checkpoint(size, root)},
            },
            "canonicalizedBody": b64(body),
        }

    def _checkpoint(self, size: int, root: bytes) -> str:
        text = f"{self._origin}\n{size}\n{b64(root)}\n"
        return _note(text, self._origin, self.id, self.key.sign(text.encode()))


class LogV1:
    """Rekor v1: ECDSA, and a signed entry timestamp, which states the time itself."""

    def __init__(self, path: Path, key: ec.EllipticCurvePrivateKey, origin: str) -> None:
        self.key, self._origin, self._file = key, origin, LogFile(path)
        self.id = sha256(spki(key))

    def add(self, request: dict[str, Any], now: dt.datetime) -> dict[str, Any]:
        """The response of /api/v1/log/entries for a `hashedrekord` or `dsse` entry whose signature fits."""
        entry: dict[str, Any] = _hashedrekord(request) if request["kind"] == "hashedrekord" else _dsse(request)
        body = rfc8785.dumps(entry)
        index, size, root, path = self._file.append(body)
        stated: dict[str, Any] = {
            "body": b64(body),
            "integratedTime": int(now.timestamp()),
            "logID": self.id.hex(),
            "logIndex": index,
        }
        promise = self.key.sign(rfc8785.dumps(stated), ec.ECDSA(hashes.SHA256()))
        proof = {
            "logIndex": index,
            "treeSize": size,
            "rootHash": root.hex(),
            "hashes": [h.hex() for h in path],
            "checkpoint": self._checkpoint(size, root),
        }
        verification = {"signedEntryTimestamp": b64(promise), "inclusionProof": proof}
        return {leaf_hash(body).hex(): stated | {"verification": verification}}

    def _checkpoint(self, size: int, root: bytes) -> str:
        text = f"{self._origin} - 1\n{size}\n{b64(root)}\n"
        return _note(text, self._origin, self.id, self.key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))


def _verify(certificate: x509.Certificate, signature: str, data: bytes, algorithm: ec.ECDSA) -> None:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("only ECDSA certificates")  # noqa: TRY004 - the certificate is input, not a programming mistake
    key.verify(unb64(signature), data, algorithm)


def _hashedrekord(request: dict[str, Any]) -> dict[str, Any]:
    spec = request["spec"]
    signature, public = spec["signature"]["content"], spec["signature"]["publicKey"]["content"]
    value = spec["data"]["hash"]["value"]
    _verify(x509.load_pem_x509_certificate(unb64(public)), signature, bytes.fromhex(value), PREHASHED)
    return {
        "apiVersion": "0.0.1",
        "kind": "hashedrekord",
        "spec": {
            "data": {"hash": {"algorithm": "sha256", "value": value}},
            "signature": {"content": signature, "publicKey": {"content": public}},
        },
    }


def _dsse(request: dict[str, Any]) -> dict[str, Any]:
    proposed = request["spec"]["proposedContent"]
    envelope = json.loads(proposed["envelope"])
    payload, kind = unb64(envelope["payload"]), envelope["payloadType"]
    (verifier,) = proposed["verifiers"]
    pae = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    for signature in envelope["signatures"]:
        _verify(x509.load_pem_x509_certificate(unb64(verifier)), signature["sig"], pae, ec.ECDSA(hashes.SHA256()))
    return {
        "apiVersion": "0.0.1",
        "kind": "dsse",
        "spec": {
            "envelopeHash": {"algorithm": "sha256", "value": sha256(proposed["envelope"].encode()).hex()},
            "payloadHash": {"algorithm": "sha256", "value": sha256(payload).hex()},
            "signatures": [{"signature": s["sig"], "verifier": verifier} for s in envelope["signatures"]],
        },
    }
