"""An event storm: every CPU fills the ring as fast as it can while Python drains it.

    python -m tests.kernel.storm --seconds 600        (make test-storm)

Holds if generated == received + counted lost, exactly, and memory stays flat. Needs root and `make -C bpf all bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.loader import Loaded, load
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.ring import Ring
from pointcall_executor.kernel.sensor import COUNTERS

BENCH = Path(__file__).resolve().parents[2] / "bpf" / "build" / "stamp.blob"
PRODUCER = """
import sys, time
from pointcall_executor.kernel import bpf
end, made = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    made += bpf.prog_run(int(sys.argv[1]), bytes(8))[0]
print(made)
"""


@dataclass(frozen=True, slots=True)
class Storm:
    """What came out. Memory: anonymous KiB, after the first second and at the end."""

    generated: int
    received: int
    lost: int
    seconds: float
    memory_early: int
    memory_late: int

    @property
    def exact(self) -> bool:
        return self.generated == self.received + self.lost


def storm(seconds: float, producers: int) -> Storm:
    """Run one; the bench object is loaded and gone again."""
    loaded = load(Blob.parse(BENCH.read_bytes()))
    ring = Ring(loaded.maps["events"])
    try:
        return _storm(loaded, ring, seconds, producers)
    finally:
        ring.close()
        loaded.close()


def _storm(loaded: Loaded, ring: Ring, seconds: float, producers: int) -> Storm:
    fd = loaded.programs["pc_fill"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PRODUCER, str(fd), str(seconds)]
    children = [
        subprocess.Popen(command, pass_fds=(fd,), env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(producers)
    ]
    start, received, early = time.monotonic(), 0, 0
    while any(child.poll() is None for child in children):
        ring.wait(0.01)
        received += len(ring.drain(65536))
        if not early and time.monotonic() - start > 1:
            early = _resident()
    while batch := ring.drain(65536):
        received += len(batch)
    generated = sum(int(child.communicate()[0]) for child in children)
    sent, lost = COUNTERS.unpack(Map(loaded.maps["counters"]).get(bytes(4)) or bytes(16))
    assert sent == received, f"{sent} sent, {received} received"
    return Storm(generated, received, lost, time.monotonic() - start, early or _resident(), _resident())


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])  # the ring's own pages are mapped, not ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--producers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    result = storm(args.seconds, args.producers)
    print(json.dumps(asdict(result) | {"exact": result.exact}))
    return 0 if result.exact else 1


if __name__ == "__main__":
    sys.exit(main())
