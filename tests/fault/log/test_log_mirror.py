"""The mirror against a real PostgreSQL: over a bad link everything arrives once; forks and rollbacks do not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import entry
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.frontier import Frontier
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_executor import mirror as mirror_module
from pointcall_executor.mirror import FEW_BYTES, MAX_BATCH_BYTES, Mirror, MirrorError, Pace, ship
from pointcall_executor.witness_server import keys_of_mirror
from tests.fault.log import postgres
from tests.unit.log import world

LEAVES = [leaf_hash(b"%d" % i) for i in range(600)]


@given(st.integers(0, 600))
def test_a_frontier_is_the_tree_without_its_leaves(size: int) -> None:
    frontier = Frontier()
    for leaf in LEAVES[:size]:
        frontier.add(leaf)
    assert frontier.root() == Tree(LEAVES[:size]).root()
    again = Frontier.parse(frontier.encode())
    again.add(LEAVES[0])
    frontier.add(LEAVES[0])
    assert again.root() == frontier.root()


@pytest.mark.parametrize("raw", [b"", bytes(7), bytes(9), b"\0" * 7 + b"\3" + bytes(32), b"\xff" * 8 + bytes(64 * 32)])
def test_another_form_of_a_frontier_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        Frontier.parse(raw)
    assert error.value.id == "log.frontier"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    lack = postgres.missing()
    if lack is not None:
        pytest.skip(f"{lack} is missing")
    with postgres.server() as port:
        yield port


def connect(port: int) -> Any:
    import psycopg

    return psycopg.connect(
        host="127.0.0.1", port=port, user=postgres.USER, dbname="postgres", autocommit=True, connect_timeout=5
    )


@pytest.fixture
def db(port: int) -> Iterator[Any]:
    with closing(connect(port)) as made:
        made.execute("drop table if exists entry, epoch, log")
        Mirror(made).create()
        yield made


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    yield made
    made.journal.close()


def held_entries(db: Any) -> list[bytes]:
    rows = db.execute("select raw from entry where origin = %s order by i", (world.ORIGIN,)).fetchall()
    return [bytes(row[0]) for row in rows]


def test_exactly_what_is_missing_is_sent(db: Any, node: world.Node) -> None:
    mirror = Mirror(db)
    assert ship(node.journal, mirror).size == 0  # no checkpoint yet
    for number in range(4):
        node.run(number)
        node.checkpoint()
        held = ship(node.journal, mirror)
        assert (held.size, held.covered) == (node.journal.size, node.journal.size)
        assert ship(node.journal, mirror) == held
    assert held_entries(db) == [e.raw for e in node.journal.entries()]


def test_over_a_bad_link_everything_arrives_once(db: Any, node: world.Node, port: int) -> None:
    import psycopg

    link = postgres.BadLink(port, broken=0.3, delay_s=0.005, seed=7)
    try:
        for number in range(12):
            node.run(number)
            node.checkpoint()
            for _ in range(30):
                with contextlib.suppress(psycopg.OperationalError), closing(connect(link.port)) as bad:
                    if ship(node.journal, Mirror(bad)).covered == node.journal.size:
                        break
    finally:
        link.close()
    assert held_entries(db) == [e.raw for e in node.journal.entries()]
    assert link.cut > 2


def test_a_link_that_never_carries_much_carries_everything_in_small_batches(
    db: Any, node: world.Node, port: int
) -> None:
    """No connection lives longer than 12,000 bytes, and the log is longer: what arrived stays, and the next goes on."""
    import psycopg

    for number in range(12):
        node.run(number)
    node.checkpoint()
    assert sum(len(e.raw) for e in node.journal.entries()) > 40_000
    link = postgres.BadLink(port, broken=1.0, delay_s=0.0, seed=5)

    def send(pace: Pace) -> int:
        with contextlib.suppress(psycopg.OperationalError), closing(connect(link.port)) as bad:
            ship(node.journal, Mirror(bad), pace)
        return Mirror(db).held(world.ORIGIN).covered

    try:
        for _ in range(40):
            send(Pace(batch_bytes=MAX_BATCH_BYTES))
        assert held_entries(db) == []
        pace = Pace()
        assert any(send(pace) == node.journal.size for _ in range(1000))
    finally:
        link.close()
    assert held_entries(db) == [e.raw for e in node.journal.entries()]


def test_few_entries_and_many_are_stored_alike(db: Any, node: world.Node) -> None:
    """The two ways into the table."""
    for number in range(40):
        node.run(number)
    raws = [e.raw for e in node.journal.entries()]
    assert sum(map(len, raws)) > FEW_BYTES
    mirror, few = Mirror(db), len(raws) // 4
    mirror.put(world.ORIGIN, 0, raws[:few])
    assert mirror.put(world.ORIGIN, 0, raws).size == len(raws)
    rows = db.execute("select i, leaf, kind, run, raw from entry where origin = %s order by i", (world.ORIGIN,))
    found = [(i, bytes(leaf), kind, run, bytes(raw)) for i, leaf, kind, run, raw in rows.fetchall()]
    assert found == [(e.index, leaf_hash(e.raw), e.kind, e.run, e.raw) for e in node.journal.entries()]


def test_several_shippers_do_no_harm(db: Any, node: world.Node, port: int) -> None:
    for number in range(40):
        node.run(number)
    node.checkpoint()
    errors: list[Exception] = []

    def one() -> None:
        try:
            with closing(connect(port)) as own:
                ship(node.journal, Mirror(own))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert held_entries(db) == [e.raw for e in node.journal.entries()]


def refused(call: Any) -> str:
    with pytest.raises(MirrorError) as error:
        call()
    return error.value.id


def test_forks_and_rollbacks_are_refused_and_seen(db: Any, node: world.Node, tmp_path: Path) -> None:
    mirror = Mirror(db)
    node.run(0)
    node.checkpoint()
    first = node.journal.head()
    ship(node.journal, mirror)
    raws = [e.raw for e in node.journal.entries()]
    assert refused(lambda: mirror.put(world.ORIGIN, 9, raws)) == "mirror.gap"
    assert refused(lambda: mirror.put(world.ORIGIN, 1, [raws[2]])) == "mirror.fork"
    assert refused(lambda: mirror.put(world.ORIGIN, 4, [b"nonsense"])) == "mirror.entry"
    forked = world.Node.boot(tmp_path / "restored")  # the same name, another history
    for number in range(3):
        forked.run(number)
    forked.checkpoint()
    assert refused(lambda: mirror.put(world.ORIGIN, 0, [e.raw for e in forked.journal.entries()])) == "mirror.fork"
    head = forked.journal.head()
    assert head is not None
    assert refused(lambda: mirror.cover(head.text)) == "mirror.checkpoint"
    forked.journal.close()
    node.run(1)
    node.checkpoint()
    ship(node.journal, mirror)
    assert first is not None
    assert refused(lambda: mirror.cover(first.text)) == "mirror.checkpoint"
    assert "passed before" in db.execute("select refused from log").fetchone()[0]
    assert held_entries(db) == [e.raw for e in node.journal.entries()]


def test_what_the_mirror_does_not_hold(db: Any, node: world.Node) -> None:
    assert refused(lambda: Mirror(db).source(world.ORIGIN)) == "mirror.no_log"
    node.checkpoint()
    ship(node.journal, Mirror(db))
    assert refused(lambda: Mirror(db).source(world.ORIGIN + "x")) == "mirror.no_log"


def test_what_was_pruned_before_it_was_shipped_is_said(db: Any, node: world.Node) -> None:
    """A gap can never be filled: better to say so than to hold a log that cannot be checked."""
    node.run(0)
    node.checkpoint()
    leaf, opening = node.leaf(entry.Prune(minimum=3, reason="old", retention_days=1))
    node.journal.prune(leaf, opening)
    node.checkpoint()
    assert refused(lambda: ship(node.journal, Mirror(db))) == "mirror.pruned"
    assert held_entries(db) == [node.journal.entry(0).raw]  # the opening of the epoch, which is kept


def test_a_strangers_checkpoint_is_refused(db: Any, node: world.Node) -> None:
    from pointcall_keys.node import EpochKeys

    mirror = Mirror(db)
    node.checkpoint()
    head = node.journal.head()
    assert head is not None
    mirror.put(world.ORIGIN, 0, [e.raw for e in node.journal.entries()])
    forged = EpochKeys.generate().sign_checkpoint(world.ORIGIN, head.size, head.root)
    assert refused(lambda: mirror.cover(forged)) == "mirror.checkpoint"
    assert mirror.held(world.ORIGIN).covered == 0
    assert mirror.cover(head.text).covered == 1
    assert Checkpoint.parse(head.text).size == 1


def address(port: int) -> str:
    return f"host=127.0.0.1 port={port} user={postgres.USER} dbname=postgres sslmode=disable gssencmode=disable"


def test_drops_and_a_slow_link_lose_nothing(
    db: Any, node: world.Node, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of the connections break and every round trip takes 2 s more, as the executor's own thread sees it. All
    times are a tenth: the link's delay and the bounds of a connection that it is held against."""
    from pointcall_executor import mirror
    from pointcall_executor.config import Config
    from pointcall_executor.recorder import Recorder
    from pointcall_executor.shipping import Shipping

    node.run(0)
    node.checkpoint()
    tenth = {"connect_timeout": "3", "tcp_user_timeout": "2000", "options": "-c statement_timeout=6000"}
    assert tenth.keys() <= mirror._BOUNDS.keys()
    monkeypatch.setattr(mirror, "_BOUNDS", tenth)
    link = postgres.BadLink(port, broken=0.3, delay_s=0.1, seed=1)
    config, recorder = Config(mirror=address(link.port), lag_seconds=100_000), Recorder(node.journal)
    shipping = Shipping(node.journal, recorder, lambda: config, lambda text, **facts: None)
    try:
        for turn in range(20):
            shipping.round(node.journal, turn * 100.0)
            if shipping.gauges()["mirror"].behind == 0:
                break
    finally:
        link.close()
    assert held_entries(db) == [e.raw for e in node.journal.entries()]
    assert shipping.gauges()["mirror"].covered == node.journal.size
    assert link.cut > 0


def test_the_mirror_makes_its_tables_and_gives_a_log_back_as_tiles(
    db: Any, node: world.Node, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from pointcall_executor.cli import main

    db.execute("drop table entry, epoch, log")
    for number in range(3):
        node.run(number)
    node.checkpoint()
    words = ["--state-dir", str(tmp_path), "--json"]
    assert main(["mirror", "ship", address(port), *words]) == 0
    assert main(["mirror", "status", address(port), *words]) == 0
    shipped, status = map(json.loads, capsys.readouterr().out.splitlines())
    assert status == shipped | {"refused": None}
    tiles = ["mirror", "tiles", address(port), "--log", world.ORIGIN, "--out", str(tmp_path / "t"), *words]
    assert main(tiles) == 0
    assert main(["verify", str(tmp_path / "t"), *words]) == 0
    assert main(["mirror", "tiles", address(port), "--log", "nobody", "--out", str(tmp_path / "u"), *words]) == 1
    assert main(["mirror", "status", "host=127.0.0.1 port=1 user=x", *words]) == 5
    assert main(["mirror", "status", "= = =", *words]) == 1


def test_a_witness_process_follows_the_epochs_of_a_mirror(db: Any, node: world.Node, port: int, tmp_path: Path) -> None:
    """`pointcall witness serve` as its own process: it learns each epoch's key from the mirror, and refuses a fork."""
    import json
    import subprocess
    import sys

    from pointcall_attest.log.witness import WitnessPolicy
    from pointcall_executor.witnessing import cosigned

    path = ":".join(sys.path)
    command = [sys.executable, "-m", "pointcall_executor.cli", "witness"]
    common = ["--name", "w.example/w", "--key", str(tmp_path / "key"), "--json"]
    made = subprocess.run([*command, "key", *common], check=True, capture_output=True, env={"PYTHONPATH": path})
    verifier = json.loads(made.stdout)["verifier"]
    serving = ["serve", *common, "--state", str(tmp_path / "w.db"), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, *serving, "--mirror", address(port)], stdout=subprocess.PIPE, env={"PYTHONPATH": path}
    )
    try:
        assert process.stdout is not None
        where = json.loads(process.stdout.readline())["address"]
        policy = WitnessPolicy.parse(f"witness w {verifier} {where}\nquorum w\n".encode())
        for _ in range(3):  # three epochs
            node.run(node.journal.size)
            node.checkpoint()
            ship(node.journal, Mirror(db))
            head = node.journal.head()
            assert head is not None
            note, asked = cosigned(head, node.journal.tree(), policy, {})
            assert [a.outcome for a in asked] == ["signed"]
            assert policy.met_by(note)
            node.keys = world.Node.epoch(node.journal).keys
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_mirror_that_says_nothing_keeps_nobody_for_long(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    import psycopg

    monkeypatch.setattr(mirror_module, "BRIEF_S", 1)
    monkeypatch.setitem(mirror_module._BRIEF, "connect_timeout", "2")  # the driver's least
    with silent() as server:
        began = time.monotonic()
        address = f"host=127.0.0.1 port={server.getsockname()[1]} user=x dbname=x sslmode=disable gssencmode=disable"
        with pytest.raises(psycopg.OperationalError):
            keys_of_mirror(address)(world.ORIGIN)
        assert time.monotonic() - began < 30
    address = f"host=127.0.0.1 port={port} user={postgres.USER} dbname=postgres"
    with connect(port) as other, other.transaction():  # it answers connects, and then not
        other.execute("drop table if exists entry, epoch, log")
        began = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            keys_of_mirror(address)(world.ORIGIN)
        assert time.monotonic() - began < 30
    assert keys_of_mirror(address)(world.ORIGIN) == []
