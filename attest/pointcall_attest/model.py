"""What the strict models of this room share: frozen, no unknown keys, no coercion, one way to fail. No I/O."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError

from pointcall_attest.errors import MalformedError

_INSTANT: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)


class Strict(BaseModel):
    """Base of every format here: a key that we do not know may mean something that we would not allow."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _read_instant(value: object) -> dt.datetime:
    if isinstance(value, dt.datetime) and value.utcoffset() == dt.timedelta(0):
        return value.replace(microsecond=0)
    if isinstance(value, str) and _INSTANT.fullmatch(value):
        return dt.datetime.fromisoformat(value)
    raise ValueError("an instant is written 2026-11-23T00:00:00Z")


def instant(at: dt.datetime) -> str:
    """RFC 3339 in UTC, whole seconds, `Z`: the one way that our formats write an instant."""
    return at.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


Instant = Annotated[dt.datetime, BeforeValidator(_read_instant), PlainSerializer(instant, return_type=str)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Measurement = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
# Each segment starts with a letter or digit, so none is `.`, `..`, hidden or empty.
FileName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$", max_length=200)
]
# Printable ASCII without space: identities are compared exactly, and look-alike characters must not exist in them.
Exact = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]+$", max_length=1024)]
Text = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$", max_length=1024)]
Version = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,4})(\.(0|[1-9][0-9]{0,4})){2}$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Digest(Strict):
    """The digest of an in-toto subject: SHA-256 in hex, and no other."""

    sha256: Sha256


class Subject(Strict):
    """One subject of an in-toto Statement v1: a file's name and its digest."""

    name: FileName
    digest: Digest


M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], raw: bytes, *, id: str, what: str) -> M:
    """The model of JSON that an exact reader accepted already, or MalformedError naming the first wrong field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise MalformedError(f"not {what}: {where}: {first['msg']}{more}"[:400], id=id) from None
