"""The witness: growth is signed, a thousand forks and rollbacks are not; over HTTP, with a policy and a quorum."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest.errors import MalformedError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import LOG, Checkpoint, Verifier
from pointcall_attest.log.tree import Tree, leaf_hash
from pointcall_attest.log.witness import Request, Seen, WitnessPolicy, WitnessRefusal, judge
from pointcall_executor.witness_server import AT_ONCE, Witness, serve
from pointcall_executor.witnessing import cosigned

ORIGIN = "pointcall.dev/log/n1"
KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
VERIFIER = Verifier(ORIGIN, LOG, KEY.public_key().public_bytes_raw())
TREE = Tree(leaf_hash(b"%d" % i) for i in range(3000))


def note(size: int, tree: Tree = TREE, origin: str = ORIGIN, key: Ed25519PrivateKey = KEY) -> Checkpoint:
    return Checkpoint.parse(checkpoints.sign(origin, size, tree.root(size), key))


def request(old: int, size: int, tree: Tree = TREE, **over: object) -> bytes:
    proof = tuple(tree.consistency(old, size)) if old <= size else ()
    return Request(old, proof, note(size, tree, **over)).encode()  # type: ignore[arg-type]


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    keys = {ORIGIN: [VERIFIER]}
    made = Witness(tmp_path / "w.db", "witness.example/w1", OTHER, lambda origin: keys.get(origin, []))
    yield made
    made.close()


def refusal(witness: Witness, raw: bytes) -> WitnessRefusal:
    with pytest.raises(WitnessRefusal) as error:
        witness.add_checkpoint(raw, at_s=1)
    return error.value


def test_growth_is_signed(witness: Witness) -> None:
    for old, size in ((0, 10), (10, 10), (10, 11), (11, 3000)):
        signed = note(size).with_lines(witness.add_checkpoint(request(old, size), at_s=1_700_000_000))
        assert checkpoints.cosigned_at(signed, witness.verifier) == 1_700_000_000


def test_status_codes_of_the_specification(witness: Witness) -> None:
    witness.add_checkpoint(request(0, 100), at_s=1)
    for raw, status, name in (
        (request(0, 10, origin="other.example/log"), 404, "witness.unknown_log"),
        (request(100, 200, key=OTHER), 403, "witness.unsigned"),
        (Request(300, (), note(200)).encode(), 400, "witness.malformed"),
        (b"old 100", 400, "witness.malformed"),
        (request(50, 200), 409, "witness.conflict"),
        (Request(100, (), note(200)).encode(), 422, "witness.inconsistent"),
    ):
        refused = refusal(witness, raw)
        assert (refused.status, refused.id) == (status, name)
        assert refused.body == ("100\n" if status == 409 else "")
    empty = Checkpoint.parse(checkpoints.sign("x", 0, b"r" * 32, KEY))
    fresh = Verifier("x", LOG, VERIFIER.public)
    with pytest.raises(WitnessRefusal) as error:
        judge(Request(0, (), empty), Seen(), [fresh])
    assert error.value.status == 422


def test_a_thousand_forks_and_rollbacks(witness: Witness) -> None:
    chance, size = random.Random(1), 2000
    witness.add_checkpoint(request(0, size), at_s=1)
    refused = 0
    for _ in range(20):
        at = chance.randrange(size)
        forked = Tree(leaf_hash(b"forged" if i == at else b"%d" % i) for i in range(2100))
        for _ in range(20):
            grown = chance.randrange(size + 1, 2100)
            for raw in (request(size, grown, forked), Request(size, (), note(grown, forked)).encode()):
                refused += refusal(witness, raw).status == 422
        refused += refusal(witness, Request(size, (), note(size, forked)).encode()).status == 422
    for _ in range(250):
        back = chance.randrange(1, size)
        refused += refusal(witness, request(back, back)).status == 409
        refused += refusal(witness, Request(size, (), note(back)).encode()).status == 400
    assert refused == 20 * 41 + 500
    witness.add_checkpoint(request(size, size), at_s=1)


def test_it_remembers_over_a_restart(tmp_path: Path) -> None:
    for old, size in ((0, 10), (10, 20)):
        witness = Witness(tmp_path / "w.db", "w", OTHER, lambda _: [VERIFIER])
        witness.add_checkpoint(request(old, size), at_s=1)
        assert refusal(witness, request(0, 5)).status == 409
        witness.close()


@given(st.binary(max_size=200))
def test_requests_have_one_form(raw: bytes) -> None:
    try:
        assert Request.parse(raw).encode() == raw
    except WitnessRefusal as error:
        assert error.status == 400  # noqa: PT017


@pytest.mark.parametrize(
    "change", [(b"old 5", b"old 05"), (b"old 5", b"new 5"), (b"\n\n", b"\n"), (b"=\n", b"\n"), (b"old 5", b"old -5")]
)
def test_another_form_of_a_request_is_refused(change: tuple[bytes, bytes]) -> None:
    raw = request(5, 9)
    assert Request.parse(raw).encode() == raw
    with pytest.raises(WitnessRefusal) as error:
        Request.parse(raw.replace(*change, 1))
    assert error.value.status == 400


@pytest.fixture
def address(witness: Witness) -> Iterator[str]:
    server = serve(witness, ("127.0.0.1", 0), lambda: 1_700_000_000)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def policy(witness: Witness, address: str, quorum: str = "both") -> WitnessPolicy:
    away = Verifier("witness.example/w2", checkpoints.COSIGNER, KEY.public_key().public_bytes_raw())
    return WitnessPolicy.parse(
        f"# who watches\nlog {VERIFIER}\nwitness w1 {witness.verifier} {address}\n"
        f"witness w2 {away} http://127.0.0.1:1\ngroup both 2 w1 w2\ngroup one any w1 w2\nquorum {quorum}\n".encode()
    )


def test_a_quorum_over_http(witness: Witness, address: str) -> None:
    known: dict[str, int] = {}
    for size in (10, 20, 20, 500):
        signed, answers = cosigned(note(size), TREE, policy(witness, address, "one"), known)
        assert [a.outcome for a in answers] == ["signed", "away"]
        assert policy(witness, address, "one").met_by(signed)
        assert not policy(witness, address, "both").met_by(signed)
        assert policy(witness, address).signers(signed) == {"w1": 1_700_000_000}
        assert not policy(witness, address, "one").met_by(note(size))
        assert policy(witness, address, "none").met_by(note(size))
    known.clear()  # the node forgot how far the witness is: it is told
    assert cosigned(note(600), TREE, policy(witness, address), known)[1][0].outcome == "signed"


def test_a_rolled_back_log_raises_an_alarm(witness: Witness, address: str) -> None:
    cosigned(note(500), TREE, policy(witness, address), {})
    assert cosigned(note(400), TREE, policy(witness, address), {})[1][0].outcome == "alarm"
    forked = Tree([leaf_hash(b"forged"), *(leaf_hash(b"%d" % i) for i in range(1, 700))])
    assert cosigned(note(600, forked), forked, policy(witness, address), {})[1][0].outcome == "alarm"
    assert cosigned(note(600, key=OTHER), TREE, policy(witness, address), {})[1][0].outcome == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "witness w1 nonsense\nquorum w1",
        "quorum w1",
        "quorum none\nquorum none",
        f"log {Verifier('w', checkpoints.COSIGNER, VERIFIER.public)}\nquorum none",
        f"witness w1 {VERIFIER}\nquorum w1",
        "group g 1\nquorum g",
        "group g any g\nquorum g",
        "nonsense",
    ],
)
def test_a_wrong_policy_is_refused(text: str) -> None:
    with pytest.raises(MalformedError) as error:
        WitnessPolicy.parse(text.encode())
    assert error.value.id == "witness.policy"


def test_a_source_of_keys_that_hangs_keeps_only_who_asks_for_them(tmp_path: Path) -> None:
    """A mirror behind a dead link: the other logs go on."""
    begun, go_on = threading.Event(), threading.Event()

    def keys(origin: str) -> list[Verifier]:
        if origin != ORIGIN:
            begun.set()
            assert go_on.wait(30)
        return [VERIFIER] if origin == ORIGIN else []

    with closing(Witness(tmp_path / "w.db", "witness.example/w1", OTHER, keys)) as made, ThreadPoolExecutor(1) as pool:
        try:
            stuck = pool.submit(made.add_checkpoint, request(0, 10, origin="other.example/log"), at_s=1)
            assert begun.wait(30)
            assert made.add_checkpoint(request(0, 10), at_s=1)
        finally:
            go_on.set()
        with pytest.raises(WitnessRefusal):
            stuck.result(30)


def test_it_answers_so_many_at_a_time_and_then_again(witness: Witness, address: str) -> None:
    url = urllib.parse.urlsplit(address)
    there = (str(url.hostname), int(url.port or 0))
    with ExitStack() as opened:
        threads = threading.active_count()
        slow = [opened.enter_context(socket.create_connection(there, timeout=30)) for _ in range(AT_ONCE)]
        for each in slow:
            each.sendall(b"POST /add")
        with socket.create_connection(there, timeout=30) as more:
            assert more.recv(1) == b""
        assert threading.active_count() <= threads + 2 * AT_ONCE  # each has one that cuts it off
        assert cosigned(note(10), TREE, policy(witness, address), {})[1][0].outcome == "away"
    deadline = time.monotonic() + 30
    while cosigned(note(10), TREE, policy(witness, address), {})[1][0].outcome != "signed":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_connection_is_for_one_request(address: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("POST", "/add-checkpoint", request(0, 10))
    answer = connection.getresponse()
    assert (answer.status, answer.will_close) == (200, True)
    connection.close()
