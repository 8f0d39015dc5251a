"""`loraplex models`: base models, in and out of memory."""

import click

from loraplex import enum_name
from loraplex_service.commands.shared import ServerAccess, print_json, print_table, reaches_server


@click.group()
def models() -> None:
    """Base models, in and out of memory."""


@models.command("list")
@reaches_server
def list_models(target: ServerAccess) -> None:
    """List all models."""
    with target.client() as client:
        found = client.list_models()
    rows = [
        (m.name, enum_name(m, "state"), m.architecture, m.dtype, str(m.limits.max_context_tokens or "")) for m in found
    ]
    print_table(("model", "state", "architecture", "type", "context"), rows)


@models.command("get")
@click.argument("name")
@reaches_server
def get_model(target: ServerAccess, name: str) -> None:
    """Show one model."""
    with target.client() as client:
        print_json(client.get_model(name))


@models.command("load")
@click.argument("name")
@click.option("--wait", type=float, default=600.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def load_model(target: ServerAccess, name: str, wait: float) -> None:
    """Load a model into memory."""
    with target.admin() as admin:
        print_json(admin.load_model(name, wait=wait))


@models.command("unload")
@click.argument("name")
@click.option("--grace", type=float, help="Seconds for running requests.")
@click.option("--wait", type=float, default=600.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def unload_model(target: ServerAccess, name: str, grace: float | None, wait: float) -> None:
    """Unload a model, once running requests have ended or the grace is over."""
    with target.admin() as admin:
        print_json(admin.unload_model(name, grace=grace, wait=wait))
