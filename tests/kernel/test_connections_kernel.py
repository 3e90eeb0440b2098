"""Killing established connections: exactly those to the destination."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pointcall_executor.kernel.connections import ConnectionKiller
from pointcall_runbook.vocabulary import Address
from tests.kernel.lab import V6, here, listen, need_blob, outcome, private_network

pytestmark = pytest.mark.kernel
N = 100


@pytest.fixture
def killer() -> Iterator[ConnectionKiller]:
    blob = need_blob("connections")
    with private_network():
        connections = ConnectionKiller(blob)
        yield connections
        connections.close()


def test_all_connections_to_the_destination_die_and_no_other(killer: ConnectionKiller) -> None:
    with listen(30401) as doomed, listen(30402) as spared, listen(30401, "127.0.0.2") as elsewhere:
        dying = [socket.create_connection(("127.0.0.1", 30401)) for _ in range(N)]
        peers = [doomed.accept()[0] for _ in range(N)]
        other = [socket.create_connection(("127.0.0.1", 30402)), socket.create_connection(("127.0.0.2", 30401))]
        others = [spared.accept()[0], elsewhere.accept()[0]]
        assert killer.kill(here(30401)) == N
        assert {outcome(lambda s=s: s.send(b"x")) for s in dying} == {"ECONNABORTED"}
        assert {outcome(lambda s=s: s.recv(1)) for s in peers} == {"ECONNRESET"}
        assert {outcome(lambda s=s: s.send(b"x")) for s in other} == {"OK"}
        assert killer.kill(here(30401)) == 0
        for sock in (*dying, *peers, *other, *others):
            sock.close()


def test_ipv6_and_v4_mapped(killer: ConnectionKiller) -> None:
    with listen(30403, "::1") as six, listen(30403) as four:
        a, b = socket.create_connection(("::1", 30403)), socket.socket(V6)
        b.connect(("::ffff:127.0.0.1", 30403))
        ends = [six.accept()[0], four.accept()[0]]
        assert killer.kill(here(30403, Address.parse("::1"))) == 1
        assert killer.kill(here(30403)) == 1
        for sock in (a, b, *ends):
            sock.close()


def test_another_namespace_is_spared(killer: ConnectionKiller) -> None:
    there = here(30404)
    with private_network(), listen(30404) as server:
        client = socket.create_connection(("127.0.0.1", 30404))
        peer, _ = server.accept()
        assert killer.kill(there) == 0
        assert killer.kill(here(30404)) == 1
        client.close()
        peer.close()
