"""kill -9 at every label of a whole life, each time that it is passed: `make test-crash`.

usage: python -m tests.fault.executor.sweep [--every N] [--seed S]

One JSON line at the end. A whole life: armed, two runs, by hand, a new epoch, a takeover, disarmed, closed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from pointcall_keys.private_sigstore import PrivateSigstore
from tests.fault.executor import evidence
from tests.fault.executor.setting import Teller, copy, prepare, why
from tests.lab import Lab, now

KILLED = -9


def sweep(folder: Path, every: int, seed: int) -> int:
    begin, wrong, cut = time.monotonic(), 0, 0
    with PrivateSigstore.start(folder / "sigstore", clock=now) as sigstore, Teller() as teller:
        (folder / "tee").mkdir()
        prepared = prepare(Lab(folder / "lab", sigstore, folder / "tee"))
        first = copy(prepared, folder / "first")
        assert teller.tell(first, "live") == 0, why(first)
        seen = json.loads((first / "labels.json").read_text())
        labels = [f"{step}#{n + 1}" for step, count in sorted(seen.items()) for n in range(count)]
        chosen = labels if every == 1 else random.Random(seed).sample(labels, len(labels) // every)
        for label in chosen:
            state = copy(prepared, folder / "state")
            ended = teller.tell(state, "live", label)
            cut += ended == KILLED  # a label that is passed more often by chance may not come this time
            again = teller.tell(state, "restart") if ended == KILLED else 0
            found = evidence.objections(state) if not again else [why(state)]
            if ended not in (0, KILLED):
                found.append(why(state))
            if found:
                wrong += 1
                print(f"{label}: {'; '.join(found)}", file=sys.stderr, flush=True)
            shutil.rmtree(state)
    line = {"labels": len(labels), "tried": len(chosen), "killed": cut, "wrong": wrong}
    print(json.dumps(line | {"seconds": round(time.monotonic() - begin)}))
    return 1 if wrong or not cut else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only one label in so many")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pointcall-crash-") as folder:
        return sweep(Path(folder), args.every, args.seed)


if __name__ == "__main__":
    sys.exit(main())
