"""What the compiler knows of values and names while it reads a function: types, spans, where they are kept."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from pointcall_runbook.compiler.code import Code, Local, constant, get, step, truth
from pointcall_runbook.compiler.span import HIGHEST, LOWEST, Span
from pointcall_runbook.opcode import I64
from pointcall_runbook.vocabulary import U31, Event, Field, Kind, Network


@dataclass(frozen=True, slots=True)
class Type:
    """The type of a value; `enum` is set for an enum."""

    kind: Kind
    enum: type[enum.IntEnum] | None = None

    def __str__(self) -> str:
        return self.enum.__name__ if self.enum else self.kind.value

    @property
    def everything(self) -> Span:
        """All values of the type."""
        if self.enum:
            return Span.of(frozenset(int(m) for m in self.enum))
        ends = {Kind.BOOL: (0, 1), Kind.SERVICE: (0, U31), Kind.CHANNEL: (0, U31)}
        return Span(*ends.get(self.kind, (LOWEST, HIGHEST)))


INT: Final = Type(Kind.INT)
BOOL: Final = Type(Kind.BOOL)
SERVICE: Final = Type(Kind.SERVICE)
CHANNEL: Final = Type(Kind.CHANNEL)
ADDRESS: Final = Type(Kind.ADDRESS)


@dataclass(frozen=True, slots=True)
class Value:
    """A value: one piece of code for each i64 (a bool is one i32), and the span of the first."""

    type: Type
    codes: tuple[Code, ...]
    span: Span

    @property
    def code(self) -> Code:
        return tuple(s for code in self.codes for s in code)


@dataclass(frozen=True, slots=True)
class Variable:
    """A value that is kept in locals: a field, a parameter, a slot, an assigned name."""

    type: Type
    locals: tuple[Local, ...]
    span: Span
    slot: int | None = None  # of a remembered slot

    @property
    def value(self) -> Value:
        codes = tuple(get(at) for at in self.locals)
        if self.type == BOOL and self.locals[0].type == I64:  # a field of an event comes as 0 or 1
            codes = (codes[0] + step("i32.wrap_i64"),)
        return settled(Value(self.type, codes, self.span))


@dataclass(frozen=True, slots=True)
class Record:
    """An event; its fields are names `<root>.<field>` of the environment."""

    event: type[Event]
    root: str


class Poison(enum.Enum):
    """What a name is after its statement was refused."""

    POISON = 0


Binding: TypeAlias = Variable | Value | Network | Record | Poison
Environment: TypeAlias = Mapping[str, Binding]


def settled(value: Value) -> Value:
    """The same, as a constant where only one value is left: code without traps has no other effect."""
    if not value.span.constant or value.type.kind is Kind.ADDRESS:
        return value
    number = value.span.lo
    return replace(value, codes=(truth(bool(number)) if value.type == BOOL else constant(number),))


def field_type(field: Field) -> Type:
    return Type(field.kind, field.enum)


def field_span(field: Field) -> Span:
    return Type(field.kind, field.enum).everything if field.enum else Span(field.lo, field.hi)


def widened(value: Value) -> Code:
    """As i64s, for an argument of an action."""
    return value.code + step("i64.extend_i32_u") if value.type == BOOL else value.code


def joined(environments: list[Environment]) -> Environment | None:
    """What holds whichever of them was: None where control comes from nowhere."""
    if not environments:
        return None
    first, *others = environments
    out = dict(first)
    for other in others:
        out = {name: _both(kept, other[name]) for name, kept in out.items() if name in other}
    return out


def _both(a: Binding, b: Binding) -> Binding:
    if isinstance(a, Variable) and isinstance(b, Variable) and a.locals == b.locals:
        return a if a.span == b.span else replace(a, span=a.span.joined(b.span))
    return a if a == b else Poison.POISON
