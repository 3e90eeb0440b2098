"""The HTTP face of the private instance and its life: `PrivateSigstore.start`. Loopback only, always.

The URL is part of the trust material, so the port is kept in the state folder. If it is taken at the next start, that
is an error that names the port: moving silently would make every earlier bundle unverifiable.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pointcall_keys.errors import KeysError
from pointcall_keys.private_sigstore.certificate import pem
from pointcall_keys.private_sigstore.instance import Clock, Instance, RekorVersion
from pointcall_keys.private_sigstore.issuer import Kind, TokenRefused, discovery

MAX_BODY_BYTES: Final = 1 << 20  # a manifest is capped at a quarter of this
SOCKET_TIMEOUT_S: Final = 30.0


class PrivateSigstore:
    """A running instance; a context manager. Not for production: README.md of this room says why."""

    def __init__(self, server: ThreadingHTTPServer, instance: Instance) -> None:
        self._server, self._instance = server, instance
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, directory: Path, *, clock: Clock, host: str = "127.0.0.1") -> Self:
        """Serve the instance whose state is `directory`, made on first use.

        KeysError `sigstore.address` if `host` is not a loopback address, `sigstore.port` if the port of an earlier
        start is taken.
        """
        _loopback(host)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        server = _bind(directory / "port", host)
        url = f"http://{_bracketed(host)}:{server.server_port}"
        try:
            instance = Instance(directory, url, clock)
        except BaseException:
            server.server_close()
            raise
        server.RequestHandlerClass = _handler(instance)
        return cls(server, instance)

    @property
    def url(self) -> str:
        return self._instance.url

    @property
    def issuer(self) -> str:
        """The OIDC issuer, as it appears in certificates and trust policies."""
        return self._instance.issuer

    def accept_issuer(self, url: str, kind: Kind) -> None:
        """Also accept tokens that name `url` as issuer, signed by this instance: a stand-in for a CI provider."""
        self._instance.accept_issuer(url, kind)

    def token(self, subject: str, **claims: Any) -> str:
        """An identity token for `subject`. `ttl_s` sets its lifetime; any other keyword replaces or adds a claim."""
        return self._instance.token(subject, **claims)

    def trust_config(self, rekor: RekorVersion = 2) -> dict[str, Any]:
        """ClientTrustConfig JSON: trusted root and where to sign."""
        return self._instance.trust_config(rekor)

    def trusted_root(self) -> bytes:
        """The exact bytes of trusted_root.json that a trust policy pins."""
        return self._instance.trusted_root_bytes()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _loopback(host: str) -> None:
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise KeysError(
            "the private Sigstore serves loopback only",
            id="sigstore.address",
            want="a loopback address",
            got=host,
            hint="run Fulcio, Rekor and a timestamp authority for anything that others must reach",
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(remembered: Path, host: str) -> ThreadingHTTPServer:
    port = int(remembered.read_text()) if remembered.exists() else 0
    try:
        server = _Server((host, port), BaseHTTPRequestHandler)
    except OSError as error:
        raise KeysError(
            "the port of this private Sigstore is taken",
            id="sigstore.port",
            want=f"port {port}, which is part of its certificates",
            got=error.strerror or str(error),
            hint="stop the other process, or start a new instance in an empty folder and sign again",
        ) from error
    remembered.write_text(str(server.server_port))
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def _handler(instance: Instance) -> type[BaseHTTPRequestHandler]:
    routes = _routes(instance)
    return type("Handler", (_Handler,), {"pages": routes[0], "calls": routes[1]})


Page = Callable[[], dict[str, Any]]
Call = Callable[[bytes, str], tuple[str, bytes]]


def _routes(instance: Instance) -> tuple[dict[str, Page], dict[str, Call]]:
    pages: dict[str, Page] = {
        "/oidc/.well-known/openid-configuration": lambda: discovery(instance.issuer),
        "/oidc/keys": instance.key_set,
        "/trusted_root.json": instance.trusted_root,
        "/client_trust_config.json": instance.trust_config,
        "/api/v2/trustBundle": lambda: {"chains": [{"certificates": list(map(pem, instance.authority.chain))}]},
    }

    def certificate(body: bytes, bearer: str) -> tuple[str, bytes]:
        chain = {"certificates": instance.certificates(json.loads(body), bearer)}
        return _json({"signedCertificateEmbeddedSct": {"chain": chain}})

    calls: dict[str, Call] = {
        "/api/v2/signingCert": certificate,
        "/api/v2/log/entries": lambda body, _: _json(instance.log_v2.add(json.loads(body))),
        "/api/v1/log/entries": lambda body, _: _json(instance.add_v1(json.loads(body))),
        "/api/v1/timestamp": lambda body, _: ("application/timestamp-reply", instance.timestamp(body)),
    }
    return pages, calls


def _json(value: Mapping[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_S
    wbufsize = -1  # buffered: header and body in two segments would cost a delayed ACK of 40 ms in every call
    pages: ClassVar[dict[str, Page]]
    calls: ClassVar[dict[str, Call]]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are in the logs that they append to."""

    def do_GET(self) -> None:
        page = self.pages.get(self.path)
        if page is None:
            self._refuse(404, "not found")
        else:
            self._reply(200, *_json(page()))

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 <= size <= MAX_BODY_BYTES:
            self.close_connection = True
            self._refuse(413, "too large")
            return
        body, call = self.rfile.read(size), self.calls.get(self.path)
        if call is None:
            self._refuse(404, "not found")
            return
        try:
            kind, answer = call(body, self.headers.get("Authorization", "").removeprefix("Bearer ").strip())
        except TokenRefused as refusal:
            self._refuse(401, str(refusal))
        except Exception as error:  # whatever a client sends must not end the instance
            self._refuse(400, f"{type(error).__name__}: {error}")
        else:
            self._reply(201, kind, answer)

    def _refuse(self, code: int, message: str) -> None:
        self._reply(code, *_json({"code": code, "message": message}))

    def _reply(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
