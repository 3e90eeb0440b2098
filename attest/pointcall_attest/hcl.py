"""Azure HCL report: what a paravisor stores in the vTPM. bytes <-> HclReport. No I/O, no policy, no crypto but hashes.

It wraps an SNP report (or a TDREPORT) and a JSON of runtime data; REPORT_DATA[0:32] is the hash of that JSON, which
holds the vTPM's attestation key. Spec: docs/spec/snp.md, section HCL; Azure confidential VM guest attestation design.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

from pointcall_attest import snp, tdreport
from pointcall_attest.errors import MalformedError

MAX_HCL_BYTES: Final = 64 * 1024  # the vTPM index has 2600
MAX_BRACKETS: Final = 128  # of the runtime data: real ones have 9
_HEADER: Final = struct.Struct("<4sIIII12s")  # HCLA, version, size, request type, status, reserved
_REPORT_AT: Final = 32
_DATA_AT: Final = 1216
_DATA: Final = struct.Struct("<IIIII")  # size, version, report type, hash type, size of the JSON
_HASHES: Final[Mapping[int, Callable[[bytes], Any]]] = {1: hashlib.sha256, 2: hashlib.sha384, 3: hashlib.sha512}
_PLATFORMS: Final[Mapping[int, Literal["snp", "tdx"]]] = {2: "snp", 4: "tdx"}


@dataclass(frozen=True, slots=True)
class HclReport:
    """One HCL report, well-formed and nothing more. `report` is an SNP report or a TDREPORT."""

    platform: Literal["snp", "tdx"]
    report: bytes = field(repr=False)
    report_data: bytes
    runtime_data: bytes = field(repr=False)  # the JSON, byte for byte
    runtime: Mapping[str, Any] = field(hash=False)  # what it says
    runtime_hash: bytes

    @property
    def binds(self) -> bool:
        """REPORT_DATA is the hash of the runtime data, filled up with zeros."""
        return self.report_data == self.runtime_hash.ljust(64, b"\0")


def parse(raw: bytes) -> HclReport:
    """The HCL report in these bytes; MalformedError `hcl.malformed` or that of the report inside."""
    if not _DATA_AT + _DATA.size <= len(raw) <= MAX_HCL_BYTES:
        raise _refused(f"{len(raw)} bytes")
    magic, version, total, request, status, reserved = _HEADER.unpack_from(raw)
    if (magic, request, status) != (b"HCLA", 2, 0) or version not in (1, 2) or any(reserved):
        raise _refused("its header is not one that we know")
    size, data_version, kind, hash_type, json_size = _DATA.unpack_from(raw, _DATA_AT)
    end = _DATA_AT + _DATA.size + json_size
    if data_version != 1 or size != _DATA.size + json_size or end > len(raw) or total != end or any(raw[end:]):
        raise _refused("its sizes disagree, or something follows")
    if kind not in _PLATFORMS or hash_type not in _HASHES:
        raise _refused(f"report type {kind}, hash type {hash_type}")
    runtime_data = raw[end - json_size : end]
    rows = _json(runtime_data)
    platform = _PLATFORMS[kind]
    report, report_data = _inner(platform, raw[_REPORT_AT:_DATA_AT])
    return HclReport(platform, report, report_data, runtime_data, rows, _HASHES[hash_type](runtime_data).digest())


def _inner(platform: Literal["snp", "tdx"], area: bytes) -> tuple[bytes, bytes]:
    if platform == "snp":
        return area, snp.parse(area).report_data
    report = area[: tdreport.SIZE]
    if any(area[tdreport.SIZE :]):
        raise _refused("something follows the TDREPORT")
    return report, tdreport.parse(report).report_data


def _json(raw: bytes) -> dict[str, Any]:
    """The runtime data, read in one way only: no key twice, no number that JSON does not have, bounded depth."""
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise _refused("its runtime data is nested too deeply")
    try:
        rows = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except ValueError:
        rows = None
    if not isinstance(rows, dict) or "keys" not in rows:
        raise _refused("its runtime data is not a JSON object with keys")
    return rows


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _refused(why: str) -> MalformedError:
    return MalformedError("not an Azure HCL report", id="hcl.malformed", got=why)
