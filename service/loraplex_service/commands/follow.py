"""`loraplex follow`: a machine that computes a part of a model, for the server on another machine."""

import os
from pathlib import Path

import click

from loraplex_engine.link.child import child_command
from loraplex_engine.link.logs import LOG_FORMATS
from loraplex_engine.link.machines import DEFAULT_PORT, Meeting
from loraplex_service.environment import without_secrets


@click.command()
@click.option("--leader", envvar="LWS_LEADER_ADDRESS", required=True, help="The host of the server.")
@click.option("--port", type=int, default=DEFAULT_PORT, show_default=True, help="That of its machines_listen.")
@click.option(
    "--machines",
    type=click.IntRange(min=2),
    envvar="LWS_GROUP_SIZE",
    required=True,
    help="How many compute the model, the server's among them.",
)
@click.option(
    "--index",
    type=click.IntRange(min=1),
    envvar="LWS_WORKER_INDEX",
    required=True,
    help="Which of them this one is; the server's is 0.",
)
@click.option(
    "--secret",
    type=click.Path(path_type=Path),
    envvar="LORAPLEX_MACHINES_SECRET",
    required=True,
    help="The file of its machines_secret.",
)
@click.option("--host", envvar="POD_IP", help="By which the others reach this machine; as it would reach the server.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model is here, if elsewhere than there.")
@click.option("--log-level", envvar="LORAPLEX_LOG_LEVEL", default="INFO", show_default=True)
@click.option("--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True)
def follow(
    leader: str,
    port: int,
    machines: int,
    index: int,
    secret: Path,
    host: str | None,
    model: Path | None,
    log_level: str,
    log_format: str,
) -> None:
    """Compute a part of a model for the server at LEADER, until SIGTERM or SIGINT.

    It waits for that server, is told what to load, and begins anew with each of its engines. In a LeaderWorkerSet the
    environment says all but the secret.
    """
    if index >= machines:
        raise click.UsageError(f"--index {index}: of {machines} machines it is at most {machines - 1}")
    try:
        Meeting.at(f"{leader}:{port}", str(secret))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    options = [f"--leader={leader}:{port}", f"--machines={machines}", f"--index={index}", f"--secret={secret}"]
    options += [] if host is None else [f"--host={host}"]
    options += [] if model is None else [f"--model={model.absolute()}"]
    options += [f"--log-level={log_level}", f"--log-format={log_format}"]
    command, variables = child_command("loraplex_engine.following.machine", *options)
    os.execve(command[0], command, without_secrets(os.environ) | variables)
