"""Who may call what: the one table of methods and roles.

A role is the Unix socket that a call came through. A method that is not in `METHODS` is denied to everybody, also when
the server knows it. Spec: docs/spec/api.md section 2; the test of the whole matrix is tests/unit/api/test_matrix.py.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class Role(enum.StrEnum):
    """What a caller is, by the socket it could open."""

    OPERATOR = "operator"
    AUDITOR = "auditor"
    AGENT = "agent"
    RELYING_PARTY = "relying-party"


SOCKET_MODES: Final[Mapping[Role, int]] = {
    Role.OPERATOR: 0o600,
    Role.AUDITOR: 0o660,
    Role.AGENT: 0o660,
    Role.RELYING_PARTY: 0o660,
}

# What a role may spend: tokens a second, and how many it may save up.
RATES: Final[Mapping[Role, tuple[int, int]]] = {
    Role.OPERATOR: (200, 400),
    Role.AUDITOR: (200, 400),
    Role.AGENT: (50, 100),
    Role.RELYING_PARTY: (20, 100),
}


@dataclass(frozen=True, slots=True)
class Method:
    """Who may call it, what a call costs in tokens, how large a request may be, and whether it changes the node."""

    roles: frozenset[Role]
    cost: int = 1
    max_request_bytes: int = 4 * 1024
    mutating: bool = False


_READERS: Final = frozenset({Role.OPERATOR, Role.AUDITOR, Role.AGENT})
_AUDITORS: Final = frozenset({Role.OPERATOR, Role.AUDITOR})
_EVERYBODY: Final = frozenset(Role)
_OPERATOR: Final = frozenset({Role.OPERATOR})
_MIB: Final = 1024 * 1024

METHODS: Final[Mapping[str, Method]] = {
    "/pointcall.v1.Runs/ListRuns": Method(_READERS),
    "/pointcall.v1.Runs/GetRun": Method(_READERS),
    "/pointcall.v1.Runs/GetReceipt": Method(_READERS),
    "/pointcall.v1.Status/GetStatus": Method(_READERS),
    "/pointcall.v1.Status/GetEvidence": Method(
        frozenset({Role.OPERATOR, Role.AUDITOR, Role.RELYING_PARTY}),
        cost=10,  # each one asks the platform
    ),
    "/pointcall.v1.Status/ListWaiting": Method(_READERS),
    "/pointcall.v1.Events/ListEvents": Method(_AUDITORS, cost=2),
    "/pointcall.v1.Proposals/SubmitProposal": Method(
        frozenset({Role.OPERATOR, Role.AGENT}),
        cost=50,
        max_request_bytes=80 * 1024,  # 64 KiB source, 8 KiB rationale
    ),
    "/pointcall.v1.Proposals/ListProposals": Method(_READERS),
    "/pointcall.v1.Proposals/GetProposal": Method(_READERS),
    "/pointcall.v1.Control/Arm": Method(_OPERATOR, cost=10, max_request_bytes=32 * _MIB, mutating=True),
    "/pointcall.v1.Control/Disarm": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/Pause": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/Resume": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/TripCircuit": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/ReleaseCircuit": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/Approve": Method(_OPERATOR, cost=50, max_request_bytes=256 * 1024, mutating=True),
    "/pointcall.v1.Control/Acknowledge": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/BeginDrill": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/EndDrill": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/RecordProbe": Method(_OPERATOR, mutating=True),
    "/pointcall.v1.Control/PruneLog": Method(_OPERATOR, cost=10, mutating=True),
    "/pointcall.v1.Control/EraseLog": Method(_OPERATOR, cost=10, max_request_bytes=32 * 1024, mutating=True),
    "/grpc.health.v1.Health/Check": Method(_EVERYBODY),
    "/grpc.health.v1.Health/List": Method(_EVERYBODY),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Method(_READERS),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Method(_READERS),
}


def permitted(role: Role, method: str) -> bool:
    """Whether this role may call this full method name. Unknown methods: nobody."""
    row = METHODS.get(method)
    return row is not None and role in row.roles


def max_message_bytes(role: Role) -> int:
    """The largest request that any method of this role takes; the transport refuses more before it is parsed."""
    return max(m.max_request_bytes for m in METHODS.values() if role in m.roles)
