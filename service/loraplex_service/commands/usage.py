"""`loraplex usage`: what generations used, for billing."""

from contextlib import suppress

import click

from loraplex_service.commands.shared import ServerAccess, print_json, reaches_server


@click.group()
def usage() -> None:
    """What generations used, for billing."""


@usage.command("watch")
@click.option("--after", "after_id", default="", help="Begin after the record with this id, instead of the oldest.")
@click.option("--existing", "existing_only", is_flag=True, help="End with the newest, instead of waiting for more.")
@reaches_server
def watch(target: ServerAccess, after_id: str, existing_only: bool) -> None:
    """Print the usage records of the server, a line of JSON each, as they are written."""
    with target.admin() as admin, suppress(KeyboardInterrupt):
        for response in admin.watch_usage(after_id=after_id, existing_only=existing_only):
            for record in response.records:
                print_json(record, indent=None)
