"""`loraplex picker`: the endpoint picker of an Envoy or a gateway."""

import asyncio
import signal
from pathlib import Path

import click
import uvloop

from loraplex_engine.link.logs import set_up_logging
from loraplex_service.config_file import ConfigError
from loraplex_service.picker.config import PickerConfig, load_picker_config


@click.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="YAML file; see docs/routing.md.")
def picker(config: Path) -> None:
    """Choose a replica for each request that an Envoy has, until SIGTERM or SIGINT.

    It speaks Envoy's external processing, as endpoint pickers of the Gateway API do.
    """
    try:
        settings = load_picker_config(config)
        set_up_logging(settings.log_level, "text", "picker")
        uvloop.run(_pick(settings))
    except (ConfigError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


async def _pick(settings: PickerConfig) -> None:
    from loraplex_service.picker.process import picking  # only where it is needed: other commands start without metrics

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with picking(settings) as address:
        print(f"listening picker={address}", flush=True)
        await stop.wait()
