"""Frames between the service and an engine: typed msgpack over one ZeroMQ pair socket per engine process. Torch-free.

The address is an ipc:// path in a directory that only its owner may enter. A frame that does not decode into the closed
set of its direction is logged, counted and dropped. Frames are numbered. A gap means that a frame is lost that a caller
may wait for: `FrameLost` is raised before any frame after the gap is handed out. The heartbeat's frames find a gap that
no other frame follows.
"""

import asyncio
import errno
import logging
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import msgspec
import zmq

from loraplex_engine.link.messages import FromEngine, ToEngine

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES: Final = 256 << 20  # a prompt of 32 MiB and its tokens fit many times
SPARE_DESCRIPTORS: Final = 32  # a bus and its engine process take less than half of them
MAX_UNREAD_FRAMES: Final = 16384  # steps that an engine goes ahead of a service that does not read, then it waits

NUMBER: Final = struct.Struct(">Q")  # ahead of each frame: how many its sender has sent before it

T = TypeVar("T")


class FrameLost(Exception):  # noqa: N818  (what happened)
    """A frame did not arrive, or one arrived that has no number."""

    def __init__(self, expected: int, frame: bytes) -> None:
        got = NUMBER.unpack_from(frame)[0] if len(frame) >= NUMBER.size else "none"
        super().__init__(f"frame {expected} is lost: the next one's number is {got}")


class BadRequest(msgspec.Struct, frozen=True):
    """An AddRequest frame that did not decode, except for its request id: so it can be answered."""

    request_id: int
    problem: str


class FrameReader(Generic[T]):
    """Decodes frames of one closed set of messages, and counts the others."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self.num_bad_frames = 0
        self._decoder = decoder

    def read(self, frame: bytes | memoryview) -> T | BadRequest | None:
        """The message in a frame; None: the frame holds none. Never raises."""
        try:
            return self._decoder.decode(frame)
        # Whatever a hostile frame provokes (MsgspecError, RecursionError, UnicodeDecodeError, …) is its own fault.
        except Exception as error:
            self.num_bad_frames += 1
            logger.warning(
                "dropped a frame of %d bytes that cannot be decoded (%s); %d so far",
                len(frame),
                error,
                self.num_bad_frames,
            )
            return _bad_request(frame, str(error))


def _bad_request(frame: bytes | memoryview, problem: str) -> BadRequest | None:
    try:
        fields = msgspec.msgpack.decode(frame)
    except Exception:  # as above; it is logged already
        return None
    match fields:
        case ["AddRequest", int(request_id), *_]:
            return BadRequest(request_id, problem)
    return None


def bus_address(directory: Path, name: str) -> str:
    """The address of one engine process. Raises ValueError where the path is too long for a socket."""
    path = str(directory / name)
    if len(path.encode()) >= zmq.IPC_PATH_MAX_LEN:
        raise ValueError(
            f"socket path {path!r} is longer than {zmq.IPC_PATH_MAX_LEN - 1} bytes: set TMPDIR to a shorter one"
        )
    return f"ipc://{path}"


class _Bus:
    """The common part of both ends: a pair socket and an encoder."""

    def __init__(self) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._num_sent = 0
        self._num_received = 0

    def close(self, linger_seconds: float = 1.0) -> None:
        """Send the queued messages, for at most this time, and close. Closing twice is harmless."""
        if not self._socket.closed:
            self._socket.close(linger=round(1000 * linger_seconds))
            self._context.term()

    def _send(self, message: ToEngine | FromEngine, flags: int = 0) -> None:
        """Raises zmq.Again where it would have to wait and `flags` forbid that."""
        self._socket.send(NUMBER.pack(self._num_sent) + self._encoder.encode(message), flags)
        self._num_sent += 1

    def _unpack(self, frame: bytes) -> memoryview:
        """The frame without its number. Raises FrameLost."""
        if frame[: NUMBER.size] != NUMBER.pack(self._num_received):
            raise FrameLost(self._num_received, frame)
        self._num_received += 1
        return memoryview(frame)[NUMBER.size :]

    def _has_input(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class EngineBus(_Bus):
    """The engine's end: blocking, for the thread that takes the steps."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._reader = FrameReader[ToEngine](msgspec.msgpack.Decoder(ToEngine))
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_FRAMES)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # what the service admits, it has bounded itself
        self._socket.connect(address)

    @property
    def num_bad_frames(self) -> int:
        return self._reader.num_bad_frames

    def receive(self, timeout_seconds: float | None) -> list[ToEngine | BadRequest]:
        """Return all messages received so far. If there are none, wait for the first; None: for ever, 0: not at all.

        Raises FrameLost: the service's view of this engine is then wrong, and the engine must be replaced.
        """
        messages: list[ToEngine | BadRequest] = []
        if timeout_seconds != 0 and not self._has_input():
            self._socket.poll(None if timeout_seconds is None else round(1000 * timeout_seconds))
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = self._reader.read(self._unpack(frame))
            if message is not None:
                messages.append(message)

    def send(self, message: FromEngine) -> None:
        """Queue a message. Waits only when the service has left MAX_UNREAD_FRAMES unread."""
        self._send(message)


class ServiceBus(_Bus):
    """The service's end, for one event loop. `send` never waits: an abort can be sent while a task is cancelled.

    The socket's descriptor reports edges, not levels: it reports an event once, and each access to the socket may clear
    the report. So after every receive and send all readable frames are taken at once.
    """

    def __init__(self, address: str) -> None:
        """Binds the address. Needs a running event loop. Raises OSError, zmq.ZMQError."""
        _check_descriptors()
        super().__init__()
        self._reader = FrameReader[FromEngine](msgspec.msgpack.Decoder(FromEngine))
        self._socket.setsockopt(zmq.SNDHWM, 0)  # admission bounds what is queued
        self._socket.setsockopt(zmq.RCVHWM, MAX_UNREAD_FRAMES)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            super().close(0.0)
            raise
        self._frames: list[bytes] = []
        self._readable = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._take_frames)

    @property
    def num_bad_frames(self) -> int:
        return self._reader.num_bad_frames

    def send(self, message: ToEngine) -> None:
        """Queue a message. Without an engine at the other end it is dropped, and calls that wait for an answer fail
        when the process is found dead. So send nothing before the engine has sent EngineSized or EngineReady.
        """
        if self._socket.closed:
            return
        try:
            self._send(message, zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("dropped %s: no engine is connected", type(message).__name__)
        self._take_frames()

    async def receive(self) -> list[FromEngine]:
        """Wait for a frame, and return all messages received so far, in order; empty: the frame held no message.

        Raises FrameLost.
        """
        await self._readable.wait()
        self._readable.clear()
        frames, self._frames = self._frames, []
        messages = map(self._reader.read, map(self._unpack, frames))
        return [message for message in messages if message is not None and not isinstance(message, BadRequest)]

    def close(self, linger_seconds: float = 0.0) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
        super().close(linger_seconds)

    def _take_frames(self) -> None:
        while self._has_input():
            self._frames.append(self._socket.recv(zmq.NOBLOCK))
            self._readable.set()


def _check_descriptors() -> None:
    """Raise OSError if too few descriptors are left: ZeroMQ aborts a process that runs out of them."""
    held: list[int] = []
    try:
        while len(held) < SPARE_DESCRIPTORS:
            held += os.pipe()
    except OSError as error:
        raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}; raise its limit (ulimit -n)") from error
    finally:
        for descriptor in held:
            os.close(descriptor)
