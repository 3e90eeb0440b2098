"""The in-toto Statement v1 around an entry or a receipt, and the scalar types that both use. Bytes <-> Statement.

One subject, one predicate, canonical JSON. Not here: manifests, which have many subjects (manifest.py), and
signatures (dsse.py). Spec: in-toto Statement v1, docs/spec/receipt.md section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
)

from pointcall_attest import canonical
from pointcall_attest.dsse import MAX_PAYLOAD_BYTES
from pointcall_attest.errors import MalformedError
from pointcall_attest.run_id import PATTERN as RUN_ID_PATTERN

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
MAX_TEXT: Final = 1024  # a name, a reason, a hint: the longest real one has 200 characters
_FROM_JSON: Final = {"from": "json"}
_MOMENT: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


def rfc3339(moment: datetime) -> str:
    """UTC with microseconds and Z: the one form of a time in an entry."""
    assert moment.tzinfo is not None, "a time without a zone"
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"  # strftime takes four times as long


def _moment(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or len(value) != 27:
        raise ValueError("a time is RFC 3339 in UTC with six digits and Z")
    return datetime.strptime(value, _MOMENT).replace(tzinfo=UTC)


def _int64(value: object, info: ValidationInfo) -> int:
    if type(value) is int and info.context is not _FROM_JSON:  # we build parts from numbers, JSON has strings
        number = value
    elif isinstance(value, str) and len(value) <= 20 and value.isascii() and str(int(value)) == value:
        number = int(value)
    else:
        raise ValueError("a 64-bit integer is a decimal string")
    if not -(2**63) <= number < 2**63:
        raise ValueError("the integer has more than 64 bits")
    return number


Int64 = Annotated[int, BeforeValidator(_int64), PlainSerializer(str)]
Moment = Annotated[datetime, BeforeValidator(_moment), PlainSerializer(rfc3339)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=canonical.MAX_INTEGER)]
RunId = Annotated[str, Field(pattern=f"^{RUN_ID_PATTERN}$")]
Detail = dict[Text, JsonValue]


class Part(BaseModel):
    """Base of every part of a predicate: strict, frozen, no unknown keys, tuples for lists."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


# JSON has no tuples: strict mode would refuse the list that the decoder made
def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Listed = BeforeValidator(_tuple)
_T = TypeVar("_T", bound=Part)


@dataclass(frozen=True, slots=True)
class Statement:
    """A well-formed statement with one subject."""

    predicate_type: str
    subject: str
    sha256: str  # what the subject digest claims
    predicate: dict[str, Any]


def encode(statement: Statement) -> bytes:
    """The payload to sign."""
    return canonical.dumps(
        {
            "_type": STATEMENT_TYPE,
            "predicate": statement.predicate,
            "predicateType": statement.predicate_type,
            "subject": [{"digest": {"sha256": statement.sha256}, "name": statement.subject}],
        }
    )


def around(predicate: bytes, predicate_type: str, subject: str, sha256: str) -> bytes:
    """The same around a predicate that is canonical JSON already, with a type and a subject that need no escapes: an
    action waits for it."""
    return b'{"_type":"%s","predicate":%s,"predicateType":"%s","subject":[{"digest":{"sha256":"%s"},"name":"%s"}]}' % (
        STATEMENT_TYPE.encode(),
        predicate,
        predicate_type.encode(),
        sha256.encode(),
        subject.encode(),
    )


class _Digest(Part):
    sha256: Sha256


class _Subject(Part):
    name: Text
    digest: _Digest


class _Form(Part):
    type_: Annotated[str, Field(alias="_type")]
    predicateType: Text  # noqa: N815  in-toto's own spelling
    subject: Annotated[tuple[_Subject], Listed]
    predicate: dict[str, Any]


def parse(payload: bytes) -> Statement:
    """MalformedError `json.*` or `statement.form` unless this is one canonical statement with one subject."""
    form = checked(_Form, canonical.loads(payload, max_bytes=MAX_PAYLOAD_BYTES, what="the statement"), "statement.form")
    if form.type_ != STATEMENT_TYPE:
        raise MalformedError("not an in-toto statement", id="statement.form", want=STATEMENT_TYPE, got=form.type_[:80])
    (subject,) = form.subject
    return Statement(form.predicateType, subject.name, subject.digest.sha256, form.predicate)


def checked(model: type[_T], value: object, id: str) -> _T:
    """`value` as this part. MalformedError `id` that names the first field that does not fit."""
    try:
        return model.model_validate(value, context=_FROM_JSON)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise MalformedError(
            f"{model.__name__.strip('_')} does not have its form",
            id=id,
            want=first["msg"][:120],
            got=f"field {where!r}",
        ) from None
