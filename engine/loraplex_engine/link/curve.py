"""Sockets between machines: encrypted by CURVE, and open to those alone who have the same secret. Torch-free.

The keys of both ends are made of the secret, so that each knows the other by it. CURVE makes new ones for every
connection: who learns the secret later cannot read what was said before.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

LEAST_SECRET_BYTES: Final = 32  # of 256 random bits, in whatever spelling, are at least as many
DOMAIN: Final = "loraplex"  # of ZeroMQ's authentication
HEARTBEAT_MILLISECONDS: Final = 2000  # of ZeroMQ, which finds connections whose other end is gone
DEAD_MILLISECONDS: Final = 10_000
FIRST_RETRY_MILLISECONDS: Final = 100
LAST_RETRY_MILLISECONDS: Final = 2000
FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def read_secret(file: Path) -> bytes:
    """The secret in a file, without the white space around it. Raises ValueError where there is none of some length."""
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"machines_secret: {file} cannot be read: {error.strerror}") from error
    if len(secret) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"machines_secret: {file} has {len(secret)} bytes, and at least {LEAST_SECRET_BYTES} are needed, which "
            "nobody can guess: write it with `openssl rand -hex 32`"
        )
    return secret


class SharedKeys:
    """The keys of both ends of a connection: of the one that listens, and of those that join it."""

    def __init__(self, secret: bytes) -> None:
        self._listener = _pair(secret, b"loraplex listener")
        self._joiner = _pair(secret, b"loraplex joiner")

    def listen(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> ThreadAuthenticator:
        """Have a socket let in those alone who have the secret. To be stopped before the context ends."""
        guard = ThreadAuthenticator(context)
        guard.start()
        guard.configure_curve_callback(domain=DOMAIN, credentials_provider=_Only(self._joiner[0]))
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        _own(socket, self._listener)
        return guard

    def join(self, socket: zmq.Socket[Any]) -> None:
        """Have a socket connect to nobody but who has the secret."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._listener[0])
        socket.setsockopt(zmq.RECONNECT_IVL, FIRST_RETRY_MILLISECONDS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, LAST_RETRY_MILLISECONDS)
        _own(socket, self._joiner)


class Handshakes:
    """How the handshakes of a socket end: one that fails was with somebody who has another secret, or none."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._events = socket.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def ended(self) -> list[bool]:
        """Those since the last call, in order: whether each has succeeded."""
        found = []
        while self._events.poll(0):
            found.append(recv_monitor_message(self._events)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.disable_monitor()
        self._events.close(linger=0)


def _own(socket: zmq.Socket[Any], pair: tuple[bytes, bytes]) -> None:
    public, private = pair
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MILLISECONDS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_MILLISECONDS)


def _pair(secret: bytes, purpose: bytes) -> tuple[bytes, bytes]:
    """A public key and its private one, as ZeroMQ spells them."""
    private = z85.encode(hmac.digest(secret, purpose, "sha256"))
    return zmq.curve_public(private), private


class _Only:
    """Lets the owners of one key in."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self._key)
