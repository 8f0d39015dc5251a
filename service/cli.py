"""The command line: `loraplex serve` and `loraplex demo` run a server, everything else is a client of one."""

import os

# Engines are started by fork and exec. gRPC would try to survive a bare fork too, cannot, and says so each time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
import grpc
import msgspec
import uvloop
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from engine.logs import set_up_logging
from loraplex import AdminClient, Client, GenerateOptions, LoraplexError
from service.app import running
from service.auth.command import keys
from service.config import ConfigError, ServiceConfig, load_config
from service.demo import play_demo
from service.quantize import quantize
from service.telemetry.logs import CallFields
from service.top import watch_load

P = ParamSpec("P")
R = TypeVar("R")

EXISTING = click.Path(path_type=Path, exists=True)
CONFIG_OPTION = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="LORAPLEX_CONFIG",
    help="YAML file; without it the embedded demo models are served.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loraplex", message="loraplex %(version)s")
def main() -> None:
    """Serve language models, each with many LoRA adapters, over gRPC."""


# ---- servers ---------------------------------------------------------------------------------------------------------


main.add_command(keys)
main.add_command(quantize)


@main.command()
@CONFIG_OPTION
@click.option("--insecure", is_flag=True, help="Allow addresses that other machines reach without TLS or credentials.")
def serve(config: Path | None, insecure: bool) -> None:
    """Run a server until SIGTERM or SIGINT; then let running requests finish, and exit."""
    settings = _settings(config, {"LORAPLEX_INSECURE": "true"} if insecure else {})
    set_up_logging(settings.log_level, settings.log_format, "service", CallFields())
    with _start_failures():
        uvloop.run(_serve(settings))


async def _serve(settings: ServiceConfig) -> None:
    stop = _stop_signal()
    async with running(settings) as (_, addresses):
        # The one line on stdout: whoever started the server on port 0 reads here which ports it got.
        health = f" health={addresses.health}" if addresses.health else ""
        print(f"listening data={addresses.data} admin={addresses.admin}{health}", flush=True)
        await stop.wait()
        logging.getLogger(__name__).info("told to stop: draining for at most %g s", settings.drain_grace_seconds)


@main.command()
@CONFIG_OPTION
@click.option("--prompt", default="Tell me a story about a fox.", show_default=True)
@click.option("--max-tokens", default=96, show_default=True, type=click.IntRange(min=1))
@click.option("--verbose", is_flag=True, help="Show the server's log.")
def demo(config: Path | None, prompt: str, max_tokens: int, verbose: bool) -> None:
    """Start a server, stream one prompt through every model and adapter side by side, and end."""
    settings = msgspec.structs.replace(_settings(config).with_free_ports(), state_directory="")
    settings = settings if verbose else msgspec.structs.replace(settings, log_level="ERROR")
    set_up_logging(settings.log_level, settings.log_format, "service")

    async def run() -> None:
        async with running(settings) as (_, addresses):
            await play_demo(addresses, settings, prompt, max_tokens, Console())

    with _start_failures(), _call_failures():
        uvloop.run(run())


def _settings(config: Path | None, overrides: Mapping[str, str] = MappingProxyType({})) -> ServiceConfig:
    try:
        return load_config(config, {**os.environ, **overrides})
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _start_failures() -> Iterator[None]:
    """What keeps a server from starting, for people."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second ends the process at once, and its engines with it."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


# ---- clients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is, and who asks."""

    server: str
    admin_server: str
    token: str | None
    tenant: str | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    timeout: float | None

    def client(self) -> Client:
        return Client(self.server, **self._arguments())

    def admin(self) -> AdminClient:
        return AdminClient(self.admin_server, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        credentials = None
        if self.tls_ca is not None:
            key = self.tls_key.read_bytes() if self.tls_key is not None else None
            certificate = self.tls_cert.read_bytes() if self.tls_cert is not None else None
            credentials = grpc.ssl_channel_credentials(self.tls_ca.read_bytes(), key, certificate)
        return {"credentials": credentials, "token": self.token, "tenant": self.tenant, "timeout": self.timeout}


def reaches_server(command: Callable[Concatenate[Target, P], R]) -> Callable[..., R]:
    """Gives a command the options that say where the server is, and its errors a form for people."""

    @click.option("--server", default="127.0.0.1:50051", show_default=True, help="Data port.")
    @click.option("--admin-server", default="127.0.0.1:50052", show_default=True, help="Admin port.")
    @click.option("--token", envvar="LORAPLEX_TOKEN", help="Bearer token.")
    @click.option("--tenant", help="The tenant to act for.")
    @click.option("--tls-ca", type=EXISTING, help="PEM file of who signed the server's certificate; absent: no TLS.")
    @click.option("--tls-cert", type=EXISTING, help="PEM file of your own certificate, if the server asks for one.")
    @click.option("--tls-key", type=EXISTING, help="PEM file of its key.")
    @click.option("--timeout", type=float, help="Seconds for each call.")
    def wrapper(
        server: str,
        admin_server: str,
        token: str | None,
        tenant: str | None,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        timeout: float | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        with _call_failures():
            return command(
                Target(server, admin_server, token, tenant, tls_ca, tls_cert, tls_key, timeout), *args, **kwargs
            )

    return update_wrapper(wrapper, command)


@contextmanager
def _call_failures() -> Iterator[None]:
    """Why a call failed, for people."""
    try:
        yield
    except LoraplexError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="The prompt is what a user says in a conversation.")
@click.option("--max-tokens", type=int)
@click.option("--temperature", type=float)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="A string that ends the output; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end that the model sets.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole response instead of the text.")
@reaches_server
def generate(
    target: Target,
    model: str,
    prompt: str,
    chat: bool,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    as_json: bool,
) -> None:
    """Generate from PROMPT with MODEL: a model, an adapter, or an adapter version. The text is printed as it comes."""
    said = [{"role": "user", "content": prompt}] if chat else prompt
    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop, ignore_eos=ignore_eos or None
    )
    with target.client() as client:
        stream = client.stream_generate(model, said, **options)
        if as_json:
            _print_json(stream.collect())
            return
        for piece in stream.text():
            click.echo(piece, nl=False)
        click.echo()


@main.command()
@click.argument("service", default="")
@reaches_server
def health(target: Target, service: str) -> None:
    """Say whether the server, one of its services or models/MODEL can be used now. Exit status 1: it cannot."""
    with target.client() as client:
        serving = client.is_serving(service)
    click.echo("SERVING" if serving else "NOT_SERVING")
    sys.exit(0 if serving else 1)


@main.command()
@click.option("--interval", default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@reaches_server
def top(target: Target, interval: float, count: int | None) -> None:
    """Show the load of every model, as it changes."""
    with target.admin() as admin, suppress(KeyboardInterrupt):
        watch_load(admin, interval, count, Console())


@main.group()
def models() -> None:
    """Base models, in and out of memory."""


@models.command("list")
@reaches_server
def list_models(target: Target) -> None:
    """List all models."""
    with target.admin() as admin:
        found = admin.list_models()
    rows = [(m.name, _state(m), m.architecture, m.dtype, str(m.limits.max_context_tokens or "")) for m in found]
    _print_table(("model", "state", "architecture", "type", "context"), rows)


@models.command("get")
@click.argument("name")
@reaches_server
def get_model(target: Target, name: str) -> None:
    """Show one model."""
    with target.admin() as admin:
        _print_json(admin.get_model(name))


@models.command("load")
@click.argument("name")
@click.option("--wait", type=float, default=600.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def load_model(target: Target, name: str, wait: float) -> None:
    """Load a model into memory."""
    with target.admin() as admin:
        _print_json(admin.load_model(name, wait=wait))


@models.command("unload")
@click.argument("name")
@click.option("--grace", type=float, help="Seconds for running requests.")
@click.option("--wait", type=float, default=600.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def unload_model(target: Target, name: str, grace: float | None, wait: float) -> None:
    """Unload a model, once running requests have ended or the grace is over."""
    with target.admin() as admin:
        _print_json(admin.unload_model(name, grace=grace, wait=wait))


@main.group()
def adapters() -> None:
    """LoRA adapters, which come and go while the server runs."""


@adapters.command("list")
@click.option("--base-model", help="Only adapters of this model.")
@click.option("--versions", is_flag=True, help="Every version, instead of the current ones.")
@reaches_server
def list_adapters(target: Target, base_model: str | None, versions: bool) -> None:
    """List the adapters of a tenant (--tenant), or all."""
    with target.admin() as admin:
        found = admin.list_adapters(tenant=target.tenant or "-", base_model=base_model, include_versions=versions)
    rows = [(a.version, a.base_model, _state(a), str(a.rank or ""), "*" if a.current else "") for a in found]
    _print_table(("version", "model", "state", "rank", "current"), rows)


@adapters.command("get")
@click.argument("name")
@reaches_server
def get_adapter(target: Target, name: str) -> None:
    """Show one adapter, or one version of it."""
    with target.admin() as admin:
        _print_json(admin.get_adapter(name, tenant=target.tenant or "shared"))


@adapters.command("create")
@click.argument("adapter_id")
@click.argument("source")
@click.option("--base-model", required=True, help="The model that it adapts.")
@click.option("--validate-only", is_flag=True, help="Read and check, but register nothing.")
@click.option("--keep-current", is_flag=True, help="Do not move the bare name to this version.")
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def create_adapter(
    target: Target,
    adapter_id: str,
    source: str,
    base_model: str,
    validate_only: bool,
    keep_current: bool,
    wait: float,
) -> None:
    """Register the adapter in SOURCE: a directory under one of the server's adapter roots."""
    with target.admin() as admin:
        created = admin.create_adapter(
            adapter_id,
            base_model=base_model,
            source=source,
            tenant=target.tenant or "shared",
            validate_only=validate_only,
            make_current=not keep_current,
            wait=wait,
        )
    _print_json(created)
    sys.exit(1 if created.state == created.STATE_FAILED else 0)


@adapters.command("use")
@click.argument("version")
@reaches_server
def use_adapter(target: Target, version: str) -> None:
    """Have the bare name mean VERSION ("legal@1a2b3c4d5e6f"): a switch forward, or a rollback."""
    name = version.partition("@")[0]
    with target.admin() as admin:
        _print_json(admin.update_adapter(name, version=version, tenant=target.tenant or "shared"))


@adapters.command("delete")
@click.argument("name")
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def delete_adapter(target: Target, name: str, wait: float) -> None:
    """Delete a version, or for a bare name all versions, once running requests have ended."""
    with target.admin() as admin:
        _print_json(admin.delete_adapter(name, tenant=target.tenant or "shared", wait=wait))


def _state(resource: Any) -> str:
    """The name of its state, without the prefix."""
    name: str = type(resource).State.Name(resource.state)
    return name.removeprefix("STATE_")


def _print_json(message: Message) -> None:
    click.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2, ensure_ascii=False))


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # Without a terminal nothing may be cut: the next program in the pipe reads it.
    console = (
        Console()
        if sys.stdout.isatty()
        else Console(width=max(80, 2 * max((sum(map(len, r)) for r in rows), default=0)))
    )
    console.print(table)
