"""`loraplex keys`: make and take back the tokens of a key file. A server that uses the file notices by itself."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_service.auth.keys import KeyFile, make_key, read_keys, write_keys
from loraplex_service.auth.principal import Role

FILE_OPTION = click.option(
    "--file", type=click.Path(path_type=Path), default=Path("keys.yaml"), show_default=True, help="The key file."
)


@click.group()
def keys() -> None:
    """Bearer tokens for callers of a server with `auth: {keys: FILE}`."""


@keys.command("create")
@FILE_OPTION
@click.option("--tenant", required=True, help="The tenant that the token acts for.")
@click.option(
    "--role",
    "roles",
    type=click.Choice([role.value for role in Role]),
    multiple=True,
    default=[Role.INFERENCE.value],
    show_default=True,
)
@click.option("--days", type=click.IntRange(min=1), help="How long it is valid; without it, until it is revoked.")
@click.option("--comment", default="", help="For you: who has it, and what for.")
def create_key(file: Path, tenant: str, roles: tuple[str, ...], days: int | None, comment: str) -> None:
    """Make a token and print it, this once: the file keeps its hash alone."""
    if not is_id(tenant):
        raise click.BadParameter(f"{tenant!r} must be {ID_RULE}", param_hint="--tenant")
    expires = None if days is None else (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    token, key = make_key(tenant, map(Role, roles), expires, comment)
    content = _read(file) if file.exists() and file.stat().st_size else KeyFile()
    write_keys(file, KeyFile(keys=(*content.keys, key)))
    click.echo(token)


@keys.command("list")
@FILE_OPTION
def list_keys(file: Path) -> None:
    """List the keys of the file. They do not reveal the tokens."""
    for key in _read(file).keys:
        until = "for ever" if key.expires is None else f"until {key.expires.astimezone(UTC):%F %T} UTC"
        click.echo("  ".join(part for part in (key.id, key.tenant, ",".join(key.roles), until, key.comment) if part))


@keys.command("revoke")
@FILE_OPTION
@click.argument("key_id")
def revoke_key(file: Path, key_id: str) -> None:
    """Take a token back, by the id of its key: the part between lpx_ and the next underscore."""
    content = _read(file)
    kept = tuple(key for key in content.keys if key.id != key_id)
    if len(kept) == len(content.keys):
        raise click.ClickException(f"{file} has no key {key_id!r}; list those it has")
    write_keys(file, msgspec.structs.replace(content, keys=kept))


def _read(file: Path) -> KeyFile:
    try:
        return read_keys(file)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
