"""Prompts from what callers have at hand: text, token ids, or messages as most chat APIs write them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from loraplex.v1 import inference_pb2, prompt_pb2

Message: TypeAlias = prompt_pb2.ChatMessage | Mapping[str, object]
Tool: TypeAlias = prompt_pb2.Tool | Mapping[str, object]
PromptLike: TypeAlias = str | Sequence[int] | Sequence[Message] | prompt_pb2.Prompt

_MESSAGE_KEYS = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}
_TOOL_MODES = ("auto", "none", "required")
_FUNCTION_KEYS = {"name", "description", "parameters"}


def build_prompt(prompt: PromptLike) -> prompt_pb2.Prompt:
    """Build the Prompt that `prompt` means.

    A string is text, integers are token ids, anything else in a sequence is a chat message: a ChatMessage or a mapping
    such as {"role": "user", "content": "Hello"}.

    Raises ValueError for an empty sequence, which could mean either, and for keys that no message has.
    """
    if isinstance(prompt, prompt_pb2.Prompt):
        return prompt
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=prompt)
    items = list(prompt)
    if not items:
        raise ValueError("the prompt is an empty sequence: pass text, token ids, or at least one chat message")
    ids = [item for item in items if isinstance(item, int)]
    if len(ids) == len(items):
        return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=ids))
    messages = [build_message(item) for item in items if not isinstance(item, int)]
    if ids:
        raise ValueError("the prompt mixes token ids and chat messages: pass one or the other")
    return prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=messages))


def build_message(message: Message) -> prompt_pb2.ChatMessage:
    """Build a ChatMessage from a mapping with keys of a ChatMessage, such as role and content.

    Content is text, or a list of parts {"type": "text", "text": ...}, which are joined as they are. Raises ValueError
    for parts of other types.
    """
    if isinstance(message, prompt_pb2.ChatMessage):
        return message
    if not isinstance(message, Mapping):
        raise TypeError(f"a chat message is a ChatMessage or a mapping, not {type(message).__name__}: {message!r}")
    _refuse_unknown("chat message", message, _MESSAGE_KEYS)
    given: Mapping[str, Any] = message
    built = prompt_pb2.ChatMessage(
        role=given["role"],
        content=_content(given.get("content")),
        name=given.get("name"),
        reasoning_content=given.get("reasoning_content"),
        tool_call_id=given.get("tool_call_id"),
    )
    built.tool_calls.extend(_build_tool_call(call) for call in given.get("tool_calls") or ())
    return built


def _content(content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TypeError(f"the content of a chat message is text or a list of parts, not {type(content).__name__}")
    return "".join(_part_text(index, part) for index, part in enumerate(content))


def _part_text(index: int, part: object) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise TypeError(f'content[{index}] is no part of a chat message: {{"type": "text", "text": ...}} is')
    if part["type"] != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"content[{index}] is of type {part['type']!r}: parts of type 'text', with their text, are taken"
        )
    text: str = part["text"]
    return text


def assistant_message(output: inference_pb2.GenerateOutput) -> prompt_pb2.ChatMessage:
    """Build the message that an output is, to go on with the conversation: its text, reasoning and calls of tools."""
    return prompt_pb2.ChatMessage(
        role="assistant",
        content=output.text,
        reasoning_content=output.reasoning or None,
        tool_calls=output.tool_calls,
    )


def build_tool(tool: Tool) -> prompt_pb2.Tool:
    """Build a Tool from a mapping with the keys name, description and parameters.

    Such a mapping may also be the value of "function" in {"type": "function", "function": ...}.
    """
    if isinstance(tool, prompt_pb2.Tool):
        return tool
    given: Mapping[str, Any] = tool
    function = given.get("function", given)
    _refuse_unknown("tool", function, _FUNCTION_KEYS)
    return prompt_pb2.Tool(
        name=function["name"],
        description=function.get("description"),
        parameters_json=_json_text(function.get("parameters")),
    )


def build_tool_choice(choice: str | prompt_pb2.ToolChoice) -> prompt_pb2.ToolChoice:
    """Build a ToolChoice from "auto", "none", "required" or the name of a tool."""
    if isinstance(choice, prompt_pb2.ToolChoice):
        return choice
    if choice in _TOOL_MODES:
        return prompt_pb2.ToolChoice(mode=prompt_pb2.ToolMode.Value(f"TOOL_MODE_{choice.upper()}"))
    return prompt_pb2.ToolChoice(name=choice)


def _build_tool_call(call: prompt_pb2.ToolCall | Mapping[str, Any]) -> prompt_pb2.ToolCall:
    if isinstance(call, prompt_pb2.ToolCall):
        return call
    function = call.get("function", call)
    return prompt_pb2.ToolCall(
        id=call.get("id", ""), name=function["name"], arguments_json=_json_text(function.get("arguments")) or "{}"
    )


def _json_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_unknown(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"a {what} has no key {', '.join(unknown)}; it has {', '.join(sorted(known))}")
