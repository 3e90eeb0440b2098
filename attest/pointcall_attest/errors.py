"""Refusals of this room. Outside input raises one of these; a bug raises AssertionError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointcall_runbook.errors import PointcallError

if TYPE_CHECKING:
    from pointcall_attest.verdict import Verdict


class AttestError(PointcallError):
    """Base: anything this room refuses."""

    id = "attest.error"


class MalformedError(AttestError):
    """The bytes are not of the form their format demands. Nothing about them may be believed."""

    id = "attest.malformed"


class VerifyError(AttestError):
    """Well-formed, but not authentic: a signature, chain or binding does not hold."""

    id = "attest.verify"


class RefusedError(AttestError):
    """Authentic, but not acceptable to the policy. Carries the verdict with every check."""

    id = "attest.refused"

    def __init__(self, verdict: Verdict) -> None:
        first = verdict.failed[0] if verdict.failed else None
        super().__init__(
            "refused: " + (", ".join(c.id for c in verdict.failed) or "nothing was checked"),
            id=first.id if first else "verdict.empty",
            want=first.expected if first else "at least one check",
            got=first.observed if first else "none",
            hint=first.hint if first else "",
        )
        self.verdict = verdict
