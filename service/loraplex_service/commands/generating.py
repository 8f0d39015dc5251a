"""Commands that write text: `generate`, and `chat`; and `score`, which reads it."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import update_wrapper
from typing import Any, Final, TextIO, TypeVar

import click

from loraplex import GenerateOptions
from loraplex.prompts import Message, build_tool
from loraplex.v1.generation_pb2 import Constraint, GenerateSpec
from loraplex.v1.prompt_pb2 import Tool
from loraplex_service.commands.forms import asks_for_form
from loraplex_service.commands.shared import (
    ServerAccess,
    call_failures,
    echo_text,
    print_json,
    print_table,
    reaches_server,
)

R = TypeVar("R")

DRAFT_KINDS: Final = ("off", "ngram", "model")
DRAWING = (
    click.option("--max-tokens", type=int),
    click.option("--temperature", type=float),
    click.option("--top-p", type=float),
    click.option("--seed", type=int),
)


def draws_tokens(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the options that say how tokens are drawn, and how many; and it the argument `options` with
    them.
    """

    def wrapper(
        *args: Any,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        **more: Any,
    ) -> R:
        options = GenerateOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return command(*args, options=options, **more)

    update_wrapper(wrapper, command)  # with the options that it has
    for option in reversed(DRAWING):
        option(wrapper)
    return wrapper


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="The prompt is what a user says in a conversation.")
@click.option("--system", help="What the model is told before the conversation; goes with --chat.")
@click.option("--routing-key", help="Requests of one key stay with one target of a route.")
@click.option("--stop", multiple=True, help="A string that ends the output; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end that the model sets.")
@click.option("--best-of", type=int, help="Draw so many outputs, and print the likeliest.")
@click.option("--num-beams", type=int, help="Search for the likeliest output with so many beams.")
@click.option("--drafts", type=click.Choice(DRAFT_KINDS), help="Where guesses at the next tokens come from.")
@click.option("--tools", type=click.File(), help="A JSON file: a list of the tools that the model may call.")
@click.option("--tool-choice", metavar="auto|none|required|TOOL", help="Whether the model calls tools, or which.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole response instead of the text.")
@draws_tokens
@asks_for_form
@reaches_server
def generate(
    target: ServerAccess,
    model: str,
    prompt: str,
    chat: bool,
    system: str | None,
    options: GenerateOptions,
    routing_key: str | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    best_of: int | None,
    num_beams: int | None,
    drafts: str | None,
    tools: TextIO | None,
    tool_choice: str | None,
    as_json: bool,
    form: Constraint | None,
) -> None:
    """Generate from PROMPT with MODEL: a model, an adapter, or an adapter version. The text is printed as it comes.

    PROMPT is read from standard input where it is "-". Calls of tools are printed behind the text, each as one line of
    JSON.
    """
    if not chat and (tools is not None or system is not None):
        raise click.UsageError(f"{'--system' if tools is None else '--tools'} goes with --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    said = [*_told(system), {"role": "user", "content": text}] if chat else text
    options |= GenerateOptions(
        stop=stop,
        ignore_eos=ignore_eos or None,
        draft_kind=drafts,
        best_of=best_of,
        num_beams=num_beams,
    )
    if tools is not None:
        options |= {"tools": _read_tools(tools), "tool_choice": tool_choice}
    with target.client() as client:
        if best_of or num_beams:  # nothing comes before the end
            answer = client.generate(
                model, said, spec=GenerateSpec(constraint=form), routing_key=routing_key, **options
            )
            print_json(answer) if as_json else echo_text(answer.outputs[0].text)
            return
        stream = client.stream_generate(
            model, said, spec=GenerateSpec(constraint=form), routing_key=routing_key, **options
        )
        if as_json:
            print_json(stream.collect())
            return
        for piece in stream.text():
            echo_text(piece, nl=False)
        click.echo()
        for call in stream.collect().outputs[0].tool_calls:
            click.echo(json.dumps({"name": call.name, "arguments": json.loads(call.arguments_json)}))


def _read_tools(file: TextIO) -> list[Tool]:
    """The tools of a JSON file, a list of objects with name, description and parameters."""
    try:
        return [build_tool(tool) for tool in json.load(file)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise click.ClickException(f"{file.name}: holds no list of tools: {error}") from error


@click.command()
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@draws_tokens
@reaches_server
def chat(target: ServerAccess, model: str, system: str | None, options: GenerateOptions) -> None:
    """Talk with MODEL: a model, an adapter, or a route. Each line is what you say, until the end of the input.

    /new begins a new conversation. What is interrupted (Ctrl-C) stays in the conversation as far as it came. In a
    terminal the conversation goes on where an answer failed, without what was said last.
    """
    said = _told(system)
    is_terminal = sys.stdin.isatty()
    with target.client() as client:
        while (line := _next_line(is_terminal)) is not None:
            if line == "/new":
                said = _told(system)
            elif line:
                said.append({"role": "user", "content": line})
                try:
                    # An answer that is interrupted ends at the server, too.
                    with call_failures(target), client.stream_generate(model, said, **options) as stream:
                        said.append({"role": "assistant", "content": "".join(_echoed(stream.text()))})
                except click.ClickException as failure:
                    if not is_terminal:
                        raise
                    failure.show()
                    said.pop()


def _told(system: str | None) -> list[Message]:
    """How a conversation begins."""
    return [] if system is None else [{"role": "system", "content": system}]


def _next_line(is_terminal: bool) -> str | None:
    """What is said next; None: nothing more."""
    try:
        return input("> " if is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            click.echo()
        return None


def _echoed(pieces: Iterator[str]) -> Iterator[str]:
    """Print the pieces of an answer as they come, until it is interrupted."""
    try:
        for piece in pieces:
            echo_text(piece, nl=False)
            yield piece
    except KeyboardInterrupt:
        click.echo(" …", nl=False)
    click.echo()


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.argument("candidates", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the whole response, with each token, instead of the sums.")
@reaches_server
def score(target: ServerAccess, model: str, prompt: str, candidates: tuple[str, ...], as_json: bool) -> None:
    """Say how likely each of CANDIDATES is to follow PROMPT with MODEL. A blank in front of a candidate is its own."""
    with target.client() as client:
        answer = client.score(model, prompt, candidates, logprobs=as_json)
    if as_json:
        print_json(answer)
        return
    rows = [
        (f"{each.logprob:.4f}", str(each.num_tokens), text)
        for each, text in zip(answer.scores, candidates, strict=True)
    ]
    print_table(("logprob", "tokens", "candidate"), rows)
