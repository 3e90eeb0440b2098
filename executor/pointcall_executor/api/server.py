"""The gRPC server: one Unix socket for each role, and where wanted one mTLS port, served until `stop`.

A socket appears under its public name only after it has its mode and its server listens, so there is no moment in which
a stranger could connect. Each role has a server of its own with its own threads: a flood on one cannot starve another.
Spec: docs/spec/api.md sections 1 and 2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pointcall_executor.api.accesses import Accesses
from pointcall_executor.api.backend import Backend
from pointcall_executor.api.caller import REMOTE_ROLES, CallerOf, Mtls, of_socket
from pointcall_executor.api.endpoint import endpoint
from pointcall_executor.api.interceptor import Interceptor
from pointcall_executor.api.messages import pb
from pointcall_executor.api.roles import SOCKET_MODES, Role, max_message_bytes
from pointcall_executor.api.services import Handler, Services
from pointcall_runbook.errors import PointcallError

THREADS: Final[Mapping[Role, int]] = {Role.OPERATOR: 4, Role.AUDITOR: 4, Role.AGENT: 2, Role.RELYING_PARTY: 2}
MAX_CALLS: Final = 32  # at once and for each role; more are refused at once
MAX_STREAMS: Final = 32  # of one connection
MAX_METADATA_BYTES: Final = 8 * 1024
MAX_RESPONSE_BYTES: Final = 8 * 1024 * 1024  # a page of 100 runs is below 1 MiB


class ServeError(PointcallError):
    """The API cannot be served from that folder."""

    id = "api.serve"


class Server:
    """A running API. Made by `serve`; `stop` may be called twice."""

    def __init__(self, backend: Backend, run_dir: Path, clock_ns: Callable[[], int], mtls: Mtls | None) -> None:
        self._backend, self._run_dir, self._clock_ns, self._mtls = backend, run_dir, clock_ns, mtls
        self._accesses = Accesses()
        self._services = Services(backend, clock_ns)
        self._health = health.HealthServicer()
        self._servers = {role: self._server(role.value, of_socket(role), role) for role in Role}
        self._remote: Any = self._server("remote", mtls.callers(backend.now), *REMOTE_ROLES) if mtls else None
        self.port = 0  # of the mTLS listener, once it listens

    def socket(self, role: Role) -> Path:
        """Where this role connects."""
        return self._run_dir / f"{role.value}.sock"

    def set_serving(self, serving: bool) -> None:
        """What health checks answer, for every service at once."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(s.full_name for s in pb.DESCRIPTOR.services_by_name.values())):
            self._health.set(name, state)

    def flush(self) -> None:
        """Hand the counted accesses to the backend, which writes them to the journal. Call it every second or so."""
        accesses = self._accesses.drain()
        if accesses:
            self._backend.accessed(accesses)

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, let running ones end within the grace, remove the sockets, flush the access counts."""
        self._health.enter_graceful_shutdown()
        for role in Role:
            self.socket(role).unlink(missing_ok=True)
        servers = [*self._servers.values(), *([self._remote] if self._remote else [])]
        for stopped in [server.stop(grace_s) for server in servers]:
            stopped.wait()
        self.flush()

    def start(self, groups: Mapping[Role, int]) -> None:
        """Listen on all four sockets and on the mTLS port, or raise and leave none behind."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir.chmod(0o755)  # whatever the umask is: the sockets' own modes say who may connect
        for role in Role:
            _refuse_taken(self.socket(role))
        self.set_serving(self._backend.status().ready)
        staging = Path(tempfile.mkdtemp(prefix=".", dir=self._run_dir))  # mode 0700: nobody else gets in
        try:
            for role, server in self._servers.items():
                self._listen(role, server, staging, groups.get(role))
            if self._mtls is not None:
                self.port = _bind_mtls(self._remote, self._mtls)
                self._remote.start()
        except BaseException:
            self.stop(0)
            raise
        finally:
            shutil.rmtree(staging)

    def _listen(self, role: Role, server: Any, staging: Path, group: int | None) -> None:
        staged = staging / self.socket(role).name
        server.add_insecure_port(endpoint(staged))
        server.start()
        staged.chmod(SOCKET_MODES[role])
        if group is not None:
            os.chown(staged, -1, group)
        staged.replace(self.socket(role))

    def _server(self, name: str, caller_of: CallerOf, *roles: Role) -> Any:
        """A server for callers of these roles, with threads of its own."""
        interceptors: Any = [Interceptor(caller_of, self._accesses, self._clock_ns)]
        server = grpc.server(
            futures.ThreadPoolExecutor(max(THREADS[r] for r in roles), thread_name_prefix=f"api-{name}"),
            interceptors=interceptors,
            maximum_concurrent_rpcs=MAX_CALLS,
            options=_options(max(map(max_message_bytes, roles))),
        )
        for name, handlers in self._services.handlers().items():
            server.add_generic_rpc_handlers((_generic(name, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [s.full_name for s in pb.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server


def serve(
    backend: Backend,
    run_dir: Path,
    *,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    groups: Mapping[Role, int] | None = None,
    mtls: Mtls | None = None,
) -> Server:
    """Serve the API on `<run_dir>/<role>.sock` and return at once.

    `groups` gives the group id that owns a role's socket (default: the process's own). With `mtls`, auditors and
    relying parties may also call over the network.

    Raises ServeError `api.socket-in-use` when another executor listens there, `api.mtls` when the port or the
    certificate is not usable; SocketPathError when a path is too long.
    """
    server = Server(backend, run_dir, clock_ns, mtls)
    server.start(groups or {})
    return server


def _generic(service: str, handlers: Mapping[str, Handler]) -> Any:
    descriptor = pb.DESCRIPTOR.services_by_name[service]
    methods = {m.name: _method(m, handlers[m.name]) for m in descriptor.methods}
    return grpc.method_handlers_generic_handler(descriptor.full_name, methods)


def _method(descriptor: Any, handler: Handler) -> Any:
    request = message_factory.GetMessageClass(descriptor.input_type)
    response = message_factory.GetMessageClass(descriptor.output_type)
    return grpc.unary_unary_rpc_method_handler(
        lambda message, _: handler(message), request.FromString, response.SerializeToString
    )


def _options(max_request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.max_connection_age_ms", 3_600_000),  # a client certificate is looked at again at least every hour
        ("grpc.max_connection_age_grace_ms", 30_000),
        ("grpc.so_reuseport", 0),  # nobody else listens on our port
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _bind_mtls(server: Any, mtls: Mtls) -> int:
    credentials = grpc.ssl_server_credentials(
        [(mtls.key, mtls.certificate)], mtls.client_roots, require_client_auth=True
    )
    try:
        return int(server.add_secure_port(mtls.address, credentials))
    except RuntimeError as refusal:
        raise ServeError(
            "cannot serve mTLS",
            id="api.mtls",
            want=f"to listen on {mtls.address} with the certificate",
            got=str(refusal),
        ) from None


def _refuse_taken(path: Path) -> None:
    """A socket that nobody answers is left over and may be replaced; one that answers belongs to another executor."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(0.5)
        probe.connect(str(path))
        raise ServeError(
            "another executor serves this folder",
            id="api.socket-in-use",
            got=str(path),
            hint="stop it first, or use another --state-dir",
        )
