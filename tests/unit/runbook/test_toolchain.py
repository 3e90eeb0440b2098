"""Modules that other toolchains made: the shipped examples are built, adopted, verified, and decide as they say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
import wasmtime

from pointcall_executor.wasm import Runner
from pointcall_runbook import Interpreter, ModuleError, compile_source, verify_module
from pointcall_runbook.adopt import adopt
from pointcall_runbook.vocabulary import (
    NO_SERVICE,
    Address,
    Call,
    CircuitOpened,
    DiskError,
    Level,
    channel,
    service,
    slots,
)
from tests.unit.runbook.programs import arguments

EXAMPLES = Path(__file__).resolve().parents[3] / "runbooks" / "examples"
OPS = channel("ops").number


@pytest.fixture(scope="module")
def from_c(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if shutil.which("clang") is None or not any(shutil.which(f"wasm-ld{v}") for v in ("", "-14", "-15", "-16", "-19")):
        pytest.skip("clang or wasm-ld is not installed")
    out = tmp_path_factory.mktemp("c") / "raw.wasm"
    flags = ("--target=wasm32", "-O2", "-nostdlib", "-Wl,--no-entry", "-Wl,--strip-all", "-Wl,--compress-relocations")
    subprocess.run(["clang", *flags, "-o", out, EXAMPLES / "c" / "recreate.c"], check=True, timeout=60)
    return out.read_bytes()


def test_a_module_from_clang_decides_like_its_source(from_c: bytes) -> None:
    with pytest.raises(ModuleError):
        verify_module(from_c)  # its linker adds a memory
    wasm = adopt(from_c)
    info, chance = verify_module(wasm), Random(3)
    assert info.capabilities == ("notify", "recreate")
    runner, interpreter = Runner(wasm, info), Interpreter(wasm)
    for _ in range(500):
        args = arguments(chance, info, "CircuitOpened")
        decided = runner.decide("CircuitOpened", args)
        assert interpreter.run("CircuitOpened", args) == decided
        assert decided.fuel <= info.fuel_bound
    event = CircuitOpened(5, Address.parse("::1"), 80, 3, False, 11, service("api"), 1)
    grace = 2_000_000_000 + 1_000_000
    assert runner.decide("CircuitOpened", slots(event)).calls == (Call("recreate", (service("api").number, grace)),)


@pytest.fixture(scope="module")
def from_assemblyscript(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    asc = shutil.which("asc", path=os.pathsep.join((f"{os.environ.get('NODE_PATH', '')}/.bin", os.environ["PATH"])))
    if asc is None or shutil.which("node") is None:
        pytest.skip("node or assemblyscript is not installed")
    out = tmp_path_factory.mktemp("asc") / "disk.wasm"
    flags = ("-O2", "--runtime", "stub", "--noExportMemory", "--use", "abort=")
    subprocess.run([asc, EXAMPLES / "assemblyscript" / "disk.ts", "-o", out, *flags], check=True, timeout=120)
    return out.read_bytes()


def test_a_module_from_assemblyscript_decides_like_its_source(from_assemblyscript: bytes) -> None:
    info, chance = verify_module(from_assemblyscript), Random(4)
    assert info.capabilities == ("escalate", "notify")
    runner, interpreter = Runner(from_assemblyscript, info), Interpreter(from_assemblyscript)
    for _ in range(500):
        args = arguments(chance, info, "DiskError")
        decided = runner.decide("DiskError", args)
        assert interpreter.run("DiskError", args) == decided
        assert decided.fuel <= info.fuel_bound
    api = service("api")
    assert runner.decide("DiskError", slots(DiskError(1, 8, 5, api))).calls == (
        Call("notify", (OPS, Level.CRITICAL.value, 5)),
    )
    assert runner.decide("DiskError", slots(DiskError(1, 8, 5, NO_SERVICE))).calls == (Call("escalate", (OPS, 5)),)
    assert runner.decide("DiskError", slots(DiskError(1, 8, 4, NO_SERVICE))).calls == ()


def test_a_module_written_by_hand() -> None:
    wasm = adopt(bytes(wasmtime.wat2wasm((EXAMPLES / "wat" / "disk.wat").read_text())))
    interpreter = Interpreter(wasm)
    assert interpreter.run("DiskError", slots(DiskError(1, 8, 5, NO_SERVICE))).calls == (Call("escalate", (OPS, 5)),)
    assert interpreter.run("DiskError", slots(DiskError(1, 8, 4, NO_SERVICE))).calls == ()


def test_adopting_changes_nothing_that_is_in_the_profile() -> None:
    source = "from pointcall_runbook import Decision, Timer, runbook\n"
    wasm = compile_source(source + "@runbook\ndef due(e: Timer) -> Decision:\n    return []\n").wasm
    assert adopt(wasm) == wasm
    with pytest.raises(ModuleError):
        adopt(b"not wasm")
