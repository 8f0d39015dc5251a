"""An HTTP/2 client without manners: frames as they are asked for, whatever the server has said (RFC 9113, RFC 7541)."""

import socket
import struct
from collections import Counter
from collections.abc import Iterable

from tests.waits import MOST_SECONDS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
CANCEL = 8
INDEXED, LITERAL_WITH_INDEX, LITERAL = 0x80, 0x40, 0x00
FIRST_DYNAMIC_INDEX = 62

Fields = Iterable[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def text(value: str) -> bytes:
    return number(len(value), 7) + value.encode()


def number(value: int, prefix_bits: int, first: int = 0) -> bytes:
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([first | value])
    encoded = [first | most]
    value -= most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def literals(fields: Fields, how: int = LITERAL) -> bytes:
    return b"".join(bytes([how]) + text(name) + text(value) for name, value in fields)


def call_headers(path: str, fields: Fields = ()) -> bytes:
    own = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
    return literals([*own, ("content-type", "application/grpc"), *fields])


def message(data: bytes, compressed: bool = False) -> bytes:
    """As gRPC frames it."""
    return struct.pack(">BI", compressed, len(data)) + data


class Http2Caller:
    """One connection. Blocking; ends with its block."""

    def __init__(self, address: str, window: int | None = None, source: str = "") -> None:
        """`window`: of each stream, what the server may send before it is read; None: the usual 65535.

        `source`: the address that the server sees; empty: the machine's choice.
        """
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=MOST_SECONDS, source_address=(source, 0))
        self._next_stream = 1
        self._unread = b""
        settings = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(SETTINGS, ACK, 0))

    def __enter__(self) -> "Http2Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def streams(self, count: int) -> list[int]:
        """Numbers of streams that have not been used yet."""
        first, self._next_stream = self._next_stream, self._next_stream + 2 * count
        return list(range(first, self._next_stream, 2))

    def open(self, headers: bytes, count: int = 1) -> list[int]:
        """So many calls, all with these headers, and nothing else of them yet."""
        streams = self.streams(count)
        self.send(b"".join(frame(HEADERS, END_HEADERS, stream, headers) for stream in streams))
        return streams

    def settle(self) -> Counter[int]:
        """Wait until the server has read all that was sent: the kinds of frames that came meanwhile, counted."""
        self.send(frame(PING, 0, 0, b"12345678"))
        seen: Counter[int] = Counter()
        while True:
            kind, flags = self._frame()
            if kind == PING and flags & ACK:
                return seen
            seen[kind] += 1

    def until(self, kind: int, count: int = 1) -> Counter[int]:
        """Wait for so many frames of a kind: the kinds of all that came meanwhile, counted."""
        seen: Counter[int] = Counter()
        while seen[kind] < count:
            seen[self._frame()[0]] += 1
        return seen

    def _frame(self) -> tuple[int, int]:
        header = self._read(9)
        self._read(int.from_bytes(header[:3]))
        return header[3], header[4]

    def _read(self, size: int) -> bytes:
        while len(self._unread) < size:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._unread += data
        data, self._unread = self._unread[:size], self._unread[size:]
        return data
