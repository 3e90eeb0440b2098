"""The evidence bundle: one file with all that an offline verification needs. bytes <-> EvidenceBundle. No I/O.

Nothing in a bundle is trusted; the roots are not in it. One form: parse() refuses bytes that encode() would not write,
so the SHA-256 of a bundle names its content. Spec: docs/spec/evidence.md.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pointcall_attest.errors import MalformedError
from pointcall_attest.tee_policy import Platform

FORMAT: Final = "pointcall-evidence/v1"
MAX_BUNDLE_BYTES: Final = 2 * 1024 * 1024  # an event log of 256 KiB and collateral of 100 KiB fit ten times
MAX_EVIDENCE_BYTES: Final = 64 * 1024  # the largest quote seen has 8 KiB
MAX_CERTIFICATES: Final = 16


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["pointcall-evidence/v1"]
    platform: Platform
    evidence: str
    certificates: Annotated[list[str], Field(max_length=MAX_CERTIFICATES)]
    crls: Annotated[list[str], Field(max_length=MAX_CERTIFICATES)]
    collateral: dict[str, str] | None
    event_log: str | None


@dataclass(frozen=True, slots=True)
class EvidenceBundle:
    """Evidence of one platform with certificates (DER), CRLs (DER), Intel collateral and event log where they exist."""

    platform: Platform
    evidence: bytes
    certificates: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()
    collateral: Mapping[str, str] | None = field(default=None, hash=False)
    event_log: bytes | None = None

    @classmethod
    def parse(cls, raw: bytes) -> EvidenceBundle:
        """The bundle in exactly these bytes; MalformedError `evidence.malformed` for anything else."""
        if len(raw) > MAX_BUNDLE_BYTES:
            raise _refused("too long", f"<= {MAX_BUNDLE_BYTES} bytes", f"{len(raw)} bytes")
        try:
            file = _File.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise _refused(
                first["msg"], "the keys of docs/spec/evidence.md", ".".join(map(str, first["loc"]))
            ) from None
        bundle = cls(
            file.platform,
            _decoded(file.evidence),
            tuple(map(_decoded, file.certificates)),
            tuple(map(_decoded, file.crls)),
            file.collateral,
            None if file.event_log is None else _decoded(file.event_log),
        )
        if len(bundle.evidence) > MAX_EVIDENCE_BYTES or bundle.encode() != raw:
            raise _refused("not in its one canonical form", "RFC 8785", "another encoding or evidence too long")
        return bundle

    def encode(self) -> bytes:
        """Canonical JSON (RFC 8785)."""
        rows: dict[str, Any] = {
            "format": FORMAT,
            "platform": self.platform,
            "evidence": _encoded(self.evidence),
            "certificates": [_encoded(der) for der in self.certificates],
            "crls": [_encoded(der) for der in self.crls],
            "collateral": None if self.collateral is None else dict(self.collateral),
            "event_log": None if self.event_log is None else _encoded(self.event_log),
        }
        return rfc8785.dumps(rows)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the encoded bundle: what receipts and epoch-open entries name."""
        return hashlib.sha256(self.encode()).hexdigest()


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise _refused("a value is not base64", "base64", text[:16]) from None


def _refused(why: str, want: str, got: str) -> MalformedError:
    return MalformedError(f"not an evidence bundle: {why}", id="evidence.malformed", want=want, got=got)
