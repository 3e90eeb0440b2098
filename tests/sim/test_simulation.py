"""A short run of the simulation; `make sim` runs a thousand seeds. And that a seed says everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sim.__main__ import play, report

ROOT = Path(__file__).parents[2]
ROOMS = ("runbooks", "attest", "keys", "executor", ".")
SEEDS = range(1, 41)
EVENTS = 1500


def test_no_invariant_breaks() -> None:
    results = [play(seed, EVENTS) for seed in SEEDS]
    broken = [report(r, strict=False) for r in results if r.broken]
    assert not broken, "\n".join(broken)
    assert sum(r.events for r in results) >= len(SEEDS) * EVENTS
    seen = {name for r in results for name, count in r.counts.items() if count}
    for name in ("receipt", "intent", "outcome", "refusal", "lost", "epoch-close", "forced"):
        assert name in seen, f"{name} never happened: the simulation is too tame to prove anything"
    for name in ("began recreate", "began close_circuit", "permitted notify", "permitted again", "operator disarm"):
        assert name in seen, f"{name} never happened: the simulation is too tame to prove anything"
    assert sum(r.starts for r in results) > 2 * len(SEEDS), "executors hardly ever started again"


def run(seed: int, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(ROOMS)}
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--events", "1500"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    first, second, another = run(6, "1"), run(6, "2"), run(7, "1")
    assert first == second
    assert first != another
