"""Figures of the log: durable receipts beside a bare fdatasync of the same disk, proofs, verification. JSON lines.

Ratios are taken within one run, baseline and measurement interleaved, because disks differ and change.
usage: python -m tests.bench.log [--dir FOLDER ON A REAL DISK] [--large]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pointcall_attest import dsse, entry
from pointcall_attest.log.tree import Tree, leaf_hash, verify_inclusion
from pointcall_attest.receipt import Receipt
from pointcall_executor.mirror import Mirror
from tests.bench.figures import figure, percentile
from tests.fault.log import postgres
from tests.unit.log import world

ROUNDS = 30
PER_ROUND = 40
BURST = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.log")
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write; must be on a real disk")
    parser.add_argument("--large", action="store_true", help="a tree of a million entries")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix=".bench-log-") as name:
        node = world.Node.boot(Path(name))
        with ThreadPoolExecutor(1) as caller:  # as in the executor, whose loop is not the main thread
            caller.submit(_durable, node, Path(name)).result()
        _throughput(node)
        node.journal.close()
    _verification(node)
    _mirror()
    _proofs(1_000_000 if args.large else 100_000)


def _durable(node: world.Node, folder: Path) -> None:
    """Sign and append one receipt, next to write and fdatasync of as many bytes."""
    made = [world.receipt(world.run_id.run_id(n, bytes(10)), n, node, intent=None) for n in range(PER_ROUND)]
    raw = node.keys.sign(made[0].sealed(bytes(32))[0])
    fd = os.open(folder / "baseline", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    bare: list[float] = []
    durable: list[float] = []
    for _ in range(ROUNDS):
        bare += [_timed(lambda: (os.write(fd, raw), os.fdatasync(fd))) for _ in made]
        durable += [_timed(lambda r=r: _append(node, r)) for r in made]
    os.close(fd)
    for p in (50, 99):
        measured, base = percentile(durable, p / 100), percentile(bare, p / 100)
        figure(
            "log",
            f"receipt_us_p{p}",
            measured * 1e6,
            "us",
            len(durable),
            baseline="write + fdatasync",
            ratio=measured / base,
        )
        figure(
            "log", f"receipt_fdatasync_ratio_p{p}", measured / base, "x", len(durable), baseline=f"{base * 1e6:.0f} us"
        )


def _append(node: world.Node, receipt: Receipt) -> int:
    """Seal, sign and append, as the recorder does."""
    payload, opening = receipt.sealed(os.urandom(32))
    return node.journal.append(node.keys.sign(payload), opening)


def _submit(node: world.Node, receipt: Receipt) -> Future[int]:
    payload, opening = receipt.sealed(os.urandom(32))
    return node.journal.submit(node.keys.sign(payload), opening)


def _throughput(node: world.Node) -> None:
    receipts = [world.receipt(world.run_id.run_id(n, bytes(10)), n, node, intent=None) for n in range(100)]
    start = time.perf_counter()
    waiting = [_submit(node, receipts[i % 100]) for i in range(BURST)]
    for future in waiting:
        future.result()
    figure(
        "log", "receipts_per_second", BURST / (time.perf_counter() - start), "1/s", BURST, baseline="one writer, queued"
    )


def _verification(node: world.Node) -> None:
    """Parse and verify receipts as an auditor does, one core."""
    leaf = node.keys.sign(world.receipt(world.run_id.run_id(1, bytes(10)), 1, node, intent=None).sealed(bytes(32))[0])
    key, n = dsse.public_key(node.keys.spki), 5_000
    start = time.perf_counter()
    for _ in range(n):
        dsse.verify(dsse.parse(leaf), key)
    figure(
        "log", "receipt_verify_per_second", n / (time.perf_counter() - start), "1/s", n, baseline="signature, one core"
    )
    start = time.perf_counter()
    for i in range(n):
        entry.parse_entry(i, leaf)
    figure("log", "entry_parse_us", (time.perf_counter() - start) / n * 1e6, "us", n)


def _mirror() -> None:
    """Shipping to a PostgreSQL on the same machine, through parsing, hashing and COPY."""
    if (lack := postgres.missing()) is not None:
        sys.stderr.write(f"mirror: skipped, {lack} is missing\n")
        return
    import psycopg

    with tempfile.TemporaryDirectory(prefix="pointcall-bench-pg-") as name, postgres.server() as port:
        node = world.Node.boot(Path(name) / "node")
        made = [world.receipt(world.run_id.run_id(n, bytes(10)), n, node, intent=None) for n in range(100)]
        leaves = [node.keys.sign(made[i % 100].sealed(bytes(32))[0]) for i in range(BURST)]
        first = [e.raw for e in node.journal.entries()]
        node.journal.close()
        address = {"host": "127.0.0.1", "port": port, "user": postgres.USER, "dbname": "postgres"}
        with psycopg.connect(**address, autocommit=True) as db:
            mirror = Mirror(db)
            mirror.create()
            mirror.put(world.ORIGIN, 0, first)
            start = time.perf_counter()
            for at in range(0, BURST, 1_000):
                mirror.put(world.ORIGIN, 1 + at, leaves[at : at + 1_000])
            rate = BURST / (time.perf_counter() - start)
    figure("log", "mirror_receipts_per_second", rate, "1/s", BURST, baseline="PostgreSQL, one connection, durable")


def _proofs(size: int) -> None:
    tree = Tree(leaf_hash(i.to_bytes(8)) for i in range(size))
    root, places = tree.root(), [(i * 7919) % size for i in range(1_000)]
    paths = {i: tree.inclusion(i) for i in places}
    make = [_timed(lambda i=i: tree.inclusion(i)) for i in places]
    check = [_timed(lambda i=i: verify_inclusion(i, size, tree.leaf(i), paths[i], root)) for i in places]
    figure("log", "inclusion_proof_us_p50", percentile(make, 0.50) * 1e6, "us", len(make), baseline=f"{size} entries")
    figure(
        "log", "inclusion_verify_us_p50", percentile(check, 0.50) * 1e6, "us", len(check), baseline=f"{size} entries"
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
