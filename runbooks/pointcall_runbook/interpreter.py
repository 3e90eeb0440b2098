"""The second implementation: runs a verified module in plain Python, for replay and as an oracle.

Fuel is counted exactly as Wasmtime counts it. A difference to the runner in the executor is a miscompilation there
or a bug here, and is never ignored. No clock, no chance, no I/O. Spec: docs/spec/rb1.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from pointcall_runbook import opcode as o
from pointcall_runbook.decision import Decided, Trap
from pointcall_runbook.module import EXPORT, ModuleInfo, verify_module
from pointcall_runbook.opcode import BY_NAME
from pointcall_runbook.sections import Body, FunctionType, Sections, take_apart
from pointcall_runbook.vocabulary import Call

_MASK: Final = 2**64 - 1


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero, as the machine does; b is not zero."""
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def _div_s(a: int, b: int, bits: int) -> int:
    if b == 0:
        raise Trap("division by zero")
    q = _quotient(_signed(a, bits), _signed(b, bits))
    if q == 1 << (bits - 1):
        raise Trap("overflow")
    return q


def _rem_s(a: int, b: int, bits: int) -> int:
    if b == 0:
        raise Trap("division by zero")
    x, y = _signed(a, bits), _signed(b, bits)
    return x - y * _quotient(x, y)


def _div_u(a: int, b: int) -> int:
    if b == 0:
        raise Trap("division by zero")
    return a // b


def _rem_u(a: int, b: int) -> int:
    if b == 0:
        raise Trap("division by zero")
    return a % b


def _rotl(a: int, n: int, bits: int) -> int:
    n %= bits
    return a << n | a >> (bits - n)


def _extend(value: int, from_bits: int) -> int:
    return _signed(value & ((1 << from_bits) - 1), from_bits)


Binary: TypeAlias = Callable[[int, int], int]
Unary: TypeAlias = Callable[[int], int]


def _binary(bits: int) -> dict[str, Binary]:
    """Operands and results are unsigned; a result is cut to `bits` by the caller."""

    def s(value: int) -> int:
        return _signed(value, bits)

    return {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt_s": lambda a, b: s(a) < s(b),
        "lt_u": lambda a, b: a < b,
        "gt_s": lambda a, b: s(a) > s(b),
        "gt_u": lambda a, b: a > b,
        "le_s": lambda a, b: s(a) <= s(b),
        "le_u": lambda a, b: a <= b,
        "ge_s": lambda a, b: s(a) >= s(b),
        "ge_u": lambda a, b: a >= b,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div_s": lambda a, b: _div_s(a, b, bits),
        "div_u": _div_u,
        "rem_s": lambda a, b: _rem_s(a, b, bits),
        "rem_u": _rem_u,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "shl": lambda a, b: a << b % bits,
        "shr_s": lambda a, b: s(a) >> b % bits,
        "shr_u": lambda a, b: a >> b % bits,
        "rotl": lambda a, b: _rotl(a, b, bits),
        "rotr": lambda a, b: _rotl(a, bits - b % bits, bits),
    }


def _unary(bits: int) -> dict[str, Unary]:
    return {
        "eqz": lambda a: a == 0,
        "clz": lambda a: bits - a.bit_length(),
        "ctz": lambda a: (a & -a).bit_length() - 1 if a else bits,
        "popcnt": lambda a: a.bit_count(),
        "extend8_s": lambda a: _extend(a, 8),
        "extend16_s": lambda a: _extend(a, 16),
    }


def _cut2(operation: Binary, mask: int) -> Binary:
    return lambda a, b: operation(a, b) & mask


def _cut1(operation: Unary, mask: int) -> Unary:
    return lambda a: operation(a) & mask


def _tables() -> tuple[dict[int, Binary], dict[int, Unary]]:
    two: dict[int, Binary] = {}
    one: dict[int, Unary] = {
        BY_NAME["i32.wrap_i64"].code: lambda a: a & 0xFFFFFFFF,
        BY_NAME["i64.extend_i32_s"].code: lambda a: _extend(a, 32) & _MASK,
        BY_NAME["i64.extend_i32_u"].code: lambda a: a,
        BY_NAME["i64.extend32_s"].code: lambda a: _extend(a, 32) & _MASK,
    }
    for bits in (32, 64):
        mask = (1 << bits) - 1
        two |= {BY_NAME[f"i{bits}.{n}"].code: _cut2(f, mask) for n, f in _binary(bits).items()}
        one |= {BY_NAME[f"i{bits}.{n}"].code: _cut1(f, mask) for n, f in _unary(bits).items()}
    return two, one


_BINARY, _UNARY = _tables()


@dataclass(frozen=True, slots=True)
class _Function:
    """A body ready to run: each step is (code, immediate, fuel, end, else, results of the block, offset)."""

    steps: tuple[tuple[int, int, int, int, int, int, int], ...]
    locals: int
    results: int


def _prepared(type_: FunctionType, body: Body) -> _Function:
    ends: dict[int, int] = {}
    elses: dict[int, int] = {}
    opened: list[int] = []
    for i, at in enumerate(body.code):
        if at.op.code in (o.BLOCK, o.IF):
            opened.append(i)
        elif at.op.code == o.ELSE:
            elses[opened[-1]] = i
        elif at.op.code == o.END and opened:
            start = opened.pop()
            ends[start] = i
            ends[elses.get(start, start)] = i
    return _Function(tuple(_steps(body, ends, elses)), len(body.locals), len(type_.results))


def _steps(
    body: Body, ends: Mapping[int, int], elses: Mapping[int, int]
) -> list[tuple[int, int, int, int, int, int, int]]:
    out = []
    for i, at in enumerate(body.code):
        value = at.value
        if at.op.code in (o.I32_CONST, o.I64_CONST):
            value &= 0xFFFFFFFF if at.op.code == o.I32_CONST else _MASK
        end = ends.get(i, -1)
        results = int(at.op.immediate == "block" and value != o.EMPTY)
        out.append((at.op.code, value, at.op.fuel, end, elses[i] + 1 if i in elses else end, results, at.offset))
    return out


class _Run:
    """One run: the calls and the fuel so far."""

    __slots__ = ("calls", "fuel", "functions", "imports", "limit", "trace")

    def __init__(self, functions: tuple[_Function, ...], imports: tuple[str, ...], limit: int) -> None:
        self.functions, self.imports, self.limit = functions, imports, limit
        self.calls: list[Call] = []
        self.fuel = 0
        self.trace: list[tuple[int, bool]] | None = None

    def enter(self, index: int, types: Sections, stack: list[int]) -> None:
        """Call a function: its arguments leave the stack, its results come onto it."""
        type_ = types.function_type(index)
        assert type_ is not None, "the module was verified"
        first = len(stack) - len(type_.params)
        args = stack[first:]
        del stack[first:]
        if index < len(self.imports):
            self.calls.append(Call(self.imports[index], tuple(_signed(a, 64) for a in args)))
            return
        function = self.functions[index - len(self.imports)]
        if self.fuel >= self.limit:
            raise Trap("fuel")
        self.fuel += o.FUEL_PER_ENTRY
        stack += self.body(function, args + [0] * function.locals, types)

    def body(self, function: _Function, local: list[int], types: Sections) -> list[int]:
        """Run one body to its end; the results. One branch a kind of instruction, the most frequent first."""
        stack: list[int] = []
        labels: list[tuple[int, int, int]] = []  # (where its end is, height of the stack, results)
        pc, steps, trace = 0, function.steps, self.trace
        while True:
            code, value, fuel, end, otherwise, results, offset = steps[pc]
            pc += 1
            self.fuel += fuel
            if trace is not None:
                trace.append((offset, bool(stack and stack[-1])))
            if code == o.LOCAL_GET:
                stack.append(local[value])
            elif code in (o.I64_CONST, o.I32_CONST):
                stack.append(value)
            elif code in _BINARY:
                right = stack.pop()
                stack[-1] = _BINARY[code](stack[-1], right)
            elif code == o.LOCAL_SET:
                local[value] = stack.pop()
            elif code == o.LOCAL_TEE:
                local[value] = stack[-1]
            elif code in (o.IF, o.BLOCK):
                taken = code == o.BLOCK or stack.pop()
                labels.append((end, len(stack), results))
                pc = pc if taken else otherwise
            elif code == o.END:
                if not labels:
                    return stack
                labels.pop()
            elif code == o.ELSE:
                pc = end
            elif code in _UNARY:
                stack[-1] = _UNARY[code](stack[-1])
            elif code == o.SELECT:
                condition, second = stack.pop(), stack.pop()
                stack[-1] = stack[-1] if condition else second
            elif code in (o.BR, o.BR_IF):
                if code == o.BR_IF and not stack.pop():
                    continue
                if value >= len(labels):
                    return stack[len(stack) - function.results :]
                del labels[len(labels) - value :]
                pc, height, keep = labels[-1]
                stack[height:] = stack[len(stack) - keep :]
            elif code == o.RETURN:
                return stack[len(stack) - function.results :]
            elif code == o.CALL:
                self.enter(value, types, stack)
            elif code == o.DROP:
                stack.pop()
            elif code == o.UNREACHABLE:
                raise Trap("unreachable")
            else:
                assert code == o.NOP, "the module was verified"


class Interpreter:
    """Decides with one module. Raises ModuleError on construction where the module does not verify."""

    def __init__(self, wasm: bytes) -> None:
        self.info: ModuleInfo = verify_module(wasm)
        self._module = take_apart(wasm)
        self._imports = tuple(name for _, name, _ in self._module.imports)
        pairs = zip(self._module.functions, self._module.bodies, strict=True)
        self._functions = tuple(_prepared(type_, body) for type_, body in pairs)
        self._entries = dict(self._module.exports)

    def run(
        self,
        event: str,
        args: tuple[int, ...],
        *,
        fuel_limit: int | None = None,
        trace: list[tuple[int, bool]] | None = None,
    ) -> Decided:
        """Decide once. `args` are the raw i64 of event, parameters and slots; see `ModuleInfo.arguments`.

        ValueError: no handler for the event, or another number of arguments. Trap: the handler did not return.
        `fuel_limit` is the proven bound plus one unless told. `trace` receives (offset, condition) of every step.
        """
        handler = self.info.handlers.get(event)
        if handler is None:
            raise ValueError(f"the module does not handle {event}")
        if len(args) != handler.arity:
            raise ValueError(f"{event} takes {handler.arity} arguments here, not {len(args)}")
        limit = handler.fuel_bound + 1 if fuel_limit is None else fuel_limit
        run = _Run(self._functions, self._imports, limit)
        run.trace = trace
        run.enter(self._entries[EXPORT + event], self._module, [a & _MASK for a in args])
        return Decided(tuple(run.calls), run.fuel)
