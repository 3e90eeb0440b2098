"""Who accepts where: by the kernel's dump, and by its table where there is no dump."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.services import listening as module
from pointcall_executor.services.listening import accepts, bound, listening
from pointcall_runbook.vocabulary import Address

HERE4, HERE6 = Address.parse("127.0.0.1"), Address.parse("::1")


@pytest.fixture(params=["dump", "table"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "table":
        refuse(monkeypatch, errno.ENOENT)


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(family: int) -> Iterator[bytes]:
        raise OSError(code, "no dump")
        yield b""

    monkeypatch.setattr(module, "_dump", refused)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(("where", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_socket_accepts_from_listen_to_close(where: str, family: int) -> None:
    address = Address.parse(where)
    with socket.socket(family) as server:
        server.bind((where, 0))
        port = server.getsockname()[1]
        assert not listening(address, port), "bound is not listening"
        server.listen()
        assert listening(address, port)
        assert not listening(Address.parse("127.9.9.9"), port)
    assert not listening(address, port)


@pytest.mark.usefixtures("source")
def test_everywhere_is_here_too() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert listening(HERE4, port)
        assert not listening(HERE6, port), "0.0.0.0 is no IPv6"
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        assert listening(HERE6, port)
        assert listening(HERE4, port)


def test_both_sources_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("::1", 0), family=socket.AF_INET6) as two:
        ours = {one.getsockname()[1], two.getsockname()[1]}
        asked = {b for b in bound() if b[2] in ours}
        refuse(monkeypatch, errno.ENOENT)
        assert {b for b in bound() if b[2] in ours} == asked
        assert len(asked) == 2


def test_a_node_without_ipv6_has_its_ipv4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue\n"
    rows = "   0: 0100007F:1F90 00000000:0000 0A 00000000\n   1: 0100007F:1F91 0100007F:9999 01 00000000\n"
    (tmp_path / "tcp").write_text(head + rows + "junk\n")
    refuse(monkeypatch, errno.EPROTONOSUPPORT)
    assert list(bound(tmp_path)) == [(socket.AF_INET, b"\x7f\0\0\1", 8080)]
    assert accepts((socket.AF_INET, b"\x7f\0\0\1", 8080), HERE4, 8080)


def test_another_error_is_not_an_empty_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOBUFS)
    with pytest.raises(OSError, match="no dump"):
        listening(HERE4, 1)
