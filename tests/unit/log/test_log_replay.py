"""Replay: the same module and inputs make the same decision; everything else is a difference with a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.entry import Entry
from pointcall_attest.receipt import Receipt
from pointcall_attest.replay import Replayed, interpreter, replay, replay_all
from pointcall_executor.journal import JournalError
from tests.unit.log import world


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Entry]]:
    node = world.Node.boot(tmp_path_factory.mktemp("node"))
    for number in range(6):
        node.run(number)
    yield node.journal.runs()
    node.journal.close()


def test_all_runs_are_identical(entries: list[Entry]) -> None:
    replayed = list(replay_all(entries, lambda _: world.module()))
    assert [r.run for r in replayed] == [e.run for e in entries]
    assert all(r.identical for r in replayed)


def test_both_implementations_agree(entries: list[Entry]) -> None:
    wasm = pytest.importorskip("pointcall_executor.cli.replay", reason="the Wasmtime runner is not there")
    assert all(r.identical for r in replay_all(entries, lambda _: world.module(), wasm.wasmtime))


def change(receipt: Receipt, part: str, **over: Any) -> Replayed:
    spoiled = receipt.model_copy(update={part: getattr(receipt, part).model_copy(update=over)})
    return replay(spoiled, interpreter(world.module()))


def test_each_difference_has_a_name(entries: list[Entry]) -> None:
    receipt = entries[0].receipt()
    values = receipt.inputs.values
    cases = {
        "calls": change(receipt, "inputs", values=(*values[:-2], values[-2] + 1, values[-1])),
        "fuel": change(receipt, "decision", fuel_used=receipt.decision.fuel_used + 1),
        "trap": change(receipt, "decision", trap="overflow"),
        "inputs": change(receipt, "inputs", values=values[1:]),
    }
    for what, replayed in cases.items():
        assert what in [d.what for d in replayed.differences], what
    unknown = change(receipt, "inputs", handler="decide_Timer")
    assert [d.what for d in unknown.differences] == ["inputs"]


def test_too_little_fuel_is_a_trap(entries: list[Entry]) -> None:
    replayed = change(entries[0].receipt(), "inputs", fuel_limit=0)
    assert ("trap", "none", "fuel") in [(d.what, d.recorded, d.again) for d in replayed.differences]


def test_a_missing_or_changed_module_is_a_difference_of_its_runs(entries: list[Entry]) -> None:
    def missing(sha256: str) -> bytes:
        raise JournalError("no content", id="journal.no_blob")

    for lookup in (missing, lambda _: world.module() + b"\0", lambda _: b""):
        replayed = list(replay_all(entries, lookup))
        assert [[d.what for d in r.differences] for r in replayed] == [["module"]] * len(entries)


def test_a_wrong_subject_digest_is_a_difference(entries: list[Entry]) -> None:
    spoiled = replace(entries[0], subject="0" * 64)
    assert [d.what for r in replay_all([spoiled], lambda _: world.module()) for d in r.differences] == ["subject"]


def test_ten_thousand_runs(entries: list[Entry]) -> None:
    many = (entries[i % len(entries)] for i in range(10_000))
    assert all(r.identical for r in replay_all(many, lambda _: world.module()))


def test_the_result_prints(entries: list[Entry], tmp_path: Path) -> None:
    replayed = change(entries[0].receipt(), "decision", fuel_used=1)
    assert replayed.as_dict()["identical"] is False
    assert "fuel: recorded 1" in str(replayed.differences[0])
