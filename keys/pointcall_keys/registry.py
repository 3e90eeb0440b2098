"""A small strict client of an OCI registry: push a release, pull it by digest. It trusts nothing that it gets.

HTTPS with the system's roots; plain HTTP only for a registry on loopback. Tags are not supported: what a tag names may
change. Which digest to pull is said by a signed pointer. Answers are capped and compared with their digests.
Spec: OCI distribution-spec v1.1; the token protocol of the Docker registry.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import re
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from pointcall_keys.errors import KeysError
from pointcall_keys.release import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Release, digest

TIMEOUT_S: Final = 30.0
MAX_REDIRECTS: Final = 3
MAX_TOKEN_BYTES: Final = 64 * 1024
_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9a-f:]+\](?::[0-9]{1,5})?)"
    r"/(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_CHALLENGE = re.compile(r'(realm|service|scope)="([^"\\]*)"')


@dataclass(frozen=True, slots=True)
class Reference:
    """`host[:port]/repository[@sha256:...]`."""

    host: str
    name: str
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """KeysError `registry.reference` for anything else; tags are refused."""
        found = _REFERENCE.fullmatch(text)
        if found is None or len(text) > 512:
            raise KeysError(
                "not a reference",
                id="registry.reference",
                want="host/repository@sha256:<hex>",
                got=text[:120],
                hint="tags are not supported: what they name may change",
            )
        return cls(found["host"], found["name"], found["digest"])

    def __str__(self) -> str:
        return f"{self.host}/{self.name}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, slots=True)
class Account:
    """Name and password of a registry, or of its token service."""

    name: str
    password: str

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.name}:{self.password}".encode()).decode()


def push(release: Release, where: Reference, account: Account | None = None) -> Reference:
    """Upload what is missing, the manifest last; the reference with its digest. KeysError `registry.*`."""
    client = _Client(where, account, "pull,push")
    encoded = release.encode()
    for name, content in encoded.blobs.items():
        client.put_blob(name, content)
    headers = {"Content-Type": MANIFEST_TYPE}
    client.ask("PUT", f"manifests/{encoded.digest}", headers, encoded.image, good=(201,), cap=MAX_MANIFEST_BYTES)
    return Reference(where.host, where.name, encoded.digest)


def pull(where: Reference, account: Account | None = None) -> Release:
    """The release of exactly this digest, not yet verified. KeysError `registry.*`, MalformedError `release.*`."""
    if where.digest is None:
        raise KeysError("a pull needs a digest", id="registry.reference", want=f"{where}@sha256:<hex>")
    client = _Client(where, account, "pull")
    image = client.get(f"manifests/{where.digest}", MANIFEST_TYPE, MAX_MANIFEST_BYTES)
    if digest(image) != where.digest:
        raise KeysError(
            "the registry gave another manifest", id="registry.answer", want=where.digest, got=digest(image)
        )
    return Release.decode(image, lambda name, size: client.get(f"blobs/{name}", "*/*", size))


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Client:
    def __init__(self, where: Reference, account: Account | None, actions: str) -> None:
        scheme = "http" if _is_loopback(where.host) else "https"
        self._base = f"{scheme}://{where.host}/v2/{where.name}/"
        self._scope, self._account = f"repository:{where.name}:{actions}", account
        self._authorization: str | None = None

    def get(self, path: str, accept: str, cap: int) -> bytes:
        return self.ask("GET", path, {"Accept": accept}, good=(200,), cap=cap).body

    def put_blob(self, name: str, content: bytes) -> None:
        if self.ask("HEAD", f"blobs/{name}", {}, good=(200, 404), cap=0).status == 200:
            return
        started = self.ask("POST", "blobs/uploads/", {"Content-Length": "0"}, b"", good=(202,), cap=MAX_TOKEN_BYTES)
        url = urllib.parse.urljoin(self._base, started.headers.get("location", ""))
        self._check_scheme(url)
        url += ("&" if "?" in url else "?") + urllib.parse.urlencode({"digest": name})
        headers = {"Content-Type": "application/octet-stream"}
        self.ask("PUT", url, headers, content, good=(201,), cap=MAX_TOKEN_BYTES)

    def ask(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes | None = None,
        *,
        good: tuple[int, ...],
        cap: int,
    ) -> _Answer:
        """One call, with a token where the registry asks for one. KeysError `registry.answer` for any other status."""
        url = urllib.parse.urljoin(self._base, path)
        answer = self._follow(method, url, headers, body, cap)
        if answer.status == 401 and self._authorization is None:
            self._authorization = self._authorize(answer.headers.get("www-authenticate", ""))
            answer = self._follow(method, url, headers, body, cap)
        if answer.status not in good:
            raise KeysError(
                "the registry refused",
                id="registry.answer",
                want=f"status {good[0]}",
                got=f"{answer.status} for {method} {urllib.parse.urlsplit(url).path}",
            )
        return answer

    def _follow(self, method: str, url: str, headers: dict[str, str], body: bytes | None, cap: int) -> _Answer:
        """Blobs may lie elsewhere: reads follow redirects, and our credentials do not go there."""
        home, own = urllib.parse.urlsplit(self._base).netloc, dict(headers)
        for _ in range(MAX_REDIRECTS + 1):
            own.pop("Authorization", None)
            if self._authorization is not None and urllib.parse.urlsplit(url).netloc == home:
                own["Authorization"] = self._authorization
            answer = _call(method, url, own, body, cap)
            if method not in ("GET", "HEAD") or answer.status not in (301, 302, 303, 307, 308):
                return answer
            url = urllib.parse.urljoin(url, answer.headers.get("location", ""))
            self._check_scheme(url)
        raise KeysError("the registry redirects in circles", id="registry.answer", want=f"<= {MAX_REDIRECTS} redirects")

    def _check_scheme(self, url: str) -> None:
        """A registry behind HTTPS cannot send us to a plain service of this machine."""
        if not url.startswith("https:") and self._base.startswith("https:"):
            raise KeysError("the registry leaves HTTPS", id="registry.network", want="https", got=url[:120])

    def _authorize(self, challenge: str) -> str:
        """Basic, or a bearer token from the service that the registry names."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic" and self._account is not None:
            return self._account.basic
        parts = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in parts:
            raise KeysError("the registry wants a login", id="registry.login", got=challenge[:120])
        asked = {"scope": self._scope} | ({"service": parts["service"]} if "service" in parts else {})
        url = f"{parts['realm']}?{urllib.parse.urlencode(asked)}"
        self._check_scheme(url)
        headers = {"Authorization": self._account.basic} if self._account else {}
        answer = _call("GET", url, headers, None, MAX_TOKEN_BYTES)
        try:
            body = json.loads(answer.body)
            return f"Bearer {body.get('token') or body['access_token']}"
        except (ValueError, KeyError, AttributeError, TypeError):
            raise KeysError("the token service refused", id="registry.login", got=f"status {answer.status}") from None


def _is_loopback(host: str) -> bool:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _call(method: str, url: str, headers: Mapping[str, str], body: bytes | None, cap: int) -> _Answer:
    parts = urllib.parse.urlsplit(url)
    connection = _connect(parts)
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, body, dict(headers))
        with connection.getresponse() as answer:
            raw = answer.read(cap + 1)
        if answer.status < 300 and len(raw) > cap:
            raise KeysError("the registry's answer is too long", id="registry.answer", want=f"<= {cap} bytes")
        return _Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, raw)
    except (OSError, http.client.HTTPException) as error:
        raise KeysError(
            "the registry cannot be reached",
            id="registry.network",
            want=parts.netloc,
            got=f"{type(error).__name__}: {error}",
        ) from None
    finally:
        connection.close()


def _connect(parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    if parts.scheme == "https" and parts.hostname:
        return http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT_S, context=ssl.create_default_context())
    if parts.scheme == "http" and _is_loopback(parts.netloc):
        return http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    raise KeysError(
        "only HTTPS, or HTTP on loopback", id="registry.network", got=f"{parts.scheme}://{parts.netloc}"[:120]
    )
