"""From a valid Prompt to the tokens that the model reads."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Value

from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, ToolCall
from service.catalog import LoadedModel
from service.errors import InvalidRequest, Unavailable
from service.text import Conversation, RendererError, TemplateRenderer, TextError

# Shorter texts take less time to tokenise than to hand to another thread.
_INLINE_CHARS = 8192


async def prompt_text(prompt: Prompt, model: LoadedModel, renderer: TemplateRenderer, path: str) -> str:
    """The text of a prompt that is text or chat; for chat what the model's template makes of it.

    `path`: where the prompt is in the request. Raises InvalidRequest, Unavailable.
    """
    if prompt.WhichOneof("content") == "text":
        return prompt.text
    conversation = _conversation(prompt.chat, f"{path}.chat")
    try:
        return await renderer.render(model.tokenizer.chat_template, conversation)
    except TextError as error:
        raise InvalidRequest.at(f"{path}.chat", str(error)) from error
    except RendererError as error:
        raise Unavailable("OVERLOADED", f"chat templates cannot be rendered now: {error}") from error


def adds_special_tokens(prompt: Prompt) -> bool:
    """Whether the tokenizer adds its special tokens. Templates write their own; plain text gets them."""
    if prompt.HasField("add_special_tokens"):
        return prompt.add_special_tokens
    return prompt.WhichOneof("content") == "text"


async def prompt_tokens(prompt: Prompt, model: LoadedModel, renderer: TemplateRenderer, path: str) -> list[int]:
    """The tokens of a prompt, cut to the last `truncate_to_tokens`. At least one. Raises InvalidRequest."""
    kind = prompt.WhichOneof("content")
    if kind == "token_ids":
        token_ids = list(prompt.token_ids.ids)
    else:
        text = await prompt_text(prompt, model, renderer, path)
        special = adds_special_tokens(prompt)
        try:
            if len(text) <= _INLINE_CHARS:
                token_ids = model.tokenizer.encode(text, special)
            else:
                token_ids = await asyncio.to_thread(model.tokenizer.encode, text, special)
        except TextError as error:
            raise InvalidRequest.at(f"{path}.{kind}", str(error)) from error
        if not token_ids:
            raise InvalidRequest.at(f"{path}.{kind}", "comes to no tokens at all; the model needs at least one")
        _check_known(token_ids, model, f"{path}.{kind}")
    return token_ids[-prompt.truncate_to_tokens :] if prompt.truncate_to_tokens else token_ids


def _check_known(token_ids: list[int], model: LoadedModel, path: str) -> None:
    """Raise InvalidRequest for a token that was added to the tokenizer, and not to the model."""
    highest = max(token_ids)
    if highest >= model.limits.vocab_size:
        token = model.tokenizer.id_to_token(highest)
        problem = f"holds {token!r}, token {highest} of the tokenizer; the model has {model.limits.vocab_size} tokens"
        raise InvalidRequest.at(path, problem)


def _conversation(chat: Chat, path: str) -> Conversation:
    continue_final = chat.continue_final_message
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continue_final
    return Conversation(
        messages=[_message(message, f"{path}.messages[{index}]") for index, message in enumerate(chat.messages)],
        add_generation_prompt=opens,
        continue_final_message=continue_final,
        variables=_variables(chat),
    )


def _message(message: ChatMessage, path: str) -> Mapping[str, Any]:
    """As templates know it. What is absent stays absent: many ask whether a key is there."""
    fields: dict[str, Any] = {"role": message.role}
    for name in ("content", "name", "reasoning_content", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    return fields


def _tool_call(call: ToolCall, path: str) -> Mapping[str, Any]:
    try:
        arguments = json.loads(call.arguments_json or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.at(f"{path}.arguments_json", f"is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidRequest.at(f"{path}.arguments_json", "must be a JSON object")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


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
