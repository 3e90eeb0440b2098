"""Deciding a recorded run again: receipt and module in, whether the decision is the same out. Pure; no capability.

The inputs in the receipt are all that a module can see, so the same module must make the same calls and use the same
fuel. The default runner is the plain Python interpreter: another implementation than the one that decided.
Not here: whether the receipt is authentic (pack.py). Spec: docs/spec/receipt.md section 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pointcall_attest.entry import Entry
from pointcall_attest.receipt import Receipt, subject_digest
from pointcall_runbook.decision import Decided, Trap
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.interpreter import Interpreter

_PREFIX: Final = "decide_"


class Runner(Protocol):
    """What can decide: `Interpreter` here, the Wasmtime runner in the executor."""

    def __call__(self, event: str, args: tuple[int, ...], fuel_limit: int) -> Decided:
        """Raises Trap, or ValueError where the module has no such handler or another number of arguments."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as recorded."""

    what: str
    recorded: str
    again: str

    def __str__(self) -> str:
        return f"{self.what}: recorded {self.recorded}, again {self.again}"


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result for one run. Check `identical`: an object is always true.

    `erased`: the inputs were deleted, so it cannot be decided again; it is then neither identical nor different.
    """

    run: str
    differences: tuple[Difference, ...]
    erased: bool = False

    @property
    def identical(self) -> bool:
        return not self.differences and not self.erased

    @property
    def different(self) -> bool:
        return bool(self.differences)

    def as_dict(self) -> dict[str, Any]:
        rows = [{"what": d.what, "recorded": d.recorded, "again": d.again} for d in self.differences]
        row: dict[str, Any] = {"run": self.run, "identical": self.identical, "differences": rows}
        return row | ({"erased": True} if self.erased else {})


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a decision was, recorded or made again."""

    calls: tuple[str, ...]
    fuel: int
    trap: str | None


def interpreter(module: bytes) -> Runner:
    """The runner in plain Python. PointcallError `module.*` if the bytes are no verified module."""
    machine = Interpreter(module)

    def decide(event: str, args: tuple[int, ...], fuel_limit: int) -> Decided:
        return machine.run(event, args, fuel_limit=fuel_limit)

    return decide


def replay(receipt: Receipt, runner: Runner) -> Replayed:
    """Decide the run of this receipt again with a runner of its module."""
    recorded = _Answer(
        tuple(_shown(c.action, c.args) for c in receipt.decision.calls),
        receipt.decision.fuel_used,
        receipt.decision.trap,
    )
    inputs = receipt.inputs
    try:
        decided = runner(inputs.handler.removeprefix(_PREFIX), inputs.values, inputs.fuel_limit)
    except Trap as trap:
        # a trap uses up nothing that both sides must count alike: Wasmtime reports the fuel of the whole block
        again = _Answer((), recorded.fuel, trap.kind)
    except ValueError as error:
        return Replayed(receipt.run.id, (Difference("inputs", f"{inputs.handler}, {len(inputs.values)}", str(error)),))
    else:
        again = _Answer(tuple(_shown(c.action, c.args) for c in decided.calls), decided.fuel, None)
    return Replayed(receipt.run.id, tuple(_differences(recorded, again)))


def replay_all(
    receipts: Iterable[Entry],
    module: Callable[[str], bytes],
    make_runner: Callable[[bytes], Runner] = interpreter,
) -> Iterator[Replayed]:
    """Replay the runs of receipt entries; `module` gives a module's bytes by SHA-256 (hex), asked once for each.

    A module that is missing, changed or no module is a difference of the runs that need it, never an exception.
    So are inputs or a decision that do not have the digest that the receipt's subject states. Runs whose inputs were
    erased are named as such.
    """
    runners: dict[str, Runner | Difference] = {}
    for entry in receipts:
        receipt = entry.receipt()
        if not entry.subject_holds:
            yield Replayed(receipt.run.id, (Difference("subject", entry.subject, subject_digest(entry.leaf)),))
            continue
        if entry.closed:
            yield Replayed(receipt.run.id, (), erased=True)
            continue
        sha256 = receipt.runbook.module
        if sha256 not in runners:
            runners[sha256] = _runner(sha256, module, make_runner)
        runner = runners[sha256]
        if isinstance(runner, Difference):
            yield Replayed(receipt.run.id, (runner,))
        else:
            yield replay(receipt, runner)


def _runner(sha256: str, module: Callable[[str], bytes], make_runner: Callable[[bytes], Runner]) -> Runner | Difference:
    try:
        data = module(sha256)
        if hashlib.sha256(data).hexdigest() != sha256:
            return Difference("module", sha256, hashlib.sha256(data).hexdigest())
        return make_runner(data)
    except PointcallError as error:
        return Difference("module", sha256, f"{error.message} [{error.id}]")


def _shown(action: str, args: tuple[int, ...]) -> str:
    return f"{action}({', '.join(map(str, args))})"


def _differences(recorded: _Answer, again: _Answer) -> Iterator[Difference]:
    rows: Mapping[str, tuple[object, object]] = {
        "calls": ("; ".join(recorded.calls) or "none", "; ".join(again.calls) or "none"),
        "fuel": (recorded.fuel, again.fuel),
        "trap": (recorded.trap or "none", again.trap or "none"),
    }
    for what, (before, now) in rows.items():
        if before != now:
            yield Difference(what, str(before), str(now))
