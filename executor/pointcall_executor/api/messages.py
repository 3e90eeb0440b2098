"""The generated message classes, and the one way from our values to them.

Names are the contract: a value's field goes into the message field of the same name (tests hold the two together), so
there is no list of assignments to forget one in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pointcall_runbook.errors import PointcallError

__all__ = ["NotGeneratedError", "as_pairs", "message", "pb"]


class NotGeneratedError(PointcallError):
    """The message classes were not made yet."""

    id = "api.not-generated"


try:
    from pointcall_executor.api.generated import pointcall_pb2 as pb
except ImportError as _missing:
    raise NotGeneratedError(
        "the gRPC messages are not made yet",
        want="pointcall_executor/api/generated/pointcall_pb2.py",
        got=str(_missing),
        hint="python -m pointcall_executor.api.generate, or make setup",
    ) from None


def message(value: Any, name: str) -> Any:
    """`value` (a dataclass or model) as the message `name`. A field that the message does not have is a bug."""
    return getattr(pb, name)(**{k: _plain(v) for k, v in as_pairs(value).items()})


def as_pairs(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or model, one level deep."""
    if isinstance(value, BaseModel):
        return dict(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return {k: _plain(v) for k, v in as_pairs(value).items()}
    return dict(value) if isinstance(value, Mapping) else value
