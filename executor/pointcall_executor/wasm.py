"""The runner: one fresh Wasmtime store and instance for each decision, on the raw C API of the `wasmtime` wheel.

Not here: what a decision may do (core/guard.py), and whether a module may be armed (attest/admission.py). A module
reaches nothing: its only imports are the actions it was verified for, and those only collect their arguments.
Settings and their reasons: docs/spec/rb1.md, section "Engine".

Ownership: each address that is passed to the library belongs to an object that the runner holds; stores, traps and
errors are deleted where they are received. The library is opened with the GIL held, so a decision is atomic for
Python threads. One runner is used by one thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from ctypes import c_bool, c_char_p, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import wasmtime
from wasmtime import _ffi as ffi

from pointcall_runbook.decision import Decided, Trap, TrapKind
from pointcall_runbook.module import EXPORT, NAMESPACE, ModuleInfo
from pointcall_runbook.vocabulary import ACTIONS, Call, arity

STACK_BYTES: Final = 65_536

_SETTINGS: Final[Mapping[str, bool | int | str]] = {
    "strategy": "cranelift",  # Winch has had a sandbox escape
    "consume_fuel": True,
    "cranelift_nan_canonicalization": True,
    "max_wasm_stack": STACK_BYTES,
    "signals_based_traps": False,  # no SIGSEGV, SIGFPE or SIGILL handler in a Python process
    "memory_reservation": 0,
    "memory_guard_size": 0,
    "memory_reservation_for_growth": 0,
    "memory_init_cow": False,
    "parallel_compilation": False,
    **dict.fromkeys(
        (
            *("wasm_threads", "wasm_tail_call", "wasm_simd", "wasm_relaxed_simd", "wasm_bulk_memory"),
            *("wasm_multi_value", "wasm_multi_memory", "wasm_memory64", "wasm_exceptions", "wasm_function_references"),
            *("wasm_gc", "wasm_wide_arithmetic", "wasm_custom_page_sizes", "wasm_stack_switching"),
            *("wasm_reference_types", "wasm_component_model", "gc_support", "shared_memory"),
        ),
        False,
    ),
}
# Only the C API has these. A contradictory configuration aborts the process, so the order and the set are fixed.
_C_SETTINGS: Final[Mapping[str, bool]] = dict.fromkeys(
    (
        *("wasm_component_model_async", "wasm_component_model_more_async_builtins"),
        *("wasm_component_model_async_stackful", "concurrency_support", "wasm_branch_hinting", "wasm_compact_imports"),
    ),
    False,
)
_NO_JIT: Final[Mapping[str, str]] = {"target": "pulley64"}  # Wasmtime's interpreter: no executable pages

_KINDS: Final[Mapping[int, TrapKind]] = {6: "overflow", 7: "division by zero", 9: "unreachable", 11: "fuel"}


class Trapped(Trap):
    """The handler did not return. `code` is Wasmtime's; `runbook.trap` is the id."""

    def __init__(self, code: int, kind: TrapKind) -> None:
        super().__init__(kind)
        self.code = code


def engine_settings(*, no_jit: bool = False) -> dict[str, bool | int | str]:
    """Every setting of the engine and the version of the library, as plain data."""
    chosen = _NO_JIT if no_jit else {}
    return {"wasmtime": version("wasmtime"), **_SETTINGS, **_C_SETTINGS, **chosen}


def engine_digest(*, no_jit: bool = False) -> str:
    """SHA-256 (hex) of the canonical JSON of `engine_settings`; it goes into each epoch and receipt."""
    text = json.dumps(engine_settings(no_jit=no_jit), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def make_engine(*, no_jit: bool = False) -> wasmtime.Engine:
    """An engine with exactly `engine_settings`. `no_jit` uses Pulley, for hosts that forbid executable pages."""
    config = wasmtime.Config()
    for name, value in {**_SETTINGS, **(_NO_JIT if no_jit else {})}.items():
        setattr(config, name, value)
    for name, value in _C_SETTINGS.items():
        getattr(ffi, f"wasmtime_config_{name}_set")(config.ptr(), value)
    return wasmtime.Engine(config)


@functools.cache
def shared_engine() -> wasmtime.Engine:
    """The engine of this process: one, so that type indices are never mixed up between two."""
    return make_engine()


@dataclass(frozen=True, slots=True)
class _Library:
    """The nine functions of a decision, with integer addresses."""

    store_new: Callable[..., Any]
    store_context: Callable[..., Any]
    store_delete: Callable[..., Any]
    set_fuel: Callable[..., Any]
    get_fuel: Callable[..., Any]
    instantiate: Callable[..., Any]
    export: Callable[..., Any]
    call: Callable[..., Any]
    define: Callable[..., Any]
    trap_code: Callable[..., Any]
    trap_delete: Callable[..., Any]
    error_delete: Callable[..., Any]


_P: Final = c_void_p
_SIGNATURES: Final[Mapping[str, tuple[str, Any, tuple[Any, ...]]]] = {
    "store_new": ("wasmtime_store_new", _P, (_P, _P, _P)),
    "store_context": ("wasmtime_store_context", _P, (_P,)),
    "store_delete": ("wasmtime_store_delete", None, (_P,)),
    "set_fuel": ("wasmtime_context_set_fuel", _P, (_P, c_uint64)),
    "get_fuel": ("wasmtime_context_get_fuel", _P, (_P, _P)),
    "instantiate": ("wasmtime_instance_pre_instantiate", _P, (_P, _P, _P, _P)),
    "export": ("wasmtime_instance_export_get", c_bool, (_P, _P, _P, c_size_t, _P)),
    "call": ("wasmtime_func_call_unchecked", _P, (_P, _P, _P, c_size_t, _P)),
    "define": (
        "wasmtime_linker_define_func_unchecked",
        _P,
        (_P, c_char_p, c_size_t, c_char_p, c_size_t, _P, _P, _P, _P),
    ),
    "trap_code": ("wasmtime_trap_code", c_bool, (_P, _P)),
    "trap_delete": ("wasm_trap_delete", None, (_P,)),
    "error_delete": ("wasmtime_error_delete", None, (_P,)),
}


@functools.cache
def _library() -> _Library:
    handle = ctypes.PyDLL(ffi.filename.as_posix())
    functions: dict[str, Callable[..., Any]] = {}
    for field, (name, result, arguments) in _SIGNATURES.items():
        function = handle[name]
        function.restype, function.argtypes = result, arguments
        functions[field] = function
    return _Library(**functions)


_CALLBACK: Final = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_void_p, ctypes.POINTER(c_int64), c_size_t)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One handler, ready to be called: its name and arguments lie in buffers that live as long as the runner."""

    name: ctypes.Array[ctypes.c_char]
    length: int
    buffer: ctypes.Array[ctypes.c_char]
    slots: int
    pack: Callable[..., None]
    arity: int
    fuel: int
    addresses: tuple[int, int]  # of name and buffer


def _entry(event: str, arguments: int, bound: int) -> _Entry:
    title = (EXPORT + event).encode()
    name = ctypes.create_string_buffer(title, len(title))
    slots = max(1, arguments)
    buffer = ctypes.create_string_buffer(16 * slots)  # a wasmtime_val_raw_t is 16 bytes, the i64 comes first
    pack = struct.Struct("<" + "q8x" * arguments).pack_into
    addresses = (ctypes.addressof(name), ctypes.addressof(buffer))
    return _Entry(name, len(title), buffer, slots, pack, arguments, bound + 1, addresses)


class Runner:
    """Decides with one verified module.

    Raises ValueError where `info` is not about these bytes, and wasmtime's errors where the engine refuses a module
    that the verifier accepted: then one of the two is wrong, and nothing is armed.
    """

    def __init__(self, wasm: bytes, info: ModuleInfo, *, engine: wasmtime.Engine | None = None) -> None:
        if hashlib.sha256(wasm).hexdigest() != info.sha256:
            raise ValueError("the verified module is another one")
        self.info = info
        self._library = _library()
        self._engine = shared_engine() if engine is None else engine
        self._module = wasmtime.Module(self._engine, wasm)
        self._linker = wasmtime.Linker(self._engine)
        self._calls: list[Call] = []
        self._kept = [self._define(name) for name in info.capabilities]
        self._pre = self._linker.instantiate_pre(self._module)
        self._entries = {h.event: _entry(h.event, h.arity, h.fuel_bound) for h in info.handlers.values()}
        self._instance = ffi.wasmtime_instance_t()
        self._extern = ffi.wasmtime_extern_t()
        self._trap, self._fuel = c_void_p(), c_uint64()
        self._fixed = self._addresses()

    def _define(self, name: str) -> tuple[object, object]:
        """Give the linker the collecting function of one action; it and its type must outlive the linker."""
        count = arity(ACTIONS[name])
        type_ = wasmtime.FuncType([wasmtime.ValType.i64()] * count, [])
        collect = self._calls.append

        def called(_env: int, _caller: int, raw: Any, _length: int) -> int:
            collect(Call(name, tuple(raw[0 : 2 * count : 2])))
            return 0

        callback = _CALLBACK(called)
        error = self._library.define(
            ctypes.cast(self._linker.ptr(), c_void_p),
            *(NAMESPACE.encode(), len(NAMESPACE), name.encode(), len(name)),
            *(ctypes.cast(type_.ptr(), c_void_p), ctypes.cast(callback, c_void_p), None, None),
        )
        if error:
            self._library.error_delete(error)
            raise ValueError(f"the action {name} cannot be linked")
        return callback, type_

    def _addresses(self) -> tuple[int, int, int, int, int, int, int]:
        engine = ctypes.cast(self._engine.ptr(), c_void_p).value
        pre = ctypes.cast(self._pre.ptr(), c_void_p).value
        assert engine is not None
        assert pre is not None
        extern = ctypes.addressof(self._extern)
        places = (ctypes.addressof(self._instance), extern, extern + ffi.wasmtime_extern_t.of.offset)
        return engine, pre, *places, ctypes.addressof(self._trap), ctypes.addressof(self._fuel)

    def decide(self, event: str, args: tuple[int, ...]) -> Decided:
        """Decide once. `args` are the raw i64 of event, parameters and slots.

        Raises KeyError for an event without a handler, ValueError for another number of arguments or one beyond 64
        bits, Trapped where the handler did not return. The calls are as the module made them: the caller checks
        their number, types, ranges and grants (`Call.typed`).
        """
        library, entry = self._library, self._entries[event]
        if len(args) != entry.arity:
            raise ValueError(f"{event} takes {entry.arity} arguments here, not {len(args)}")
        engine, pre, instance, extern, function, trap, left = self._fixed
        calls = self._calls
        calls.clear()
        try:
            entry.pack(entry.buffer, 0, *args)
        except struct.error as misfit:
            raise ValueError(f"an argument of {event} is not a signed 64-bit integer: {misfit}") from None
        name, buffer = entry.addresses
        store = library.store_new(engine, None, None)
        try:
            context = library.store_context(store)
            error = library.set_fuel(context, entry.fuel) or library.instantiate(pre, context, instance, trap)
            if error or self._trap.value:
                raise self._failed(error)
            if not library.export(context, instance, name, entry.length, extern):
                raise AssertionError("a verified handler is not exported")
            error = library.call(context, function, buffer, entry.slots, trap)
            if error or self._trap.value:
                raise self._failed(error)
            library.get_fuel(context, left)
            return Decided(tuple(calls), entry.fuel - self._fuel.value)
        finally:
            library.store_delete(store)

    def _failed(self, error: int | None) -> Exception:
        """Delete what the library handed over, forget the calls; the exception to raise."""
        self._calls.clear()
        if error:
            self._library.error_delete(error)
        if not self._trap.value:
            return AssertionError("the engine refused a call without a trap")
        code = c_uint8()
        known = self._library.trap_code(self._trap.value, ctypes.addressof(code))
        self._library.trap_delete(self._trap.value)
        self._trap.value = None
        number = code.value if known else -1
        kind = _KINDS.get(number)
        return (
            AssertionError(f"a trap that the profile cannot cause: {number}") if kind is None else Trapped(number, kind)
        )
