"""A public transparency-log entry (Rekor v1 and v2) beside a signature by a long-lived key: was exactly this logged?

The `sigstore` library verifies the entries of certificates; it knows no keys, so theirs are verified here: the body
says this signature by this key over this digest, it is in the tree, a log of the trusted root signed the tree.
Not our own log: that is the package `log`. Spec: RFC 6962 section 2.1; C2SP tlog-checkpoint; Rekor entry kinds.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from pointcall_attest import canonical, exact_json
from pointcall_attest.errors import VerifyError
from pointcall_attest.log.tree import leaf_hash, verify_inclusion
from pointcall_attest.trusted_root import in_window, window

CHECK: Final = "bundle.log"
MAX_BODY_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Logged:
    """What an entry must say: signature, SPKI of the key, digest of what was signed, and of a DSSE payload."""

    signature: bytes
    spki: bytes
    signed_sha256: bytes  # of the file, or of the DSSE pre-authentication encoding
    payload_sha256: bytes | None = None


def verify_entry(
    entry: Mapping[str, Any], logged: Logged, root: Mapping[str, Any], stamped: Sequence[dt.datetime] = ()
) -> None:
    """VerifyError `bundle.log` unless a log of the trusted root contains exactly `logged`.

    A log counts that was within its window when it promised, if it did, and at every time in `stamped`, the times that
    timestamp authorities state. Raises whatever bad input raises (KeyError, ValueError, TypeError): the caller guards.
    """
    body = base64.b64decode(entry["canonicalizedBody"], validate=True)
    kind = entry["kindVersion"]
    _require(_says(body, f"{kind['kind']}/{kind['version']}", logged), "the log entry speaks of something else")
    in_log(entry, root, stamped)


def in_log(entry: Mapping[str, Any], root: Mapping[str, Any], stamped: Sequence[dt.datetime] = ()) -> None:
    """VerifyError `bundle.log` unless the entry's body is in the tree of a log of the trusted root; raises as above."""
    body = base64.b64decode(entry["canonicalizedBody"], validate=True)
    proof = entry["inclusionProof"]
    tree_root = base64.b64decode(proof["rootHash"], validate=True)
    path = [base64.b64decode(h, validate=True) for h in proof.get("hashes", [])]
    index, size = int(proof["logIndex"]), int(proof["treeSize"])
    _require(verify_inclusion(index, size, leaf_hash(body), path, tree_root), "the entry is not in the tree")
    promise, logs = entry.get("inclusionPromise"), _alive(root, stamped)
    if promise is not None:
        _require(_promised(entry, promise["signedEntryTimestamp"], logs), "the log's promise does not verify")
        logs = _alive(root, [*stamped, dt.datetime.fromtimestamp(int(entry["integratedTime"]), dt.UTC)])
    _require(_signed_tree(proof["checkpoint"]["envelope"], size, tree_root, logs), "no log of the root signed the tree")


def _alive(root: Mapping[str, Any], times: Sequence[dt.datetime]) -> list[Mapping[str, Any]]:
    """The logs of the root that have a window and were within it at all these times."""
    rows = [row for row in root.get("tlogs", []) if window(row)[0] is not None]
    return [row for row in rows if all(in_window(row, time) for time in times)]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise VerifyError(message, id=CHECK, want="this signature, in a log of the trusted root")


# What the body says: one function a kind


def _says(body: bytes, kind: str, logged: Logged) -> bool:
    value = exact_json.loads(body, id=CHECK, max_bytes=MAX_BODY_BYTES, what="the log entry")
    name, version = kind.split("/")
    if (value["kind"], value["apiVersion"]) != (name, version):
        return False
    spec = value["spec"]
    match kind:
        case "hashedrekord/0.0.1":
            return _hashedrekord_v1(spec, logged)
        case "hashedrekord/0.0.2":
            return _hashedrekord_v2(spec["hashedRekordV002"], logged)
        case "dsse/0.0.1":
            return _dsse(spec, logged)
        case "intoto/0.0.2":
            return _intoto(spec["content"], logged)
        case _:
            return False


def _hashedrekord_v1(spec: Mapping[str, Any], logged: Logged) -> bool:
    digest, signature = spec["data"]["hash"], spec["signature"]
    return (
        digest["algorithm"] == "sha256"
        and bytes.fromhex(digest["value"]) == logged.signed_sha256
        and _same(signature["content"], logged.signature)
        and _is_key(signature["publicKey"]["content"], logged.spki)
    )


def _hashedrekord_v2(spec: Mapping[str, Any], logged: Logged) -> bool:
    return (
        spec["data"]["algorithm"] == "SHA2_256"
        and _same(spec["data"]["digest"], logged.signed_sha256)
        and _same(spec["signature"]["content"], logged.signature)
        and _same(spec["signature"]["verifier"]["publicKey"]["rawBytes"], logged.spki)
    )


def _dsse(spec: Mapping[str, Any], logged: Logged) -> bool:
    (signature,) = spec["signatures"]
    return (
        _is_payload(spec["payloadHash"], logged)
        and _same(signature["signature"], logged.signature)
        and _is_key(signature["verifier"], logged.spki)
    )


def _intoto(content: Mapping[str, Any], logged: Logged) -> bool:
    (signature,) = content["envelope"]["signatures"]
    once = base64.b64decode(signature["sig"], validate=True).decode("ascii")  # this kind encodes the signature twice
    return (
        _is_payload(content["payloadHash"], logged)
        and _same(once, logged.signature)
        and _is_key(signature["publicKey"], logged.spki)
    )


def _is_payload(digest: Mapping[str, Any], logged: Logged) -> bool:
    return digest["algorithm"] == "sha256" and bytes.fromhex(digest["value"]) == logged.payload_sha256


def _same(text: str, data: bytes) -> bool:
    return base64.b64decode(text, validate=True) == data


def _is_key(text: str, spki: bytes) -> bool:
    key = load_pem_public_key(base64.b64decode(text, validate=True))
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == spki


# Who signed the tree


def _signed_tree(envelope: str, size: int, tree_root: bytes, logs: list[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint states this tree and one of the logs signed it; other signatures are witnesses' affair."""
    text, _, lines = envelope.partition("\n\n")
    stated = text.split("\n")
    if len(stated) < 3 or not stated[0] or stated[1] != str(size) or not _same(stated[2], tree_root):
        return False
    return any(_signed(text, line, row) for line in lines.split("\n") for row in logs)


def _signed(text: str, line: str, row: Mapping[str, Any]) -> bool:
    """Whether one signature line of a note is by the log of one row: named as the origin of the note is (Rekor v1 adds
    the number of the tree to that), with the start of the log's id as its hint."""
    parts, origin = line.split(" "), text.split("\n", 1)[0]
    if len(parts) != 3 or parts[0] != "—" or parts[1] not in (origin, origin.partition(" - ")[0]):
        return False
    raw = base64.b64decode(parts[2], validate=True)
    hint = base64.b64decode(row["logId"]["keyId"])[:4]
    return raw[:4] == hint and _verifies(row, raw[4:], f"{text}\n".encode())


def _promised(entry: Mapping[str, Any], promise: str, logs: list[Mapping[str, Any]]) -> bool:
    log_id = entry["logId"]["keyId"]
    stated = canonical.dumps(
        {
            "body": entry["canonicalizedBody"],
            "integratedTime": int(entry["integratedTime"]),
            "logID": base64.b64decode(log_id).hex(),
            "logIndex": int(entry["logIndex"]),
        }
    )
    rows = [row for row in logs if row["logId"]["keyId"] == log_id]
    return any(_verifies(row, base64.b64decode(promise, validate=True), stated) for row in rows)


def _verifies(row: Mapping[str, Any], signature: bytes, data: bytes) -> bool:
    key = load_der_public_key(base64.b64decode(row["publicKey"]["rawBytes"]))
    try:
        match key:
            case ec.EllipticCurvePublicKey():
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            case ed25519.Ed25519PublicKey():
                key.verify(signature, data)
            case _:
                return False
    except InvalidSignature:
        return False
    return True
