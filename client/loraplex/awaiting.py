"""Running operations with asyncio: the caller, the streams it returns, and methods made of operations."""

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from loraplex.channel import CallOptions, Connection
from loraplex.errors import Cancelled, from_call, local
from loraplex.events import GenerationEvents
from loraplex.operations import inference
from loraplex.operations.base import Listing, Operation, Upload, serialize
from loraplex.v1 import inference_pb2

P = ParamSpec("P")
MessageT = TypeVar("MessageT", bound=Message)
MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class _StreamCall(Protocol[MessageT_co]):
    """What a stream needs of grpc's call."""

    def cancel(self) -> bool: ...
    def __aiter__(self) -> AsyncIterator[MessageT_co]: ...


class AsyncStream(Generic[MessageT]):
    """The messages of a call, as they come. Cancels the call as soon as nobody can read them any more.

    That is: when a loop over it is left by break, return or an exception; at the end of its `async with`; on cancel();
    and when it is dropped. (grpc's own call goes on after a break, and the server with it.) `anext(stream)` reads one
    message and leaves the call running, so that messages can be read one by one before a loop.

    Reading raises a LoraplexError if the call failed, and Cancelled after cancel().
    """

    def __init__(self, call: _StreamCall[MessageT], loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._loop = loop
        self._ended = False

    def cancel(self) -> None:
        """End the call now, if it has not ended. May be called more than once, from the loop's own thread."""
        # Without its loop a call is over, and cancelling it would raise.
        if not self._ended and not self._loop.is_closed():
            self._call.cancel()

    async def __anext__(self) -> MessageT:
        if self._ended:
            raise StopAsyncIteration
        try:
            message = await self._messages.__anext__()
        except StopAsyncIteration:
            self._ended = True
            self._check_end()
            raise
        except grpc.aio.AioRpcError as error:
            self._ended = True
            raise from_call(error) from None
        except asyncio.CancelledError:
            self._ended = True
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._call.cancel()
                raise
            raise local(Cancelled, grpc.StatusCode.CANCELLED, "the stream was cancelled by this side") from None
        self._received(message)
        return message

    def __aiter__(self) -> AsyncIterator[MessageT]:
        return _AsyncLoop(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):  # else it was never made
            self.cancel()

    def _received(self, message: MessageT) -> None:
        """Take note of a message."""

    def _check_end(self) -> None:
        """Raise if the messages may not end here."""


class _AsyncLoop(Generic[MessageT]):
    """One loop over a stream. Python drops it when the loop is left, in whatever way; then the call is cancelled."""

    def __init__(self, stream: AsyncStream[MessageT]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, MessageT]:
        return self._stream.__anext__()

    def __del__(self) -> None:
        self._stream.cancel()


class AsyncGenerateStream(AsyncStream[inference_pb2.StreamGenerateResponse]):
    """The events of a generation: Started, then Delta and Finished for each output, then Completed.

    Reading to the end raises IncompleteStream if Completed did not come.
    """

    def __init__(
        self,
        call: _StreamCall[inference_pb2.StreamGenerateResponse],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(call, loop)
        self._events = GenerationEvents()

    @property
    def started(self) -> inference_pb2.Started | None:
        """The first event, once it has been read."""
        return self._events.started

    @property
    def completed(self) -> inference_pb2.Completed | None:
        """The last event, once it has been read."""
        return self._events.completed

    async def text(self, output_index: int = 0) -> AsyncGenerator[str, None]:
        """The text of one output, piece by piece."""
        async for message in self:
            if message.HasField("delta") and message.delta.output_index == output_index and message.delta.text:
                yield message.delta.text

    async def collect(self) -> inference_pb2.GenerateResponse:
        """Read to the end, and return what Generate would have, what was read before included."""
        async for _ in self:
            pass
        return self._events.response()

    def _received(self, message: inference_pb2.StreamGenerateResponse) -> None:
        self._events.add(message)

    def _check_end(self) -> None:
        self._events.check_complete()


StreamT = TypeVar("StreamT", bound=AsyncStream[Any])


class AsyncCaller:
    """Runs operations over one channel. To be made, used and closed in one running event loop."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | Callable[[], str] | None = None,
        tenant: str | None = None,
        timeout: float | None = None,
        options: Mapping[str, str | int] | None = None,
    ) -> None:
        """See Connection for what the arguments mean. Raises RuntimeError where no event loop is running."""
        self._loop = asyncio.get_running_loop()
        self._connection = Connection(address, credentials, token, tenant, timeout, options or {})
        self._channel = self._connection.open_async()
        # grpc's close() finds only calls that a task is waiting for; a stream between two reads would go on.
        self._streams: weakref.WeakSet[AsyncStream[Any]] = weakref.WeakSet()

    async def close(self) -> None:
        """Cancel every call that is still running, and close the channel."""
        for stream in self._streams:
            stream.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def is_serving(self, service: str = "") -> bool:
        """Whether the server (or one of its services, or "models/{model}") can be used now.

        Raises NotFound for a name that the server does not know.
        """
        response = await self.run(inference.check_health(service))
        return response.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_until_serving(self, service: str = "", **call: Unpack[CallOptions]) -> None:
        """Return as soon as it can be used, waiting for a server that is not up yet. DeadlineExceeded on timeout."""
        call["wait_for_ready"] = True
        async for response in self.stream(inference.watch_health(service, **call)):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return

    async def run(self, operation: Operation[MessageT]) -> MessageT:
        method = self._channel.unary_unary(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        try:
            return await method(operation.request, **self._connection.arguments(operation.call))
        except grpc.aio.AioRpcError as error:
            raise from_call(error) from None

    async def upload(self, upload: Upload[MessageT]) -> MessageT:
        method = self._channel.stream_unary(
            upload.method,
            request_serializer=serialize,
            response_deserializer=upload.response.FromString,
        )
        try:
            return await method(upload.requests, **self._connection.arguments(upload.call))
        except grpc.aio.AioRpcError as error:
            raise from_call(error) from None

    async def list(self, listing: Listing[MessageT]) -> list[MessageT]:
        items: list[MessageT] = []
        token = ""
        while True:
            page = await self.run(listing.page(token))
            items.extend(listing.items(page))
            if not (token := page.next_page_token):
                return items

    def stream(self, operation: Operation[MessageT]) -> AsyncStream[MessageT]:
        return self._keep(AsyncStream(self._start(operation), self._loop))

    def stream_generation(self, operation: Operation[inference_pb2.StreamGenerateResponse]) -> AsyncGenerateStream:
        return self._keep(AsyncGenerateStream(self._start(operation), self._loop))

    def _keep(self, stream: StreamT) -> StreamT:
        self._streams.add(stream)
        return stream

    def _start(self, operation: Operation[MessageT]) -> _StreamCall[MessageT]:
        method = self._channel.unary_stream(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        return method(operation.request, **self._connection.arguments(operation.call))


# Methods made of operations: same arguments, same documentation, run by the caller whose method they are.


def runs(
    build: Callable[P, Operation[MessageT]],
) -> Callable[Concatenate[AsyncCaller, P], Coroutine[Any, Any, MessageT]]:
    @functools.wraps(build)
    async def method(self: AsyncCaller, /, *args: P.args, **kwargs: P.kwargs) -> MessageT:
        return await self.run(build(*args, **kwargs))

    return method


def uploads(
    build: Callable[P, Upload[MessageT]],
) -> Callable[Concatenate[AsyncCaller, P], Coroutine[Any, Any, MessageT]]:
    @functools.wraps(build)
    async def method(self: AsyncCaller, /, *args: P.args, **kwargs: P.kwargs) -> MessageT:
        return await self.upload(build(*args, **kwargs))

    return method


def lists(
    build: Callable[P, Listing[MessageT]],
) -> Callable[Concatenate[AsyncCaller, P], Coroutine[Any, Any, list[MessageT]]]:
    @functools.wraps(build)
    async def method(self: AsyncCaller, /, *args: P.args, **kwargs: P.kwargs) -> list[MessageT]:
        return await self.list(build(*args, **kwargs))

    return method


def streams(build: Callable[P, Operation[MessageT]]) -> Callable[Concatenate[AsyncCaller, P], AsyncStream[MessageT]]:
    @functools.wraps(build)
    def method(self: AsyncCaller, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[MessageT]:
        return self.stream(build(*args, **kwargs))

    return method


def streams_generation(
    build: Callable[P, Operation[inference_pb2.StreamGenerateResponse]],
) -> Callable[Concatenate[AsyncCaller, P], AsyncGenerateStream]:
    @functools.wraps(build)
    def method(self: AsyncCaller, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerateStream:
        return self.stream_generation(build(*args, **kwargs))

    return method
