"""`pointcall drill`: inject a fault for one cgroup and destination, and say what was due and what was seen.

The lease is in the kernel: the fault ends at its time also when this process is killed, and at once when it ends. A
drill goes through the node's own blob, whose digest `--sha256` can demand; it acts on nothing but the named cgroup.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_executor.kernel.blob import Blob
    from pointcall_executor.kernel.drill import Fault, Observed

MILLION = 1_000_000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Refuse connects or lose packets, for one cgroup and one destination, for a limited time."
    parser.add_argument("--cgroup", required=True, metavar="PATH", help="folder of the v2 tree, below its root")
    parser.add_argument("--to", required=True, metavar="ADDRESS:PORT", help="destination, [ADDRESS]:PORT for IPv6")
    parser.add_argument("--udp", action="store_true", help="UDP instead of TCP")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="refuse the first N connects")
    parser.add_argument(
        "--refuse", type=float, default=0.0, metavar="SHARE", help="refuse each connect with this chance"
    )
    parser.add_argument("--errno", default="ECONNREFUSED", help="what the application sees (default ECONNREFUSED)")
    parser.add_argument("--lose", type=float, default=0.0, metavar="SHARE", help="lose each packet with this chance")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same faults")
    parser.add_argument("--seconds", type=float, default=10.0, help="at most 600 (default 10)")
    parser.add_argument("--sha256", metavar="HEX", help="the drill blob must have this digest, as in the manifest")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.kernel.drill import DrillInjector, expected

    fault = _fault(args)
    with DrillInjector(_blob(args.sha256), cgroup=Path(args.cgroup)) as injector:
        injector.inject(fault, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(args.seconds * 1e9))
        with contextlib.suppress(KeyboardInterrupt):  # a drill may always be ended early
            time.sleep(args.seconds)
        observed = injector.end()
    due = expected(fault, observed.attempts, observed.packets)
    return _show(args, observed, due)


def _fault(args: argparse.Namespace) -> Fault:
    from pointcall_executor.core.event import Destination
    from pointcall_executor.kernel.drill import Fault
    from pointcall_runbook.vocabulary import Address

    host, _, port = args.to.rpartition(":")
    code = getattr(errno, args.errno, None)
    if not isinstance(code, int):
        raise output.UsageRefusal(f"no errno is called {args.errno!r}", hint="for example ECONNREFUSED, ETIMEDOUT")
    try:
        to = Destination(Address.parse(host.strip("[]")), int(port), 0, 17 if args.udp else 6)
        return Fault(to, args.seed, args.first, int(args.refuse * MILLION), code, int(args.lose * MILLION))
    except ValueError as error:
        raise output.UsageRefusal(f"this drill makes no sense: {error}", hint="pointcall drill --help") from None


def _blob(sha256: str | None) -> Blob:
    from pointcall_executor.kernel.blob import Blob
    from pointcall_executor.kernel.errors import BlobError
    from pointcall_executor.kernel.probe import BLOBS

    path = BLOBS / "drill.blob"
    if not path.exists():
        raise output.EnvironmentRefusal("the drill blob is not built", hint="make -C bpf")
    blob = Blob.parse(path.read_bytes())
    if sha256 is not None and blob.sha256 != sha256:
        raise BlobError("the drill blob is another one", id="kernel.blob.digest", want=sha256, got=blob.sha256)
    return blob


def _show(args: argparse.Namespace, observed: Observed, due: tuple[int, int]) -> int:
    refused, lost = due
    same = (observed.refused, observed.lost) == due
    if args.json:
        row = {"ok": same, "expected": {"refused": refused, "lost": lost}, "observed": asdict(observed)}
        output.print_json(row)
    else:
        print(f"connects {observed.attempts}: refused {observed.refused}, due {refused}")
        print(f"packets  {observed.packets}: lost {observed.lost}, due {lost}")
        print(f"after the lease {observed.after} connects passed" if observed.after else "the fault is ended")
    return output.Exit.OK if same else output.Exit.BUG
