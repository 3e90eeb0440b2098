"""The closed set of actions, one file each. An action does one thing, twice without harm, and says what it did.

Not here: whether it may (the guard), why (the runbook), the record of it (the journal). `REGISTRY` is what this
executor can do; a module that needs anything else is not armed. `remember` and `again` are the core's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pointcall_executor.actions import (
    close_circuit,
    escalate,
    freeze,
    isolate,
    kill,
    kill_connections,
    notify,
    open_circuit,
    recreate,
    thaw,
)
from pointcall_executor.actions.world import Verb

REGISTRY: Final[Mapping[str, Verb]] = {
    "recreate": recreate.VERB,
    "notify": notify.VERB,
    "open_circuit": open_circuit.VERB,
    "close_circuit": close_circuit.VERB,
    "kill_connections": kill_connections.VERB,
    "isolate": isolate.VERB,
    "freeze": freeze.VERB,
    "thaw": thaw.VERB,
    "kill": kill.VERB,
    "escalate": escalate.VERB,
}

# Leases that live in the kernel end by themselves, so their effect need not wait for the disk.
KERNEL_LEASES: Final = frozenset({"open_circuit", "isolate"})
# Nothing outside the executor changes: no intent is needed.
WITHOUT_INTENT: Final = frozenset({"notify", "escalate", "remember", "again"})
