"""Options that say where the server is and who asks, and the form of answers and errors for people."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import click
import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex import AdminClient, AsyncClient, Client, LoraplexError

P = ParamSpec("P")
R = TypeVar("R")

# What gRPC says where no server of ours answers, and what is the matter then.
SIGNS: Final = {
    "Connection refused": "Nothing listens there. Does the server run (`loraplex serve`), and at this address?",
    "hostname lookup": "No host has that name.",
    "errors resolving": "No host has that name.",
    "CERTIFICATE_VERIFY_FAILED": "Its certificate is not by the authority of --tls-ca, or for another name.",
    "WRONG_VERSION_NUMBER": "It does not speak TLS: leave --tls-ca out, or give the port that does.",
    "Failed parsing HTTP/2": "It does not speak gRPC, or it wants TLS: give the data port (the first line that "
    "`loraplex serve` prints, data=…), and --tls-ca if it wants TLS.",
    "Socket closed": "It closed the connection: it may want TLS (--tls-ca).",
}

# Spelt as JSON spells them. Names and texts come from others, and these would steer the terminal that shows them.
CONTROLS: Final = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

EXISTING = click.Path(path_type=Path, exists=True)


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """The address of a server, and the credentials to use."""

    server: str
    admin_server: str | None  # None: where the server says
    token: str | None
    tenant: str | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    timeout: float | None

    def client(self) -> Client:
        return Client(self.server, **self._arguments())

    def async_client(self) -> AsyncClient:
        return AsyncClient(self.server, **self._arguments())

    def admin(self) -> AdminClient:
        return AdminClient(self.admin_server or self._admin_address(), **self._arguments())

    def _admin_address(self) -> str:
        """The admin port on the host of the server, which says what it is. Raises LoraplexError, ClickException."""
        with self.client() as client:
            port = client.get_server_info().admin_port
        host, colon, _ = self.server.rpartition(":")
        if port and colon:
            return f"{host}:{port}"
        raise click.ClickException(
            "this needs the admin port, and the server tells it only to callers with the role admin or adapters: "
            "give such a token (--token, LORAPLEX_TOKEN), or the port itself (--admin-server, LORAPLEX_ADMIN_SERVER)"
        )

    def _arguments(self) -> dict[str, Any]:
        credentials = None
        if self.tls_ca is not None:
            key = self.tls_key.read_bytes() if self.tls_key is not None else None
            certificate = self.tls_cert.read_bytes() if self.tls_cert is not None else None
            credentials = grpc.ssl_channel_credentials(self.tls_ca.read_bytes(), key, certificate)
        return {"credentials": credentials, "token": self.token, "tenant": self.tenant, "timeout": self.timeout}


def reaches_server(command: Callable[Concatenate[ServerAccess, P], R]) -> Callable[..., R]:
    """Give a command the options that say where the server is, and print its errors for people."""

    @click.option("--server", envvar="LORAPLEX_SERVER", default="127.0.0.1:50051", show_default=True, help="Data port.")
    @click.option(
        "--admin-server", envvar="LORAPLEX_ADMIN_SERVER", help="Admin port, if it is not where the server says."
    )
    @click.option("--token", envvar="LORAPLEX_TOKEN", help="Bearer token.")
    @click.option("--tenant", help="The tenant to act for.")
    @click.option(
        "--tls-ca", type=EXISTING, help="PEM file of the authority of the server's certificate; without it no TLS."
    )
    @click.option("--tls-cert", type=EXISTING, help="PEM file of your own certificate, if the server asks for one.")
    @click.option("--tls-key", type=EXISTING, help="PEM file of its key.")
    @click.option("--timeout", type=float, help="Seconds for each call.")
    def wrapper(
        server: str,
        admin_server: str | None,
        token: str | None,
        tenant: str | None,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        timeout: float | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        access = ServerAccess(server, admin_server, token, tenant, tls_ca, tls_cert, tls_key, timeout)
        with call_failures(access):
            return command(access, *args, **kwargs)

    return update_wrapper(wrapper, command)


@contextmanager
def call_failures(access: ServerAccess | None = None) -> Iterator[None]:
    """Turn the errors of calls into messages for people, with what to do where the server is not where it is sought."""
    try:
        yield
    except LoraplexError as error:
        hint = _hint(error, access) if access is not None else ""
        raise click.ClickException(f"{visible(str(error))}{hint}") from error


def _hint(error: LoraplexError, access: ServerAccess) -> str:
    """What may be the matter, where it was not the server that answered, or not its right port."""
    if "is not a method of this port" in error.message:
        why = "Is it the server's admin port, where its data port is wanted, or the other way round?"
    elif error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        why = next((hint for sign, hint in SIGNS.items() if sign in error.message), "Does the server run?")
    else:
        return ""
    admin = f", --admin-server (LORAPLEX_ADMIN_SERVER) {access.admin_server}" if access.admin_server else ""
    return f"\n{why}\n--server (LORAPLEX_SERVER) is {access.server}{admin}"


def visible(text: str) -> str:
    """The text with its control characters spelt out, all but newlines and tabs."""
    return text.translate(CONTROLS)


def echo_text(text: str, nl: bool = True) -> None:
    """Print what a model wrote: as it is for a program, and for a terminal so that it cannot be steered."""
    click.echo(visible(text) if sys.stdout.isatty() else text, nl=nl, color=True)


def print_json(message: Message, indent: int | None = 2) -> None:
    fields = MessageToDict(message, preserving_proto_field_name=True)
    click.echo(visible(json.dumps(fields, indent=indent, ensure_ascii=False)))


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table whose cells are shown whole: in a narrow terminal on several lines."""
    shown = [[visible(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(visible(name)), overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    # Without a terminal nothing may be cut: the next program in the pipe reads it.
    console = (
        Console()
        if sys.stdout.isatty()
        else Console(width=max(80, 2 * max((sum(map(len, r)) for r in shown), default=0)))
    )
    console.print(table)
