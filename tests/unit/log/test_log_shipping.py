"""Shipping beside the executor: a quorum of real witnesses over loopback, networks that are gone, alarms, retention."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from pointcall_attest import entry
from pointcall_attest.log.checkpoint import WitnessKey
from pointcall_attest.log.witness import WitnessPolicy
from pointcall_attest.pack import Pack, export
from pointcall_attest.pack_check import verify_pack
from pointcall_executor import shipping as shipping_module
from pointcall_executor.cli import main
from pointcall_executor.config import Config
from pointcall_executor.journal import Journal
from pointcall_executor.journal_reader import JournalReader
from pointcall_executor.recorder import Recorder
from pointcall_executor.shipping import ERASE_EVERY_S, MAX_WAIT_S, Shipping
from pointcall_executor.witness_server import Witness, keys_of_file, serve
from pointcall_executor.witnessing import cosigned
from tests.fault.log.postgres import free_port
from tests.unit.log import world


@dataclass
class Ship:
    """A node whose log is shipped, round by round, with a clock of its own."""

    node: world.Node
    shipping: Shipping
    reader: JournalReader
    said: list[str]
    now_s: float = 0.0

    def round(self, seconds: float = 1.0) -> Any:
        self.now_s += seconds
        self.shipping.round(self.reader, self.now_s)
        return self.shipping.gauges()

    def grow(self, number: int) -> str:
        run = self.node.run(number)
        self.node.checkpoint()
        return run

    def kinds(self) -> list[str]:
        return [e.kind for e in self.node.journal.entries()]


def shipped(stack: ExitStack, folder: Path, **settings: Any) -> Ship:
    node = world.Node.boot(folder)
    stack.callback(node.journal.close)
    recorder = Recorder(node.journal)
    recorder._keys = node.keys
    said: list[str] = []
    config = Config.model_validate(settings)
    shipping = Shipping(node.journal, recorder, lambda: config, lambda text, **facts: said.append(f"{text} {facts}"))
    reader = stack.enter_context(closing(JournalReader.open(node.journal.path)))
    return Ship(node, shipping, reader, said)


@dataclass
class Running:
    """Witnesses over HTTP, and the policy that names them."""

    policy: Path
    logs: Path
    addresses: list[str]


def running(stack: ExitStack, folder: Path, keys: list[WitnessKey], quorum: int) -> Running:
    logs, lines, addresses = folder / "logs", [], []
    logs.write_text("")
    for number, key in enumerate(keys):
        witness = Witness(folder / f"w{number}.db", f"witness.example/w{number}", key, keys_of_file(logs))
        server = serve(witness, ("127.0.0.1", 0), lambda: 1_800_000_000)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        stack.callback(witness.close)
        stack.callback(server.server_close)
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        addresses.append(f"http://127.0.0.1:{server.server_port}")
        lines.append(f"witness w{number} {witness.verifier} {addresses[-1]}")
    names = " ".join(f"w{n}" for n in range(len(keys)))
    policy = folder / "policy"
    policy.write_text("\n".join([*lines, f"group enough {quorum} {names}", "quorum enough", ""]))
    return Running(policy, logs, addresses)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def known(ship: Ship, witnesses: Running) -> None:
    """The witnesses are told the key of the running epoch."""
    witnesses.logs.write_text(f"# test\nlog {ship.node.keys.verifier(world.ORIGIN)}\n")


def test_a_quorum_signs_and_the_pack_proves_it(stack: ExitStack, tmp_path: Path) -> None:
    keys: list[WitnessKey] = [Ed25519PrivateKey.generate(), MLDSA44PrivateKey.generate()]
    witnesses = running(stack, tmp_path, keys, 2)
    ship = shipped(stack, tmp_path / "node", witnesses=str(witnesses.policy))
    known(ship, witnesses)
    run = ship.grow(0)
    gauge = ship.round()["witnesses"]
    assert (gauge.configured, gauge.covered, gauge.behind, gauge.behind_s) == (True, 4, 0, 0.0)
    policy = WitnessPolicy.parse(witnesses.policy.read_bytes())
    ship.grow(1)  # a later checkpoint that nobody has signed does not displace the one that was
    pack = Pack.of(export(ship.node.journal, run).files())
    assert len(pack.witnesses) == 2
    verdict = verify_pack(pack, trust=world.trust(), in_process=True, witnesses=policy)
    assert verdict.passed
    assert {c.id: c.outcome for c in verdict.checks}["log.witnesses"] == "pass"
    stranger = WitnessPolicy.parse(
        f"witness x {Witness(tmp_path / 'x.db', 'x.example/w', keys[0], lambda _: ()).verifier}\nquorum x\n".encode()
    )
    failed = verify_pack(pack, trust=world.trust(), in_process=True, witnesses=stranger).failed
    assert [c.id for c in failed] == ["log.witnesses"]
    files = export(ship.node.journal, run).files()
    for name in ("witnesses", "checkpoint"):
        for at in range(0, len(files[name]), 41):
            raw = bytearray(files[name])
            raw[at] ^= 1
            assert not accepted({**files, name: bytes(raw)}), (name, at)
    assert not accepted({name: raw for name, raw in files.items() if name != "witnesses"})


def accepted(files: dict[str, bytes]) -> bool:
    from pointcall_attest.errors import MalformedError

    try:
        return verify_pack(Pack.of(files), trust=world.trust(), in_process=True).passed
    except MalformedError:
        return False


def test_a_witness_that_is_away_delays_nothing_and_the_gap_is_logged(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "policy").write_text(
        f"witness w {Witness(tmp_path / 'w.db', 'w.example/w', Ed25519PrivateKey.generate(), lambda _: ()).verifier}"
        f" http://127.0.0.1:{free_port()}\nquorum w\n"
    )
    ship = shipped(stack, tmp_path / "node", witnesses=str(tmp_path / "policy"), lag_seconds=30)
    ship.grow(0)
    gauge = ship.round()["witnesses"]
    assert (gauge.behind, gauge.failures) == (4, 1)
    before = ship.kinds()
    for _ in range(29):
        ship.round()
    assert ship.kinds() == before
    assert ship.shipping.gauges()["witnesses"].failures < 8  # ever more rarely
    for _ in range(200):
        gauge = ship.round()["witnesses"]
    assert ship.kinds().count("config") == 1
    found = ship.node.journal.entries("config")[-1]
    assert found.body["what"] == "witnesses behind"
    assert gauge.behind_s > 200
    assert gauge.failures < 8 + 200 / MAX_WAIT_S + 2


def test_when_the_network_is_back_that_is_logged_too(stack: ExitStack, tmp_path: Path) -> None:
    witnesses = running(stack, tmp_path, [Ed25519PrivateKey.generate()], 1)
    ship = shipped(stack, tmp_path / "node", witnesses=str(witnesses.policy), lag_seconds=5)
    ship.grow(0)
    for _ in range(10):
        ship.round()  # the witness does not know this log yet
    known(ship, witnesses)
    for _ in range(3):
        ship.round(MAX_WAIT_S)
    assert [e.body["what"] for e in ship.node.journal.entries("config")] == ["witnesses behind", "witnesses caught up"]


def test_a_log_that_was_rolled_back_is_an_alarm_once(stack: ExitStack, tmp_path: Path) -> None:
    witnesses = running(stack, tmp_path, [Ed25519PrivateKey.generate()], 1)
    ship = shipped(stack, tmp_path / "node", witnesses=str(witnesses.policy))
    known(ship, witnesses)
    for number in range(3):
        ship.grow(number)
    ship.round()
    restored = shipped(stack, tmp_path / "restored", witnesses=str(witnesses.policy))
    witnesses.logs.write_text(f"log {restored.node.keys.verifier(world.ORIGIN)}\n")
    restored.grow(0)
    for _ in range(4):
        restored.round(MAX_WAIT_S)
    assert [e.body["check"] for e in restored.node.journal.entries("refusal")] == ["witness.alarm"]
    assert any("witness.alarm" in line for line in restored.said)
    assert restored.shipping.gauges()["witnesses"].covered == 0


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"witnesses": "/nonexistent/policy"}, "witness.file"),
        ({"mirror": "no such = = thing"}, "mirror.address"),
    ],
)
def test_wrong_settings_are_said_once_and_stop_nothing(
    settings: dict[str, str], check: str, stack: ExitStack, tmp_path: Path
) -> None:
    if "mirror" in settings:
        pytest.importorskip("psycopg")
    ship = shipped(stack, tmp_path / "node", **settings)
    ship.grow(0)
    for _ in range(5):
        ship.round(MAX_WAIT_S)
    assert [e.body["check"] for e in ship.node.journal.entries("refusal")] == [check]


def test_nothing_configured_asks_nobody(stack: ExitStack, tmp_path: Path) -> None:
    ship = shipped(stack, tmp_path / "node")
    ship.grow(0)
    gauges = ship.round(1000.0)
    assert not any(g.configured or g.failures for g in gauges.values())
    assert ship.said == []


def test_clear_texts_go_when_they_are_old_enough(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(world, "NOW", world.NOW - timedelta(days=3))
        ship = shipped(stack, tmp_path / "node", clear_text_days=2)
        old = ship.node.append(entry.Config(what="old", detail={"text": "x"}))
    new = ship.node.append(entry.Config(what="new", detail={"text": "x"}))
    ship.node.checkpoint()
    ship.round(5_000.0)
    ship.round()
    assert ship.node.journal.entry(old).closed
    assert not ship.node.journal.entry(new).closed
    assert ship.kinds().count("erase") == 1
    ship.round(5_000.0)
    assert ship.kinds().count("erase") == 1  # nothing is old any more


def test_a_reader_that_stays_holds_up_neither_erasing_nor_shipping(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointcall_executor.shipping.FORGET_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(world, "NOW", world.NOW - timedelta(days=3))
        ship = shipped(stack, tmp_path / "node", clear_text_days=2)
        old = ship.node.append(entry.Config(what="old", detail={"text": "not to be found"}))
    staying = stack.enter_context(closing(sqlite3.connect(ship.node.journal.path, isolation_level=None)))
    staying.execute("begin")
    staying.execute("select count(*) from sqlite_schema").fetchone()
    ship.grow(0)
    ship.round(5_000.0)
    assert ship.node.journal.entry(old).closed
    assert "a reader holds the old pages" in ship.said[-1]
    ship.round(61.0)
    assert ship.kinds().count("erase") == 1
    staying.execute("commit")
    ship.round(61.0)
    for file in ship.node.journal.path.parent.glob("journal.db*"):
        assert b"not to be found" not in file.read_bytes()
    assert ship.shipping._erase_due_s == ship.now_s + ERASE_EVERY_S


def test_the_end_does_not_wait_for_a_reader_of_what_was_erased_and_nothing_is_written_after_it(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointcall_executor.shipping.FORGET_S", 600.0)
    with monkeypatch.context() as patched:
        patched.setattr(world, "NOW", world.NOW - timedelta(days=3))
        ship = shipped(stack, tmp_path / "node", clear_text_days=2)
        old = ship.node.append(entry.Config(what="old", detail={"text": "x"}))
    ship.node.checkpoint()
    staying = stack.enter_context(closing(sqlite3.connect(ship.node.journal.path, isolation_level=None)))
    staying.execute("begin")
    staying.execute("select count(*) from sqlite_schema").fetchone()
    ship.shipping.start()
    deadline = time.monotonic() + 30
    while not ship.node.journal.entry(old).closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ship.shipping.stop()
    assert not any(thread.is_alive() for thread in ship.shipping._threads), "it let nobody wait, so all have ended"
    assert time.monotonic() < deadline
    kinds = ship.kinds()
    ship.node.journal.close()  # as the executor does next
    with closing(JournalReader.open(ship.node.journal.path)) as reader:
        assert [e.kind for e in reader.entries()] == kinds
    assert "erase" in kinds
    assert ["a reader holds the old pages" in said for said in ship.said] == [True]


def test_nothing_is_forgotten_after_the_end(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is closed by then."""
    ship = shipped(stack, tmp_path / "node")
    ship.shipping.stop()
    monkeypatch.setattr(Journal, "forget", lambda *_, **__: pytest.fail("it was"))
    with pytest.raises(shipping_module._Ended):
        ship.shipping._forget()


def test_the_thread_starts_ships_and_ends(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointcall_executor.shipping.ROUND_S", 0.01)
    witnesses = running(stack, tmp_path, [Ed25519PrivateKey.generate()], 1)
    ship = shipped(stack, tmp_path / "node", witnesses=str(witnesses.policy))
    known(ship, witnesses)
    ship.grow(0)
    ship.shipping.start()
    waiting = threading.Event()
    for _ in range(500):
        if ship.node.journal.cosigned():
            break
        waiting.wait(0.01)
    ship.shipping.stop()
    ((note, keys),) = ship.node.journal.cosigned()
    assert (note.size, len(keys)) == (4, 1)
    again = Journal.open  # a cosigned checkpoint survives a restart
    ship.node.journal.close()
    with closing(again(ship.node.journal.path, origin=world.ORIGIN)) as reopened:
        assert reopened.cosigned()[0][0].size == 4


class Silent:
    """A witness that takes every request and answers none, until it is let go."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        key = Witness(folder / "w.db", "w.example/w", Ed25519PrivateKey.generate(), lambda _: ()).verifier
        self.policy = folder / "policy"
        self.policy.write_text(f"witness w {key} http://127.0.0.1:{listening.getsockname()[1]}\nquorum w\n")


def test_the_end_waits_for_nobody_who_does_not_answer_and_nothing_is_written_after_it(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointcall_executor.witnessing.TIMEOUT_S", 4.0)
    monkeypatch.setattr("pointcall_executor.shipping.END_S", 0.2)
    ship = shipped(stack, tmp_path / "node", witnesses=str(Silent(stack, tmp_path).policy))
    ship.grow(0)
    ship.shipping.start()
    time.sleep(0.3)
    ship.shipping.stop()
    assert any(thread.is_alive() for thread in ship.shipping._threads), "it waited for the witness"
    size = ship.node.journal.size
    ship.node.journal.close()  # as the executor does next: a thread that wrote now would fail loudly
    for thread in ship.shipping._threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    with closing(JournalReader.open(ship.node.journal.path)) as reader:
        assert reader.size == size
    assert ship.said == []


def test_lag_is_said_while_somebody_is_still_being_asked(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointcall_executor.witnessing.TIMEOUT_S", 4.0)
    monkeypatch.setattr("pointcall_executor.shipping.ROUND_S", 0.05)
    ship = shipped(stack, tmp_path / "node", witnesses=str(Silent(stack, tmp_path).policy), lag_seconds=1)
    ship.grow(0)
    ship.shipping.start()
    stack.callback(lambda: [thread.join() for thread in ship.shipping._threads])
    stack.callback(ship.shipping.stop)
    time.sleep(0.5)
    early = ship.shipping.gauges()["witnesses"]
    assert (early.configured, early.failures, early.behind) == (True, 0, 4)
    for _ in range(300):
        if "config" in ship.kinds():
            break
        time.sleep(0.01)
    late = ship.shipping.gauges()["witnesses"]
    assert late.failures == 0, "it was said only when the witness had not answered"
    assert late.behind_s > 1
    assert [e.body["what"] for e in ship.node.journal.entries("config")] == ["witnesses behind"]


def test_what_a_witness_said_of_its_size_is_kept_although_the_next_request_was_lost(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = world.Node.boot(tmp_path)
    stack.callback(node.journal.close)
    node.run(0)
    node.checkpoint()
    policy, known = WitnessPolicy.parse(Silent(stack, tmp_path).policy.read_bytes()), {}
    asked: list[bytes] = []

    def post(_address: str, body: bytes) -> tuple[int, bytes]:
        asked.append(body)
        if len(asked) == 1:
            return 409, b"2\n"
        raise ConnectionError("lost")

    monkeypatch.setattr("pointcall_executor.witnessing._post", post)
    head = node.journal.head()
    assert head is not None
    for _ in range(2):
        _, answers = cosigned(head, node.journal.tree(), policy, known)
        assert [a.outcome for a in answers] == ["away"]
    assert [body.split(b"\n")[0] for body in asked] == [b"old 0", b"old 2", b"old 2"]


def test_witness_key_makes_keys_that_a_policy_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("ed", []), ("pq", ["--ml-dsa"])):
        words = ["witness", "key", "--name", f"w.example/{name}", "--key", str(tmp_path / name), "--json", *more]
        assert main(words) == 0
        verifier = json.loads(capsys.readouterr().out)["verifier"]
        WitnessPolicy.parse(f"witness w {verifier}\nquorum w\n".encode())
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert main(words) == 5  # an existing key is never overwritten
        capsys.readouterr()
    from pointcall_executor.cli.witness import _read_key

    assert isinstance(_read_key(tmp_path / "ed"), Ed25519PrivateKey)
    assert isinstance(_read_key(tmp_path / "pq"), MLDSA44PrivateKey)
