"""The clients with which the door calls the service, and what goes along with every call."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from google.protobuf.message import Message

from loraplex import AsyncClient, AsyncGenerateStream, LoraplexError
from loraplex.channel import CallOptions
from loraplex.operations.base import GenerationOperation, Operation
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    CancelGenerationRequest,
    CancelGenerationResponse,
    StreamGenerateRequest,
    StreamGenerateResponse,
)
from loraplex_service.http.exchange import Exchange
from loraplex_service.http.failures import Refusal

ResponseT = TypeVar("ResponseT", bound=Message)

# What a caller may say beside the body, by the same names as in gRPC's metadata.
ROUTING_KEY = "loraplex-routing-key"
TENANT = "loraplex-tenant"
API_KEY = "x-api-key"  # Anthropic's clients send the token so
FORWARDED = ("authorization", TENANT, ROUTING_KEY, "x-request-id", "traceparent", "tracestate")
TIMEOUT = "loraplex-timeout-seconds"
MAX_HEADER_BYTES = 7 << 10  # gRPC takes 8 KiB of metadata, names and its own included, and refuses more without a word
_OPTIONS: dict[str, str | int] = {
    "grpc.use_local_subchannel_pool": 1,  # else all clients would share one connection
    "grpc.enable_retries": 0,  # the caller is told, and decides itself
    "grpc.max_receive_message_length": -1,  # the service bounds its answers
}


class ServiceClient(AsyncClient):
    """A client that sends requests as they are, too: what they lack the service says, in its own words."""

    async def ask(self, method: str, request: Message, response: type[ResponseT], call: CallOptions) -> ResponseT:
        """Call a unary method, such as "TokenizerService/Tokenize"."""
        return await self._run(Operation(f"/loraplex.v1.{method}", request, response, call))

    async def check_role(self, call: CallOptions) -> None:
        """Raise what the service says to callers who may not generate. It is asked to cancel nothing: that is cheap."""
        nothing = CancelGenerationRequest(client_request_ids=[""])
        await self.ask("InferenceService/CancelGeneration", nothing, CancelGenerationResponse, call)

    async def serves_within(self, seconds: float) -> bool:
        """Say whether the service says in time that it can be used."""
        with suppress(LoraplexError, TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.is_serving()
        return False

    def stream(self, spec: GenerateSpec, call: CallOptions) -> AsyncGenerateStream:
        """Call StreamGenerate."""
        method, request = "/loraplex.v1.InferenceService/StreamGenerate", StreamGenerateRequest(spec=spec)
        return self._stream_generation(GenerationOperation(method, request, StreamGenerateResponse, call))


class Clients:
    """As many clients as there are calls for, each with a connection of its own, since a connection takes so many."""

    def __init__(self, target: str, calls_per_client: int) -> None:
        self._target = target
        self._calls_per_client = calls_per_client
        self._calls = Counter[ServiceClient]()

    @contextmanager
    def lease(self) -> Iterator[ServiceClient]:
        """A client for one call."""
        client = next((one for one, calls in self._calls.items() if calls < self._calls_per_client), None)
        if client is None:
            client = ServiceClient(self._target, options=_OPTIONS)
        self._calls[client] += 1
        try:
            yield client
        finally:
            self._calls[client] -= 1

    @property
    def num_calls(self) -> int:
        """Calls in progress."""
        return self._calls.total()

    async def close(self) -> None:
        """Cancel all calls, and close all connections."""
        for client in self._calls:
            await client.close()


def call_options(exchange: Exchange, routing_key: str | None = None) -> CallOptions:
    """The options of a call that come from the request's headers. Raises Refusal for what gRPC cannot carry.

    `routing_key`: of the body, which goes along as the header does, and comes before it.
    """
    metadata = {name: exchange.headers[name] for name in FORWARDED if name in exchange.headers}
    names = {name: name for name in metadata}
    if API_KEY in exchange.headers:
        token = f"Bearer {exchange.headers[API_KEY]}"
        if metadata.setdefault("authorization", token) != token:
            raise Refusal(401, f"authorization and {API_KEY} are different credentials; send one", param=API_KEY)
        names["authorization"] = API_KEY
    if routing_key is not None:
        metadata[ROUTING_KEY], names[ROUTING_KEY] = routing_key, "prompt_cache_key"
    for name, value in metadata.items():
        if not (value.isascii() and value.isprintable()):
            problem = f"{names[name]}: has characters other than those of printable ASCII"
            raise Refusal(400, problem, param=names[name], code="invalid_value")
    if sum(len(name) + len(value) for name, value in metadata.items()) > MAX_HEADER_BYTES:
        together = ", ".join(names.values())
        raise Refusal(431, f"what goes along with the call has more than {MAX_HEADER_BYTES} bytes: {together}")
    if exchange.peer:
        metadata["loraplex-peer"] = exchange.peer
    return {"metadata": metadata, "timeout": _timeout(exchange.headers.get(TIMEOUT))}


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise Refusal(400, f"the header {TIMEOUT} must be a number of seconds above 0", param=TIMEOUT)
    return seconds
