"""Intel collateral: what a TDX quote is judged by. JSON <-> Collateral -> TcbInfo and QeIdentity. No I/O, no trust.

One JSON object carries nine texts (docs/spec/tdx.md, Collateral). The signatures of TCB info and QE identity cover the
exact bytes of their texts: those bytes are kept, verified first, and parsed only then.
Spec: Intel PCS API v4, TCB info V3 and enclave identity V2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from pointcall_attest import pem
from pointcall_attest.errors import MalformedError
from pointcall_attest.tee_policy import TcbStatus

MAX_COLLATERAL_BYTES: Final = 512 * 1024  # the largest real one has 22 KiB; CRLs of large fleets grow
MAX_LEVELS: Final = 256  # Intel publishes some twenty
STATUSES: Final[frozenset[str]] = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "Revoked",
    }
)
_TEXTS: Final = (
    "tcb_info",
    "tcb_info_signature",
    "tcb_info_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
    "qe_identity_issuer_chain",
    "root_ca_crl",
    "pck_crl",
)
_UNUSED: Final = ("pck_crl_issuer_chain", "pck_certificate_chain")  # the quote brings that chain


@dataclass(frozen=True, slots=True)
class Collateral:
    """The parts, decoded, nothing about them proven."""

    tcb_info: bytes = field(repr=False)
    tcb_info_signature: bytes = field(repr=False)
    tcb_info_chain: tuple[bytes, ...] = field(repr=False)
    qe_identity: bytes = field(repr=False)
    qe_identity_signature: bytes = field(repr=False)
    qe_identity_chain: tuple[bytes, ...] = field(repr=False)
    root_crl: bytes = field(repr=False)
    pck_crl: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Level:
    """One row of a TCB table. `sgx`, `pcesvn` and `tdx` are empty or 0 in tables of a module or enclave."""

    status: TcbStatus
    date: datetime
    advisories: tuple[str, ...]
    isvsvn: int = 0
    sgx: bytes = b""
    pcesvn: int = 0
    tdx: bytes = b""


@dataclass(frozen=True, slots=True)
class Module:
    """What a TDX module must be, and its table. `id` is TDX_01 and so on; empty for the first module."""

    id: str
    mrsigner: bytes
    attributes: bytes
    mask: bytes
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class TcbInfo:
    """Signed by Intel: the TCB table of one platform family, newest level first."""

    issued: datetime
    next_update: datetime
    fmspc: bytes
    pceid: bytes
    evaluation_number: int
    module: Module | None
    modules: tuple[Module, ...]
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class QeIdentity:
    """Signed by Intel: what the quoting enclave must be, and its table, newest level first."""

    issued: datetime
    next_update: datetime
    evaluation_number: int
    misc_select: bytes
    misc_mask: bytes
    attributes: bytes
    attributes_mask: bytes
    mrsigner: bytes
    isv_prod_id: int
    levels: tuple[Level, ...]


def parse_json(raw: bytes) -> dict[str, str]:
    """The nine texts of a collateral file; MalformedError `collateral.malformed` for anything else."""
    if len(raw) > MAX_COLLATERAL_BYTES:
        raise _refused(f"longer than {MAX_COLLATERAL_BYTES} bytes")
    try:
        rows = json.loads(raw)
    except (ValueError, RecursionError):
        raise _refused("not JSON") from None
    if not isinstance(rows, dict) or not all(isinstance(value, str) or value is None for value in rows.values()):
        raise _refused("not an object of texts")
    return {key: value for key, value in rows.items() if value is not None}


def parse(texts: Mapping[str, str]) -> Collateral:
    """The parts of these texts; MalformedError `collateral.malformed` where one is missing, unknown or undecodable."""
    missing, unknown = set(_TEXTS) - set(texts), set(texts) - set(_TEXTS) - set(_UNUSED)
    if missing or unknown:
        raise _refused(f"missing {sorted(missing)}, unknown {sorted(unknown)}")
    return _parsed(*(texts[name] for name in _TEXTS))


@lru_cache(maxsize=16)
def _parsed(
    tcb: str, tcb_signature: str, tcb_chain: str, qe: str, qe_signature: str, qe_chain: str, root_crl: str, pck_crl: str
) -> Collateral:
    return Collateral(
        _text(tcb),
        _hex(tcb_signature),
        tuple(pem.certificates(_text(tcb_chain))),
        _text(qe),
        _hex(qe_signature),
        tuple(pem.certificates(_text(qe_chain))),
        _hex(root_crl),
        _hex(pck_crl),
    )


def _text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _refused("a text is not Unicode") from None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise _refused("a value is not hex") from None


@lru_cache(maxsize=16)
def parse_tcb_info(raw: bytes) -> TcbInfo:
    """TCB info V3 for TDX, after its signature was verified; MalformedError `collateral.malformed` otherwise."""
    rows = _object(raw)
    try:
        if (rows["id"], rows["version"], rows["tcbType"]) != ("TDX", 3, 0):
            raise _refused(f"TCB info {rows['id']} version {rows['version']} type {rows['tcbType']}")
        module = _module(rows["tdxModule"]) if "tdxModule" in rows else None
        return TcbInfo(
            _time(rows["issueDate"]),
            _time(rows["nextUpdate"]),
            _bytes(rows["fmspc"], 6),
            _bytes(rows["pceId"], 2),
            _int(rows["tcbEvaluationDataNumber"], 0xFFFF_FFFF),
            module,
            tuple(map(_module, _list(rows.get("tdxModuleIdentities", [])))),
            tuple(sorted(map(_platform_level, _list(rows["tcbLevels"])), key=_order, reverse=True)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _refused(f"TCB info: {error!r}") from None


@lru_cache(maxsize=16)
def parse_qe_identity(raw: bytes) -> QeIdentity:
    """Enclave identity V2 of the TD quoting enclave, after its signature was verified; MalformedError otherwise."""
    rows = _object(raw)
    try:
        if (rows["id"], rows["version"]) != ("TD_QE", 2):
            raise _refused(f"enclave identity {rows['id']} version {rows['version']}")
        return QeIdentity(
            _time(rows["issueDate"]),
            _time(rows["nextUpdate"]),
            _int(rows["tcbEvaluationDataNumber"], 0xFFFF_FFFF),
            _bytes(rows["miscselect"], 4),
            _bytes(rows["miscselectMask"], 4),
            _bytes(rows["attributes"], 16),
            _bytes(rows["attributesMask"], 16),
            _bytes(rows["mrsigner"], 32),
            _int(rows["isvprodid"], 0xFFFF),
            _svn_levels(rows["tcbLevels"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _refused(f"QE identity: {error!r}") from None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        rows = json.loads(raw)
    except (ValueError, RecursionError):
        raise _refused("not JSON") from None
    if not isinstance(rows, dict):
        raise _refused("not an object")
    return rows


def _module(rows: dict[str, Any]) -> Module:
    return Module(
        str(rows.get("id", "")).upper(),
        _bytes(rows["mrsigner"], 48),
        _bytes(rows["attributes"], 8),
        _bytes(rows["attributesMask"], 8),
        _svn_levels(rows.get("tcbLevels", [])),
    )


def _svn_levels(rows: Any) -> tuple[Level, ...]:
    """Levels by one security version, the highest first."""
    found = [Level(*_common(row), isvsvn=_int(row["tcb"]["isvsvn"], 0xFFFF)) for row in _list(rows)]
    return tuple(sorted(found, key=lambda level: level.isvsvn, reverse=True))


def _platform_level(row: dict[str, Any]) -> Level:
    tcb = row["tcb"]
    sgx, tdx = (_components(tcb[name]) for name in ("sgxtcbcomponents", "tdxtcbcomponents"))
    return Level(*_common(row), sgx=sgx, pcesvn=_int(tcb["pcesvn"], 0xFFFF), tdx=tdx)


def _order(level: Level) -> tuple[bytes, int, bytes]:
    return level.sgx, level.pcesvn, level.tdx


def _common(row: dict[str, Any]) -> tuple[TcbStatus, datetime, tuple[str, ...]]:
    status = row["tcbStatus"]
    if status not in STATUSES:
        raise _refused(f"an unknown TCB status: {status}")
    return status, _time(row["tcbDate"]), tuple(map(str, _list(row.get("advisoryIDs", []))))


def _components(rows: Any) -> bytes:
    found = [row["svn"] for row in _list(rows)]
    if len(found) != 16 or set(map(type, found)) != {int} or not 0 <= min(found) <= max(found) <= 0xFF:
        raise _refused("not 16 TCB components from 0 to 255")
    return bytes(found)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_LEVELS:
        raise _refused("not a list of bounded length")
    return value


def _int(value: Any, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise _refused(f"not a number from 0 to {largest}")
    return value


def _bytes(value: Any, size: int) -> bytes:
    raw = _hex(value)
    if len(raw) != size:
        raise _refused(f"not {size} bytes in hex")
    return raw


def _time(value: str) -> datetime:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        at = None
    if at is None or at.tzinfo is not UTC or len(value) != len("2026-01-01T00:00:00Z"):
        raise _refused("not a time in UTC")
    return at


def _refused(why: str) -> MalformedError:
    return MalformedError("not Intel collateral", id="collateral.malformed", got=why)
