"""Resets of established connections, segments and SYNs sent again, for watched destinations. It reports only.

Spec: docs/spec/kernel-abi.md section 9.
"""

from __future__ import annotations

import errno

from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.breaker import KEY, normalised
from pointcall_executor.kernel.errors import CircuitError
from pointcall_executor.kernel.sensor import Sensor


class TransportSensor(Sensor):
    """Constants: window_ns, resets_min, retransmits_min, timeouts_min."""

    def watch(self, destination: Destination) -> None:
        """Report trouble on the way there. Twice does no harm. CircuitError `kernel.circuit.full`: no room."""
        table = self._maps["destinations"]
        try:
            table.add(_key(destination), bytes(table.info.value_size))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            raise CircuitError(
                "no room for another destination", id="kernel.circuit.full",
                want=f"at most {table.info.max_entries} watched destinations", got=str(destination),
            ) from None  # fmt: skip

    def unwatch(self, destination: Destination) -> None:
        """Be silent about it. Twice does no harm."""
        self._maps["destinations"].delete(_key(destination))


def _key(destination: Destination) -> bytes:
    to = normalised(destination)
    return KEY.pack(to.address.packed, to.netns, to.port, to.protocol)
