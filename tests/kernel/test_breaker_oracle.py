"""The kernel and the pure model, side by side: the same random story, the same word after every step."""

from __future__ import annotations

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
    Event,
    Failed,
    Force,
    ProbeReady,
    State,
    Succeeded,
    step,
)
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.breaker import BreakerSensor
from tests.kernel.conftest import Make
from tests.kernel.lab import BLOCKED, OK, connect, here, listen

pytestmark = pytest.mark.kernel
PORT = 30201
STEPS = 250
CONFIGS = {
    "counts": {"threshold": 3, "window_us": 40_000, "cooldown_us": 5_000},
    "share": {"threshold": 2, "percent": 40, "min_attempts": 5, "window_us": 40_000, "cooldown_us": 4_000},
    "growth": {"threshold": 1, "cooldown_us": 1_000, "cooldown_max_us": 6_000},
}


class Oracle:
    """Plays one move in the kernel and in the model, and compares. Times come from the kernel; only they may differ
    within the call's own duration."""

    def __init__(self, breaker: BreakerSensor, destination: Destination) -> None:
        self.breaker, self.destination, self.circuit = breaker, destination, Circuit()

    def connect(self, *, alive: bool) -> None:
        if alive:
            with listen(PORT):
                start, answer, end = self._timed_connect()
        else:
            start, answer, end = self._timed_connect()
        self._agree(self._stories(start, end, alive=alive), answer)

    def command(self, event: Event) -> None:
        match event:
            case Force(until_us):
                self.breaker.force(self.destination, until_us * 1000)
            case ProbeReady():
                self.breaker.make_probe_ready(self.destination)
            case _:
                self.breaker.close_circuit(self.destination)
        circuit, _ = step(self.circuit, event, self.breaker.params)
        self._agree([(circuit, "")], "")

    def _timed_connect(self) -> tuple[int, str, int]:
        start = now_us()
        return start, connect(PORT), now_us()

    def _stories(self, start: int, end: int, *, alive: bool) -> list[tuple[Circuit, str]]:
        """What may have happened: the gate and the detector looked at the clock somewhere between start and end."""
        return [self._story(gate, result, alive) for gate, result in ((start, start), (start, end), (end, end))]

    def _story(self, gate_us: int, result_us: int, alive: bool) -> tuple[Circuit, str]:
        params = self.breaker.params
        circuit, said = step(self.circuit, Connect(gate_us), params)
        if Effect.REFUSED in said:
            return circuit, BLOCKED
        result = Succeeded if alive else Failed
        circuit, _ = step(circuit, result(result_us, probe=Effect.PROBE in said), params)
        return circuit, OK if alive else "ECONNREFUSED"

    def _agree(self, stories: list[tuple[Circuit, str]], answer: str) -> None:
        now = self.breaker.circuit(self.destination)
        seen = replace(now.word, time_us=0)
        for circuit, said in stories:
            if replace(circuit.word, time_us=0) == seen and said == answer:
                assert abs(circuit.word.time_us - now.word.time_us) < 50_000
                if self.breaker.params.percent and now.state is State.CLOSED:
                    assert circuit.attempts == now.attempts
                self.circuit = Circuit(now.word, now.attempts)
                return
        raise AssertionError(f"kernel {now.word}, {answer}; the model allows {stories}")


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
                oracle.command(Force(now_us() + chance.choice((2_000, 10_000))))
            case "probe":
                oracle.command(ProbeReady(now_us()))
            case "close":
                oracle.command(Close())
            case what:
                oracle.connect(alive=what == "alive")
        visited.add(oracle.circuit.word.state)
    assert {State.CLOSED, State.OPEN, State.FORCED} <= visited, f"seed {seed}"
