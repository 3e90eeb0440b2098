"""The one place where a call is let through: role, rate, size, deadline, and what an error looks like outside.

Fail closed: a method without a row in roles.METHODS is denied before the server looks for it, and an exception that is
not a PointcallError leaves as INTERNAL without its text. Not here: what a method does (services.py).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import grpc

from pointcall_executor.agent_api.errors import NotFoundError, QuotaError, RequestError
from pointcall_executor.api.accesses import Accesses
from pointcall_executor.api.quota import Bucket
from pointcall_executor.api.roles import METHODS, RATES, Role, permitted
from pointcall_runbook.errors import PointcallError

MAX_STREAM_S: Final = 30.0  # a reflection stream: longer than any tool needs
ERROR_KEY: Final = "pointcall-error"  # trailing metadata: the error as JSON
MAX_ERROR_BYTES: Final = 4_000  # metadata is capped by every transport

log = logging.getLogger(__name__)


class RoleInterceptor:
    """A grpc.ServerInterceptor that guards one server, which serves one role. `clock_ns` is monotonic."""

    def __init__(self, role: Role, accesses: Accesses, clock_ns: Callable[[], int]) -> None:
        self._role, self._accesses, self._clock_ns = role, accesses, clock_ns
        rate, burst = RATES[role]
        self._bucket = Bucket(rate, burst, clock_ns())

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        method = str(details.method)
        if not permitted(self._role, method):
            self._accesses.add(self._role, method, denied=True)
            return _refusing(grpc.StatusCode.PERMISSION_DENIED, _denied(self._role, method))
        if not self._bucket.take(METHODS[method].cost, self._clock_ns()):
            return _refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, _too_fast(self._role))
        self._accesses.add(self._role, method, denied=False)
        handler = continuation(details)
        if handler is None:
            return _refusing(grpc.StatusCode.UNIMPLEMENTED, RequestError("not served here", id="api.method"))
        return _bounded_stream(handler) if handler.response_streaming else _guarded(handler, method)


def _denied(role: Role, method: str) -> PointcallError:
    return PointcallError(
        "this role may not call that method",
        id="api.denied",
        want="a method of the role's row in docs/spec/api.md",
        got=f"{role.value} called {method[:120]!a}",
        hint="the socket is the role: use the one of your role",
    )


def _too_fast(role: Role) -> PointcallError:
    rate, burst = RATES[role]
    return QuotaError(
        "too many calls", id="api.rate", want=f"{rate} tokens/s, at most {burst} saved", hint="wait a second"
    )


def _refusing(code: Any, error: PointcallError) -> Any:
    """A handler that refuses without parsing the request."""

    def refuse(_: bytes, context: Any) -> NoReturn:
        _abort(context, code, error)

    return grpc.unary_unary_rpc_method_handler(refuse)


def _guarded(handler: Any, method: str) -> Any:
    """The handler behind its size cap and deadline, with errors in their one form."""
    most = METHODS[method].max_request_bytes

    def parse(raw: bytes) -> Any:
        return handler.request_deserializer(raw) if len(raw) <= most else _TooLarge(len(raw))

    def call(request: Any, context: Any) -> Any:
        left = context.time_remaining()
        if left is not None and left <= 0:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        try:
            if isinstance(request, _TooLarge):
                raise RequestError("the request is too large", id="api.size", want=f"<= {most}", got=str(request.size))
            return handler.unary_unary(request, context)
        except PointcallError as refusal:
            _abort(context, _code_of(refusal), refusal)
        except Exception:  # a bug: its text may hold what the caller must not see
            log.exception("bug in %s", method)
            context.abort(grpc.StatusCode.INTERNAL, "a bug in pointcall; the executor's log has it")

    return grpc.unary_unary_rpc_method_handler(call, parse, handler.response_serializer)


class _TooLarge:
    def __init__(self, size: int) -> None:
        self.size = size


def _bounded_stream(handler: Any) -> Any:
    """A stream that ends by itself, so that idle ones do not hold the server's threads."""

    def call(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        timer = threading.Timer(MAX_STREAM_S, context.cancel)
        timer.daemon = True
        context.add_callback(timer.cancel)
        timer.start()
        yield from handler.stream_stream(requests, context)

    assert handler.request_streaming, "only reflection streams, in both directions"
    return grpc.stream_stream_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


def _code_of(error: PointcallError) -> Any:
    match error:
        case NotFoundError():
            return grpc.StatusCode.NOT_FOUND
        case QuotaError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case RequestError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case _:
            return grpc.StatusCode.FAILED_PRECONDITION


def _abort(context: Any, code: Any, error: PointcallError) -> NoReturn:
    body = {k: v[:600] for k, v in error.as_dict().items()}
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(body)[:MAX_ERROR_BYTES]),))
    context.abort(code, f"{error.message} [{error.id}]")
    raise AssertionError("abort returns never")
