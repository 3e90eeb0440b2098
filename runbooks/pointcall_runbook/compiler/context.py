"""What is shared while functions are read: the file's names and limits, the function being written, the scope."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pointcall_runbook.compiler.code import Code, Function, Label, Local, wasm_type
from pointcall_runbook.compiler.diagnostic import Diagnostics, Refusal
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import BOOL, Environment, Type, Value
from pointcall_runbook.meta import Parameter, Slot

MAX_WORK: Final = 40_000  # nodes read, helpers and loops unrolled: far above the largest runbook, still milliseconds
MAX_ITERATIONS: Final = 64
MAX_HELPER_DEPTH: Final = 8


@dataclass(slots=True)
class Unit:
    """One source file. `names` are all names at module level; `bindings` those that hold a value."""

    diagnostics: Diagnostics
    imported: set[str] = field(default_factory=set)
    bindings: Environment = field(default_factory=dict)
    helpers: dict[str, ast.FunctionDef] = field(default_factory=dict)
    handlers: dict[str, ast.FunctionDef] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    channels: set[str] = field(default_factory=set)
    live: set[int] = field(default_factory=set)  # ids of statements that some run can reach
    called: set[str] = field(default_factory=set)
    work: int = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.imported, *self.bindings, *self.helpers, *(f.name for f in self.handlers.values())})

    def spend(self, node: ast.AST) -> None:
        self.work += 1
        if self.work > MAX_WORK:
            hint = "fewer iterations, or fewer helpers that call helpers"
            raise Refusal(node, "language.size", "the runbook unrolls to too much code", hint=hint)


@dataclass(slots=True)
class Returning:
    """Where the `return` of an inlined helper puts its value: `result` is None for a decision."""

    result: Type | None
    label: Label = field(default_factory=Label)
    locals: tuple[Local, ...] = ()
    span: Span | None = None


@dataclass(slots=True)
class Loop:
    """An open loop: where `break` and `continue` lead, and what was known there."""

    after: Label = field(default_factory=Label)
    next: Label = field(default_factory=Label)
    broken: list[Environment] = field(default_factory=list)
    continued: list[Environment] = field(default_factory=list)


@dataclass(slots=True)
class Scope:
    """One function being read: a handler, or a helper at one of its calls."""

    returning: Returning
    depth: int = 0
    names: dict[str, tuple[Type, tuple[Local, ...]]] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)


@dataclass(slots=True)
class Context:
    """Everything that reading a statement needs. `evaluate` and `inline` tie the knot between the modules."""

    unit: Unit
    function: Function
    scope: Scope
    evaluate: Callable[[ast.expr, Environment, Context], Value]
    inline: Callable[[ast.Call, Environment, Context], Value]
    inline_decision: Callable[[ast.Call, Environment, Context], Code]

    def within(self, scope: Scope) -> Context:
        return Context(self.unit, self.function, scope, self.evaluate, self.inline, self.inline_decision)

    def locals_for(self, type_: Type) -> tuple[Local, ...]:
        return tuple(self.function.local(wasm_type(type_ == BOOL)) for _ in range(type_.kind.slots))

    def glance(self, node: ast.expr, environment: Environment) -> Value | None:
        """The type and span of an expression without its code or its complaints."""
        kept = len(self.function.locals)
        try:
            return self.evaluate(node, environment, self)
        except Refusal:
            return None
        finally:
            del self.function.locals[kept:]


def shown(node: ast.AST) -> str:
    """A piece of source for a message."""
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:57] + "..."
