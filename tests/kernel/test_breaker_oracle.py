"""The kernel and the pure model, side by side: the same random story, the same word after every step."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace

import pytest

from pointcall_executor.core.breaker import (
    TIME_MASK,
    Circuit,
    Close,
    Connect,
    Effect,
    Failed,
    Force,
    ProbeReady,
    State,
    Succeeded,
    step,
)
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.errors import CircuitError
from tests.kernel.conftest import Make
from tests.kernel.lab import BLOCKED, OK, REFUSED, connect, here, listen

pytestmark = pytest.mark.kernel
PORT = 30201
STEPS = 250
CONFIGS = {
    "counts": {"threshold": 3, "window_us": 40_000, "cooldown_us": 5_000},
    "share": {"threshold": 2, "percent": 40, "min_attempts": 5, "window_us": 40_000, "cooldown_us": 4_000},
    "growth": {"threshold": 1, "cooldown_us": 1_000, "cooldown_max_us": 6_000},
}


class Oracle:
    """Plays one move in the kernel and in the model, and compares.

    The kernel reads its clock somewhere within the call, so the model plays the move at the call's beginning and end.
    """

    def __init__(self, breaker: BreakerSensor, destination: Destination) -> None:
        self.breaker, self.destination, self.circuit = breaker, destination, Circuit()

    def connect(self, *, alive: bool) -> None:
        with listen(PORT) if alive else contextlib.nullcontext():
            start, answer, end = now_us(), connect(PORT), now_us()
        spans = ((start, start), (start, end), (end, end))
        self._agree([self._story(gate, result, alive) for gate, result in spans], answer, end - start)

    def force(self, us: int) -> None:
        event = Force(now_us() + us)
        try:
            self.breaker.force(self.destination, event.until_us * 1000)
        except CircuitError:
            return  # a slow machine: the lease was over before it began
        self._agree([(step(self.circuit, event, self.breaker.params)[0], "")], "", 0)

    def make_probe_ready(self) -> None:
        start = now_us()
        self.breaker.make_probe_ready(self.destination)
        end = now_us()
        stories = [(step(self.circuit, ProbeReady(at), self.breaker.params)[0], "") for at in (start, end)]
        self._agree(stories, "", end - start)

    def close(self) -> None:
        self.breaker.close_circuit(self.destination)
        self._agree([(step(self.circuit, Close(), self.breaker.params)[0], "")], "", 0)

    def _story(self, gate_us: int, result_us: int, alive: bool) -> tuple[Circuit, str]:
        params = self.breaker.params
        circuit, said = step(self.circuit, Connect(gate_us), params)
        if Effect.REFUSED in said:
            return circuit, BLOCKED
        result = Succeeded if alive else Failed
        circuit, _ = step(circuit, result(result_us, probe=Effect.PROBE in said), params)
        return circuit, OK if alive else REFUSED

    def _agree(self, stories: list[tuple[Circuit, str]], answer: str, took_us: int) -> None:
        now = self.breaker.circuit(self.destination)
        seen = replace(now.word, time_us=0)
        fits = [c for c, said in stories if replace(c.word, time_us=0) == seen and said == answer]
        assert fits, f"kernel {now.word}, {answer}; the model allows {stories}"
        times = [circuit.word.time_us for circuit in fits]
        assert min(times) - took_us <= now.word.time_us <= max(times) + took_us
        if self.breaker.params.percent and now.state is State.CLOSED:
            assert now.attempts in [circuit.attempts for circuit in fits]
        self.circuit = Circuit(now.word, now.attempts)


def now_us() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000 & TIME_MASK


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_does_what_the_model_says(make: Make, name: str, seed: int) -> None:
    breaker, chance = make(**CONFIGS[name]), random.Random(f"{name} {seed}")
    breaker.arm(here(PORT))
    oracle = Oracle(breaker, here(PORT))
    visited = set()
    for _ in range(STEPS):
        match chance.choices(("dead", "alive", "wait", "force", "probe", "close"), (8, 3, 3, 1, 1, 1))[0]:
            case "wait":
                time.sleep(chance.choice((0.0005, 0.002, 0.006)))
            case "force":
                oracle.force(chance.choice((2_000, 10_000)))
            case "probe":
                oracle.make_probe_ready()
            case "close":
                oracle.close()
            case what:
                oracle.connect(alive=what == "alive")
        visited.add(oracle.circuit.word.state)
    assert {State.CLOSED, State.OPEN} <= visited, f"seed {seed}"
