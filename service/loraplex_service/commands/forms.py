"""Options that say what form an output must have."""

from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any, TypeVar

import click

from loraplex import constraint
from loraplex_service.commands.shared import EXISTING

R = TypeVar("R")

OPTIONS = (
    click.option("--json-schema", type=EXISTING, help="Outputs satisfy the JSON Schema in this file."),
    click.option("--json-object", is_flag=True, help="Outputs are JSON objects."),
    click.option("--regex", help="Outputs match this regular expression as a whole."),
    click.option("--choice", "choices", multiple=True, help="Outputs are this text; repeated: one of these."),
    click.option("--grammar", type=EXISTING, help="Outputs follow the grammar in this file, in GBNF."),
    click.option("--any-text", is_flag=True, help="Outputs are any text, whatever the route or adapter says."),
)


def asks_for_form(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the options that say what form outputs must have, and it the argument `form`: a Constraint, or
    None.
    """

    def wrapper(
        *args: Any,
        json_schema: Path | None,
        json_object: bool,
        regex: str | None,
        choices: tuple[str, ...],
        grammar: Path | None,
        any_text: bool,
        **options: Any,
    ) -> R:
        try:
            form = constraint(
                json_schema=None if json_schema is None else json_schema.read_text(encoding="utf-8"),
                json_object=json_object,
                regex=regex,
                choices=choices or None,
                grammar=None if grammar is None else grammar.read_text(encoding="utf-8"),
                any_text=any_text,
            )
        except (OSError, ValueError) as error:
            raise click.UsageError(str(error)) from error
        return command(*args, form=form if form.WhichOneof("kind") else None, **options)

    update_wrapper(wrapper, command)  # with the options that it has
    for option in reversed(OPTIONS):
        option(wrapper)
    return wrapper
