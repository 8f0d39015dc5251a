"""`loraplex adapters`: LoRA adapters, which come and go while the server runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from loraplex import PermissionDenied, enum_name
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.generation_pb2 import Constraint
from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.source import check_there, digest
from loraplex_adapters.files.trust import SIGNATURE_FILE, sign
from loraplex_service.commands.forms import asks_for_form
from loraplex_service.commands.shared import EXISTING, ServerAccess, print_json, print_table, reaches_server


@click.group()
def adapters() -> None:
    """LoRA adapters, which come and go while the server runs."""


@adapters.command("list")
@click.option("--base-model", help="Only adapters of this model.")
@click.option("--versions", is_flag=True, help="Every version, instead of the current ones.")
@reaches_server
def list_adapters(target: ServerAccess, base_model: str | None, versions: bool) -> None:
    """List the adapters of a tenant (--tenant), or all."""
    with target.client() as client:
        found = client.list_adapters(tenant=target.tenant or "-", base_model=base_model, include_versions=versions)
    rows = [
        (
            a.version,
            a.base_model,
            enum_name(a, "state"),
            enum_name(a, "residency").lower(),
            str(a.rank or ""),
            "*" if a.current else "",
            "*" if a.pinned else "",
        )
        for a in found
    ]
    print_table(("version", "model", "state", "where", "rank", "current", "pinned"), rows)


@adapters.command("get")
@click.argument("name")
@reaches_server
def get_adapter(target: ServerAccess, name: str) -> None:
    """Show one adapter, or one version of it."""
    with target.client() as client:
        print_json(client.get_adapter(name, tenant=target.tenant or "shared"))


@adapters.command("create")
@click.argument("adapter_id")
@click.argument("source")
@click.option("--base-model", required=True, help="The model that it adapts.")
@click.option("--validate-only", is_flag=True, help="Read and check, but register nothing.")
@click.option("--keep-current", is_flag=True, help="Do not move the bare name to this version.")
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@asks_for_form
@reaches_server
def create_adapter(
    target: ServerAccess,
    adapter_id: str,
    source: str,
    base_model: str,
    validate_only: bool,
    keep_current: bool,
    wait: float,
    form: Constraint | None,
) -> None:
    """Register the adapter in SOURCE, which the server can reach: a directory under one of its adapter roots, relative
    to one or to here, or s3://… or hf://… A form is the default of requests that ask for none."""

    def create(source: str) -> Adapter:
        return admin.create_adapter(
            adapter_id,
            base_model=base_model,
            source=source,
            tenant=target.tenant or "shared",
            validate_only=validate_only,
            make_current=not keep_current,
            wait=wait,
            default_constraint=form,
        )

    with target.admin() as admin:
        try:
            created = create(source)
        except PermissionDenied as error:
            if error.reason != "SOURCE_NOT_ALLOWED" or Path(source).is_absolute() or not Path(source).is_dir():
                raise
            created = create(str(Path(source).resolve()))
    _print_created(created)


@adapters.command("use")
@click.argument("version")
@reaches_server
def use_adapter(target: ServerAccess, version: str) -> None:
    """Have the bare name mean VERSION ("legal@1a2b3c4d5e6f"): a switch forward, or a rollback."""
    name = version.partition("@")[0]
    with target.admin() as admin:
        print_json(admin.update_adapter(name, version=version, tenant=target.tenant or "shared"))


@adapters.command("delete")
@click.argument("name")
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def delete_adapter(target: ServerAccess, name: str, wait: float) -> None:
    """Delete a version, or for a bare name all versions, once running requests have ended."""
    with target.admin() as admin:
        print_json(admin.delete_adapter(name, tenant=target.tenant or "shared", wait=wait))


@adapters.command("upload")
@click.argument("adapter_id")
@click.argument("directory", type=EXISTING)
@click.option("--base-model", required=True, help="The model that it adapts.")
@click.option("--keep-current", is_flag=True, help="Do not move the bare name to this version.")
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@asks_for_form
@reaches_server
def upload_adapter(
    target: ServerAccess,
    adapter_id: str,
    directory: Path,
    base_model: str,
    keep_current: bool,
    wait: float,
    form: Constraint | None,
) -> None:
    """Send the adapter in DIRECTORY, on this machine, to the server and register it. A form is the default of requests
    that ask for none."""
    with _file_failures():
        check_there(directory)
    with target.admin() as admin:
        created = admin.upload_adapter(
            adapter_id,
            base_model=base_model,
            directory=directory,
            tenant=target.tenant or "shared",
            make_current=not keep_current,
            wait=wait,
            default_constraint=form,
        )
    _print_created(created)


@adapters.command("form")
@click.argument("name")
@asks_for_form
@reaches_server
def set_form(target: ServerAccess, name: str, form: Constraint | None) -> None:
    """Set the form of the outputs of requests to NAME that ask for none; without options, remove it."""
    with target.admin() as admin:
        changed = admin.update_adapter(name, default_constraint=form or Constraint(), tenant=target.tenant or "shared")
        print_json(changed)


@adapters.command("pin")
@click.argument("name")
@reaches_server
def pin_adapter(target: ServerAccess, name: str) -> None:
    """Keep a version on the device, now and after every restart."""
    with target.admin() as admin:
        print_json(admin.update_adapter(name, pinned=True, tenant=target.tenant or "shared"))


@adapters.command("unpin")
@click.argument("name")
@reaches_server
def unpin_adapter(target: ServerAccess, name: str) -> None:
    """Let a version leave the device again when others need the room."""
    with target.admin() as admin:
        print_json(admin.update_adapter(name, pinned=False, tenant=target.tenant or "shared"))


@adapters.command("preload")
@click.argument("name")
@click.option("--to", "residency", type=click.Choice(["host", "device"]), default="device", show_default=True)
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def preload_adapter(target: ServerAccess, name: str, residency: str, wait: float) -> None:
    """Bring a version into host memory, or on to the device, ahead of its first request."""
    with target.admin() as admin:
        print_json(admin.load_adapter(name, residency=residency, wait=wait, tenant=target.tenant or "shared"))


@adapters.command("unload")
@click.argument("name")
@click.option("--to", "residency", type=click.Choice(["disk", "host"]), default="disk", show_default=True)
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds; 0 returns at once.")
@reaches_server
def unload_adapter(target: ServerAccess, name: str, residency: str, wait: float) -> None:
    """Free the memory of a version, or its room on the device. Its next request loads it again."""
    with target.admin() as admin:
        print_json(admin.unload_adapter(name, residency=residency, wait=wait, tenant=target.tenant or "shared"))


@adapters.command("digest")
@click.argument("directory", type=EXISTING)
def print_digest(directory: Path) -> None:
    """Print the digest of the adapter in DIRECTORY, which names its version."""
    with _file_failures():
        click.echo(f"sha256:{digest(directory)}")


@adapters.command("sign")
@click.argument("directory", type=EXISTING)
@click.option("--key", type=EXISTING, required=True, help="PEM file of an Ed25519 private key.")
def sign_adapter(directory: Path, key: Path) -> None:
    """Write the signature of the adapter in DIRECTORY beside its files, for tenants that accept signed ones alone."""
    with _file_failures():
        (directory / SIGNATURE_FILE).write_bytes(sign(digest(directory), key.read_bytes()))
    click.echo(directory / SIGNATURE_FILE)


def _print_created(adapter: Adapter) -> None:
    """Print the created version, and exit with status 1 if the adapter failed, or the model that it waits for."""
    print_json(adapter)
    sys.exit(1 if adapter.HasField("error") else 0)


@contextmanager
def _file_failures() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AdapterRejected) as error:
        raise click.ClickException(str(error)) from error
