"""OOM victims and bad exits of watched cgroups. It reports; core/event.py says what, core/trigger.py what it means.

Spec: docs/spec/kernel-abi.md section 5.
"""

from __future__ import annotations

import struct

from pointcall_executor.kernel.sensor import Sensor


class LifecycleSensor(Sensor):
    """Attach once for the node; a cgroup that is not watched sends nothing."""

    def watch(self, cgroup_id: int) -> None:
        """Report the processes of this cgroup (cgroup v2 id)."""
        self._maps["watched"].set(struct.pack("<Q", cgroup_id), struct.pack("<I", 1))

    def unwatch(self, cgroup_id: int) -> None:
        """Be silent about it. Twice does no harm."""
        self._maps["watched"].delete(struct.pack("<Q", cgroup_id))
