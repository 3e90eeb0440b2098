"""A small strict client of a Kubernetes API server: JSON over HTTPS, with the credentials of one kubeconfig.

Only what a kubeconfig holds itself or names as a file: certificates and tokens. No `exec` and no `auth-provider`, which
would start programs; no proxy, no `insecure-skip-tls-verify`; the server's name is always checked.
Trust: the kubeconfig is trusted like the executor's other settings; who can write it can send evictions elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from pointcall_executor.services.exchange import connected
from pointcall_executor.services.managed import ServiceError

ANSWER_SECONDS: Final = 10.0
MAX_ANSWER_BYTES: Final = 16 << 20
MAX_CONFIG_BYTES: Final = 1 << 20
_REFUSED: Final = ("exec", "auth-provider", "username", "password", "as", "as-uid", "as-groups", "impersonate")


class NotFound(ServiceError):
    """404"""


class Conflict(ServiceError):
    """409: a precondition does not hold."""


class TooManyDisruptions(ServiceError):
    """429 to an eviction."""


_ANSWERS: Final[dict[int, type[ServiceError]]] = {404: NotFound, 409: Conflict, 429: TooManyDisruptions}


class Cluster:
    """One connection for each request. `kubeconfig` is read at the first one, and again after it changed."""

    def __init__(self, kubeconfig: Path | None) -> None:
        self._path = kubeconfig
        self._read: tuple[int, _Access] | None = None

    def _access(self) -> _Access:
        if self._path is None:
            raise _unusable("no kubeconfig is set", "set kubeconfig to a file for this executor's own account")
        try:
            changed = self._path.stat().st_mtime_ns
            if self._read is None or self._read[0] != changed:
                self._read = changed, _Access(self._path)
        except OSError as error:
            raise _unusable(str(error), "is the setting kubeconfig right?") from error
        return self._read[1]

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of the answer. NotFound, Conflict, TooManyDisruptions, other ServiceErrors."""
        access = self._access()
        try:
            headers = {"Accept": "application/json"} | access.headers()
        except (OSError, ValueError) as error:
            raise _unusable(str(error), "is the token file there?") from error
        raw = None if body is None else json.dumps(body)
        if raw is not None:
            headers["Content-Type"] = "application/json"
        connection = http.client.HTTPSConnection(
            access.host, access.port, timeout=ANSWER_SECONDS, context=access.context
        )
        try:
            with connected(connection, ANSWER_SECONDS):
                connection.request(method, access.prefix + path, raw, headers)
                answer = connection.getresponse()
                content = answer.read(MAX_ANSWER_BYTES + 1)
            if len(content) > MAX_ANSWER_BYTES:
                raise ValueError("the answer is too long")
            found = json.loads(content) if content else {}
            if not isinstance(found, dict):
                raise ValueError("the answer is no JSON object")  # noqa: TRY004
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ServiceError(
                "the API server does not answer", id="service.manager", want=f"{access.host}:{access.port}",
                got=(str(error) or repr(error))[:500],
            ) from error  # fmt: skip
        finally:
            connection.close()
        if answer.status >= 300:
            kind = _ANSWERS.get(answer.status, ServiceError)
            got = f"{answer.status} {found.get('reason', '')}: {found.get('message', '')}"[:500]
            raise kind("the API server refuses", id="service.manager", want=f"{method} {path}", got=got)
        return found


class _Access:
    """What a kubeconfig's current context says: where the server is, whom to trust, who we are."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        try:
            if len(raw) > MAX_CONFIG_BYTES:
                raise ValueError("it is too long")
            document = yaml.safe_load(raw)
            context = _named(document["contexts"], document["current-context"], "context")
            cluster = _named(document["clusters"], context["cluster"], "cluster")
            user = _named(document["users"], context["user"], "user")
            self._connect_to(cluster, path.parent)
            self._be(user, path.parent)
        except (KeyError, TypeError, ValueError, yaml.YAMLError, binascii.Error, ssl.SSLError) as error:
            raise _unusable(f"{path.name}: {error}", "certificates, tokens and files; no exec, no insecure") from error

    def _connect_to(self, cluster: dict[str, Any], folder: Path) -> None:
        url = urlsplit(cluster["server"])
        if url.scheme != "https" or not url.hostname or url.query or url.fragment or url.username:
            raise ValueError("server must be https://host:port")
        if cluster.get("insecure-skip-tls-verify") or cluster.get("proxy-url"):
            raise ValueError("insecure-skip-tls-verify and proxy-url are refused")
        self.host, self.port, self.prefix = url.hostname, url.port or 443, url.path.rstrip("/")
        authority = _content(cluster, "certificate-authority", folder)
        if authority is None:
            raise ValueError("certificate-authority is missing")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_verify_locations(cadata=authority.decode("ascii"))

    def _be(self, user: dict[str, Any], folder: Path) -> None:
        refused = [name for name in _REFUSED if name in user]
        if refused:
            raise ValueError(f"{refused[0]} is refused")
        self._token: str | Path | None = user.get("token")
        if self._token is None and "tokenFile" in user:
            self._token = folder / user["tokenFile"]  # read each time: such a token lives for an hour or so
        self.headers()
        certificate = _content(user, "client-certificate", folder)
        key = _content(user, "client-key", folder)
        if certificate is not None and key is not None:
            with _memory(certificate + b"\n" + key) as file:
                self.context.load_cert_chain(file)

    def headers(self) -> dict[str, str]:
        """Who we are. OSError, ValueError if the token cannot be read."""
        token = self._token.read_text() if isinstance(self._token, Path) else self._token
        return {} if token is None else {"Authorization": f"Bearer {_printable(token.strip())}"}


def _named(rows: list[dict[str, Any]], name: str, kind: str) -> dict[str, Any]:
    found = [row[kind] for row in rows if row["name"] == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries for {kind} {name}")
    return dict(found[0])


def _content(row: dict[str, Any], name: str, folder: Path) -> bytes | None:
    """What `<name>-data` holds, or the file that `<name>` names."""
    if f"{name}-data" in row:
        return base64.b64decode(row[f"{name}-data"], validate=True)
    return (folder / row[name]).read_bytes() if name in row else None


def _printable(token: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token is not printable ASCII")
    return token


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[str]:
    """A file name for what must not be on a disk: OpenSSL reads certificates and keys from files only."""
    fd = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _unusable(got: str, hint: str) -> ServiceError:
    return ServiceError("the kubeconfig cannot be used", id="service.kubeconfig", got=got, hint=hint)
