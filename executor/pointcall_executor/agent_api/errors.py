"""Refusals of the agent-facing room."""

from __future__ import annotations

from pointcall_runbook.errors import PointcallError


class RequestError(PointcallError):
    """The request is not of the form that the method demands."""

    id = "api.request"


class NotFoundError(PointcallError):
    """No such run or proposal."""

    id = "api.not-found"


class QuotaError(PointcallError):
    """The caller has used up what it may have; later is fine."""

    id = "proposal.quota"
