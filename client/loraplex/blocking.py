"""Running operations and waiting for them: the caller, the streams it returns, and methods made of operations.

The same as awaiting.py, without asyncio; what the calls are and what their answers mean is shared.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from loraplex.channel import CallOptions, Connection
from loraplex.errors import from_call
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
    def __next__(self) -> MessageT_co: ...


class Stream(Generic[MessageT]):
    """The messages of a call, as they come. Cancels the call as soon as nobody can read them any more.

    That is: when a loop over it is left by break, return or an exception; at the end of its `with`; on cancel(), which
    any thread may call; and when it is dropped, to which grpc's own call sees. `next(stream)` reads one message and
    leaves the call running.

    Reading raises a LoraplexError if the call failed, and Cancelled after cancel().
    """

    def __init__(self, call: _StreamCall[MessageT]) -> None:
        self._call = call
        self._ended = False

    def cancel(self) -> None:
        """End the call now, if it has not ended. May be called more than once."""
        if not self._ended:
            self._call.cancel()

    def __next__(self) -> MessageT:
        if self._ended:
            raise StopIteration
        try:
            message = next(self._call)
        except StopIteration:
            self._ended = True
            self._check_end()
            raise
        except grpc.RpcError as error:
            self._ended = True
            raise from_call(error) from None
        self._received(message)
        return message

    def __iter__(self) -> Iterator[MessageT]:
        return _Loop(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def _received(self, message: MessageT) -> None:
        """Take note of a message."""

    def _check_end(self) -> None:
        """Raise if the messages may not end here."""


class _Loop(Generic[MessageT]):
    """One loop over a stream. Python drops it when the loop is left, in whatever way; then the call is cancelled."""

    def __init__(self, stream: Stream[MessageT]) -> None:
        self._stream = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MessageT:
        return next(self._stream)

    def __del__(self) -> None:
        self._stream.cancel()


class GenerateStream(Stream[inference_pb2.StreamGenerateResponse]):
    """The events of a generation: Started, then Delta and Finished for each output, then Completed.

    Reading to the end raises IncompleteStream if Completed did not come.
    """

    def __init__(self, call: _StreamCall[inference_pb2.StreamGenerateResponse]) -> None:
        super().__init__(call)
        self._events = GenerationEvents()

    @property
    def started(self) -> inference_pb2.Started | None:
        """The first event, once it has been read."""
        return self._events.started

    @property
    def completed(self) -> inference_pb2.Completed | None:
        """The last event, once it has been read."""
        return self._events.completed

    def text(self, output_index: int = 0) -> Generator[str, None, None]:
        """The text of one output, piece by piece."""
        for message in self:
            if message.HasField("delta") and message.delta.output_index == output_index and message.delta.text:
                yield message.delta.text

    def collect(self) -> inference_pb2.GenerateResponse:
        """Read to the end, and return what Generate would have, what was read before included."""
        for _ in self:
            pass
        return self._events.response()

    def _received(self, message: inference_pb2.StreamGenerateResponse) -> None:
        self._events.add(message)

    def _check_end(self) -> None:
        self._events.check_complete()


class Caller:
    """Runs operations over one channel. May be shared between threads."""

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
        """See Connection for what the arguments mean."""
        self._connection = Connection(address, credentials, token, tenant, timeout, options or {})
        self._channel = self._connection.open()

    def close(self) -> None:
        """Cancel every call that is still running, and close the channel."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def is_serving(self, service: str = "") -> bool:
        """Whether the server (or one of its services, or "models/{model}") can be used now.

        Raises NotFound for a name that the server does not know.
        """
        return self.run(inference.check_health(service)).status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_serving(self, service: str = "", **call: Unpack[CallOptions]) -> None:
        """Return as soon as it can be used, waiting for a server that is not up yet. DeadlineExceeded on timeout."""
        call["wait_for_ready"] = True
        for response in self.stream(inference.watch_health(service, **call)):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return

    def run(self, operation: Operation[MessageT]) -> MessageT:
        method = self._channel.unary_unary(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        try:
            return method(operation.request, **self._connection.arguments(operation.call))
        except grpc.RpcError as error:
            raise from_call(error) from None

    def upload(self, upload: Upload[MessageT]) -> MessageT:
        method = self._channel.stream_unary(
            upload.method,
            request_serializer=serialize,
            response_deserializer=upload.response.FromString,
        )
        try:
            return method(upload.requests, **self._connection.arguments(upload.call))
        except grpc.RpcError as error:
            raise from_call(error) from None

    def list(self, listing: Listing[MessageT]) -> list[MessageT]:
        items: list[MessageT] = []
        token = ""
        while True:
            page = self.run(listing.page(token))
            items.extend(listing.items(page))
            if not (token := page.next_page_token):
                return items

    def stream(self, operation: Operation[MessageT]) -> Stream[MessageT]:
        return Stream(self._start(operation))

    def stream_generation(self, operation: Operation[inference_pb2.StreamGenerateResponse]) -> GenerateStream:
        return GenerateStream(self._start(operation))

    def _start(self, operation: Operation[MessageT]) -> _StreamCall[MessageT]:
        method = self._channel.unary_stream(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        return method(operation.request, **self._connection.arguments(operation.call))


# Methods made of operations: same arguments, same documentation, run by the caller whose method they are.


def runs(build: Callable[P, Operation[MessageT]]) -> Callable[Concatenate[Caller, P], MessageT]:
    @functools.wraps(build)
    def method(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> MessageT:
        return self.run(build(*args, **kwargs))

    return method


def uploads(build: Callable[P, Upload[MessageT]]) -> Callable[Concatenate[Caller, P], MessageT]:
    @functools.wraps(build)
    def method(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> MessageT:
        return self.upload(build(*args, **kwargs))

    return method


def lists(build: Callable[P, Listing[MessageT]]) -> Callable[Concatenate[Caller, P], list[MessageT]]:
    @functools.wraps(build)
    def method(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> list[MessageT]:
        return self.list(build(*args, **kwargs))

    return method


def streams(build: Callable[P, Operation[MessageT]]) -> Callable[Concatenate[Caller, P], Stream[MessageT]]:
    @functools.wraps(build)
    def method(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> Stream[MessageT]:
        return self.stream(build(*args, **kwargs))

    return method


def streams_generation(
    build: Callable[P, Operation[inference_pb2.StreamGenerateResponse]],
) -> Callable[Concatenate[Caller, P], GenerateStream]:
    @functools.wraps(build)
    def method(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> GenerateStream:
        return self.stream_generation(build(*args, **kwargs))

    return method
