"""The one place where a call is let through: caller, method, rate, size, deadline; and what an error looks like.

Fail closed: a method without a row in roles.METHODS is denied before the server looks for it, a request is parsed only
after its caller was let through, and an exception that is not a PointcallError leaves as INTERNAL without its text.
Not here: what a method does (services.py), who a caller is (caller.py).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from pointcall_executor.agent_api.errors import NotFoundError, QuotaError, RequestError
from pointcall_executor.api.accesses import Accesses
from pointcall_executor.api.caller import Caller, CallerOf
from pointcall_executor.api.quota import Bucket
from pointcall_executor.api.roles import METHODS, RATES, Role, permitted
from pointcall_runbook.errors import PointcallError

MAX_STREAM_S: Final = 30.0  # a reflection stream: longer than any tool needs
ERROR_KEY: Final = "pointcall-error"  # trailing metadata: the error as JSON
PENALTY_S: Final = 0.1  # a refusal at once would let a caller in a loop take the CPU time that a recovery needs
MAX_PART_CHARS: Final = 600  # of one part of an error: metadata is capped by every transport

log = logging.getLogger(__name__)


class Interceptor:
    """A grpc.ServerInterceptor over one server. `caller_of` says who calls; `clock_ns` is monotonic."""

    def __init__(self, caller_of: CallerOf, accesses: Accesses, clock_ns: Callable[[], int]) -> None:
        self._caller_of, self._accesses, self._clock_ns = caller_of, accesses, clock_ns
        self._buckets: dict[str, Bucket] = {}  # by caller's name: sockets and tables bound how many there are
        self._making = threading.Lock()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        method = str(details.method)
        handler = continuation(details) if method in METHODS else None
        if handler is None or not handler.response_streaming:
            return self._unary(handler, method)
        return self._stream(handler, method)

    def _unary(self, handler: Any, method: str) -> Any:
        """Raw bytes in, and a message only for a caller that may call. Without a handler there is nothing to call."""

        def call(raw: bytes, context: Any) -> Any:
            try:
                self._enter(method, context)
                if handler is None:
                    raise UnservedError("not served by this build", got=method[:120])
                return handler.unary_unary(_request(handler, method, raw), context)
            except PointcallError as refusal:
                _abort(context, refusal)
            except Exception:  # a bug: its text may hold what the caller must not see
                log.exception("bug in %s", method)
                context.abort(grpc.StatusCode.INTERNAL, "a bug in pointcall; the executor's log has it")

        serializer = handler.response_serializer if handler is not None else None
        return grpc.unary_unary_rpc_method_handler(call, None, serializer)

    def _stream(self, handler: Any, method: str) -> Any:
        """A stream that ends by itself, so that idle ones do not hold the server's threads."""
        assert handler.request_streaming, "only reflection streams, in both directions"

        def call(requests: Iterator[Any], context: Any) -> Iterator[Any]:
            try:
                self._enter(method, context)
            except PointcallError as refusal:
                _abort(context, refusal)
            timer = threading.Timer(MAX_STREAM_S, context.cancel)
            timer.daemon = True
            context.add_callback(timer.cancel)
            timer.start()
            yield from handler.stream_stream(requests, context)

        return grpc.stream_stream_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)

    def _enter(self, method: str, context: Any) -> None:
        """Raises unless this caller may make this call now. Counts it either way."""
        caller = self._caller_of(context)
        if caller is None or not permitted(caller.role, method):
            self._accesses.add(caller.name if caller else "unknown", method, denied=True)
            if caller is None or not self._may_spend(caller, 1):
                time.sleep(PENALTY_S)
            raise _denied(caller, method)
        if not self._may_spend(caller, METHODS[method].cost):
            time.sleep(PENALTY_S)
            raise _too_fast(caller.role)
        self._accesses.add(caller.name, method, denied=False)
        left = context.time_remaining()
        if left is not None and left <= 0:
            raise LateError("the deadline has passed")

    def _may_spend(self, caller: Caller, cost: int) -> bool:
        with self._making:
            if caller.name not in self._buckets:
                rate, burst = RATES[caller.role]
                self._buckets[caller.name] = Bucket(burst, 1_000_000_000 // rate, self._clock_ns())
            bucket = self._buckets[caller.name]
        return bucket.take(cost, self._clock_ns())


class DeniedError(PointcallError):
    """This caller may not call that method, or nobody may."""

    id = "api.denied"


class UnservedError(PointcallError):
    """The method is permitted, but this build does not serve it."""

    id = "api.method"


class LateError(PointcallError):
    """The caller's deadline had passed before its call began."""

    id = "api.late"


def _request(handler: Any, method: str, raw: bytes) -> Any:
    most = METHODS[method].max_request_bytes
    if len(raw) > most:
        raise RequestError("the request is too large", id="api.size", want=f"<= {most} bytes", got=str(len(raw)))
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        raise RequestError("the request is no message of this method", want=method) from None


def _denied(caller: Caller | None, method: str) -> DeniedError:
    return DeniedError(
        "this caller may not call that method",
        want="a method of the role's row in docs/spec/api.md",
        got=f"{caller.name if caller else 'an unknown caller'} called {method[:120]!a}",
        hint="the socket is the role: use the one of your role",
    )


def _too_fast(role: Role) -> QuotaError:
    rate, burst = RATES[role]
    return QuotaError(
        "too many calls", id="api.rate", want=f"{rate} tokens/s, at most {burst} saved", hint="wait a second"
    )


def _code_of(error: PointcallError) -> Any:
    match error:
        case DeniedError():
            return grpc.StatusCode.PERMISSION_DENIED
        case UnservedError():
            return grpc.StatusCode.UNIMPLEMENTED
        case LateError():
            return grpc.StatusCode.DEADLINE_EXCEEDED
        case NotFoundError():
            return grpc.StatusCode.NOT_FOUND
        case QuotaError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case RequestError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case _:
            return grpc.StatusCode.FAILED_PRECONDITION


def _abort(context: Any, error: PointcallError) -> NoReturn:
    body = {k: v[:MAX_PART_CHARS] for k, v in error.as_dict().items()}
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(body)),))
    context.abort(_code_of(error), f"{error.message} [{error.id}]")
    raise AssertionError("abort never returns")
