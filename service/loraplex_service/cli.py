"""The command line: commands that run something, that work on this machine's files, and that call a server.

docs/commands.md lists them all.
"""

import errno
import os

# Engines are started by fork and exec. gRPC would try to survive a bare fork too, cannot, and says so each time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import sys
from importlib import import_module
from typing import Any, Final

import click

# The module of `loraplex_service.commands` that has each command.
MODULES: Final = {
    "adapters": "adapters",
    "bench": "bench",
    "chat": "generating",
    "classify": "pooling",
    "completion": "completion",
    "demo": "servers",
    "doctor": "doctor",
    "embed": "pooling",
    "follow": "follow",
    "generate": "generating",
    "health": "health",
    "keys": "keys",
    "models": "models",
    "picker": "picker",
    "quantize": "quantize",
    "rerank": "pooling",
    "routes": "routes",
    "score": "generating",
    "serve": "servers",
    "top": "top",
    "usage": "usage",
}


class Commands(click.Group):
    """Commands that are imported when they are asked for: a client waits for nothing that a server is made of."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        command: click.Command = getattr(import_module(f"loraplex_service.commands.{MODULES[cmd_name]}"), cmd_name)
        return command

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command, and say in a line what of files or standard output kept it from its work."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            full = " (standard output, or a file that was written)" if error.errno == errno.ENOSPC else ""
            click.echo(f"Error: {error}{full}", err=True)
            _drop_unwritten_output()
            sys.exit(1)


def _drop_unwritten_output() -> None:
    """Have Python not fail once more at its end with what standard output did not take."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loraplex-server", message="loraplex %(version)s")
def main() -> None:
    """Serve language models, each with many LoRA adapters, over gRPC."""
