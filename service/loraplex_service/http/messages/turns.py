"""Anthropic's conversations and tools as those of the contract.

A turn is a list of blocks. Results of tools are blocks of the user to Anthropic, and messages of their own here.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.v1.prompt_pb2 import ChatMessage, ToolCall, ToolMode
from loraplex_service.http.conversations import add_tool, begin, blamed
from loraplex_service.http.parameters import Draft, bounded, flag, items, mapping, refuse_others, text, wrong

BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # of each role, with the keys of each
    "user": {"text": ("text",), "tool_result": ("tool_use_id", "content", "is_error")},
    "assistant": {
        "text": ("text",),
        "thinking": ("thinking", "signature"),
        "tool_use": ("id", "name", "input", "caller"),
    },
    "system": {"text": ("text",)},
}
ANY_BLOCK = ("type", "cache_control")  # what a prompt begins with is cached without being asked
MODES = {
    "auto": ToolMode.TOOL_MODE_AUTO,
    "any": ToolMode.TOOL_MODE_REQUIRED,
    "none": ToolMode.TOOL_MODE_NONE,
}
DIRECT = {"type": "direct"}


def put_system(draft: Draft, value: Any) -> None:
    """What the conversation begins with."""
    draft.paths.append(("prompt.chat.messages[0]", "system"))
    draft.message.prompt.chat.messages.add(role="system", content=_said(value, "system", "system"))


def put_turns(draft: Draft, value: Any) -> None:
    """The conversation. An assistant's turn at its end is gone on with."""
    begin(draft)
    chat = draft.message.prompt.chat
    for index, turn in enumerate(items(value, "Chat.messages")):
        name = f"messages[{index}]"
        with blamed(name):
            refuse_others(mapping(turn), ("role", "content"), name)
            for message in _messages(text(turn["role"]), turn["content"], name):
                draft.paths.append((f"prompt.chat.messages[{len(chat.messages)}]", name))
                chat.messages.append(message)
                bounded(chat.messages, "Chat.messages")
    if chat.messages and chat.messages[-1].role == "assistant" and not chat.messages[-1].tool_calls:
        chat.continue_final_message = True


def _messages(role: str, content: Any, name: str) -> Iterator[ChatMessage]:
    """The messages that a turn is: one, but for the results of tools."""
    if role not in BLOCKS:
        raise wrong(f"{name}.role", f"must be one of {', '.join(BLOCKS)}")
    if isinstance(content, str):
        yield ChatMessage(role=role, content=content)
        return
    if not content:
        raise ValueError("content is empty")
    turn = _Turn(role)
    for place, block in _blocks(content, role, f"{name}.content"):
        if block["type"] == "tool_result":
            yield from turn.taken()
            yield _result(block, place)
        else:
            turn.add(block)
    yield from turn.taken()


class _Turn:
    """Blocks that make one message. What they say is joined once: piece by piece it would be copied again and again."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []

    def add(self, block: Mapping[str, Any]) -> None:
        match block["type"]:
            case "text":
                self._texts.append(text(block["text"]))
            case "thinking":  # its signature is Anthropic's word that it is Anthropic's: nothing for a prompt
                self._thoughts.append(text(block["thinking"]))
            case "tool_use":
                self._calls.append(_call(block))

    def taken(self) -> Iterator[ChatMessage]:
        """The message, if there is one, after which the turn begins anew."""
        texts, thoughts, calls = self._texts, self._thoughts, self._calls
        if texts or thoughts or calls:
            content, reasoning = ("".join(each) if each else None for each in (texts, thoughts))
            yield ChatMessage(role=self._role, content=content, reasoning_content=reasoning, tool_calls=calls)
        self._texts, self._thoughts, self._calls = [], [], []


def _blocks(content: Any, role: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The blocks of a content, each with its place in the body."""
    for index, value in enumerate(items(content, "Chat.messages")):
        place, block = f"{name}[{index}]", mapping(value)
        kind = text(block.get("type"))
        if kind not in BLOCKS[role]:
            problem = f"{kind!r} is no block of the role {role!r} here: {', '.join(BLOCKS[role])} are taken"
            raise wrong(f"{place}.type", problem, code="unsupported_parameter")
        with blamed(place):
            refuse_others(block, (*ANY_BLOCK, *BLOCKS[role][kind]), place)
            yield place, block


def _call(block: Mapping[str, Any]) -> ToolCall:
    if block.get("caller") not in (None, DIRECT):
        raise ValueError("caller: the model itself is the caller of each tool")
    arguments = json.dumps(mapping(block["input"]), ensure_ascii=False)
    return ToolCall(id=text(block["id"]), name=text(block["name"]), arguments_json=arguments)


def _result(block: Mapping[str, Any], place: str) -> ChatMessage:
    said = _said(block.get("content") or "", "system", f"{place}.content")
    if flag(block.get("is_error") or False):
        said = f"Error: {said}"  # no chat template has a place for it
    return ChatMessage(role="tool", tool_call_id=text(block["tool_use_id"]), content=said)


def _said(value: Any, role: str, name: str) -> str:
    """A text, or the texts of blocks joined as they are."""
    return value if isinstance(value, str) else "".join(text(block["text"]) for _, block in _blocks(value, role, name))


# ---- tools -----------------------------------------------------------------------------------------------------------

TOOL = ("type", "name", "description", "input_schema", "strict", "cache_control")
HARMLESS = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "eager_input_streaming": (False,),
    "input_examples": ([],),
}


def put_tools(draft: Draft, value: Any) -> None:
    """The tools that the model may call."""
    for index, given in enumerate(items(value, "Chat.tools")):
        name = f"tools[{index}]"
        with blamed(name):
            tool = {key: content for key, content in mapping(given).items() if content not in HARMLESS.get(key, ())}
            if tool.get("type") not in (None, "custom"):
                problem = "tools of type 'custom' are taken: the server runs none"
                raise wrong(f"{name}.type", problem, code="unsupported_parameter")
            refuse_others(tool, TOOL, name)
            function = {"name": tool["name"], "parameters": tool["input_schema"], "strict": tool.get("strict")}
            add_tool(draft, name, function | {"description": tool.get("description")})


def put_tool_choice(draft: Draft, value: Any) -> None:
    """Whether the model calls tools, or which, and whether several in a turn."""
    refuse_others(mapping(value), ("type", "name", "disable_parallel_tool_use"), "tool_choice")
    chat, kind = draft.message.prompt.chat, value.get("type")
    if kind == "tool":
        chat.tool_choice.name = text(value.get("name"))
    elif isinstance(kind, str) and kind in MODES:
        chat.tool_choice.mode = MODES[kind]
    else:
        raise ValueError('type must be "auto", "any", "tool" or "none"')
    if flag(value.get("disable_parallel_tool_use") or False):
        chat.parallel_tool_calls = False
