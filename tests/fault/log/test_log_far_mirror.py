"""The mirror behind a real link that goes away in the middle of things: who is gone keeps nobody waiting.

All bounds of a connection are short here; what they are bounds of is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import mirror
from pointcall_executor.mirror import Mirror, connect, ship
from tests.fault import link
from tests.fault.link import CENTRE, BadLink
from tests.fault.log import postgres
from tests.unit.log import world

SHORT = {
    "connect_timeout": "10", "tcp_user_timeout": "3000", "keepalives_idle": "1", "keepalives_interval": "1",
    "options": "-c statement_timeout=20000 -c idle_in_transaction_session_timeout=2000 -c tcp_user_timeout=3000"
    " -c tcp_keepalives_idle=1 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=2",
}  # fmt: skip


@pytest.fixture(scope="module")
def between() -> Iterator[BadLink]:
    lack = link.missing() or postgres.missing()
    if lack is not None:
        pytest.skip(f"{lack} is missing")
    with BadLink() as made:
        yield made


@pytest.fixture(scope="module")
def port(between: BadLink) -> Iterator[int]:
    with between.at_centre(), postgres.server(CENTRE) as port:
        yield port


@pytest.fixture
def far(between: BadLink, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A connection from the node, over a link that is healed at the end."""
    assert SHORT.keys() == mirror._BOUNDS.keys()
    assert {word.split("=")[0] for word in SHORT["options"].split()} == {
        word.split("=")[0] for word in mirror._BOUNDS["options"].split()
    }
    monkeypatch.setattr(mirror, "_BOUNDS", SHORT)
    with between.at_node():
        made = connect(f"host={CENTRE} port={port} user={postgres.USER} dbname=postgres")
        try:
            made.execute("delete from epoch")
            made.execute("delete from entry")
            made.execute("delete from log")
            yield made
        finally:
            between.heal()
            made.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    made.run(0)
    made.checkpoint()
    yield made
    made.journal.close()


@pytest.mark.parametrize("copying", [False, True])
def test_a_node_that_is_gone_in_a_transaction_keeps_the_next_one_waiting_for_a_bounded_time(
    copying: bool, far: Any, between: BadLink, port: int, node: world.Node
) -> None:
    """It has locked its log's row, and the server never hears of it again."""
    far.execute("begin")
    Mirror(far)._locked(world.ORIGIN)
    if copying:
        far.pgconn.exec_(b"copy entry from stdin")
    between.become(latency_s=0.0, loss=1.0)
    with between.at_centre(), closing(connect(f"host={CENTRE} port={port} user={postgres.USER} dbname=postgres")) as db:
        assert ship(node.journal, Mirror(db)).covered == node.journal.size


def test_a_server_that_is_gone_while_it_is_asked_is_noticed(far: Any, between: BadLink) -> None:
    """The question arrived, so nothing is sent again; the answer never comes."""
    import psycopg

    cut = threading.Timer(1.0, lambda: between.become(latency_s=0.0, loss=1.0))
    cut.start()
    with pytest.raises(psycopg.OperationalError, match="timed out"):
        far.execute("select pg_sleep(18)")  # it would answer that
    cut.join()
