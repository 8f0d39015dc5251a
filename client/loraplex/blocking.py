"""Waits for answers: the streams that calls return, and what all blocking clients have in common.

Written by client/generate.py from awaiting.py: change that, not this.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message

from loraplex.channel import Connection, Timeout
from loraplex.errors import from_call
from loraplex.events import GenerationEvents
from loraplex.operations import inference
from loraplex.operations.base import GenerationOperation, Listing, Operation, StreamOperation, Upload, serialize
from loraplex.v1 import inference_pb2

MessageT = TypeVar("MessageT", bound=Message)
MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class _Call(Protocol[MessageT_co]):
    """Part of a call that a stream needs."""

    def cancel(self) -> object: ...
    def __next__(self) -> MessageT_co: ...


class Stream(Generic[MessageT]):
    """The messages of a call, as they come. The call is cancelled as soon as nobody can read them any more.

    That is: when a loop over the stream is left by break, return or an exception; at the end of its `with`; on
    cancel(); and when the stream is dropped. `next(stream)` reads one message and leaves the call running, so
    that messages can be read one by one before a loop.

    Reading raises a LoraplexError if the call failed, and Cancelled after cancel().
    """

    def __init__(self, call: _Call[MessageT]) -> None:
        self._call = call
        self._ended = False

    def cancel(self) -> None:
        """End the call now, if it has not ended. May be called more than once, from any thread."""
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
    """One loop over a stream. Python drops the loop when it is left, in whatever way; then the call is cancelled."""

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

    def __init__(self, call: _Call[inference_pb2.StreamGenerateResponse]) -> None:
        super().__init__(call)
        self._events = GenerationEvents()

    @property
    def started(self) -> inference_pb2.Started | None:
        """The first event. None: it has not been read yet."""
        return self._events.started

    @property
    def completed(self) -> inference_pb2.Completed | None:
        """The last event. None: it has not been read yet."""
        return self._events.completed

    def text(self, output_index: int = 0) -> Generator[str, None, None]:
        """Read the text of one output, piece by piece."""
        for message in self:
            if message.HasField("delta") and message.delta.output_index == output_index and message.delta.text:
                yield message.delta.text

    def collect(self) -> inference_pb2.GenerateResponse:
        """Read to the end and return what `generate` would have, with what was read before."""
        for _ in self:
            pass
        return self._events.response()

    def _received(self, message: inference_pb2.StreamGenerateResponse) -> None:
        self._events.add(message)

    def _check_end(self) -> None:
        self._events.check_complete()


class Caller:
    """Runs operations over one channel. It may be shared between threads."""

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
        """Open a channel; the first call connects it.

        Args:
            address: "host:port", or any name that gRPC resolves, such as "dns:///loraplex:50051" or "unix:/run/x.sock".
            credentials: Result of grpc.ssl_channel_credentials(). None: no TLS.
            token: Bearer token, or a function that returns it and is called before every call. None: no token.
            tenant: Tenant to act for, if the token is trusted with several. None: the token's own.
            timeout: Seconds for calls that do not say otherwise. None: no limit.
            options: Further gRPC channel options. None: no options.
        """
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
        """Say whether the server can be used now. Raises NotFound for a name that the server does not know.

        Args:
            service: Name of one of the server's services, or "models/{model}". "": the server as a whole.
        """
        response = self._run(inference.check_health(service))
        return response.value == inference.SERVING

    def wait_until_serving(
        self,
        service: str = "",
        *,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Return as soon as the server can be used. A server that is not up yet is waited for.

        Args:
            service: Name of one of the server's services, or "models/{model}". "": the server as a whole.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same replica. None: to any.
            metadata: Further metadata, such as traceparent. None: no metadata.
        """
        watch = inference.watch_health(
            service, timeout=timeout, routing_key=routing_key, metadata=metadata, wait_for_ready=True
        )
        for response in self._stream(watch):
            if response.value == inference.SERVING:
                return

    def _run(self, operation: Operation[MessageT]) -> MessageT:
        method = self._channel.unary_unary(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        try:
            return method(operation.request, **self._connection.arguments(operation.call))
        except grpc.RpcError as error:
            raise from_call(error) from None

    def _upload(self, upload: Upload[MessageT]) -> MessageT:
        method = self._channel.stream_unary(
            upload.method,
            request_serializer=serialize,
            response_deserializer=upload.response.FromString,
        )
        try:
            return method(upload.requests, **self._connection.arguments(upload.call))
        except grpc.RpcError as error:
            raise from_call(error) from None

    def _list(self, listing: Listing[MessageT]) -> list[MessageT]:
        items: list[MessageT] = []
        token = ""
        while True:
            page = self._run(listing.page(token))
            items.extend(listing.items(page))
            if not (token := page.next_page_token):
                return items

    def _stream(self, operation: StreamOperation[MessageT]) -> Stream[MessageT]:
        return Stream(self._start(operation))

    def _stream_generation(self, operation: GenerationOperation) -> GenerateStream:
        return GenerateStream(self._start(operation))

    def _start(self, operation: StreamOperation[MessageT]) -> _Call[MessageT]:
        method = self._channel.unary_stream(
            operation.method,
            request_serializer=serialize,
            response_deserializer=operation.response.FromString,
        )
        return method(operation.request, **self._connection.arguments(operation.call))
