"""What every call passes through: who calls, the request's id, and the way of every error into a status."""

from __future__ import annotations  # grpc's classes are generic to mypy, and not when they run

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status

from service.auth.access import check_resource
from service.auth.door import Caller, Door
from service.auth.principal import Principal
from service.call import Call, serving
from service.errors import EngineError, InvalidRequest, LoraplexError, SlowConsumer, to_status, trailing_metadata
from service.telemetry.records import NOBODY, CallRecord, Observer
from service.telemetry.trace_context import trace_id_of
from service.tenants import Tenants
from service.validation import check_request

logger = logging.getLogger(__name__)

MAX_CLIENT_REQUEST_ID = 128  # characters


def known_error(error: Exception, call: Call, what: str) -> LoraplexError:
    """The error itself if it is for the caller; else EngineError, and what happened goes to the log alone."""
    if isinstance(error, LoraplexError):
        return error
    logger.error("%s failed, request_id=%s", what, call.request_id, exc_info=error)
    return EngineError(f"the server failed; quote request id {call.request_id} to its operator")


def error_status(error: LoraplexError, call: Call) -> Status:
    """With what the call had consumed."""
    return to_status(error, call.request_id, call.usage() if call.usage is not None else None)


def status_name(error: BaseException, call: Call) -> str:
    """The name of the status that the caller sees for what ended its call."""
    if isinstance(error, LoraplexError):
        return error.code.name
    if isinstance(error, Exception):
        return grpc.StatusCode.INTERNAL.name
    left = call.seconds_left()  # grpc cancels what has missed its deadline, too
    return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"


Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any] | AsyncGenerator[Any, None]]

_HANDLERS: Mapping[tuple[bool, bool], tuple[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]]] = {
    # (request is a stream, response is a stream)
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Gives each call its `Call`, and each error its status.

    A handler returns its response, or is an asynchronous generator of responses. Its caller's cancellation, deadline
    or disappearance reaches it as CancelledError (a generator: or as GeneratorExit), which passes through here.
    """

    def __init__(
        self,
        door: Door | None = None,
        stall_seconds: float = 30.0,
        observer: Observer = NOBODY,
        tenants: Tenants | None = None,
    ) -> None:
        """`door`: None lets everybody in. `tenants`: each call counts as a request of its tenant."""
        self._door = door or Door()
        self._tenants = tenants or Tenants()
        self._observer = observer
        self._stall_seconds = stall_seconds  # how long the caller of a stream may leave a message unread

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc.health.v1."):
            return handler  # unknown, or health, which says the same to everybody
        attribute, make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        wrapped = self._wrap(getattr(handler, attribute), handler_call_details.method)
        return make(wrapped, _tolerant(handler.request_deserializer), handler.response_serializer)

    def _wrap(self, behaviour: Behaviour, method: str) -> Behaviour:
        name = method.removeprefix("/")

        async def serve(request: Any, context: Context) -> Any:
            call = Call(tenant="")
            with serving(call):
                status = "OK"
                metadata = _text_metadata(context)
                call.trace_id = trace_id_of(metadata)
                call.admit = _Headers(call, context).send
                self._observer.call_started(call, name, metadata)
                try:
                    principal = await self._door.enter(method, _caller(context, metadata))
                    call.tenant = principal.tenant
                    self._tenants.get(principal.tenant).count_request()
                    call.client_request_id = _client_request_id(metadata)
                    call.deadline = _deadline(context)
                    call.routing_key = metadata.get("loraplex-routing-key", "")
                    if isinstance(request, AsyncIterator):
                        request = _checked_stream(request, principal, method)
                    else:
                        message = _message(request, method)
                        check_resource(principal, method, message)
                        check_request(message)
                    result = behaviour(request, context)
                    if isinstance(result, AsyncGenerator):
                        return await self._stream(result, call, context)
                    response = await result
                    await call.admit()
                    context.set_trailing_metadata(_outgoing(call))
                    return response
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    known = known_error(error, call, method)
                    status = known.code.name
                    await _abort(known, call, context)
                except BaseException as error:
                    status = status_name(error, call)
                    raise
                finally:
                    seconds = asyncio.get_running_loop().time() - call.arrival
                    self._observer.call_ended(call, CallRecord(method=name, status=status, seconds=seconds))

        return serve

    async def _stream(self, responses: AsyncGenerator[Any, None], call: Call, context: Context) -> None:
        watch = _StallWatch(self._stall_seconds)
        async with watch, aclosing(responses):
            async for response in responses:
                await call.admit()
                watch.writing()
                await context.write(response)
                watch.written()
        context.set_trailing_metadata(_outgoing(call))


class _Headers:
    """The initial metadata of a call."""

    def __init__(self, call: Call, context: Context) -> None:
        self._call = call
        self._context = context
        self._sent = False

    async def send(self) -> None:
        """At the admission of a request, else with the first response: headers end the client's right to retry."""
        if not self._sent:
            self._sent = True
            await self._context.send_initial_metadata(_outgoing(self._call))


class _StallWatch:
    """Ends its block with SlowConsumer once a single write in it takes too long.

    One timer for a whole stream, looked at when it rings: a timer for each message would cost more than the message.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._since: float | None = None  # when the write that runs now began

    def writing(self) -> None:
        self._since = self._loop.time()

    def written(self) -> None:
        self._since = None

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._seconds, self._look)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise SlowConsumer(
                f"a message of the stream was not read for {self._seconds:g} s; read faster, or ask for fewer and "
                "larger messages"
            ) from None

    def _look(self) -> None:
        now = self._loop.time()
        due = self._seconds + (now if self._since is None else self._since)
        if due <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)


async def _checked_stream(
    requests: AsyncIterator[Message | bytes], principal: Principal, method: str
) -> AsyncIterator[Message]:
    """The messages of a caller, of which the first says what they are about."""
    is_first = True
    async for request in requests:
        message = _message(request, method)
        if is_first:
            check_resource(principal, method, message)
            is_first = False
        check_request(message)
        yield message


def _message(request: Message | bytes, method: str) -> Message:
    """Raises InvalidRequest for what is no message."""
    if isinstance(request, bytes):
        raise InvalidRequest.at("request", f"{len(request)} bytes that are no message of {method}")
    return request


def _tolerant(deserialize: Callable[[bytes], Message] | None) -> Callable[[bytes], Message | bytes]:
    """Leaves bytes that are no message as they are, where gRPC would blame the server for them."""
    if deserialize is None:
        raise TypeError("a method of protocol buffers has a deserializer")

    def read(data: bytes) -> Message | bytes:
        try:
            return deserialize(data)
        except DecodeError:
            return data

    return read


def _text_metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _client_request_id(metadata: Mapping[str, str]) -> str:
    """Raises InvalidRequest for one that is too long to be kept."""
    value = metadata.get("x-request-id", "")
    if len(value) > MAX_CLIENT_REQUEST_ID:
        problem = f"has {len(value)} characters; at most {MAX_CLIENT_REQUEST_ID} are allowed"
        raise InvalidRequest.at("x-request-id", problem)
    return value


def _caller(context: Context, metadata: Mapping[str, str]) -> Caller:
    certificate = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    return Caller(metadata, context.peer(), certificate)


def _deadline(context: Context) -> float | None:
    seconds = context.time_remaining()
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


def _outgoing(call: Call) -> tuple[tuple[str, str], ...]:
    return (("loraplex-request-id", call.request_id), *call.metadata.items())


async def _abort(error: LoraplexError, call: Call, context: Context) -> None:
    status = error_status(error, call)
    await context.abort(error.code, status.message, (*_outgoing(call), *trailing_metadata(error, status)))
