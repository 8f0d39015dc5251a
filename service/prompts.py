"""From a valid Prompt to the tokens that the model reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.struct_pb2 import Value

from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, ToolCall
from service.catalog import LoadedModel
from service.errors import InvalidRequest, PromptTooLong, Unavailable
from service.tenants import Tenant
from service.text import ArgumentsError, Conversation, RendererError, TemplateRenderer, TextError, TooManyTokensError
from service.turns import TurnLimits, Turns

# Shorter texts take less time to tokenise than to hand to another thread.
_INLINE_BYTES = 8192
# Of one text, in UTF-8. Tokenising takes some 150 bytes of memory for each, and a second for each million.
MAX_TEXT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class TextWork:
    """Where texts are worked on, each tenant in its turn."""

    renderer: TemplateRenderer
    rendering: Turns
    threads: Turns

    @classmethod
    def of(cls, renderer: TemplateRenderer, waiting_bytes: int = 32 << 20) -> "TextWork":
        """`waiting_bytes`: of texts that wait or are worked on, for each of the two; past it more are refused."""
        limits = TurnLimits(at_once=2, size_at_once=MAX_TEXT_BYTES, size_in_all=waiting_bytes)
        rendering = TurnLimits(renderer.workers, size_at_once=4 * MAX_TEXT_BYTES, size_in_all=waiting_bytes)
        return cls(
            renderer,
            Turns("chat templates cannot be rendered", rendering),
            Turns("long texts cannot be tokenised", limits),
        )


async def prompt_text(prompt: Prompt, model: LoadedModel, work: TextWork, tenant: Tenant, path: str) -> str:
    """The text of a prompt that is text or chat; for chat what the model's template makes of it.

    `path`: where the prompt is in the request. Raises InvalidRequest, Unavailable.
    """
    if prompt.WhichOneof("content") == "text":
        return prompt.text
    size = prompt.chat.ByteSize()
    async with work.rendering.turn(tenant.name, tenant.config.weight, size):
        conversation = _conversation(prompt.chat)
        try:
            text = await work.renderer.render(model.tokenizer.chat_template, conversation, size > _INLINE_BYTES)
        except ArgumentsError as error:
            raise InvalidRequest.at(f"{path}.chat.{error.field}", str(error)) from error
        except TextError as error:
            raise InvalidRequest.at(f"{path}.chat", str(error)) from error
        except RendererError as error:
            raise Unavailable("OVERLOADED", f"chat templates cannot be rendered now: {error}") from error
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest.at(f"{path}.chat", f"comes to {size} bytes of text; {MAX_TEXT_BYTES} are allowed")
    return text


def adds_special_tokens(prompt: Prompt) -> bool:
    """Whether the tokenizer adds its special tokens. Templates write their own; plain text gets them."""
    if prompt.HasField("add_special_tokens"):
        return prompt.add_special_tokens
    return prompt.WhichOneof("content") == "text"


async def prompt_tokens(prompt: Prompt, model: LoadedModel, work: TextWork, tenant: Tenant, path: str) -> list[int]:
    """The tokens of a prompt, cut to the last `truncate_to_tokens`. At least one.

    Raises PromptTooLong for more than the model can hold, as early as that is certain; InvalidRequest, Unavailable.
    """
    kind, last = prompt.WhichOneof("content"), prompt.truncate_to_tokens
    most = None if last else model.limits.max_model_len - 1
    if kind == "token_ids":
        ids = prompt.token_ids.ids
        if most is not None and len(ids) > most:
            raise PromptTooLong.of(path, len(ids), model.limits.max_model_len)
        return list(ids[-last:] if last else ids)
    text = await prompt_text(prompt, model, work, tenant, path)
    size = len(text.encode(errors="surrogatepass"))
    least = model.tokenizer.least_tokens(size)
    if most is not None and least > most:
        raise PromptTooLong.of(path, least, model.limits.max_model_len, "at least ")
    special = adds_special_tokens(prompt)
    try:
        if size <= _INLINE_BYTES:
            token_ids = model.tokenizer.encode(text, special, most)
        else:
            token_ids = await work.threads.in_thread(
                tenant.name, tenant.config.weight, size, lambda: model.tokenizer.encode(text, special, most)
            )
    except TooManyTokensError as error:
        raise PromptTooLong.of(path, error.count, model.limits.max_model_len) from error
    except TextError as error:
        raise InvalidRequest.at(f"{path}.{kind}", str(error)) from error
    if not token_ids:
        raise InvalidRequest.at(f"{path}.{kind}", "comes to no tokens at all; the model needs at least one")
    _check_known(token_ids, model, f"{path}.{kind}")
    return token_ids[-last:] if last else token_ids


def _check_known(token_ids: list[int], model: LoadedModel, path: str) -> None:
    """Raise InvalidRequest for a token that was added to the tokenizer, and not to the model."""
    highest = max(token_ids)
    if highest >= model.limits.vocab_size:
        token = model.tokenizer.id_to_token(highest)
        problem = f"holds {token!r}, token {highest} of the tokenizer; the model has {model.limits.vocab_size} tokens"
        raise InvalidRequest.at(path, problem)


def _conversation(chat: Chat) -> Conversation:
    continue_final = chat.continue_final_message
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continue_final
    return Conversation(
        messages=[_message(message) for message in chat.messages],
        add_generation_prompt=opens,
        continue_final_message=continue_final,
        variables=_variables(chat),
    )


def _message(message: ChatMessage) -> Mapping[str, Any]:
    """As templates know it. What is absent stays absent: many ask whether a key is there."""
    fields: dict[str, Any] = {"role": message.role}
    for name in ("content", "name", "reasoning_content", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return fields


def _tool_call(call: ToolCall) -> Mapping[str, Any]:
    """With its arguments as text: what renders the template reads them, for what that takes is the caller's choice."""
    function = {"name": call.name, "arguments_json": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _variables(chat: Chat) -> Mapping[str, Any]:
    return {name: _value(value) for name, value in chat.template_kwargs.fields.items()}


def _value(value: Value) -> Any:
    """A Struct has no integers: whole numbers become them again, as templates compare and print them."""
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
