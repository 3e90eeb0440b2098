"""A webhook has one deadline for the whole exchange, whatever its server does, and never hangs its sender."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest.manifest import Channel
from pointcall_executor import channels
from pointcall_executor.channels import ChannelError, DeclaredChannels
from pointcall_runbook.vocabulary import Level, channel

SECONDS = 0.6
ENOUGH = 20.0  # for what is meant to come to its end
SLACK = 2.0  # a machine that others use; without a deadline these servers take half a minute
GOOD = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"
Serve = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "SEND_SECONDS", SECONDS)


def tell(address: str) -> str:
    web = Channel(name="web", kind="webhook", address=address)
    declared: Any = SimpleNamespace(channels=(web,))
    return DeclaredChannels(declared, "n1").send(channel("web").number, Level.INFO, 1)


@contextlib.contextmanager
def server(serve: Serve) -> Iterator[int]:
    """One connection on a port of its own; it ends with the test."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                client, _ = listening.accept()
                with client:
                    serve(client)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


def drip(what: bytes, every: float = 0.1) -> Serve:
    """One byte at a time, each well within what a read may wait, and then padding for as long as somebody listens."""

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for byte in what + b"x" * 300:
                client.sendall(bytes([byte]))
                time.sleep(every)

    return serve


def silent(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(4096):
            pass


def read_and(answer: bytes, then: Serve) -> Serve:
    def serve(client: socket.socket) -> None:
        told = b""
        while not told.endswith(b"}"):  # what is left unread when a connection closes takes its answer along
            if not (piece := client.recv(65536)):
                return
            told += piece
        client.sendall(answer)
        then(client)

    return serve


@pytest.mark.parametrize(
    "serve",
    [
        drip(b"HTTP/1.1 200 OK"),
        drip(b"HTTP/1.1 200 OK\r\nX-Padding: "),
        read_and(b"HTTP/1.1 200 OK\r\n", drip(b"X: ")),  # what is cut off here looks like a whole head
        read_and(b"HTTP/1.1 100 Continue\r\n\r\n", drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 20, 0.01)),
        silent,
    ],
)
def test_a_server_that_drips_is_given_up_at_the_deadline(serve: Serve) -> None:
    with server(serve) as port:
        begin = time.monotonic()
        with pytest.raises(ChannelError) as refused:
            tell(f"http://127.0.0.1:{port}/")
        assert time.monotonic() - begin < SECONDS + SLACK
    assert refused.value.id == "channel.unreachable"


def test_a_server_that_answers_is_told_and_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "SEND_SECONDS", ENOUGH)
    before = threading.active_count()
    with server(read_and(GOOD, lambda _client: None)) as port:
        assert tell(f"http://127.0.0.1:{port}/") == "web"
    assert threading.active_count() <= before


def test_a_name_that_does_not_resolve_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's own timeouts are the system's, and much longer."""
    release = threading.Event()

    def slow(*_: Any, **__: Any) -> list[Any]:
        release.wait(20)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    begin = time.monotonic()
    with pytest.raises(ChannelError) as refused:
        tell("https://hooks.example/x")
    assert time.monotonic() - begin < SECONDS + SLACK
    assert "not resolved" in refused.value.got
    release.set()


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full answers nobody, like a host that is not there."""
    resolve = socket.getaddrinfo
    with contextlib.ExitStack() as stack, server(read_and(GOOD, lambda _client: None)) as port:
        full = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())

        def both(_host: str, port: int, **given: Any) -> list[Any]:
            return [*resolve("127.0.0.2", port, **given), *resolve("127.0.0.1", port, **given)]

        monkeypatch.setattr(socket, "getaddrinfo", both)
        monkeypatch.setattr(channels, "SEND_SECONDS", 4.0)
        assert tell(f"http://127.0.0.1:{port}/") == "web"


def test_at_the_end_everything_that_waits_shares_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that nobody answers holds up the end once, not once for each message."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        web = Channel(name="web", kind="webhook", address=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        declared: Any = SimpleNamespace(channels=(web,))
        telling = DeclaredChannels(declared, "n1")
        telling.hurry()
        begin = time.monotonic()
        why = []
        for _ in range(20):
            with pytest.raises(ChannelError) as refused:
                telling.send(channel("web").number, Level.INFO, 1)
            why.append(refused.value.got)
        assert time.monotonic() - begin < SECONDS + SLACK  # 20 of them would take 12 s
        assert why[-1] == "the executor ends"


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The context of a server whose certificate the sender's store trusts."""
    key, at = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hook")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(at - dt.timedelta(hours=1))
        .not_valid_after(at + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, secret = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, secret)
    return context


def test_over_tls(trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def secured(serve: Serve) -> Serve:
        def inside(client: socket.socket) -> None:
            with contextlib.suppress(OSError), trusted.wrap_socket(client, server_side=True) as wrapped:
                serve(wrapped)

        return inside

    monkeypatch.setattr(channels, "SEND_SECONDS", ENOUGH)
    with server(secured(read_and(GOOD, lambda _client: None))) as port:
        assert tell(f"https://127.0.0.1:{port}/") == "web"
    with server(secured(read_and(GOOD, lambda _client: None))) as port:
        with pytest.raises(ChannelError) as refused:
            tell(f"https://localhost:{port}/")
        assert "certificate" in refused.value.got.lower()
    monkeypatch.setattr(channels, "SEND_SECONDS", SECONDS)
    for serve in (secured(read_and(b"HTTP/1.1 200 OK\r\n", drip(b"X: "))), drip(b"\x16\x03\x03\x40\x00")):
        with server(serve) as port:
            begin = time.monotonic()
            with pytest.raises(ChannelError):
                tell(f"https://127.0.0.1:{port}/")
            assert time.monotonic() - begin < SECONDS + SLACK
