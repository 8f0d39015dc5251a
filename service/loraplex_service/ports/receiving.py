"""Receives the messages of a call: only of callers that may call, in time, within a size, checked before parsing."""

from __future__ import annotations  # grpc's classes are generic to mypy, and not when they run

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from loraplex_service.dialect_stubs.pool import service_of
from loraplex_service.errors import DeadlineExceeded, InvalidRequest, MessageTooLarge
from loraplex_service.ports.wire import SMALL_BYTES, check_wire
from loraplex_service.validation.checks import check_request

Context = grpc.aio.ServicerContext[Any, Any]

_DATA = (
    "/loraplex.v1.InferenceService/",
    "/loraplex.v1.PoolingService/",
    "/loraplex.v1.TokenizerService/",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/vllm.Inference/",
    "/openengine.v1.Inference/",
    "/vllm.grpc.engine.VllmEngine/",
)
# Streams of requests, each with answers of its own: a caller that has sent one may take its time with the next.
_CONVERSATIONS = ("/inference.GRPCInferenceService/ModelStreamInfer",)
_BATCH = "/loraplex.v1.InferenceService/BatchGenerate"
_ADAPTERS = "/loraplex.v1.AdapterService/"
_ADAPTER_BYTES = 2 << 20  # a chunk of an upload; an adapter with the names of all of its modules
_OTHER_BYTES = 256 << 10  # names, labels, targets


@dataclass(frozen=True, slots=True)
class ReceiveLimits:
    """Limits on the decompressed size of a message, and on the wait for it."""

    request_bytes: int = 4 << 20  # bytes of a request of the data port
    batch_bytes: int = 8 << 20  # bytes of a BatchGenerate request
    message_seconds: float = 30.0  # for each message that is waited for

    def bytes_of(self, method: str) -> int:
        """`method`: its path."""
        if method == _BATCH:
            return self.batch_bytes
        if method.startswith(_ADAPTERS):
            return _ADAPTER_BYTES
        return self.request_bytes if method.startswith(_DATA) else _OTHER_BYTES

    def largest(self, services: Iterable[str]) -> int:
        """The largest limit of any method of these services, given by full names."""
        found = map(service_of, services)
        methods = [f"/{service.full_name}/{method.name}" for service in found for method in service.methods]
        return max(map(self.bytes_of, methods), default=_OTHER_BYTES)


class Received(NamedTuple):
    """A message, and its size in bytes: to count them again takes milliseconds for a large one."""

    message: Message
    size: int


class Receiver:
    """Receives the messages of one method. No message is received before it is asked for."""

    def __init__(self, method: str, parse: Callable[[bytes], Message], limits: ReceiveLimits) -> None:
        """`method`: its path."""
        self._method = method
        self.is_conversation = method in _CONVERSATIONS
        self._kind = _input_of(method)
        self._parse = parse
        self._max_bytes = limits.bytes_of(method)
        self._seconds = limits.message_seconds

    async def one(self, context: Context) -> Received:
        """The only message of a caller."""
        received = await self._next(context, self._seconds)
        if received is None:
            raise InvalidRequest.at("request", f"is missing: {self._method} takes one message")
        return received

    async def all(self, context: Context) -> AsyncIterator[Received]:
        """The messages of a caller, each received when it is asked for."""
        seconds: float | None = self._seconds
        while (received := await self._next(context, seconds)) is not None:
            yield received
            seconds = None if self.is_conversation else self._seconds

    async def _next(self, context: Context, seconds: float | None) -> Received | None:
        """The next message; None: there are no more.

        Raises InvalidRequest, FeatureUnsupported, MessageTooLarge, DeadlineExceeded.
        """
        try:
            async with asyncio.timeout(seconds):
                data = await context.read()
        except TimeoutError:
            problem = f"no message of the call came for {seconds:g} s; send it with the call"
            raise DeadlineExceeded(problem) from None
        if data is grpc.aio.EOF:
            return None
        if len(data) > self._max_bytes:
            problem = f"{self._method} takes messages of at most {self._max_bytes} bytes, and this one has {len(data)}"
            raise MessageTooLarge(problem, len(data), self._max_bytes)
        try:
            if len(data) > SMALL_BYTES:  # in a thread: the loop has others to serve
                await asyncio.to_thread(check_wire, data, self._kind)
            return Received(self._parse(data), len(data))
        except DecodeError as error:
            raise InvalidRequest.at(
                "request", f"{len(data)} bytes that cannot be decoded as a message of {self._method}"
            ) from error


def _input_of(method: str) -> Descriptor:
    """The message type that the method takes."""
    service, _, name = method.removeprefix("/").partition("/")
    return service_of(service).methods_by_name[name].input_type


async def check_message(message: Message, size: int | None = None) -> None:
    """Check a message by the table of limits. `size`: its bytes, where they are known.

    Raises InvalidRequest, FeatureUnsupported.
    """
    if (message.ByteSize() if size is None else size) > SMALL_BYTES:  # in a thread: the loop has others to serve
        await asyncio.to_thread(check_request, message)
    else:
        check_request(message)
