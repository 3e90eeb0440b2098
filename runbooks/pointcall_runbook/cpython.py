"""The same source under CPython: an oracle for the compiler, the verifier and both engines. Not used to decide.

Runs code, so it takes a `Compiled` source only: what the compiler accepted has no effect when it is imported. Even so
the names it can reach are the SDK's and five builtins.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pointcall_runbook import sdk
from pointcall_runbook.compiler import Compiled, compile_source
from pointcall_runbook.vocabulary import EVENTS, Action, Call, arity, from_slots

_BUILTINS: Final = ("min", "max", "abs", "int", "bool", "range")


@dataclass(frozen=True, slots=True)
class Plain:
    """The handlers of a source as Python functions, and the namespace in which they live."""

    compiled: Compiled
    handlers: Mapping[str, Callable[[Any], list[Action]]]
    namespace: dict[str, Any]

    def decide(self, event: str, args: tuple[int, ...]) -> tuple[Call, ...]:
        """The calls for the same raw arguments that a module takes."""
        count = arity(EVENTS[event])
        info = self.compiled.info
        values = args[count:]
        for parameter, value in zip(info.parameters, values, strict=False):
            self.namespace[parameter.name] = value
        for number, (slot, value) in enumerate(zip(info.slots, values[len(info.parameters) :], strict=True)):
            self.namespace[slot.name] = sdk.Remembered.of(number, value)
        return tuple(Call.of(action) for action in self.handlers[event](from_slots(EVENTS[event], args[:count])))


def load(source: str) -> Plain:
    """Raises CompileError for a source outside the language, before anything of it runs."""
    compiled = compile_source(source)
    package = types.SimpleNamespace(**sdk.NAMES)

    def only_the_sdk(name: str, *_: object) -> object:
        return package if name == "pointcall_runbook" else types.SimpleNamespace(annotations=None)

    reachable = {name: getattr(builtins, name) for name in _BUILTINS} | {"__import__": only_the_sdk}
    namespace: dict[str, Any] = {"__builtins__": reachable, "__name__": "runbook"}
    exec(compile(source, "<runbook>", "exec", dont_inherit=True), namespace)  # noqa: S102  accepted above
    found = {}
    for value in list(namespace.values()):
        events = [e for e in _events(value) if e in compiled.info.handlers]
        if events and value.__annotations__.get("return") in (sdk.Decision, "Decision") and _is_handler(value, source):
            found[events[0]] = value
    return Plain(compiled, found, namespace)


def _is_handler(function: types.FunctionType, source: str) -> bool:
    lines = source.split("\n")
    return lines[function.__code__.co_firstlineno - 1].lstrip().startswith("@")


def _events(value: object) -> list[str]:
    if not isinstance(value, types.FunctionType) or value.__code__.co_argcount != 1:
        return []
    annotation = value.__annotations__.get(value.__code__.co_varnames[0])
    return [annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")]
