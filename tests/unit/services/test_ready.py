"""Readiness by port, HTTP and file, and that the HTTP connect comes from the spawner's cgroup."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pointcall_attest.declaration import Http, Ready
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.ready import described, unready
from pointcall_executor.services.spawning import Spawner
from tests.unit.services.world import free_port, needs_cgroups, wait_for

PARENT = f"pointcall-ready-{os.getpid()}"


def connecting(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port))


@contextmanager
def answering(answer: bytes, asked: list[bytes] | None = None) -> Iterator[int]:
    """A server that says `answer` to whatever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            with listener.accept()[0] as channel:
                got = channel.recv(4096)
                if asked is not None:
                    asked.append(got)
                channel.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 200\r\n", ""),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "GET /health was answered with 503"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "GET /health was answered with no status"),
        (b"HTTP/2 200\r\n", "GET /health was answered with no status"),
        (b"SSH-2.0-x\r\n", "GET /health was answered with no status"),
        (b"", "GET /health was answered with no status"),
        (b"x" * 5000, "GET /health was answered with no status"),
    ],
)
def test_http(answer: bytes, wrong: str) -> None:
    asked: list[bytes] = []
    with answering(answer, asked) as port:
        ready = Ready(tcp=f"127.0.0.1:{port}", http=Http(path="/health"))
        assert unready(ready, connecting) == wrong
        assert asked[0].startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port)


def test_http_waits_for_no_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointcall_executor.services.ready.HTTP_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready = Ready(tcp=f"127.0.0.1:{listener.getsockname()[1]}", http=Http())
        assert "timed out" in unready(ready, connecting)


def test_nothing_is_connected_to_before_somebody_listens() -> None:
    def never(_host: str, _port: int) -> socket.socket:
        raise AssertionError("a connect now would count as a failure")

    where = f"127.0.0.1:{free_port()}"
    assert unready(Ready(tcp=where, http=Http()), never) == f"nobody listens on {where}"


def test_every_part_is_asked_and_described(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        where = f"[::1]:{listener.getsockname()[1]}"
        ready = Ready(tcp=where, file=str(tmp_path / "flag"))
        assert unready(ready, connecting) == f"{tmp_path}/flag does not exist"
        (tmp_path / "flag").touch()
        assert unready(ready, connecting) == ""
        assert described(ready) == f"accepts on {where} and {tmp_path}/flag exists"
        assert described(Ready()) == ""


@needs_cgroups
def test_the_connect_is_made_from_the_spawners_own_cgroup() -> None:
    spawner = Spawner(PARENT).watch()
    try:
        folder = find_root() / spawner.cgroup
        assert folder.stat().st_ino == spawner.cgroup_id
        wait_for(lambda: str(spawner.pid) in (folder / "cgroup.procs").read_text().split())
        with answering(b"HTTP/1.1 200 OK\r\n\r\n") as port:
            assert unready(Ready(tcp=f"127.0.0.1:{port}", http=Http(path="/health")), spawner.connecting) == ""
    finally:
        spawner.close()
        remove_empty(PARENT)
    wait_for(lambda: not folder.exists())
