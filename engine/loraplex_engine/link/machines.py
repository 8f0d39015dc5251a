"""What the machines of one model tell each other. Torch-free: those that follow wait for the first one without it.

A machine that follows says again and again what it does, and the first one answers each time what it is to do. So
neither has to remember what the other missed: an answer that is lost is given again.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.curve import SharedKeys, read_secret

LOOPBACK: Final = "127.0.0.1"
DEFAULT_PORT: Final = 50055
BEAT_SECONDS: Final = 0.5  # between two words of a machine
SILENT_SECONDS: Final = 30.0  # without a word, after which the other end counts as lost
RESOLVING_SECONDS: Final = 1.0  # between two attempts to find the address of a name
MAX_FRAME_BYTES: Final = 8 << 20
PIECE_BYTES: Final = 1 << 20  # of a file, in one answer

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>\d{1,5})")
_ALL_INTERFACES = "0.0.0.0"

T = TypeVar("T")


class Meeting(msgspec.Struct, frozen=True):
    """Where the machines of a model meet: at the first one, by an address that the others reach."""

    host: str
    port: int
    secret: bytes

    @classmethod
    def at(cls, address: str, secret_file: str) -> Meeting:
        """From an address, "10.0.0.5:50055", and the file with the secret. Raises ValueError."""
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 1 << 16:
            raise ValueError(
                f"address {address!r} of the first machine: HOST:PORT is expected, such as 10.0.0.5:{DEFAULT_PORT}"
            )
        if match["host"] == _ALL_INTERFACES:
            raise ValueError(f"address {address!r} of the first machine: say the one by which the others reach it")
        return cls(match["host"], int(match["port"]), read_secret(Path(secret_file)))

    @property
    def endpoint(self) -> str:
        """As ZeroMQ has it."""
        return f"tcp://{self.host}:{self.port}"

    @property
    def keys(self) -> SharedKeys:
        return SharedKeys(self.secret)


def address_of(host: str, waits: Callable[[str], None]) -> str:
    """The address of a host. A name that does not resolve is waited for: its pod may not have been placed yet.

    `waits`: told once of what is waited for.
    """
    told = False
    while True:
        try:
            return socket.gethostbyname(host)
        except socket.gaierror as error:
            if not told:
                waits(f"the name {host!r} to resolve ({error.strerror})")
            told = True
            time.sleep(RESOLVING_SECONDS)


def release() -> str:
    """The release of this software: the machines of a model must have the same."""
    return version("loraplex-server")


class OtherReleaseError(ValueError):
    """Another release has sent a message, which may mean something else there."""

    def __init__(self, other: str) -> None:
        super().__init__(f"it has release {other}, and this machine {release()}: install the same")


class UnreadableError(ValueError):
    """A message is none of those that were expected."""


class _Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every message: an array, tagged with the name of its class."""


class Here(_Message, frozen=True):
    """A machine is there, and does this."""

    index: int  # of the machine; the first one is 0
    machines: int  # that there are, as far as it knows
    host: str  # by which the others reach it
    instance: str  # of its process: another one knows nothing of what this one began
    life: str  # of the engine whose ranks it runs; "": none
    ended: dict[int, int]  # the exit status of each of these that has ended


class ListFiles(_Message, frozen=True):
    """Say which files an adapter has."""

    load: int  # its number
    part: int  # of a composition; else 0


class ReadFile(_Message, frozen=True):
    """Give a piece of such a file."""

    load: int
    part: int
    name: str
    start: int


class Follow(_Message, frozen=True):
    """Run the ranks of this life of the engine, and no others."""

    life: str
    config: EngineConfig
    port: int  # where the first rank has opened the notes


class Refused(_Message, frozen=True):
    """The machine, or what it asked, is not taken."""

    problem: str


class Files(_Message, frozen=True):
    """The names of files."""

    names: list[str]


class Piece(_Message, frozen=True):
    """A piece of a file; nothing: it has ended."""

    data: bytes


FromMachine = Here | ListFiles | ReadFile
ToMachine = Follow | Refused | Files | Piece
FROM_MACHINE: Final = msgspec.msgpack.Decoder(FromMachine)
TO_MACHINE: Final = msgspec.msgpack.Decoder(ToMachine)


def frames_of(message: FromMachine | ToMachine) -> list[bytes]:
    """A message behind the release that it is of."""
    return [release().encode(), msgspec.msgpack.encode(message)]


def read_frames(frames: Sequence[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T:
    """The message in these frames. Raises OtherReleaseError before anything of it is decoded, or UnreadableError."""
    if frames[0] != release().encode():
        raise OtherReleaseError(frames[0][:64].decode(errors="replace"))
    try:
        return decoder.decode(b"".join(frames[1:]))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UnreadableError(str(error)) from error
