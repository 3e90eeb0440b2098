"""Signed notices about manifests: which one is the newest (pointer), and which must never be armed again (revocation).

They are signed like a manifest, by the same trust policy. A pointer expires soon, so a host that withholds updates is
found out; a revocation can only remove. Neither can arm anything.

  verify_notices   whatever bundles lie in a node's notices folder -> Notices, which `check_manifest` takes

Spec: docs/spec/notice.md; in-toto Statement v1.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import Annotated, Final, Generic, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, model_validator

from pointcall_attest import canonical
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.manifest import STATEMENT_TYPE
from pointcall_attest.manifest import Sequence as SequenceNumber
from pointcall_attest.model import Instant, Name, Sha256, Strict, Subject, Text, validated
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import (
    CLOCK_SKEW,
    UNANSWERED,
    SignedStatement,
    unverified_payload,
    verify_bundles,
    verify_each,
)

POINTER_TYPE: Final = "https://pointcall.dev/pointer/v1"
REVOCATION_TYPE: Final = "https://pointcall.dev/revocation/v1"
MAX_NOTICE_BYTES: Final = 128 * 1024
MAX_NOTICES: Final = 32  # a pointer for each series and ring of a node, and a few revocations
OciDigest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class PointerBody(Strict):
    """For the nodes of one ring, until `expires`, this is the newest manifest of the series."""

    format: Literal["pointcall-pointer/v1"] = "pointcall-pointer/v1"
    name: Name
    ring: Name
    sequence: SequenceNumber
    manifest: Sha256  # of the payload
    artifact: OciDigest | None = None  # where it travels as an OCI artifact
    issued: Instant
    expires: Instant

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        if self.issued >= self.expires:
            raise ValueError("issued must be earlier than expires")
        return self

    @property
    def about(self) -> tuple[str, ...]:
        """The digests that the statement lists as its subjects."""
        return (self.manifest,)


class RevocationBody(Strict):
    """These manifests and files must never be armed again, from now on and without an end."""

    format: Literal["pointcall-revocation/v1"] = "pointcall-revocation/v1"
    name: Name
    issued: Instant
    reason: Text
    revoked: Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=512)]

    @property
    def about(self) -> tuple[str, ...]:
        """The digests that the statement lists as its subjects."""
        return self.revoked


B = TypeVar("B", PointerBody, RevocationBody)


class _Statement(Strict, Generic[B]):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=512)]
    predicateType: str  # noqa: N815 - the name in the in-toto format
    predicate: B


_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Notice(Generic[B]):
    """A notice that enough signers of the policy have signed. Made by `verify_pointer` and `verify_revocation` only."""

    body: B
    sha256: str
    signed: SignedStatement
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        assert seal is _SEAL, "a Notice is made by verifying one"


Pointer = Notice[PointerBody]
Revocation = Notice[RevocationBody]


@dataclass(frozen=True, slots=True)
class Notices:
    """What reached a node, verified. `wrong` names what did not verify: admission refuses while there is any."""

    pointers: tuple[Pointer, ...] = ()
    revocations: tuple[Revocation, ...] = ()
    wrong: tuple[str, ...] = ()
    unanswered: bool = False  # the verifier ended without an answer, so they are `wrong`: for now

    @property
    def revoked(self) -> frozenset[str]:
        """Digests (SHA-256, hex) of manifests and files that must never be armed again."""
        return frozenset(digest for notice in self.revocations for digest in notice.body.revoked)

    def newest(self, name: str, ring: str | None, at: dt.datetime) -> Pointer | None:
        """The pointer of this series and ring that counts: of those that hold at a time, the one with the highest
        sequence; where none holds, the one that held last. None where there is none at all."""
        own = [p for p in self.pointers if p.body.name == name and ring in (None, p.body.ring)]
        now = [p for p in own if holds(p, at)]
        return max(now or own, key=lambda p: (p.body.sequence, p.body.issued, p.sha256), default=None)


def holds(pointer: Pointer, at: dt.datetime) -> bool:
    """Whether a pointer says anything about a time."""
    return pointer.body.issued - CLOCK_SKEW <= at < pointer.body.expires


def notice_statement(body: PointerBody | RevocationBody) -> bytes:
    """The canonical statement to sign."""
    kind = POINTER_TYPE if isinstance(body, PointerBody) else REVOCATION_TYPE
    subjects = [{"name": f"notice/{n}", "digest": {"sha256": digest}} for n, digest in enumerate(body.about)]
    predicate = body.model_dump(mode="json")
    return canonical.dumps(
        {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": kind, "predicate": predicate}
    )


def verify_pointer(
    bundles: Sequence[bytes], *, trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, in_process: bool = False
) -> Pointer:
    """The pointer that these bundles carry. Errors as of `verify_bundles`, and MalformedError `notice.form`."""
    return _pointer(
        verify_bundles(
            bundles, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process, predicate_type=POINTER_TYPE
        )
    )


def verify_revocation(
    bundles: Sequence[bytes], *, trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, in_process: bool = False
) -> Revocation:
    """The revocation that these bundles carry. Errors as of `verify_pointer`."""
    kind = REVOCATION_TYPE
    return _revocation(
        verify_bundles(
            bundles, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process, predicate_type=kind
        )
    )


def _pointer(signed: SignedStatement) -> Pointer:
    return Notice(_parse(_Statement[PointerBody], signed.payload), _sha256(signed), signed, _SEAL)


def _revocation(signed: SignedStatement) -> Revocation:
    return Notice(_parse(_Statement[RevocationBody], signed.payload), _sha256(signed), signed, _SEAL)


def verify_notices(
    bundles: Iterable[bytes], *, trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, in_process: bool = False
) -> Notices:
    """All notices that these bundles carry, in any order; bundles over the same bytes are signatures of one notice.

    Nothing is raised: what is no notice, or is not signed as the policy demands, is in `wrong`. Who sent it may have
    meant to revoke something, so it may not be passed over.
    """
    groups: dict[bytes | None, list[bytes]] = {}
    for raw in bundles:
        groups.setdefault(unverified_payload(raw), []).append(raw)
    wrong = ["a file is no bundle"] * len(groups.pop(None, []))
    if len(groups) > MAX_NOTICES:
        return Notices(wrong=(*wrong, f"{len(groups)} notices, at most {MAX_NOTICES}: remove those that have expired"))
    kinds = [_kind(payload or b"") for payload in groups]
    asked = list(zip(groups.values(), kinds, strict=True))
    answers = verify_each(asked, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process)
    pointers, revocations = [], []
    for answer, kind, signatures in zip(answers, kinds, groups.values(), strict=True):
        try:
            if isinstance(answer, AttestError):
                raise answer
            if kind == REVOCATION_TYPE:
                revocations.append(_revocation(answer))
            else:
                pointers.append(_pointer(answer))
        except AttestError as error:
            digest = hashlib.sha256(unverified_payload(signatures[0]) or b"").hexdigest()
            wrong.append(f"{digest[:16]}: {error.message} [{error.id}] {error.got}"[:300])
    unanswered = any(isinstance(answer, AttestError) and answer.id == UNANSWERED for answer in answers)
    return Notices(tuple(pointers), tuple(revocations), tuple(wrong), unanswered)


def _kind(payload: bytes) -> str:
    """Which of the two a statement says that it is; only `verify_each` makes that true."""
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        return POINTER_TYPE
    says = body.get("predicateType") if isinstance(body, dict) else None
    return REVOCATION_TYPE if says == REVOCATION_TYPE else POINTER_TYPE


def _sha256(signed: SignedStatement) -> str:
    return hashlib.sha256(signed.payload).hexdigest()


def _parse(kind: type[_Statement[B]], payload: bytes) -> B:
    try:
        canonical.loads(payload, max_bytes=MAX_NOTICE_BYTES, what="the notice")
    except MalformedError as error:
        raise MalformedError(error.message, id="notice.form", want=error.want, got=error.got) from None
    statement = validated(kind, payload, id="notice.form", what="a notice")
    if tuple(s.digest.sha256 for s in statement.subject) != statement.predicate.about:
        raise MalformedError("subjects and predicate disagree", id="notice.form", want="the same digests")
    return statement.predicate
