"""Options that say what a server serves, without a configuration file."""

import re
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any, TypeVar

import click

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_engine.link.config import QUANTIZATIONS

R = TypeVar("R")

OPTIONS = (
    click.option("--name", help="What requests call MODEL; the last part of its path, if it is left out."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=SOURCE",
        help="An adapter of MODEL, a directory or an address (s3://, hf://); may be repeated.",
    ),
    click.option("--device", help="Where MODEL computes: cpu, cuda, cuda:1; the GPU, if there is one."),
    click.option("--quantization", type=click.Choice(QUANTIZATIONS), help="Round the weights while they are loaded."),
    click.option("--max-model-len", type=int, help="Tokens of the longest sequence; those that MODEL was made for."),
    click.option("--listen", help="The data port, such as 127.0.0.1:50051, whatever a file says."),
    click.option("--http-listen", help="The port of OpenAI's and Anthropic's APIs, likewise."),
)


def serves_model(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command these options, and it two arguments.

    `fields`: those of a configuration file that says the same, or None without a MODEL. `overrides`: variables of the
    environment that say where it listens, whatever it serves.
    """

    def wrapper(*args: Any, model: str | None, adapters: tuple[str, ...], config: Path | None, **more: Any) -> R:
        given = {name: more.pop(name) for name in ("name", "device", "quantization", "max_model_len")}
        ports = {f"LORAPLEX_{name.upper()}": more.pop(name) for name in ("listen", "http_listen")}
        more["overrides"] = _present(ports)
        if model is None:
            unused = [name for name, value in {"adapter": adapters, **given}.items() if value]
            if unused:
                raise click.UsageError(f"--{unused[0].replace('_', '-')} goes with MODEL; a file says it by itself")
            return command(*args, fields=None, config=config, **more)
        if config is not None:
            raise click.UsageError("give MODEL or a configuration file (--config, LORAPLEX_CONFIG), not both")
        return command(*args, fields=_fields(model, given, adapters), config=None, **more)

    update_wrapper(wrapper, command)  # with the options that it has
    for option in reversed(OPTIONS):
        option(wrapper)
    return wrapper


def _fields(model: str, given: dict[str, Any], adapters: tuple[str, ...]) -> dict[str, Any]:
    name = given.pop("name") or _name_of(model)
    sources = [_adapter(text) for text in adapters]
    return {
        "models": [{"name": name, "model": model, **_present(given)}],
        "adapters": [{"name": each, "model": name, "source": source} for each, source in sources],
        "adapter_roots": sorted({str(Path(source).parent) for _, source in sources if "://" not in source}),
        "adapter_sources": sorted({f"{source.rpartition('/')[0]}/" for _, source in sources if "://" in source}),
    }


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _name_of(model: str) -> str:
    """ "Qwen/Qwen2.5-0.5B-Instruct" → "qwen2.5-0.5b-instruct". Raises UsageError where that makes no name."""
    last = Path(model).expanduser().resolve().name if model in (".", "..", "~") else Path(model).name
    name = re.sub(r"[^a-z0-9._-]+", "-", last.removesuffix(".gguf").lower()).strip("-._")
    if not is_id(name):
        raise click.UsageError(f"{model!r} makes no name ({ID_RULE}): give --name")
    return name


def _adapter(text: str) -> tuple[str, str]:
    """ "legal=DIR" → its name, and where it comes from."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise click.UsageError(f"--adapter {text!r}: NAME=DIR is expected")
    return name, source if "://" in source else str(Path(source).expanduser().absolute())
