"""Where the managers of services are. Apart from their kinds, so that a kind is imported only where one is declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
PODMAN_SOCKET: Final = "/run/podman/podman.sock"


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the managers of services are, from the executor's settings."""

    systemd_bus: str = SYSTEM_BUS
    podman_socket: str = PODMAN_SOCKET
    kubeconfig: str = ""
