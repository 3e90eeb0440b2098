"""A small strict stand-in for a Kubernetes API server: TLS, a token, pods of one deployment, evictions, a budget.

It answers what the real one answers to the few requests that are made of it, and 400 to every other: a wrong path, an
unknown field, a missing precondition. Source: Kubernetes API v1.31, policy/v1 Eviction.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOKEN = "a-token-of-this-test"
IMAGE = "registry.example/web@sha256:" + "a" * 64
PODS = "/api/v1/namespaces/shop/pods"
DEPLOYMENT = "/apis/apps/v1/namespaces/shop/deployments/web"


def certificate(folder: Path) -> None:
    """ca.pem, server.pem with its key, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    raw = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "ca.pem").write_bytes(raw)
    (folder / "server.pem").write_bytes(raw + secret)


class ApiServer:
    """Started by `with`. Its state is public, so that a story can change it and look at it."""

    def __init__(self, folder: Path, replicas: int = 2) -> None:
        self.folder = folder
        self.image = IMAGE
        self.selector = {"app": "web"}
        self.pods: dict[str, dict[str, Any]] = {}
        self.looks_until_ready = 2
        self.budget = replicas  # how many pods may be away at once
        self.evictions: list[dict[str, Any]] = []
        self.before_eviction: Callable[[Self, str], None] = lambda _server, _name: None
        self.replaces = True
        self.drip_seconds = 0.0  # between two bytes of an answer
        self._numbers = iter(range(1, 10_000))
        self._lock = threading.RLock()
        for _ in range(replicas):
            self.add(ready=True)

    def add(self, *, ready: bool) -> None:
        """A pod of the deployment."""
        number = next(self._numbers)
        self.pods[f"web-{number}"] = {
            "metadata": {
                "name": f"web-{number}",
                "uid": f"uid-{number}",
                "resourceVersion": str(next(self._numbers)),
                "labels": {"app": "web"},
            },
            "spec": {"containers": [{"name": "web", "image": self.image}]},
            "status": {"phase": "Running" if ready else "Pending", "conditions": [], "looks": 0},
        }
        self.set_ready(f"web-{number}", ready)

    def set_ready(self, name: str, ready: bool) -> None:
        status = self.pods[name]["status"]
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
        status["phase"] = "Running" if ready else "Pending"

    def touch(self, name: str) -> None:
        """Somebody wrote to the pod."""
        self.pods[name]["metadata"]["resourceVersion"] = str(next(self._numbers))

    def ready_pods(self) -> int:
        return sum(p["status"]["conditions"][0]["status"] == "True" for p in self.pods.values())

    # ---- requests ----

    def get(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            if path == DEPLOYMENT and not query:
                containers = [{"name": "web", "image": self.image}]
                template = {"spec": {"containers": containers}}
                return 200, {"spec": {"selector": {"matchLabels": self.selector}, "template": template}}
            if path == PODS and query == {"labelSelector": ["app=web"]}:
                self._age()
                return 200, {"items": json.loads(json.dumps(list(self.pods.values())))}
            name = path.removeprefix(f"{PODS}/")
            if path.startswith(f"{PODS}/") and "/" not in name:
                return (200, self.pods[name]) if name in self.pods else status(404, "NotFound", name)
        return status(404 if path.startswith("/api") else 400, "NotFound", path)

    def _age(self) -> None:
        for name, pod in self.pods.items():
            pod["status"]["looks"] += 1
            if pod["status"]["looks"] >= self.looks_until_ready and "deletionTimestamp" not in pod["metadata"]:
                self.set_ready(name, True)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            name = path.removeprefix(f"{PODS}/").removesuffix("/eviction")
            wanted = {"apiVersion", "kind", "metadata", "deleteOptions"}
            if (
                path != f"{PODS}/{name}/eviction"
                or body.keys() != wanted
                or (body["apiVersion"], body["kind"]) != ("policy/v1", "Eviction")
                or body["metadata"] != {"name": name, "namespace": "shop"}
                or body["deleteOptions"].keys() != {"gracePeriodSeconds", "preconditions"}
                or body["deleteOptions"]["preconditions"].keys() != {"uid", "resourceVersion"}
            ):
                return status(400, "BadRequest", path)
            self.before_eviction(self, name)
            if name not in self.pods:
                return status(404, "NotFound", name)
            meta, given = self.pods[name]["metadata"], body["deleteOptions"]["preconditions"]
            if (given["uid"], given["resourceVersion"]) != (meta["uid"], meta["resourceVersion"]):
                return status(409, "Conflict", "the precondition does not hold")
            if len(self.pods) - self.ready_pods() >= self.budget:
                return status(429, "TooManyRequests", "Cannot evict pod as it would violate the disruption budget")
            self.evictions.append(body)
            del self.pods[name]
            if self.replaces:
                self.add(ready=False)
            return 201, {"kind": "Status", "status": "Success"}

    # ---- the server ----

    def __enter__(self) -> Self:
        certificate(self.folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_words: object) -> None:
                """Quiet."""

            def _say(self, answer: tuple[int, dict[str, Any]]) -> None:
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    answer = status(401, "Unauthorized", "who are you?")
                raw = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked has gone
                    for part in (raw[i : i + 1] for i in range(40)) if outer.drip_seconds else (raw,):
                        time.sleep(outer.drip_seconds)
                        self.wfile.write(part)

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                self._say(outer.get(url.path, parse_qs(url.query)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._say(outer.post(self.path, body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens, or did."""
        return int(self._server.server_address[1])

    def kubeconfig(self, *, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> Path:
        """A kubeconfig for this server; `cluster` and `user` change its fields."""
        authority = base64.b64encode((self.folder / "ca.pem").read_bytes()).decode()
        host = f"https://127.0.0.1:{self.port}"
        document = {
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [
                {"name": "c", "cluster": {"server": host, "certificate-authority-data": authority} | (cluster or {})}
            ],
            "users": [{"name": "u", "user": {"token": TOKEN} if user is None else user}],
        }
        path = self.folder / "kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path


def status(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}
