"""The part of the configuration that has other machines compute a part of a model."""

from collections.abc import Iterator, Sequence

from loraplex_engine.link.machines import Meeting
from loraplex_service.models.config import HostedModelConfig

LOOPBACK = "127."


def machines_problems(
    models: Sequence[HostedModelConfig], listen: str | None, secret: str | None, insecure: bool
) -> Iterator[str]:
    """Problems with where other machines come, and with what they know each other by."""
    over = [model.name for model in models if model.machines > 1]
    given = {"machines_listen": listen, "machines_secret": secret}
    if not over:
        unused = [key for key, value in given.items() if value is not None]
        yield from (f"{key}: no model has machines above 1; set that, too, or leave this out" for key in unused)
        return
    if len(over) > 1:
        yield f"models: {' and '.join(map(repr, over))} have machines above 1, as one may: run a server for each"
    if listen is None or secret is None:
        yield f"models: {over[0]!r} is over several machines: set machines_listen and machines_secret"
        return
    try:
        meeting = Meeting.at(listen, secret)
    except ValueError as error:
        yield str(error)
        return
    if not meeting.host.startswith(LOOPBACK) and meeting.host != "localhost" and not insecure:
        yield (
            f"machines_listen {listen!r} can be reached from other machines, and what ranks exchange through "
            "torch.distributed is neither encrypted nor authenticated: set insecure: true where the network between "
            "the machines is trusted"
        )


def meeting_options(model: HostedModelConfig, listen: str | None, secret: str | None) -> tuple[str, ...]:
    """The options by which an engine lets the other machines of its model come; none: it has none."""
    if model.machines == 1 or listen is None or secret is None:
        return ()
    return "--machines-listen", listen, "--machines-secret", secret
