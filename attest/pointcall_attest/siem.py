"""Entries as other systems read them: OCSF events, OpenTelemetry log records, Sigstore bundles. Pure; one way only.

Every exported row keeps origin, index and leaf hash, so that a copy stays checkable against the log: `check_copy` finds
rows that are missing, changed or made up. Rows say what leaves say: what is personal is not exported, since nobody
could erase it there, unless the caller asks for it (`clear`). Not here: shipping.
Spec: OCSF 1.3 class 7001, OTLP logs 1.0 (JSON), Sigstore
bundle v0.3; docs/spec/siem.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives import serialization

from pointcall_attest import dsse
from pointcall_attest.entry import Entry
from pointcall_attest.receipt import Acted, Receipt

OCSF_VERSION: Final = "1.3.0"
_CATEGORY, _CLASS = 7, 7001  # remediation, remediation activity
_ISOLATE, _EVICT, _RESTORE, _OTHER = 1, 2, 3, 99
_ACTIVITY: Final[Mapping[str, int]] = {
    "open_circuit": _ISOLATE,
    "isolate": _ISOLATE,
    "freeze": _ISOLATE,
    "kill": _EVICT,
    "kill_connections": _EVICT,
    "recreate": _RESTORE,
    "close_circuit": _RESTORE,
    "thaw": _RESTORE,
}
_NAMES: Final = {_ISOLATE: "Isolate", _EVICT: "Evict", _RESTORE: "Restore"}
# OCSF status: 1 success, 2 failure, 4 partial, 99 other
_STATUS: Final = {"applied": 1, "failed": 2, "refused": 99, "unconfirmed": 4, "monitored": 99}
_SEVERITY: Final = {"refusal": 13, "lost": 13, "epoch-close": 9}  # OTel numbers: 9 info, 13 warning
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def place(entry: Entry, origin: str) -> dict[str, Any]:
    """Where a row comes from; every export carries it."""
    return {"origin": origin, "index": entry.index, "leaf_hash": entry.leaf_hash.hex()}


def ocsf(entry: Entry, origin: str, *, clear: bool = False) -> Iterator[dict[str, Any]]:
    """One OCSF Remediation Activity for every action of a run; nothing for other entries."""
    if entry.kind == "receipt":
        receipt = (entry if clear else entry.without_opening()).receipt()
        for action in receipt.actions:
            yield _activity(entry, receipt, action, origin)


def _activity(entry: Entry, receipt: Receipt, action: Acted, origin: str) -> dict[str, Any]:
    activity = _ACTIVITY.get(action.action, _OTHER)
    return {
        "activity_id": activity,
        "activity_name": _NAMES.get(activity, action.action),
        "category_uid": _CATEGORY,
        "class_uid": _CLASS,
        "type_uid": _CLASS * 100 + activity,
        "command_uid": f"{receipt.run.id}/{action.index}",
        "time": _nanoseconds(receipt.time.started) // 1_000_000,
        "severity_id": 1,
        "status_id": _STATUS[action.outcome],
        "status": action.outcome,
        "message": f"{receipt.runbook.name}: {receipt.trigger.event} -> {action.action} {action.target}",
        "metadata": {
            "version": OCSF_VERSION,
            "uid": entry.leaf_hash.hex(),
            "product": {"name": "Pointcall", "vendor_name": "Pointcall"},
        },
        "device": {"type_id": 0, "hostname": receipt.run.node},
        "unmapped": place(entry, origin) | {"run": receipt.run.id, "tier": receipt.attestation.tier},
    }


def otel(entry: Entry, origin: str, *, clear: bool = False) -> dict[str, Any]:
    """One OTLP log record (JSON form) for an entry of any kind; its body is the leaf's (or the whole)."""
    attributes = {f"pointcall.{k}": v for k, v in place(entry, origin).items()} | {
        "event.name": f"pointcall.{entry.kind}"
    }
    if entry.run is not None:
        attributes["pointcall.run"] = entry.run
    return {
        "timeUnixNano": str(_nanoseconds(entry.at)),
        "severityNumber": _SEVERITY.get(entry.kind, 9),
        "body": {
            "stringValue": json.dumps(dict(entry.body if clear else entry.leaf), ensure_ascii=False, sort_keys=True)
        },
        "attributes": [{"key": key, "value": _any_value(value)} for key, value in attributes.items()],
    }


def sigstore_bundle(raw: bytes) -> bytes:
    """An entry as a Sigstore bundle v0.3 with a bare key: for `cosign` and sigstore-js, with the epoch's key as PEM."""
    envelope = dsse.parse(raw)
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "publicKey": {"hint": envelope.keyid},
                "tlogEntries": [],
                "timestampVerificationData": {},
            },
            "dsseEnvelope": json.loads(raw),
        }
    ).encode()


def epoch_pem(public_key: str) -> bytes:
    """The key of an epoch-open entry as PEM. MalformedError `dsse.key`."""
    key = dsse.public_key(base64.b64decode(public_key))
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def place_of(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """Origin, index and leaf hash of an exported row of either form. ValueError if it has none."""
    found = row.get("unmapped")
    if not isinstance(found, dict):
        pairs = {a["key"]: a["value"] for a in row.get("attributes", ())}
        found = {
            "origin": pairs.get("pointcall.origin", {}).get("stringValue"),
            "index": int(pairs.get("pointcall.index", {}).get("intValue", -1)),
            "leaf_hash": pairs.get("pointcall.leaf_hash", {}).get("stringValue"),
        }
    origin, index, leaf = found.get("origin"), found.get("index"), found.get("leaf_hash")
    if not isinstance(origin, str) or type(index) is not int or index < 0 or not isinstance(leaf, str):
        raise ValueError("the row does not say where it comes from")
    return origin, index, leaf


def check_copy(
    rows: Iterable[Mapping[str, Any]], origin: str, expected: Iterable[tuple[int, str, Mapping[str, Any]]]
) -> Iterator[str]:
    """What is wrong with a copy. `expected` are (index, leaf hash, row) as the log would export them now, in order."""
    wanted = {(index, json.dumps(row, sort_keys=True)): leaf for index, leaf, row in expected}
    for number, row in enumerate(rows, 1):
        try:
            where, index, leaf = place_of(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"row {number}: {error}"
            continue
        if where != origin or wanted.pop((index, json.dumps(row, sort_keys=True)), None) != leaf:
            yield f"row {number}: not entry {index} of {origin}, or there twice"
    yield from (f"entry {index} is missing" for index, _ in wanted)


def _any_value(value: str | int) -> dict[str, str]:
    return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}


def _nanoseconds(moment: datetime) -> int:
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000


class Export(Protocol):
    """Rows of one entry in one format."""

    def __call__(self, entry: Entry, origin: str, *, clear: bool = False) -> Iterable[dict[str, Any]]: ...


def _one_record(entry: Entry, origin: str, *, clear: bool = False) -> Iterable[dict[str, Any]]:
    return [otel(entry, origin, clear=clear)]


FORMATS: Final[Mapping[str, Export]] = {"ocsf": ocsf, "otel": _one_record}
