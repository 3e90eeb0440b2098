"""Who calls: the socket's role, or the SPIFFE ID of a client certificate looked up in an exact table.

Not a decision about what a caller may do: that is roles.py. Over the network there are auditors and relying parties
only; whoever changes a node does it on the node, or signs a manifest. Spec: docs/spec/api.md section 7; SPIFFE-ID.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509

from pointcall_executor.api.roles import Role
from pointcall_runbook.errors import PointcallError

REMOTE_ROLES: Final = frozenset({Role.AUDITOR, Role.RELYING_PARTY})
MAX_SPIFFE_ID_BYTES: Final = 2048  # SPIFFE-ID section 2.3
_PEM_PROPERTY: Final = "x509_pem_cert"


class CallerError(PointcallError):
    """The table of callers is not acceptable."""

    id = "api.callers"


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller: its name in `access` entries, and its role."""

    name: str
    role: Role


CallerOf = Callable[[Any], Caller | None]  # from a grpc.ServicerContext; None: nobody that we know


def of_socket(role: Role) -> CallerOf:
    """Everybody who could open this role's socket."""
    caller = Caller(role.value, role)
    return lambda _: caller


@dataclass(frozen=True)
class Mtls:
    """The network side: where to listen, our certificate and key, whose certificates count, and who is what.

    `roles` maps SPIFFE IDs to roles, exactly. CallerError `api.callers` for a role that is not for the network.
    """

    address: str
    certificate: bytes  # PEM, leaf first
    key: bytes  # PEM
    client_roots: bytes  # PEM
    roles: Mapping[str, Role]

    def __post_init__(self) -> None:
        for name, role in self.roles.items():
            if role not in REMOTE_ROLES or not name.startswith("spiffe://") or len(name.encode()) > MAX_SPIFFE_ID_BYTES:
                raise CallerError(
                    "not a caller for the network",
                    want="a SPIFFE ID as " + " or ".join(sorted(REMOTE_ROLES)),
                    got=f"{name[:120]} as {role}",
                )

    def callers(self, now: Callable[[], datetime]) -> CallerOf:
        """Who a connection is. The handshake checked the chain; its end is checked again, since connections last."""

        def caller(context: Any) -> Caller | None:
            leaf = _leaf(context.auth_context().get(_PEM_PROPERTY, ()))
            if leaf is None or not leaf.not_before <= now() <= leaf.not_after:
                return None
            role = self.roles.get(leaf.spiffe_id)
            return None if role is None else Caller(leaf.spiffe_id, role)

        return caller


@dataclass(frozen=True, slots=True)
class _Leaf:
    spiffe_id: str
    not_before: datetime
    not_after: datetime


def _leaf(pems: Sequence[bytes]) -> _Leaf | None:
    return _parsed(pems[0]) if len(pems) == 1 else None


@functools.lru_cache(maxsize=64)
def _parsed(pem: bytes) -> _Leaf | None:
    """A certificate with exactly one URI, as an X.509-SVID has. The transport mixes names of all kinds in one list."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        return None
    return _Leaf(uris[0], certificate.not_valid_before_utc, certificate.not_valid_after_utc)
