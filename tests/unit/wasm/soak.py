"""A long run of one process: a million decisions and 100,000 traps must leave the memory flat.

usage: python -m tests.unit.wasm.soak [--runs 1000000] [--traps 100000]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from pointcall_executor.wasm import Runner, Trapped
from pointcall_runbook import verify_module
from tests.unit.runbook.modules import code, module

BODY = code("local.get", 2, "local.get", 0, "call", 0, "i64.const", 1, "local.get", 1, "i64.div_s", "drop", "end")
ALLOWED_KIB = 2048


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def work(runner: Runner, runs: int, traps: int) -> None:
    for number in range(runs):
        runner.decide("Timer", (1, number + 1, 3, 4))
    for _ in range(traps):
        with contextlib.suppress(Trapped):
            runner.decide("Timer", (1, 0, 3, 4))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--traps", type=int, default=100_000)
    args = parser.parse_args()
    wasm = module(BODY)
    runner = Runner(wasm, verify_module(wasm))
    work(runner, 10_000, 10_000)
    before, begin = resident_kib(), time.monotonic()
    work(runner, args.runs, args.traps)
    growth, seconds = resident_kib() - before, time.monotonic() - begin
    sys.stdout.write(f"{args.runs} runs, {args.traps} traps in {seconds:.1f} s; resident memory grew by {growth} KiB\n")
    return int(growth > ALLOWED_KIB)


if __name__ == "__main__":
    raise SystemExit(main())
