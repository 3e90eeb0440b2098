"""What a module would decide on a series of events. Uses the interpreter; changes nothing; keeps no state."""

from __future__ import annotations

from collections.abc import Iterable

from pointcall_runbook.decision import Decided
from pointcall_runbook.interpreter import Interpreter


def simulate(wasm: bytes, events: Iterable[tuple[str, tuple[int, ...]]]) -> list[Decided]:
    """Each event is its name and the raw i64 arguments of the handler (event, parameters, slots).

    Raises ModuleError where the module does not verify, ValueError for an event that it does not handle, Trap where
    a handler does not return.
    """
    interpreter = Interpreter(wasm)
    return [interpreter.run(event, args) for event, args in events]
