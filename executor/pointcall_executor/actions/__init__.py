"""The closed set of actions, one file each. An action does one thing, twice without harm, and says what it did.

Not here: whether it may (the guard), why (the runbook), the record of it (the journal). `REGISTRY` is what this
executor can do; a module that needs anything else is not armed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from pointcall_executor.actions import close_circuit, notify, open_circuit, recreate
from pointcall_executor.actions.world import Done, World

Perform = Callable[[Any, World], Done]

REGISTRY: Final[Mapping[str, Perform]] = {
    "recreate": recreate.perform,
    "notify": notify.perform,
    "open_circuit": open_circuit.perform,
    "close_circuit": close_circuit.perform,
}

# Leases that live in the kernel end by themselves, so their effect need not wait for the disk.
KERNEL_LEASES: Final = frozenset({"open_circuit"})
# Nothing outside the executor changes: no intent is needed.
WITHOUT_INTENT: Final = frozenset({"notify", "escalate", "remember", "again"})
