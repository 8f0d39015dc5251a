"""`loraplex health`: whether a server, or a part of it, can be used now."""

import sys

import click

from loraplex_service.commands.shared import ServerAccess, reaches_server


@click.command()
@click.argument("service", default="")
@reaches_server
def health(target: ServerAccess, service: str) -> None:
    """Say whether the server, one of its services or models/MODEL can be used now. Exit status 1: it cannot."""
    with target.client() as client:
        serving = client.is_serving(service)
    click.echo("SERVING" if serving else "NOT_SERVING")
    sys.exit(0 if serving else 1)
