"""`pointcall drill`: rehearse a fault, and say what was due, what was seen and what the runbooks did meanwhile.

Through the running executor: what its armed manifest allows (sensor `drill`), to what the manifest declares, written
into the log. With `--cgroup` without one, for a lab: then nothing is signed and nothing is logged, and it says so. In
both the end is in the kernel: a drill ends at its time whoever is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcall_executor.cli import connection, output

if TYPE_CHECKING:
    from pointcall_executor.kernel.blob import Blob
    from pointcall_executor.kernel.drill import Fault, Observed

MILLION = 1_000_000
SECONDS_MAX = 600
DELAY_MAX_MS = 5_000
SLOW_MAX_MS = 60_000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Refuse connects, lose or delay packets, kill a service, make a file slow: for a limited time."
    what = parser.add_argument_group("what")
    what.add_argument("--to", metavar="ADDRESS:PORT", help="destination, [ADDRESS]:PORT for IPv6")
    what.add_argument("--udp", action="store_true", help="UDP instead of TCP")
    what.add_argument("--first", type=int, default=0, metavar="N", help="refuse the first N connects")
    what.add_argument("--refuse", type=float, default=0.0, metavar="SHARE", help="refuse each with this chance")
    what.add_argument("--errno", default="ECONNREFUSED", help="what the application sees (default ECONNREFUSED)")
    what.add_argument("--lose", type=float, default=0.0, metavar="SHARE", help="lose each packet with this chance")
    what.add_argument("--delay-ms", type=float, default=0.0, help="send each packet later; needs the qdisc fq")
    what.add_argument("--kill", action="store_true", help="kill the service, once")
    what.add_argument("--slow-file", default="", metavar="FILE", help="a file of the service")
    what.add_argument("--slow-ms", type=int, default=100, help="delay of each read, write and fsync (default 100)")
    what.add_argument("--seed", type=int, default=0, help="the same seed draws the same faults")
    what.add_argument("--seconds", type=float, default=10.0, help="at most 600 (default 10)")
    where = parser.add_argument_group("where")
    where.add_argument("--service", default="", help="a declared service (default: the clients behind the gate)")
    where.add_argument("--reason", default="rehearsal", help="goes into the log")
    where.add_argument("--cgroup", metavar="PATH", help="lab mode without an executor: this folder of the v2 tree")
    where.add_argument("--sha256", metavar="HEX", help="lab mode: the drill blob must have this digest")


def run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    return _in_the_lab(args) if args.cgroup else _through_the_executor(args)


def _through_the_executor(args: argparse.Namespace) -> int:
    from pointcall_executor.api.client import UnreachableError

    host, port = _place(args) if args.to else ("", 0)
    if args.to:
        _fault(args)  # nonsense is refused before anybody is asked
    seconds = math.ceil(args.seconds)
    request: dict[str, Any] = {
        "service": args.service, "address": host, "port": port, "protocol": "udp" if args.udp else "tcp",
        "first": args.first, "refuse_ppm": round(args.refuse * MILLION), "refuse_errno": _errno(args.errno),
        "lose_ppm": round(args.lose * MILLION), "delay_us": round(args.delay_ms * 1000), "seed": args.seed,
        "seconds": seconds, "kill": args.kill, "slow_file": args.slow_file,
        "slow_ms": args.slow_ms if args.slow_file else 0, "reason": args.reason,
    }  # fmt: skip
    try:
        with connection.operator(args) as client:
            id_ = client.call("Control/BeginDrill", **request).id
            with contextlib.suppress(KeyboardInterrupt):  # a drill may always be ended early
                time.sleep(seconds)
            report = client.call("Control/EndDrill", id=id_)
    except UnreachableError as refusal:
        raise connection.unreachable(refusal, output.state_dir(args) / "run" / "operator.sock", changes=True) from None
    runs = [{"run": r.run, "event": r.event, "runbook": r.runbook} for r in report.runs]
    due, seen = dict(report.expected), dict(report.observed)
    if args.json:
        row = {"ok": report.as_expected, "drill": id_, "ended": report.ended_by, "expected": due, "observed": seen}
        output.print_json(row | {"runs": runs})
    else:
        for name, count in sorted(seen.items()):
            print(f"{name:10} {count}" + (f", due {due[name]}" if name in due else ""))
        for found in runs:
            print(f"run        {found['run']} {found['event']} -> {found['runbook']}")
        print(f"drill {id_} ended: {report.ended_by}" + ("" if runs else "; no runbook ran meanwhile"))
    return output.Exit.OK if report.as_expected else output.Exit.BUG


def _in_the_lab(args: argparse.Namespace) -> int:
    from pointcall_executor.kernel.drill import DrillInjector, expected

    if not args.to:
        raise output.UsageRefusal("a drill in a lab needs a destination", hint="--to ADDRESS:PORT")
    chosen = {"--kill": args.kill, "--slow-file": args.slow_file, "--service": args.service}
    if others := [name for name, value in chosen.items() if value]:
        raise output.UsageRefusal(
            "a lab has no declared service", want="only connects and packets with --cgroup", got=", ".join(others),
            hint="leave it out, or leave --cgroup out: then the armed manifest says what may be rehearsed",
        )  # fmt: skip
    fault, blob = _fault(args), _blob(args.sha256)
    cgroup = _cgroup(args.cgroup)
    sys.stderr.write("pointcall: lab mode: no manifest allows this drill, and no log has it\n")
    with DrillInjector(blob) as injector:
        until_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(args.seconds * 1e9)
        injector.inject(cgroup, fault, until_ns)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(args.seconds)
        observed = injector.end()
    due = expected(fault, observed.attempts, observed.packets)
    return _show(args, observed, due)


def _check_numbers(args: argparse.Namespace) -> None:
    """UsageRefusal where a number is out of its range; what is no number, too."""
    limits = {
        "--seconds": (args.seconds, 0.001, SECONDS_MAX), "--refuse": (args.refuse, 0, 1), "--lose": (args.lose, 0, 1),
        "--delay-ms": (args.delay_ms, 0, DELAY_MAX_MS), "--slow-ms": (args.slow_ms, 1, SLOW_MAX_MS),
        "--first": (args.first, 0, 2**64 - 1), "--seed": (args.seed, 0, 2**64 - 1),
    }  # fmt: skip
    for name, (value, lo, hi) in limits.items():
        if not lo <= value <= hi:  # also for what is not a number
            raise output.UsageRefusal(f"{name} is out of range", want=f"{lo}..{hi}", got=str(value)[:40])


def _place(args: argparse.Namespace) -> tuple[str, int]:
    host, _, port = args.to.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (port.isascii() and port.isdecimal()) or not host or (":" in host) != bracketed:
        raise output.UsageRefusal(f"this is no destination: {args.to[:80]}", hint="--to ADDRESS:PORT or [ADDRESS]:PORT")
    if "%" in host:
        raise output.UsageRefusal(
            "a destination has no zone", want="an address without %", got=args.to[:80],
            hint="a link-local address is the same destination on every interface",
        )  # fmt: skip
    return host.strip("[]"), int(port)


def _cgroup(text: str) -> Path:
    """KernelError `kernel.cgroup.outside` where it is none."""
    from pointcall_executor.kernel.cgroup import Cgroup

    path = Path(text).resolve()
    if not path.is_dir():
        raise output.UsageRefusal("there is no such cgroup", want="a folder of the cgroup v2 tree", got=text[:200])
    Cgroup(path).level  # noqa: B018 - it raises
    return path


def _errno(name: str) -> int:
    code = getattr(errno, name, None)
    if not isinstance(code, int):
        raise output.UsageRefusal(f"no errno is called {name!r}", hint="for example ECONNREFUSED, ETIMEDOUT")
    return code


def _fault(args: argparse.Namespace) -> Fault:
    from pointcall_executor.core.event import Destination
    from pointcall_executor.kernel.drill import Fault
    from pointcall_runbook.vocabulary import Address

    (host, port), code = _place(args), _errno(args.errno)
    try:
        to = Destination(Address.parse(host), port, 0, 17 if args.udp else 6)
        chances = round(args.refuse * MILLION), code, round(args.lose * MILLION)
        return Fault(to, args.seed, args.first, *chances, round(args.delay_ms * 1000))
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
        print(f"packets  {observed.packets}: lost {observed.lost}, due {lost}; delayed {observed.delayed}")
        print(f"after the lease {observed.after} connects passed" if observed.after else "the fault is ended")
    return output.Exit.OK if same else output.Exit.BUG
