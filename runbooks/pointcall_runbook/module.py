"""The module verifier: bytes to capabilities and a proven worst-case fuel. It knows nothing of the compiler.

What it proves: the shape of the `rb1` profile, well-typed code, no loop, no recursion, imports and exports with the
signatures of the vocabulary, the exact bound. What it cannot prove for a module of another toolchain: argument ranges
and the number of actions. The host checks those on every run (`Call.typed`, `MAX_ACTIONS`). Spec: docs/spec/rb1.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pointcall_runbook.binary import ModuleError
from pointcall_runbook.body import Measured, measure
from pointcall_runbook.meta import ABI, Meta, Parameter, Slot
from pointcall_runbook.opcode import I64
from pointcall_runbook.sections import FunctionType, Sections, take_apart
from pointcall_runbook.vocabulary import ACTIONS, EVENTS, arity, digest

MAX_FUEL: Final = 20_000  # about 15 us of CPU
MAX_STACK_SLOTS: Final = 1024  # 8 bytes each, twice where they are passed on: a quarter of the engine's 64 KiB
NAMESPACE: Final = "rb1"
EXPORT: Final = "decide_"


@dataclass(frozen=True, slots=True)
class Handler:
    """One export. `capabilities` are those that its code can reach."""

    event: str
    arity: int
    fuel_bound: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """All that is known of a verified module. `fuel_bound` is the highest of its handlers."""

    abi: int
    handlers: Mapping[str, Handler]
    capabilities: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    slots: tuple[Slot, ...]
    services: tuple[str, ...]
    channels: tuple[str, ...]
    fuel_bound: int
    size: int
    sha256: str
    source_sha256: str | None
    compiler: str | None

    def arguments(self, event: tuple[int, ...], parameters: tuple[int, ...], slots: tuple[int, ...]) -> tuple[int, ...]:
        """The arguments of a handler. ValueError where a parameter or slot is missing or out of its range."""
        rows: tuple[Parameter | Slot, ...] = (*self.parameters, *self.slots)
        for row, value in zip(rows, (*parameters, *slots), strict=True):
            if not row.lo <= value <= row.hi:
                raise ValueError(f"{row.name} is {value}, outside {row.lo}..{row.hi}")
        return event + parameters + slots

    @property
    def defaults(self) -> tuple[int, ...]:
        """The parameters as the source sets them."""
        return tuple(p.default for p in self.parameters)

    @property
    def initial(self) -> tuple[int, ...]:
        """The remembered slots before anything was remembered."""
        return tuple(s.initial for s in self.slots)


def verify_module(wasm: bytes) -> ModuleInfo:
    """Raises ModuleError for everything outside the profile, and nothing else."""
    module = take_apart(wasm)
    meta = Meta() if module.meta is None else Meta.parse(module.meta)
    _check_imports(module)
    entries = _check_exports(module, meta)
    handlers = {event: _handler(module, event, index) for event, index in sorted(entries.items())}
    _check_no_dead_function(module, entries)
    if module.meta is not None:
        _check_meta(module, meta, entries)
    return ModuleInfo(
        ABI,
        handlers,
        tuple(sorted(name for _, name, _ in module.imports)),
        meta.parameters,
        meta.slots,
        meta.services,
        meta.channels,
        max(h.fuel_bound for h in handlers.values()),
        len(wasm),
        hashlib.sha256(wasm).hexdigest(),
        meta.source_sha256,
        meta.compiler,
    )


def _check_imports(module: Sections) -> None:
    seen = set()
    for namespace, name, type_ in module.imports:
        shown = f"{namespace}.{name}"[:80]
        if namespace != NAMESPACE or name not in ACTIONS or name in seen:
            raise ModuleError(
                "an import is not an action, or is there twice",
                id="module.import",
                want=f"{NAMESPACE}.<action>, each once",
                got=shown,
                hint="`pointcall explain actions` lists them",
            )
        wanted = arity(ACTIONS[name])
        if type_ != FunctionType((I64,) * wanted, ()):
            raise ModuleError(
                "an import has another signature", id="module.import", want=f"{wanted} x i64, no result", got=shown
            )
        seen.add(name)


def _check_exports(module: Sections, meta: Meta) -> dict[str, int]:
    """Event name to function index."""
    entries: dict[str, int] = {}
    for title, index in module.exports:
        event = title.removeprefix(EXPORT)
        if event == title or event not in EVENTS or event in entries:
            raise ModuleError(
                "an export is not a handler, or is there twice",
                id="module.export",
                want=f"{EXPORT}<Event>, each once",
                got=title[:80],
                hint="`pointcall explain events` lists them",
            )
        wanted = arity(EVENTS[event]) + len(meta.parameters) + len(meta.slots)
        if index < len(module.imports) or module.function_type(index) != FunctionType((I64,) * wanted, ()):
            raise ModuleError(
                "a handler has another signature", id="module.export", want=f"{wanted} x i64, no result", got=title
            )
        entries[event] = index
    if not entries:
        raise ModuleError("the module handles no event", id="module.export", want=f"{EXPORT}<Event>", got="none")
    return entries


@dataclass(slots=True)
class _Bounds:
    """Bounds of functions, each measured once, callees first. `slots` are those of a function and what it calls."""

    module: Sections
    done: dict[int, Measured] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)

    def of(self, index: int) -> int:
        own = index - len(self.module.imports)
        if own < 0:
            return 0
        if index in self.active:
            raise ModuleError("a function calls itself", id="module.recursion", got=f"function {index}")
        if index not in self.done:
            self.active.add(index)
            self.done[index] = measure(self.module, self.module.functions[own], self.module.bodies[own], self.of)
            self.active.discard(index)
            self._add_slots(index)
        return self.done[index].bound

    def _add_slots(self, index: int) -> None:
        """Wasmtime would trap in the middle of a decision where the interpreter does not."""
        measured = self.done[index]
        total = measured.slots + max((self.slots.get(callee, 0) for callee in measured.calls), default=0)
        if total > MAX_STACK_SLOTS:
            raise ModuleError(
                "the functions that call each other hold too many values at once",
                id="module.depth",
                want=f"at most {MAX_STACK_SLOTS}",
                got=f"{total} at function {index}",
                hint="fewer locals or parameters, or one function instead of a chain",
            )
        self.slots[index] = total


def _reachable(module: Sections, index: int) -> tuple[_Bounds, set[int]]:
    bounds = _Bounds(module)
    bounds.of(index)
    return bounds, {callee for m in bounds.done.values() for callee in m.calls} | {index}


def _handler(module: Sections, event: str, index: int) -> Handler:
    bounds, reached = _reachable(module, index)
    bound = bounds.of(index)
    if bound > MAX_FUEL:
        raise ModuleError(
            "the worst case costs too much",
            id="module.fuel",
            want=f"at most {MAX_FUEL}",
            got=f"{bound} in {EXPORT}{event}",
        )
    used = tuple(sorted(module.imports[i][1] for i in reached if i < len(module.imports)))
    return Handler(event, len(module.functions[index - len(module.imports)].params), bound, used)


def _check_no_dead_function(module: Sections, entries: Mapping[str, int]) -> None:
    reached = {i for index in entries.values() for i in _reachable(module, index)[1]}
    for index in range(len(module.imports), len(module.imports) + len(module.functions)):
        if index not in reached:
            raise ModuleError("a function is never called", id="module.function", got=f"function {index}")


def _check_meta(module: Sections, meta: Meta, entries: Mapping[str, int]) -> None:
    facts: tuple[tuple[str, object, object], ...] = (
        ("events", tuple(sorted(entries)), meta.events),
        ("capabilities", tuple(sorted(name for _, name, _ in module.imports)), meta.capabilities),
        ("vocabulary", digest(), meta.vocabulary or digest()),
    )
    for what, want, got in facts:
        if want != got:
            raise ModuleError(
                f"rb.meta disagrees with the module: {what}", id="module.meta", want=f"{want}", got=f"{got}"
            )
