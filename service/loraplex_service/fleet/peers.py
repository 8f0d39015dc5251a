"""Replicas send each other the files of adapters, by digest, over a port of their own.

Who asks proves with every call that it knows the fleet's secret, which is in the database alone. The proof is of one
digest and of a short time: who reads it on the way can have what was sent on the way.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from loraplex.v1.adapters_pb2 import UploadAdapterRequest, UploadFile
from loraplex_adapters.files.source import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE
from loraplex_adapters.files.trust import SIGNATURE_FILE
from loraplex_adapters.grammar import is_digest
from loraplex_service.errors import Unavailable

METHOD = "/loraplex.fleet.Files/Fetch"
SENT_FILES = (CONFIG_FILE, WEIGHTS_FILE, SIGNATURE_FILE, *TEXT_FILES)
CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 2 << 20
MAX_CALL_BYTES = 4096
CALLS_AT_ONCE = 4  # that are served; more are told to ask another replica
PROOF_SECONDS = 60.0
SILENCE_SECONDS = 30.0  # for which a replica that sends may be silent, and one that receives may take nothing
SLOWEST = 128 << 10  # bytes a second: who sends less all in all is left


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replica asks for."""

    digest: str
    until: float  # seconds since the epoch
    proof: str


def wanted(secret: bytes, digest: str, now: float) -> Wanted:
    """Ask for the files of a digest."""
    until = now + PROOF_SECONDS
    return Wanted(digest, until, _proof(secret, digest, until))


def is_proven(asked: Wanted, secret: bytes, now: float) -> bool:
    """Whether a replica of this fleet asks, and asks now."""
    fresh = now - PROOF_SECONDS <= asked.until <= now + 2 * PROOF_SECONDS  # clocks differ
    return bool(secret) and fresh and hmac.compare_digest(asked.proof, _proof(secret, asked.digest, asked.until))


def _proof(secret: bytes, digest: str, until: float) -> str:
    return hmac.digest(secret, f"{digest} {until!r}".encode(), "sha256").hex()


class PeerFiles:
    """Serves the files that this replica has."""

    def __init__(self, secret: Callable[[], bytes], find: Callable[[str], Path | None]) -> None:
        """`find`: the directory of a digest; None: it is not here."""
        self._secret = secret
        self._find = find
        self._calls = 0

    def server(self, address: str, credentials: grpc.ServerCredentials | None) -> tuple[grpc.aio.Server, int]:
        """Build a server at an address, and return the port that it has. Raises RuntimeError for one that is taken."""
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(self._fetch)
        service, _, method = METHOD.removeprefix("/").partition("/")
        options = [
            ("grpc.max_receive_message_length", MAX_CALL_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", int(1000 * SILENCE_SECONDS)),  # of a machine that is gone without a word
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=16 * CALLS_AT_ONCE)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        if credentials is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, credentials)

    async def _fetch(self, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        try:
            asked = msgspec.json.decode(request, type=Wanted)
        except msgspec.MsgspecError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a digest and its proof are expected")
        if not is_digest(asked.digest) or not is_proven(asked, self._secret(), time.time()):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "no replica of this fleet asks so, or its clock is more than a minute off",
            )
        directory = self._find(asked.digest)
        if directory is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this replica has no files of this digest")
        if self._calls >= CALLS_AT_ONCE:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "this replica sends as much as it does at once")
        self._calls += 1
        try:
            async with aclosing(_messages(directory)) as messages:
                async for message in messages:
                    async with asyncio.timeout(SILENCE_SECONDS):  # else it would keep its turn for good
                        await context.write(message)
        except TimeoutError:
            context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)  # `abort` would wait until it can be sent
            context.set_details("nothing was taken for too long")
        finally:
            self._calls -= 1


async def _messages(directory: Path) -> AsyncGenerator[bytes, None]:
    for name in SENT_FILES:
        file = directory / name
        if not await asyncio.to_thread(file.is_file):
            continue
        with file.open("rb") as opened:  # not in a thread: whoever is cancelled meanwhile would leave it open
            size = (await asyncio.to_thread(file.stat)).st_size
            yield UploadAdapterRequest(file=UploadFile(name=name, size_bytes=size)).SerializeToString()
            while chunk := await asyncio.to_thread(opened.read, CHUNK_BYTES):
                yield UploadAdapterRequest(chunk=chunk).SerializeToString()


@dataclass(frozen=True)
class Way:
    """How a replica calls the others."""

    credentials: grpc.ChannelCredentials | None = None  # None: nothing is encrypted
    server_name: str | None = None  # which their certificates are for; None: the host of their addresses

    def to(self, address: str) -> grpc.aio.Channel:
        """A channel to a replica."""
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options)
        named = [] if self.server_name is None else [("grpc.ssl_target_name_override", self.server_name)]
        return grpc.aio.secure_channel(address, self.credentials, [*options, *named])


@asynccontextmanager
async def fetched(
    address: str, digest: str, secret: bytes, way: Way
) -> AsyncIterator[AsyncIterator[UploadAdapterRequest]]:
    """Ask a replica for the files of a digest, and yield its messages, which raise Unavailable if they end early."""
    async with way.to(address) as channel:
        ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHOD)
        yield _received(ask(msgspec.json.encode(wanted(secret, digest, time.time()))))


async def _received(call: "grpc.aio.UnaryStreamCall[bytes, bytes]") -> AsyncIterator[UploadAdapterRequest]:
    now = asyncio.get_running_loop().time
    patience = now() + SILENCE_SECONDS  # which every byte adds to
    try:
        while True:
            async with asyncio.timeout_at(min(patience, now() + SILENCE_SECONDS)):
                message = await call.read()
            if not isinstance(message, bytes):
                return  # it has ended
            patience += len(message) / SLOWEST
            yield UploadAdapterRequest.FromString(message)
    except grpc.aio.AioRpcError as error:
        raise Unavailable("ADAPTER_UNREADABLE", f"{error.code().name}: {(error.details() or '')[:200]}") from None
    except (TimeoutError, ValueError) as error:
        problem = str(error) or "too little for too long"
        raise Unavailable("ADAPTER_UNREADABLE", f"it sends nothing that can be read: {problem}") from error
    finally:
        call.cancel()
