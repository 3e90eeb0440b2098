"""The resolvers of this node: destinations that no circuit may refuse, because nothing works without names.

They are read once for each arming and are a value from there on. Spec: docs/spec/config.md, `protect_resolvers`.
"""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pointcall_executor.arming import ArmingError, on_loopback
from pointcall_executor.core.event import Destination
from pointcall_runbook.vocabulary import Address

RESOLV_CONF: Final = Path("/etc/resolv.conf")
PORT: Final = 53


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Port 53, TCP and UDP, of these addresses and of every loopback address."""

    nameservers: frozenset[Address] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Self:
        """The `nameserver` lines of resolv.conf(5); what is no address there is left out, as the C library does."""
        found = set()
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                with contextlib.suppress(ValueError):
                    found.add(Address.from_bytes(ipaddress.ip_address(words[1].partition("%")[0]).packed))
        return cls(frozenset(found))

    @classmethod
    def read(cls, path: Path = RESOLV_CONF) -> Self:
        """Those of this machine. Without the file the C library asks loopback, which is always among them.

        ArmingError `arm.resolvers` where it is there and cannot be read: a circuit could refuse a resolver then.
        """
        try:
            return cls.parse(path.read_text(errors="replace"))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ArmingError(
                "the resolvers of this node cannot be told, so no circuit could spare them", id="arm.resolvers",
                want=f"a file that the executor may read: {path}", got=error.strerror or "",
                hint="make it one, or protect_resolvers = false in the node's settings and a restart",
            ) from None  # fmt: skip

    def __contains__(self, to: Destination) -> bool:
        return to.port == PORT and (to.address in self.nameservers or on_loopback(to.address))
