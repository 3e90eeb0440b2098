"""One function body: are its operands well typed, and what can it cost at most? No I/O, no knowledge of compilers.

The type rules are those of WebAssembly 1.0, appendix "Validation Algorithm". The bound is the longest path over the
structured control flow with Wasmtime's fuel table: exact over all paths in the code. Spec: docs/spec/rb1.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pointcall_runbook import opcode as o
from pointcall_runbook.binary import ModuleError
from pointcall_runbook.sections import Body, FunctionType, Instruction, Sections

MAX_NESTING: Final = 64
_UNKNOWN: Final = 0  # the type of an operand that code behind a branch never has


@dataclass(frozen=True, slots=True)
class Measured:
    """`bound`: worst-case fuel with all callees. `calls`: indices of every function named in the body.

    `slots`: values that can be alive at once, locals and operands. They may all lie on the machine's stack.
    """

    bound: int
    calls: frozenset[int]
    slots: int


@dataclass(slots=True)
class _Block:
    """An open block. `label` is the highest cost with which a branch reaches its end; None: none does."""

    code: int
    result: tuple[int, ...]
    height: int
    entry: int | None
    label: int | None = None
    dead: bool = False


def _highest(*costs: int | None) -> int | None:
    return max((c for c in costs if c is not None), default=None)


def measure(module: Sections, type_: FunctionType, body: Body, bound_of: Callable[[int], int]) -> Measured:
    """Check one body. `bound_of(index)` gives the bound of another function and refuses recursion."""
    checker = _Checker(module, type_, body, bound_of)
    for at in body.code:
        checker.step(at)
    if checker.blocks:
        raise ModuleError("a function body does not end with its last instruction", id="module.nesting")
    return Measured(checker.finished, frozenset(checker.calls), len(checker.locals) + checker.highest)


@dataclass(slots=True)
class _Checker:
    module: Sections
    type_: FunctionType
    body: Body
    bound_of: Callable[[int], int]
    locals: tuple[int, ...] = ()
    stack: list[int] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    cost: int | None = o.FUEL_PER_ENTRY  # None where control cannot be
    calls: set[int] = field(default_factory=set)
    finished: int = 0
    highest: int = 0  # the operand stack

    def __post_init__(self) -> None:
        self.locals = self.type_.params + self.body.locals
        self.blocks.append(_Block(o.BLOCK, self.type_.results, 0, self.cost))

    def step(self, at: Instruction) -> None:
        if not self.blocks:
            raise ModuleError("code behind the end of a function", id="module.nesting", got=f"offset {at.offset}")
        if self.cost is not None:
            self.cost += at.op.fuel
        self.highest = max(self.highest, len(self.stack))
        special = _SPECIAL.get(at.op.code)
        if special is not None:
            special(self, at)
            return
        self.pop_all(at.op.pops, at)
        self.stack += at.op.pushes

    def pop(self, want: int, at: Instruction) -> int:
        block = self.blocks[-1]
        if len(self.stack) == block.height:
            if block.dead:
                return want
            raise self.mistyped(at, "an operand", "an empty stack")
        got = self.stack.pop()
        if _UNKNOWN not in (want, got) and want != got:
            raise self.mistyped(at, o.TYPE_NAMES[want], o.TYPE_NAMES[got])
        return got or want

    def pop_all(self, types: tuple[int, ...], at: Instruction) -> None:
        for want in reversed(types):
            self.pop(want, at)

    def mistyped(self, at: Instruction, want: str, got: str) -> ModuleError:
        where = f"{got} at {at.op.name}, offset {at.offset}"
        return ModuleError("operands do not have the types they need", id="module.stack", want=want, got=where)

    def stop(self) -> None:
        """Control does not go on here: the rest of the block is dead."""
        block = self.blocks[-1]
        del self.stack[block.height :]
        block.dead, self.cost = True, None

    def block(self, at: Instruction) -> None:
        self.pop_all(at.op.pops, at)
        if len(self.blocks) > MAX_NESTING:
            raise ModuleError("blocks are nested too deeply", id="module.nesting", want=f"at most {MAX_NESTING}")
        result = () if at.value == o.EMPTY else (at.value,)
        self.blocks.append(_Block(at.op.code, result, len(self.stack), self.cost))

    def close(self, at: Instruction) -> _Block:
        """Leave the innermost block: its results are on the stack, and nothing else of it."""
        block = self.blocks[-1]
        self.pop_all(block.result, at)
        if len(self.stack) != block.height:
            raise self.mistyped(at, "the results of the block alone", "more operands")
        return self.blocks.pop()

    def else_(self, at: Instruction) -> None:
        if self.blocks[-1].code != o.IF:
            raise ModuleError("else without if", id="module.nesting", got=f"offset {at.offset}")
        block = self.close(at)
        label = _highest(block.label, self.cost)
        self.cost = block.entry
        self.blocks.append(_Block(o.ELSE, block.result, block.height, block.entry, label))

    def end(self, at: Instruction) -> None:
        block = self.close(at)
        if block.code == o.IF and block.result:
            raise self.mistyped(at, "an else that gives the result too", "none")
        skipped = block.entry if block.code == o.IF else None
        self.cost = _highest(block.label, self.cost, skipped)
        self.stack += block.result
        if not self.blocks:
            self.finished = self.cost or 0

    def branch(self, at: Instruction) -> None:
        self.pop_all(at.op.pops, at)
        if at.value >= len(self.blocks):
            raise ModuleError("a branch leads outside the function", id="module.nesting", got=f"offset {at.offset}")
        target = self.blocks[-1 - at.value]
        self.pop_all(target.result, at)
        target.label = _highest(target.label, self.cost)
        if at.op.code == o.BR:
            self.stop()
        else:
            self.stack += target.result

    def return_(self, at: Instruction) -> None:
        self.pop_all(self.type_.results, at)
        self.blocks[0].label = _highest(self.blocks[0].label, self.cost)
        self.stop()

    def unreachable(self, at: Instruction) -> None:
        self.blocks[0].label = _highest(self.blocks[0].label, self.cost)
        self.stop()

    def call(self, at: Instruction) -> None:
        callee = self.module.function_type(at.value)
        if callee is None:
            raise ModuleError("a call names no function", id="module.function", got=f"offset {at.offset}")
        self.pop_all(callee.params, at)
        self.stack += callee.results
        self.calls.add(at.value)
        inner = self.bound_of(at.value)
        if self.cost is not None:
            self.cost += inner

    def drop(self, at: Instruction) -> None:
        self.pop(_UNKNOWN, at)

    def select(self, at: Instruction) -> None:
        self.pop(o.I32, at)
        second = self.pop(_UNKNOWN, at)
        first = self.pop(second, at)
        self.stack.append(first or second)

    def local(self, at: Instruction) -> None:
        if at.value >= len(self.locals):
            raise ModuleError("a local index is out of range", id="module.locals", got=f"offset {at.offset}")
        type_ = self.locals[at.value]
        if at.op.code != o.LOCAL_GET:
            self.pop(type_, at)
        if at.op.code != o.LOCAL_SET:
            self.stack.append(type_)


_SPECIAL: Final[Mapping[int, Callable[[_Checker, Instruction], None]]] = {
    o.UNREACHABLE: _Checker.unreachable,
    o.BLOCK: _Checker.block,
    o.IF: _Checker.block,
    o.ELSE: _Checker.else_,
    o.END: _Checker.end,
    o.BR: _Checker.branch,
    o.BR_IF: _Checker.branch,
    o.RETURN: _Checker.return_,
    o.CALL: _Checker.call,
    o.DROP: _Checker.drop,
    o.SELECT: _Checker.select,
    o.LOCAL_GET: _Checker.local,
    o.LOCAL_SET: _Checker.local,
    o.LOCAL_TEE: _Checker.local,
}
