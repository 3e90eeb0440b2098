"""A client of one executor over one role's socket, for the CLI and the MCP process.

Every failure is a PointcallError: the executor's own one where it sent one, `api.unreachable` where nobody listens.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf import message_factory

from pointcall_executor.api.endpoint import endpoint
from pointcall_executor.api.messages import pb
from pointcall_runbook.errors import PointcallError

TIMEOUT_S: Final = 30.0
MAX_RESPONSE_BYTES: Final = 8 * 1024 * 1024
_PACKAGE: Final = "pointcall.v1"


class ApiError(PointcallError):
    """The executor refused the call; `id` is the id of its error."""

    id = "api.error"
    status: str = ""  # the gRPC status code by name


class UnreachableError(PointcallError):
    """No executor answers on that socket."""

    id = "api.unreachable"


class Client:
    """One connection. Use it in a `with` block. SocketPathError where the socket's path is too long."""

    def __init__(self, socket: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._socket, self._timeout_s = socket, timeout_s
        self._channel = grpc.insecure_channel(
            endpoint(socket),
            options=[("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES)],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def call(self, method: str, **fields: Any) -> Any:
        """Call `Service/Method` with the fields of its request message; returns the response message.

        Raises ApiError with the executor's id, want, got and hint, or UnreachableError.
        """
        service, name = method.split("/")
        descriptor = pb.DESCRIPTOR.services_by_name[service].methods_by_name[name]
        request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
        response = message_factory.GetMessageClass(descriptor.output_type)
        stub = self._channel.unary_unary(
            f"/{_PACKAGE}.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return stub(request, timeout=self._timeout_s)
        except grpc.RpcError as failure:
            raise self._refusal(failure) from None

    def _refusal(self, failure: Any) -> PointcallError:
        sent = dict(failure.trailing_metadata() or ()).get("pointcall-error")
        if failure.code() is grpc.StatusCode.UNAVAILABLE and sent is None:
            return UnreachableError(
                "no executor answers", got=str(self._socket), hint="is `pointcall run` running with this --state-dir?"
            )
        if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED and sent is None:
            return UnreachableError(
                "the executor does not answer in time", id="api.deadline", got=str(self._socket),
                want=f"an answer within {self._timeout_s:g} s",
                hint="what was asked for may still be done: pointcall status, pointcall events",
            )  # fmt: skip
        try:
            body = json.loads(sent) if sent else {}
        except ValueError:
            body = {}
        details = body.get("message") or str(failure.details())
        parts = {k: str(body[k]) for k in ("id", "want", "got", "hint") if k in body}
        error = ApiError(details, **parts)
        error.status = failure.code().name
        return error
