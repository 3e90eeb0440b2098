"""A second person's word for one action: signed, for exactly this call of this run, and soon over.

It can let through what the guard holds back for want of it, once; it can neither ask for an action nor change one. An
approver is not a signer of the armed manifest: one stolen identity must not be both hands.
Spec: docs/spec/approval.md; in-toto Statement v1.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import InitVar, dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pointcall_attest import canonical
from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.manifest import STATEMENT_TYPE, Action
from pointcall_attest.model import Instant, Name, Strict, Subject, Text, validated
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import CLOCK_SKEW, SignerIdentity, verify_bundles
from pointcall_attest.statement import RunId

APPROVAL_TYPE: Final = "https://pointcall.dev/approval/v1"
MAX_APPROVAL_BYTES: Final = 16 * 1024
MAX_LIFETIME: Final = dt.timedelta(hours=1)
Number = Annotated[str, StringConstraints(pattern=r"^(0|-?[1-9][0-9]{0,18})$")]  # an i64 as a decimal string


class ApprovalBody(Strict):
    """What is approved: call `index` of `run` on `node`, as the runbook made it."""

    format: Literal["pointcall-approval/v1"] = "pointcall-approval/v1"
    node: Text
    run: RunId
    index: Annotated[int, Field(ge=0, le=7)]
    runbook: Name
    action: Action
    args: Annotated[tuple[Number, ...], Field(max_length=16)]
    issued: Instant
    expires: Instant

    @model_validator(mode="after")
    def _is_soon_over(self) -> Self:
        if not dt.timedelta(0) < self.expires - self.issued <= MAX_LIFETIME:
            raise ValueError("an approval lasts an hour at most")
        return self


class _Statement(Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=1)]  # the armed manifest
    predicateType: Literal["https://pointcall.dev/approval/v1"]  # noqa: N815 - the name in the in-toto format
    predicate: ApprovalBody


_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Approval:
    """An approval that an approver of the policy has signed and that holds now. Made by `verify_approval` only."""

    body: ApprovalBody
    by: SignerIdentity
    sha256: str  # of the statement
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        assert seal is _SEAL, "an Approval is made by verifying one"


def approval_statement(body: ApprovalBody, *, manifest: str) -> bytes:
    """The canonical statement to sign; `manifest` is the digest (hex) of the armed one."""
    subject = {"name": "manifest.json", "digest": {"sha256": manifest}}
    predicate = body.model_dump(mode="json")
    return canonical.dumps(
        {"_type": STATEMENT_TYPE, "subject": [subject], "predicateType": APPROVAL_TYPE, "predicate": predicate}
    )


def parse_approval(payload: bytes) -> tuple[ApprovalBody, str]:
    """What an approval says, and of which manifest (hex). Nobody's signature has been checked.

    MalformedError `approval.form`.
    """
    try:
        canonical.loads(payload, max_bytes=MAX_APPROVAL_BYTES, what="the approval")
    except MalformedError as error:
        raise MalformedError(error.message, id="approval.form", want=error.want, got=error.got) from None
    statement = validated(_Statement, payload, id="approval.form", what="an approval")
    return statement.predicate, statement.subject[0].digest.sha256


def verify_approval(
    bundle: bytes,
    *,
    trusted_root: bytes,
    policy: TrustPolicy,
    node: str,
    manifest: str,
    manifest_signers: frozenset[SignerIdentity],
    at: dt.datetime,
    in_process: bool = False,
) -> Approval:
    """The approval in this bundle, for this node and the manifest that is armed there.

    MalformedError `approval.form`; VerifyError with an id of `verify_bundles`, or `approval.approvers`,
    `approval.second-person`, `approval.other`, `approval.time`.
    """
    if not policy.may_approve:
        raise VerifyError("the trust policy names no approver", id="approval.approvers", want="approvers")
    signed = verify_bundles(
        [bundle],
        trusted_root=trusted_root,
        policy=policy.for_approvals(),
        at=at,
        in_process=in_process,
        predicate_type=APPROVAL_TYPE,
    )
    body, about = parse_approval(signed.payload)
    by = signed.signers[0]
    if by in manifest_signers:
        raise VerifyError(
            "the approver signed the manifest", id="approval.second-person", want="somebody else", got=by.identity
        )
    if (body.node, about) != (node, manifest):
        raise VerifyError(
            "the approval is for something else",
            id="approval.other",
            want=f"{node}, manifest {manifest}",
            got=f"{body.node}, manifest {about}",
        )
    if not body.issued - CLOCK_SKEW <= at < body.expires:
        raise VerifyError(
            "the approval does not hold now",
            id="approval.time",
            want=f"between {body.issued:%H:%M:%S} and {body.expires:%H:%M:%S} UTC",
            got=f"{at:%H:%M:%S}",
            hint="approve again",
        )
    return Approval(body, by, hashlib.sha256(signed.payload).hexdigest(), _SEAL)
