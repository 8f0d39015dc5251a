"""Turns a valid Prompt into the tokens that the model reads."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from google.protobuf.struct_pb2 import Value

from loraplex.v1.prompt_pb2 import TOOL_MODE_NONE, Chat, ChatMessage, Prompt, Tool, ToolCall
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import InvalidRequest, PromptTooLong, Unavailable
from loraplex_service.names.target import LoadedModel
from loraplex_service.requests.turns import Pieces, TurnLimits, Turns, whole
from loraplex_service.text import (
    MAX_TOKENS,
    ArgumentsError,
    Conversation,
    RendererError,
    Span,
    TemplateRenderer,
    TextError,
    TooManyTokensError,
)

T = TypeVar("T")

# In bytes, or tokens. Shorter texts take less time to tokenise than to hand to another thread.
_INLINE_SIZE = 8192
PIECE = 1 << 11  # tokens that are worked on before the event loop serves others
_NO_PARAMETERS = '{"type": "object", "properties": {}}'
# UTF-8 bytes of one text. Tokenising takes some 150 bytes of memory a byte, and a second a million.
MAX_TEXT_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class TextWork:
    """The turns for work on texts: rendering of chat templates and tokenisation."""

    renderer: TemplateRenderer
    rendering: Turns
    threads: Turns
    tokens: Turns

    @classmethod
    def of(cls, renderer: TemplateRenderer, waiting_bytes: int = 32 << 20) -> "TextWork":
        """`waiting_bytes`: the limit on texts, or tokens, that wait or are worked on, for each kind of work."""
        limits = TurnLimits(at_once=2, size_at_once=MAX_TEXT_BYTES, size_in_all=waiting_bytes)
        rendering = TurnLimits(renderer.workers, size_at_once=4 * MAX_TEXT_BYTES, size_in_all=waiting_bytes)
        return cls(
            renderer,
            Turns("chat templates cannot be rendered", rendering),
            Turns("long texts cannot be tokenised", limits),
            Turns("so many tokens cannot be read", TurnLimits(1, size_at_once=MAX_TOKENS, size_in_all=waiting_bytes)),
        )

    async def on(self, tenant: Tenant, size: int, do: Callable[[], T]) -> T:
        """Run work on a text: here if that is shorter than to hand it to a thread, else in a turn."""
        if size <= _INLINE_SIZE:
            return do()
        return await self.threads.in_thread(tenant.name, tenant.config.weight, size, do)

    async def on_places(self, tenant: Tenant, size: int, do: Callable[[], T]) -> T:
        """Run work on a text that gives a place for each token, one text at a time: the objects take the interpreter
        as long as the library took for them."""
        if size <= _INLINE_SIZE:
            return do()
        return await self.tokens.in_thread(tenant.name, tenant.config.weight, size, do)

    async def on_tokens(self, tenant: Tenant, count: int, work: Pieces[T]) -> T:
        """Run work on tokens: at once if there are few, else piece by piece in a turn. Two at once would end no sooner:
        the interpreter does it all."""
        if count <= _INLINE_SIZE:
            return whole(work)
        return await self.tokens.in_pieces(tenant.name, tenant.config.weight, count, work)


class PromptText(NamedTuple):
    """The text of a prompt, and the parts of it that must not become control tokens."""

    text: str
    literal: Sequence[Span]

    @property
    def work_size(self) -> int:
        """The size of the work in bytes.

        It is large where the text may need the tokenizer's twin, made in about a second.
        """
        size = len(self.text.encode(errors="surrogatepass"))
        return max(size, _INLINE_SIZE + 1) if self.literal else size


async def prompt_text(prompt: Prompt, model: LoadedModel, work: TextWork, tenant: Tenant, path: str) -> PromptText:
    """The text of a text prompt, or of a chat prompt as the model's template renders it.

    `path`: where the prompt is in the request. Raises InvalidRequest, Unavailable.
    """
    if prompt.WhichOneof("content") == "text":
        return PromptText(prompt.text, [(0, len(prompt.text))] if prompt.literal_content else ())
    literal = prompt.literal_content if prompt.HasField("literal_content") else model.literal_content
    template = model.tokenizer.chat_template
    if offered_tools(prompt.chat) and template is not None and not template.shows_tools:
        raise InvalidRequest.at(f"{path}.chat.tools", "cannot be offered: the model's chat template shows no tools")
    size = prompt.chat.ByteSize()
    async with work.rendering.turn(tenant.name, tenant.config.weight, size):
        is_long = size > _INLINE_SIZE
        try:
            conversation = (
                await asyncio.to_thread(_conversation, prompt.chat) if is_long else _conversation(prompt.chat)
            )
            given = template, conversation, is_long
            if literal:
                rendered = PromptText(*await work.renderer.render_literally(*given))
            else:
                rendered = PromptText(await work.renderer.render(*given), ())
        except ArgumentsError as error:
            raise InvalidRequest.at(f"{path}.chat.{error.field}", str(error)) from error
        except TextError as error:
            raise InvalidRequest.at(f"{path}.chat", str(error)) from error
        except RendererError as error:
            raise Unavailable("OVERLOADED", f"chat templates cannot be rendered now: {error}") from error
    size = len(rendered.text.encode(errors="surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest.at(f"{path}.chat", f"comes to {size} bytes of text; {MAX_TEXT_BYTES} are allowed")
    return rendered


def adds_special_tokens(prompt: Prompt) -> bool:
    """Whether the tokenizer adds its special tokens: to plain text it does, while templates write their own."""
    if prompt.HasField("add_special_tokens"):
        return prompt.add_special_tokens
    return prompt.WhichOneof("content") == "text"


async def prompt_tokens(
    prompt: Prompt, model: LoadedModel, work: TextWork, tenant: Tenant, path: str, num_drawn: int = 1
) -> list[int]:
    """The tokens of a prompt, at least one, cut to `truncate_to_tokens`. `num_drawn`: the room to leave behind them.

    Raises PromptTooLong for a prompt above the model's context, as early as that is certain; InvalidRequest,
    Unavailable.
    """
    kind, last = prompt.WhichOneof("content"), prompt.truncate_to_tokens
    context = model.limits.max_model_len
    most = MAX_TOKENS if last else context - num_drawn
    if kind == "token_ids":
        ids = prompt.token_ids.ids
        if len(ids) > most:
            raise PromptTooLong.of(path, len(ids), context, num_drawn)
        first = len(ids) - min(last or len(ids), len(ids))
        return await work.on_tokens(
            tenant, len(ids) - first, checked_tokens(ids, model, f"{path}.token_ids.ids", first)
        )
    rendered = await prompt_text(prompt, model, work, tenant, path)
    size = len(rendered.text.encode(errors="surrogatepass"))
    least = model.tokenizer.least_tokens(size)
    if not last and least > most:
        raise PromptTooLong.of(path, least, context, num_drawn, "at least ")
    try:
        return await work.on(
            tenant, rendered.work_size, lambda: _tokens(prompt, rendered, most, model, f"{path}.{kind}")
        )
    except TooManyTokensError as error:
        if last or error.count <= most:
            raise InvalidRequest.at(f"{path}.{kind}", str(error)) from error
        raise PromptTooLong.of(path, error.count, context, num_drawn) from error
    except TextError as error:
        raise InvalidRequest.at(f"{path}.{kind}", str(error)) from error


def checked_tokens(ids: Sequence[int], model: LoadedModel, path: str, first: int = 0) -> Pieces[list[int]]:
    """Given token ids from the place `first` on. Raises InvalidRequest for one that the model does not have."""
    token_ids: list[int] = []
    for some in pieces_of(ids, model, path, first):
        token_ids += some
        yield
    return token_ids


def pieces_of(ids: Sequence[int], model: LoadedModel, path: str, first: int = 0) -> Iterator[Sequence[int]]:
    """Given token ids, as many at a time as are worked on before the event loop serves others.

    Raises InvalidRequest for one that the model does not have.
    """
    for start in range(first, len(ids), PIECE):
        some = ids[start : start + PIECE]
        if (largest := max(some)) >= model.limits.vocab_size:
            raise InvalidRequest.at(path, f"holds {largest}, and the vocabulary has {model.limits.vocab_size} tokens")
        yield some


def _tokens(prompt: Prompt, rendered: PromptText, most: int, model: LoadedModel, path: str) -> list[int]:
    """Tokenise a text. Raises TextError, and InvalidRequest for no tokens or for one that the model lacks."""
    special, most = adds_special_tokens(prompt), min(most, MAX_TOKENS)
    token_ids = model.tokenizer.encode(rendered.text, special, most, rendered.literal)
    if not token_ids:
        raise InvalidRequest.at(path, "comes to no tokens at all; the model needs at least one")
    highest = max(token_ids)
    if highest >= model.limits.vocab_size:
        token = model.tokenizer.id_to_token(highest)
        problem = f"holds {token!r}, token {highest} of the tokenizer; the model has {model.limits.vocab_size} tokens"
        raise InvalidRequest.at(path, problem)
    if not prompt.truncate_to_tokens:
        return token_ids
    return [token_id for part in kept_parts(prompt, model, token_ids) for token_id in token_ids[part]]


def kept_parts(prompt: Prompt, model: LoadedModel, token_ids: Sequence[int]) -> tuple[slice, slice]:
    """The tokens that `truncate_to_tokens` keeps: those that the tokenizer puts in front, and the last of the text."""
    front = model.tokenizer.num_in_front if adds_special_tokens(prompt) else 0
    if not front and token_ids[:1] == [model.tokenizer.bos_token_id]:
        front = 1
    last = prompt.truncate_to_tokens or len(token_ids)
    if front >= last or last >= len(token_ids):
        front = 0
    return slice(0, front), slice(max(0, len(token_ids) - last + front), None)


def _conversation(chat: Chat) -> Conversation:
    continue_final = chat.continue_final_message
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continue_final
    return Conversation(
        messages=[_message(message) for message in chat.messages],
        tools=[_tool(tool) for tool in offered_tools(chat)],
        add_generation_prompt=opens,
        continue_final_message=continue_final,
        variables=_variables(chat),
    )


def _message(message: ChatMessage) -> Mapping[str, Any]:
    """The message in the form that templates know. Absent fields have no key, since many templates ask for that."""
    fields: dict[str, Any] = {"role": message.role}
    for name in ("content", "name", "reasoning_content", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return fields


def offered_tools(chat: Chat) -> Sequence[Tool]:
    """The tools that the model may call."""
    return () if chat.tool_choice.mode == TOOL_MODE_NONE else chat.tools


def _tool(tool: Tool) -> Mapping[str, Any]:
    """The tool, with its schema as text, as `_tool_call` has arguments."""
    described = {"description": tool.description} if tool.HasField("description") else {}
    return {
        "type": "function",
        "function": {"name": tool.name, **described, "parameters_json": tool.parameters_json or _NO_PARAMETERS},
    }


def _tool_call(call: ToolCall) -> Mapping[str, Any]:
    """The tool call, with its arguments as text. The template's process parses them: the caller decides their cost."""
    function = {"name": call.name, "arguments_json": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _variables(chat: Chat) -> Mapping[str, Any]:
    return {name: _value(value) for name, value in chat.template_kwargs.fields.items()}


def _value(value: Value) -> Any:
    """The value of a Struct field. Whole numbers become integers, as templates compare and print them."""
    match value.WhichOneof("kind"):
        case "number_value":
            return int(value.number_value) if value.number_value.is_integer() else value.number_value
        case "struct_value":
            return {name: _value(item) for name, item in value.struct_value.fields.items()}
        case "list_value":
            return [_value(item) for item in value.list_value.values]
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None
