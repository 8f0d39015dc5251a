"""Channel of grpc.aio whose streams end as those of grpc do, so that one source serves both kinds of client."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)
MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class _GrpcCall(Protocol[MessageT_co]):
    """Part of gRPC's call that a stream needs."""

    def cancel(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def __aiter__(self) -> AsyncIterator[MessageT_co]: ...


class AsyncCall(Generic[MessageT]):
    """A call that answers with a stream. It ends when it is dropped, and reading fails once it has been cancelled."""

    def __init__(self, call: _GrpcCall[MessageT], loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._loop = loop

    def cancel(self) -> None:
        # Without its loop a call is over, and cancelling it would raise.
        if not self._loop.is_closed():
            self._call.cancel()

    async def __anext__(self) -> MessageT:
        try:
            return await self._messages.__anext__()
        except StopAsyncIteration:
            if not self._call.cancelled():
                raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._call.cancel()
                raise
        nothing = grpc.aio.Metadata()
        message = "the stream was cancelled by this side"
        raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, nothing, nothing, message)

    def __del__(self) -> None:
        self.cancel()


class AsyncChannel:
    """A channel whose streams end with it. It is made, used and closed in one running event loop."""

    def __init__(self, channel: grpc.aio.Channel, loop: asyncio.AbstractEventLoop) -> None:
        self._channel = channel
        self._loop = loop
        self.unary_unary = channel.unary_unary
        self.stream_unary = channel.stream_unary
        # grpc's close() finds only calls that a task is waiting for; a stream between two reads would go on.
        self._calls: weakref.WeakSet[AsyncCall[Any]] = weakref.WeakSet()

    def unary_stream(
        self,
        method: str,
        *,
        request_serializer: Callable[[Message], bytes],
        response_deserializer: Callable[[bytes], MessageT],
    ) -> Callable[..., AsyncCall[MessageT]]:
        start = self._channel.unary_stream(
            method, request_serializer=request_serializer, response_deserializer=response_deserializer
        )

        def started(request: Message, **arguments: Any) -> AsyncCall[MessageT]:
            call = AsyncCall[MessageT](start(request, **arguments), self._loop)
            self._calls.add(call)
            return call

        return started

    async def close(self) -> None:
        """Cancel every call that is still running, and close the channel."""
        for call in self._calls:
            call.cancel()
        await self._channel.close()
