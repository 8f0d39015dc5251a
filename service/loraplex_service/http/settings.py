"""What the service tells its HTTP process at its start, and what it is told while that runs."""

import msgspec

from loraplex_service.ports.config import TlsConfig


class DoorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of the process's standard input."""

    target: str  # where the service answers gRPC, such as "unix:/run/x.sock"
    admin_target: str | None = None  # where it answers those who manage adapters; None: not over HTTP
    log_level: str = "INFO"
    log_format: str = "text"
    tls: TlsConfig | None = None
    hosts: tuple[str, ...] | None = None  # names by which it is called, beside its address; None: any
    body_bytes: int = 8 << 20  # of one request
    waiting_bytes: int = 32 << 20  # of all bodies that are being received
    message_seconds: float = 30.0  # for a request to come
    unread_seconds: float = 30.0  # for what was sent to be taken
    idle_seconds: float = 300.0  # of a connection between two requests
    connections: int = 1024
    calls_per_connection: int = 64  # on one connection to the service


class AnswerCount(msgspec.Struct, frozen=True, array_like=True):
    """How often an endpoint answered with a status since the last line on stdout, which is a list of these."""

    endpoint: str
    status: str
    number: int
