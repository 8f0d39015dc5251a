"""The interceptor of every call: authentication, the request id, and the mapping of errors to a status."""

from __future__ import annotations  # grpc's classes are generic to mypy, and not when they run

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from loraplex_service.admission.places import SMALL_ANSWER_BYTES, Places, Refusals, UnreadAnswers
from loraplex_service.admission.tenants import Tenants
from loraplex_service.auth.access import check_resource, is_public
from loraplex_service.auth.door import Caller, Door
from loraplex_service.auth.principal import ANYBODY, Principal, Role
from loraplex_service.call import Call, serving
from loraplex_service.call_errors import error_status, known_error, status_name
from loraplex_service.errors import (
    FeatureUnsupported,
    InvalidRequest,
    LoraplexError,
    MessageTooLarge,
    SlowConsumer,
    Unauthenticated,
    trailing_metadata,
)
from loraplex_service.ports.receiving import Received, ReceiveLimits, Receiver, check_message
from loraplex_service.telemetry.records import NOBODY, CallRecord, Observer
from loraplex_service.telemetry.trace_context import trace_id_of

logger = logging.getLogger(__name__)

MAX_CLIENT_REQUEST_ID = 128  # characters
PUBLIC_CALLS_PER_HOST = 256  # of methods that ask for no credentials: health, which may be watched for ever


Context = grpc.aio.ServicerContext[Any, Any]
Enter = Callable[[], Awaitable[Principal]]
Behaviour = Callable[[Any, Context], Awaitable[Any] | AsyncGenerator[Any, None]]
_BEHAVIOURS: Mapping[tuple[bool, bool], str] = {
    # (request is a stream, response is a stream)
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits on what one caller may take of the server."""

    receive: ReceiveLimits = field(default_factory=ReceiveLimits)
    calls_per_tenant: int = 2048  # in progress
    unread_seconds: float = 30.0  # that a message of a stream may stay unread
    answer_bytes: int = 32 << 20  # of the answer to a unary call
    unread_bytes: int = 256 << 20  # of such answers that one tenant has not read yet


@dataclass(frozen=True, slots=True)
class _Method:
    """One method and its behaviour, as it is served."""

    path: str
    behaviour: Behaviour
    receiver: Receiver
    takes_many: bool  # messages
    serialize: Callable[[Any], bytes]
    observer: Observer

    @property
    def name(self) -> str:
        return self.path.removeprefix("/")

    async def request(self, principal: Principal, enter: Enter, context: Context) -> Any:
        """The argument of the behaviour: a message, or an iterator of messages. Raises PermissionDenied.

        `enter`: authenticates the caller again.
        """
        if self.takes_many:
            messages = _checked(self.receiver.all(context), principal, self.path)
            return _entered(messages, principal, enter) if self.receiver.is_conversation else messages
        message, size = await self.receiver.one(context)
        check_resource(principal, self.path, message)
        await check_message(message, size)
        return message


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Gives each call its `Call` object, and each error its status.

    To gRPC every method takes a stream, so that no message is received before its caller is authenticated. A handler
    returns its response, or is an asynchronous generator of responses. Its caller's cancellation, deadline or
    disappearance reaches it as CancelledError (a generator: or as GeneratorExit), which passes through here.
    """

    def __init__(
        self,
        door: Door | None = None,
        limits: CallLimits | None = None,
        observer: Observer = NOBODY,
        tenants: Tenants | None = None,
    ) -> None:
        """`door`: None: calls need no credentials. `tenants`: each call counts as a request of its tenant."""
        self._door = door or Door()
        self._tenants = tenants or Tenants()
        self._observer = observer
        self.limits = limits or CallLimits()
        self._places = Places(self.limits.calls_per_tenant)
        self._public_places = Places(PUBLIC_CALLS_PER_HOST)
        self._unread = UnreadAnswers(self.limits.unread_bytes)
        self._refusals = Refusals()
        self._served: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # by path

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None:
            return grpc.stream_unary_rpc_method_handler(partial(self._refuse_unknown, path))
        served = self._served.get(path)
        if served is None:
            served = self._served[path] = self._handler(path, handler)
        return served

    def _handler(self, path: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.request_deserializer is None or handler.response_serializer is None:
            raise TypeError("a method of protocol buffers has a serializer and a deserializer")
        method = _Method(
            path=path,
            behaviour=getattr(handler, _BEHAVIOURS[handler.request_streaming, handler.response_streaming]),
            receiver=Receiver(path, handler.request_deserializer, self.limits.receive),
            takes_many=handler.request_streaming,
            serialize=handler.response_serializer,
            observer=NOBODY if is_public(path) else self._observer,
        )
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._serving(method), None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(self._serving(method))

    def _serving(self, method: _Method) -> Callable[[object, Context], Awaitable[Any]]:
        async def serve(_: object, context: Context) -> Any:
            call = Call(tenant="")
            with serving(call):
                status = "OK"
                pairs = context.invocation_metadata() or ()
                metadata = {key: value for key, value in pairs if isinstance(value, str)}
                call.trace_id = trace_id_of(metadata)
                call.admit = _Headers(call, context).send
                method.observer.call_started(call, method.name, metadata)
                try:
                    _check_credentials_once(pairs)
                    caller = _caller(context, metadata)
                    principal = await self._principal(method.path, caller)
                    call.tenant, call.is_admin = principal.tenant, principal.has(Role.ADMIN)
                    call.manages = principal.has(Role.ADAPTERS)
                    self._count(principal, caller)
                    call.client_request_id = _client_request_id(metadata)
                    call.deadline = _deadline(context)
                    call.routing_key = metadata.get("loraplex-routing-key", "")
                    enter = partial(self._principal, method.path, caller)
                    result = method.behaviour(await method.request(principal, enter, context), context)
                    if isinstance(result, AsyncGenerator):
                        return await self._stream(result, call, context)
                    return await self._answer(await result, method, call, context)
                except grpc.aio.AbortError:
                    raise
                except grpc.aio.InternalError as error:  # what was to be sent cannot be: the caller is gone
                    status = status_name(error, call)
                    raise
                except Exception as error:
                    known = known_error(error, call, method.path)
                    status = known.code.name
                    if not call.tenant:  # nobody whom this server knows
                        await self._refusals.turn()
                    await _abort(known, call, context)
                except BaseException as error:
                    status = status_name(error, call)
                    raise
                finally:
                    seconds = asyncio.get_running_loop().time() - call.arrival
                    method.observer.call_ended(call, CallRecord(method=method.name, status=status, seconds=seconds))
                    call.let_go()

        return serve

    async def _refuse_unknown(self, path: str, _: object, context: Context) -> None:
        problem = "is not a method of this port of this server; reflection lists its services"
        await self._refusals.turn()
        await _abort(FeatureUnsupported(path[:200], problem), Call(tenant=""), context)

    async def _principal(self, path: str, caller: Caller) -> Principal:
        """Authenticate the caller. Raises what `Door.enter` raises, and Unavailable."""
        if is_public(path):
            return ANYBODY
        self._places.enter("")
        try:
            return await self._door.enter(path, caller)
        finally:
            self._places.leave("")

    def _count(self, principal: Principal, caller: Caller) -> None:
        """Give the call a place until it is over. Raises Unavailable, QuotaExceeded."""
        if principal is ANYBODY:
            places, who = self._public_places, caller.host
        else:
            places, who = self._places, principal.tenant
            self._tenants.get(principal.tenant).count_request()
        places.enter(who)
        _at_end(lambda _: places.leave(who))

    async def _answer(self, response: Any, method: _Method, call: Call, context: Context) -> bytes | None:
        """The answer to a unary call, serialised. Raises MessageTooLarge, SlowConsumer."""
        if response is None:
            return None  # a stream that its behaviour has written
        answer = method.serialize(response)
        if len(answer) > self.limits.answer_bytes:
            raise MessageTooLarge.answer(len(answer), self.limits.answer_bytes)
        if len(answer) > SMALL_ANSWER_BYTES:
            self._unread.send(call.tenant, len(answer))
            _at_end(lambda _: self._unread.sent(call.tenant, len(answer)))
        await call.admit()
        context.set_trailing_metadata(_outgoing(call))
        return answer

    async def _stream(self, responses: AsyncGenerator[Any, None], call: Call, context: Context) -> None:
        watch = _StallWatch(self.limits.unread_seconds)
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
        """Send the headers: once the request is admitted, else with the first response.

        They end the client's right to retry.
        """
        if not self._sent:
            self._sent = True
            await self._context.send_initial_metadata(_outgoing(self._call))


class _StallWatch:
    """Ends its block with SlowConsumer once a single write takes too long.

    One timer serves a whole stream and checks the current write when it fires: a timer for each message would cost more
    than the message.
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


async def _checked(received: AsyncIterator[Received], principal: Principal, path: str) -> AsyncIterator[Message]:
    """The messages of a stream, after checking the caller's right to the resource that the first one names."""
    is_first = True
    async for message, size in received:
        if is_first:
            check_resource(principal, path, message)
            is_first = False
        await check_message(message, size)
        yield message


async def _entered(messages: AsyncIterator[Message], principal: Principal, enter: Enter) -> AsyncIterator[Message]:
    """The messages of a stream without end, while its credentials are good. Raises what `Door.enter` raises."""
    async for message in messages:
        if await enter() != principal:
            raise Unauthenticated(
                "the credentials of this call stand for another caller or other roles now; call again"
            )
        yield message


def _at_end(callback: Callable[[object], None]) -> None:
    """Register a callback for the end of the call: its answer has been read, or its caller is gone."""
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(callback)


def _check_credentials_once(pairs: Iterable[tuple[str, str | bytes]]) -> None:
    """Raise Unauthenticated for credentials sent twice: a proxy and this server could each use another of them."""
    keys = [key for key, _ in pairs]
    for key in ("authorization", "loraplex-tenant"):
        if keys.count(key) > 1:
            raise Unauthenticated(f"the metadata `{key}` was sent {keys.count(key)} times; send it once")


def _client_request_id(metadata: Mapping[str, str]) -> str:
    """The request id that the caller chose. Raises InvalidRequest if it is too long to be kept."""
    value = metadata.get("x-request-id", "")
    if len(value) > MAX_CLIENT_REQUEST_ID:
        problem = f"has {len(value)} characters; at most {MAX_CLIENT_REQUEST_ID} are allowed"
        raise InvalidRequest.at("x-request-id", problem)
    return value


def _caller(context: Context, metadata: Mapping[str, str]) -> Caller:
    certificate = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    peer = context.peer()
    if peer.startswith("unix:"):  # the HTTP process of this service: it says whom it calls for
        peer = metadata.get("loraplex-peer", peer)
    return Caller(metadata, peer, certificate)


def _deadline(context: Context) -> float | None:
    seconds = context.time_remaining()
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


def _outgoing(call: Call) -> tuple[tuple[str, str], ...]:
    return (("loraplex-request-id", call.request_id), *call.metadata.items())


async def _abort(error: LoraplexError, call: Call, context: Context) -> None:
    status = error_status(error, call)
    try:
        await context.abort(error.code, status.message, (*_outgoing(call), *trailing_metadata(error, status)))
    except grpc.aio.AbortError as aborted:
        _at_end(partial(_let_go, aborted, error))
        raise


def _let_go(aborted: grpc.aio.AbortError, error: LoraplexError, _: object) -> None:
    """Break the cycle between a call and its errors: gRPC keeps `aborted` in the call, and the errors' frames hold the
    call.

    Otherwise the call stays, with all that gRPC holds of it, until a full collection, which would block the loop.
    """
    aborted.__context__ = None
    aborted.__traceback__ = error.__traceback__ = None
