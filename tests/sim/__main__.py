"""`python -m tests.sim`: one seed again, or many on all cores. A failure prints the one command that repeats it."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field

from tests.sim.auditor import BrokenError
from tests.sim.findings import KNOWN
from tests.sim.machine import Machine


@dataclass(frozen=True, slots=True)
class Result:
    """What one seed gave."""

    seed: int
    events: int
    digest: int
    starts: int
    simulated_s: int
    counts: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    broken: str = ""
    at: int = 0  # events until it broke


def play(seed: int, events: int, strict: bool = False) -> Result:
    """Run one seed. What broke is in the result, not raised."""
    machine = Machine(seed, frozenset() if strict else KNOWN)
    begin, broken = machine.scheduler.now, ""
    try:
        machine.run(events)
    except BrokenError as error:
        broken = str(error)
    except Exception:
        broken = "the simulation itself: " + traceback.format_exc()
    audit, lasted = machine.auditor, (machine.scheduler.now - begin) // 10**9
    counts, found = dict(audit.counts), dict(audit.found)
    return Result(seed, machine.events, audit.digest, machine.starts, lasted, counts, found, broken, machine.events + 1)


def shrunk(result: Result, strict: bool) -> Result:
    """The same seed with as few events as still break it: a run's beginning does not depend on its length."""
    low, high, best = 0, result.at, result
    while high - low > 1:
        middle = (low + high) // 2
        again = play(result.seed, middle, strict)
        if again.broken:
            high, best = middle, again
        else:
            low = middle
    return Result(best.seed, high, best.digest, best.starts, best.simulated_s, {}, {}, best.broken, high)


def report(result: Result, strict: bool) -> str:
    command = f"python -m tests.sim --seed {result.seed} --events {result.at}{' --strict' if strict else ''}"
    return f"seed {result.seed}, event {result.at}: {result.broken}\nrepeat with  {command}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--first", type=int, default=1, help="the first of many")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--events", type=int, default=10_000, help="of each seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--strict", action="store_true", help="known findings (tests/sim/findings.py) fail too")
    args = parser.parse_args()
    if args.seed is not None:
        result = play(args.seed, args.events, args.strict)
        print(json.dumps({"digest": result.digest, "counts": result.counts, "found": result.found}, sort_keys=True))
        if result.broken:
            print(report(result, args.strict), file=sys.stderr)
        return 1 if result.broken else 0
    return many(args.first, args.seeds, args.events, args.jobs, args.strict)


def many(first: int, seeds: int, events: int, jobs: int, strict: bool) -> int:
    """One JSON line at the end; the exit code says whether an invariant broke."""
    begin = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    found: collections.Counter[str] = collections.Counter()
    broken: list[Result] = []
    total = starts = simulated = 0
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        numbers = range(first, first + seeds)
        for result in pool.map(play, numbers, [events] * seeds, [strict] * seeds, chunksize=4):
            total, starts, simulated = total + result.events, starts + result.starts, simulated + result.simulated_s
            counts.update(result.counts)
            found.update(result.found)
            if result.broken:
                broken.append(result)
                print(report(result, strict), file=sys.stderr, flush=True)
    if broken:
        print("the shortest:\n" + report(shrunk(broken[0], strict), strict), file=sys.stderr)
    line = {
        "seeds": seeds,
        "events": total,
        "simulated_hours": round(simulated / 3600),
        "executor_starts": starts,
        "broken": len(broken),
        "found": dict(found),
        "counts": dict(counts),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(line, sort_keys=True))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
