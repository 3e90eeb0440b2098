"""Refusals of this room: signing, keys and where they are kept."""

from __future__ import annotations

from pointcall_runbook.errors import PointcallError


class KeysError(PointcallError):
    """Something could not be signed, or a key or an instance is not as it must be."""

    id = "keys.error"
