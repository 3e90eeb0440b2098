"""Instructions before they are bytes: symbolic locals and labels, and the source line of each. No meaning.

A `Code` is a tuple of `Step`s, so pieces are joined with `+`. encode.py gives locals their numbers and labels their
depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

from pointcall_runbook.opcode import BY_NAME, EMPTY, I32, I64, Opcode


@dataclass(eq=False, slots=True)
class Local:
    """A local variable or parameter of the function; its number is known when all are."""

    type: int


@dataclass(eq=False, slots=True)
class Label:
    """The end of a block."""


Operand: TypeAlias = int | str | Local | Label | None


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. The operand of `call` is the name of an action, of `block` and `if` their label."""

    op: Opcode
    operand: Operand = None
    line: int = 0
    result: int = EMPTY  # of a block


Code: TypeAlias = tuple[Step, ...]
NOTHING: Final[Code] = ()


def step(name: str, operand: Operand = None) -> Code:
    return (Step(BY_NAME[name], operand),)


def constant(value: int) -> Code:
    return step("i64.const", value)


def truth(value: bool) -> Code:
    return step("i32.const", int(value))


def get(local: Local) -> Code:
    return step("local.get", local)


def put(local: Local) -> Code:
    return step("local.set", local)


def tee(local: Local) -> Code:
    return step("local.tee", local)


def block(label: Label, inner: Code) -> Code:
    return (Step(BY_NAME["block"], label), *inner, Step(BY_NAME["end"]))


def choose(condition: Code, then: Code, otherwise: Code, result: int = EMPTY) -> Code:
    """`if`, with the label nobody branches to; `else` is left out where it is empty."""
    middle = (Step(BY_NAME["else"]), *otherwise) if otherwise else NOTHING
    return (*condition, Step(BY_NAME["if"], Label(), 0, result), *then, *middle, Step(BY_NAME["end"]))


def at_line(code: Code, line: int) -> Code:
    """The same with `line` on every step that has none yet."""
    return tuple(s if s.line else Step(s.op, s.operand, line, s.result) for s in code)


@dataclass(slots=True)
class Function:
    """One handler on its way to bytes."""

    event: str
    parameters: list[Local] = field(default_factory=list)
    locals: list[Local] = field(default_factory=list)
    code: Code = NOTHING

    def local(self, type_: int = I64) -> Local:
        made = Local(type_)
        self.locals.append(made)
        return made

    def parameter(self) -> Local:
        made = Local(I64)
        self.parameters.append(made)
        return made


def wasm_type(is_bool: bool) -> int:
    return I32 if is_bool else I64
