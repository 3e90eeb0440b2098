"""The module verifier: from one good module, each broken rule of the profile is refused, by exactly its own error."""

from __future__ import annotations

import pytest
import wasmtime

from pointcall_runbook import ModuleError, verify_module
from pointcall_runbook import binary as b
from pointcall_runbook.meta import Meta
from pointcall_runbook.module import MAX_FUEL
from pointcall_runbook.sections import MAX_FUNCTIONS, MAX_LOCALS, MAX_MODULE_BYTES

TIMER = "i64 i64 i64 i64"  # at, tag, service, restarts
IMPORT = '(import "rb1" "again" (func (param i64 i64)))'
BODY = "(call 0 (local.get 0) (i64.const 7))"
EXPORT = '(export "decide_Timer" (func 1))'


def text(body: str = BODY, *, head: str = IMPORT, tail: str = EXPORT, params: str = TIMER, locals_: str = "") -> bytes:
    """A module in text form, one part of it replaced."""
    where = f"(func (param {params}) {locals_} {body})"
    return bytes(wasmtime.wat2wasm(f"(module {head} {where} {tail})"))


def refused(wasm: bytes) -> str:
    with pytest.raises(ModuleError) as caught:
        verify_module(wasm)
    return caught.value.id


def sections(wasm: bytes) -> dict[int, bytes]:
    """The content of each section of a module."""
    reader, out = b.Reader(wasm, 8), {}
    while not reader.done:
        number, part = reader.byte(), reader.part()
        out[number] = part.take(part.end - part.at)
    return out


def put_together(parts: list[tuple[int, bytes]]) -> bytes:
    return b.HEADER + b"".join(b.section(number, body) for number, body in parts)


GOOD = text()
PARTS = sections(GOOD)


def test_the_good_one_is_good() -> None:
    info = verify_module(GOOD)
    assert info.capabilities == ("again",)
    assert info.handlers["Timer"].arity == 4
    assert info.fuel_bound == info.handlers["Timer"].fuel_bound == 4  # entry, get, const, call
    assert (info.compiler, info.source_sha256, info.parameters, info.slots) == (None, None, (), ())
    assert put_together(list(PARTS.items())) == GOOD


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_each_truncation_is_refused(length: int) -> None:
    refused(GOOD[:length])


@pytest.mark.parametrize(
    ("instruction", "id"),
    [
        ("(loop)", "module.opcode"),
        ("(drop (f64.const 1))", "module.opcode"),
        ("(drop (f32.convert_i64_s (i64.const 1)))", "module.opcode"),
        ("(drop (ref.null func))", "module.opcode"),
        ("(drop (i64.trunc_sat_f64_s (f64.const 1)))", "module.opcode"),
        ("(drop (v128.const i64x2 0 0))", "module.opcode"),
        ("(drop (select (result i64) (i64.const 1) (i64.const 1) (i32.const 1)))", "module.opcode"),
        ("(block (br_table 0 (i32.const 0)))", "module.opcode"),
        ("(block (result f64) unreachable) drop", "module.type"),
        ("(drop (i64.add (i64.const 1) (i32.const 1)))", "module.stack"),
        ("i64.const 1", "module.stack"),
        ("i64.add drop", "module.stack"),
        ("(block i64.const 1)", "module.stack"),
        ("(block (result i64)) drop", "module.stack"),
        ("(drop (if (result i64) (i32.const 1) (then (i64.const 1))))", "module.stack"),
        ("(if (i64.const 1) (then))", "module.stack"),
        ("(block (result i64) (br 0 (i32.const 1))) drop", "module.stack"),
        ("(drop (select (i64.const 1) (i32.const 1) (i32.const 1)))", "module.stack"),
        ("(local.set 0 (i32.const 1))", "module.stack"),
        ("(call 0 (i64.const 1))", "module.stack"),
        ("(return) (drop (i64.add (i32.const 1)))", "module.stack"),
        ("(drop (local.get 4))", "module.locals"),
        ("(local.set 4 (i64.const 1))", "module.locals"),
        ("(br 1)", "module.nesting"),
        ("(call 1 (i64.const 1) (i64.const 1) (i64.const 1) (i64.const 1))", "module.recursion"),
        ("(call 2)", "module.function"),
        ("(block " * 65 + ")" * 65, "module.nesting"),
        ("(drop (i64.const 1))" * (MAX_FUEL + 1), "module.size"),
        ("nop " * (MAX_MODULE_BYTES), "module.size"),
    ],
)
def test_one_wrong_instruction_fails_exactly_one_rule(instruction: str, id: str) -> None:
    assert refused(text(BODY + instruction)) == id


@pytest.mark.parametrize("depth", [0, 63, 64])
def test_what_is_just_allowed(depth: int) -> None:
    verify_module(text(BODY + "(block " * depth + ")" * depth))


@pytest.mark.parametrize(
    ("head", "id"),
    [
        ('(import "env" "again" (func (param i64 i64)))', "module.import"),
        ('(import "rb1" "reboot" (func (param i64 i64)))', "module.import"),
        ('(import "rb1" "again" (func (param i64)))', "module.import"),
        ('(import "rb1" "again" (func (param i64 i64) (result i64)))', "module.import"),
        ('(import "rb1" "again" (memory 1))' + IMPORT, "module.import"),
        ('(import "rb1" "again" (global i64))' + IMPORT, "module.import"),
        (IMPORT + "(memory 1)", "module.section"),
        (IMPORT + "(table 1 funcref)", "module.section"),
        (IMPORT + "(global i64 (i64.const 1))", "module.section"),
        (IMPORT + '(memory 1) (data (i32.const 0) "x")', "module.section"),
    ],
)
def test_one_wrong_part_fails_exactly_one_rule(head: str, id: str) -> None:
    assert refused(text(head=head)) == id


@pytest.mark.parametrize(
    ("tail", "id"),
    [
        ("", "module.export"),
        ('(export "main" (func 1))', "module.export"),
        ('(export "decide_" (func 1))', "module.export"),
        ('(export "decide_Reboot" (func 1))', "module.export"),
        ('(export "decide_OomKilled" (func 0))', "module.export"),
        ('(export "decide_CircuitOpened" (func 1))', "module.export"),
        (EXPORT + "(func)", "module.function"),
        (EXPORT + "(func) (start 2)", "module.section"),
        (EXPORT + "(func)" * MAX_FUNCTIONS, "module.function"),
    ],
)
def test_one_wrong_export_fails_exactly_one_rule(tail: str, id: str) -> None:
    assert refused(text(tail=tail)) == id


def test_floats_and_two_results_have_no_place_in_a_type() -> None:
    assert refused(text(params="i64 i64 i64 f64")) == "module.type"
    assert refused(text("", head="", params=f"{TIMER}) (result i64 i64", tail="")) == "module.type"
    assert refused(text(BODY, locals_="(local f32)")) == "module.locals"
    assert refused(text(BODY, locals_="(local" + " i64" * MAX_LOCALS + ")")) == "module.locals"


def test_twice_the_same_import_or_export() -> None:
    twice = "(call 1 (i64.const 1) (i64.const 1))" + BODY
    assert refused(text(twice, head=IMPORT * 2, tail='(export "decide_Timer" (func 2))')) == "module.import"
    entry = b.name("decide_Timer") + b"\0\x01"
    assert refused(put_together(list((PARTS | {b.EXPORT: b.vector([entry, entry])}).items()))) == "module.export"


def with_(number: int, body: bytes) -> bytes:
    return put_together(sorted((PARTS | {number: body}).items()))


@pytest.mark.parametrize(
    ("wasm", "id"),
    [
        (b"", "module.header"),
        (b"\0asm\x02\0\0\0" + GOOD[8:], "module.header"),
        (GOOD + b"\0" * MAX_MODULE_BYTES, "module.size"),
        (with_(b.TYPE, PARTS[b.TYPE] + b"\0"), "module.section"),
        (put_together([*PARTS.items(), (b.TYPE, PARTS[b.TYPE])]), "module.section"),
        (put_together([(13, b""), *PARTS.items()]), "module.section"),
        (put_together([*PARTS.items(), (b.CUSTOM, b.name("name"))]), "module.section"),
        (put_together([*PARTS.items(), (b.CUSTOM, b"\x02\xff\xff")]), "module.name"),
        (with_(b.FUNCTION, b.vector([b"\0", b"\0"])), "module.section"),
        (with_(b.FUNCTION, b.vector([b"\x07"])), "module.type"),
        (with_(b.FUNCTION, b"\x81\0\x01"), "module.number"),
        (with_(b.CODE, b"\x80\x80\x80\x80\x80\0"), "module.number"),
        (with_(b.CODE, b.vector([b.sized(b"\0")])), "module.nesting"),
        (with_(b.CODE, b.vector([b.sized(b"\0\x0b\x0b")])), "module.nesting"),
        (with_(b.CODE, b.vector([b.sized(b"\0\x05\x0b")])), "module.nesting"),
        (with_(b.CODE, b.vector([b.sized(b"\0\x42\x80\0\x1a\x0b")])), "module.number"),
        (with_(b.CODE, b.vector([b.sized(b"\x01\0\x7e\x0b")])), "module.locals"),
        (with_(b.TYPE, b.vector([b"\x5e\0\0"] * 2)), "module.type"),
    ],
)
def test_bytes_that_no_text_form_gives(wasm: bytes, id: str) -> None:
    assert refused(wasm) == id


def test_a_short_body_that_costs_too_much() -> None:
    """Functions that call functions: 2**15 times one instruction, in a few hundred bytes."""
    calls = "".join(f"(func (call {i + 1}) (call {i + 1}))" for i in range(2, 17)) + "(func nop)"
    assert refused(text(f"{BODY}(call 2)", tail=EXPORT + calls)) == "module.fuel"


META = Meta(("Timer",), ("again",))


def with_meta(meta: Meta) -> bytes:
    return put_together([*PARTS.items(), (b.CUSTOM, b.name("rb.meta") + meta.encode())])


def test_metadata_that_agrees_is_read() -> None:
    assert verify_module(with_meta(META)).capabilities == ("again",)


@pytest.mark.parametrize(
    "meta",
    [
        Meta(("OomKilled",), ("again",)),
        Meta((), ("again",)),
        Meta(("Timer",), ()),
        Meta(("Timer",), ("again", "kill")),
        Meta(("Timer",), ("again",), vocabulary="0" * 64),
    ],
)
def test_metadata_that_lies_is_refused(meta: Meta) -> None:
    assert refused(with_meta(meta)) == "module.meta"


def test_two_metadata_sections_are_one_too_many() -> None:
    section = (b.CUSTOM, b.name("rb.meta") + META.encode())
    assert refused(put_together([section, *PARTS.items(), section])) == "module.section"
