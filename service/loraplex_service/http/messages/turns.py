"""Anthropic's conversations and tools as those of the contract.

A turn is a list of blocks. Results of tools are blocks of the user to Anthropic, and messages of their own here.
"""

import json
from collections.abc import Mapping
from typing import Any

from loraplex.v1.prompt_pb2 import ToolCall, ToolMode
from loraplex_service.http.conversations import add_tool, begin, blamed
from loraplex_service.http.parameters import Draft, bounded, flag, items, mapping, refuse_others, text, wrong
from loraplex_service.http.turns import Texts, Turn
from loraplex_service.http.turns import put_turns as put_all

BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # of each role, with the keys of each
    "user": {"text": ("text",), "tool_result": ("tool_use_id", "content", "is_error")},
    "assistant": {
        "text": ("text",),
        "thinking": ("thinking", "signature"),
        "tool_use": ("id", "name", "input", "caller"),
    },
    "system": {"text": ("text",)},
}
TEXT_ALONE = {"text": ("text",)}
TTLS = (None, "5m", "1h")
ANY_BLOCK = ("type", "cache_control")  # what a prompt begins with is cached without being asked
MODES = {
    "auto": ToolMode.TOOL_MODE_AUTO,
    "any": ToolMode.TOOL_MODE_REQUIRED,
    "none": ToolMode.TOOL_MODE_NONE,
}
DIRECT = {"type": "direct"}


def put_system(draft: Draft, value: Any) -> None:
    """What the conversation begins with."""
    turn = Turn("system", "system")
    _say(turn.said, value, "system")
    put_all(draft, [turn])


def put_turns(draft: Draft, value: Any) -> None:
    """The conversation. An assistant's turn at its end is gone on with."""
    begin(draft)
    turns: list[Turn] = []
    for index, given in enumerate(items(value, "Chat.messages")):
        name = f"messages[{index}]"
        with blamed(name):
            refuse_others(mapping(given), ("role", "content"), name)
            turns += _turns(text(given["role"]), given["content"], name)
            bounded(turns, "Chat.messages")
    put_all(draft, turns)
    if turns and turns[-1].role == "assistant" and not turns[-1].calls:
        draft.message.prompt.chat.continue_final_message = True


def _turns(role: str, content: Any, name: str) -> list[Turn]:
    """The messages that a turn is: one, but for the results of tools."""
    if role not in BLOCKS:
        raise wrong(f"{name}.role", f"must be one of {', '.join(BLOCKS)}")
    if not content and not isinstance(content, str):
        raise ValueError("content is empty")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    turns: list[Turn] = []
    for index, value in enumerate(items(content, "Chat.messages")):
        place = f"{name}.content[{index}]"
        with blamed(place):
            block = _block(value, BLOCKS[role], place, f"the role {role!r}")
            if block["type"] == "tool_result":
                turns.append(_result(block, place))
                continue
            if not turns or turns[-1].answers is not None:
                turns.append(Turn(role, name))
            _add(turns[-1], block, place)
    return turns


def _block(value: Any, kinds: Mapping[str, tuple[str, ...]], place: str, where: str) -> dict[str, Any]:
    """The block, which must be one of these kinds."""
    block = mapping(value)
    kind = text(block.get("type"))
    if kind not in kinds:
        problem = f"{kind!r} is no block of {where} here: {', '.join(kinds)} are taken"
        raise wrong(f"{place}.type", problem, code="unsupported_parameter")
    refuse_others(block, (*ANY_BLOCK, *kinds[kind]), place)
    check_cache_control(block.get("cache_control"), f"{place}.cache_control")
    return block


def check_cache_control(value: Any, name: str) -> None:
    """Raise Refusal for what asks for more than to cache what a prompt begins with, which needs no asking."""
    if value is None:
        return
    if not isinstance(value, dict) or value.get("type") != "ephemeral" or value.get("ttl") not in TTLS:
        problem = 'must be {"type": "ephemeral"}, with or without a `ttl` of "5m" or "1h"'
        raise wrong(name, problem, code="unsupported_parameter")
    refuse_others(value, ("type", "ttl"), name)


def _add(turn: Turn, block: Mapping[str, Any], place: str) -> None:
    match block["type"]:
        case "text":
            turn.said.add(text(block["text"]))
        case "thinking":  # its signature is Anthropic's word that it is Anthropic's: nothing for a prompt
            turn.thought.add(text(block["thinking"]))
        case "tool_use":
            if block.get("caller") not in (None, DIRECT):
                raise ValueError("caller: the model itself is the caller of each tool")
            arguments = json.dumps(mapping(block["input"]), ensure_ascii=False)
            call = ToolCall(id=text(block["id"]), name=text(block["name"]), arguments_json=arguments)
            turn.call(call, place, {"arguments_json": "input"})


def _result(block: Mapping[str, Any], place: str) -> Turn:
    called = text(block["tool_use_id"])
    turn = Turn("tool", place, answers=called, places={"tool_call_id": f"{place}.tool_use_id"})
    if flag(block.get("is_error") or False):
        turn.said.add("Error: ")  # no chat template has a place for it
    _say(turn.said, block.get("content") or "", f"{place}.content")
    return turn


def _say(said: Texts, value: Any, name: str) -> None:
    """Add a text, or the texts of blocks as they are."""
    if isinstance(value, str):
        said.add(value)
        return
    for index, given in enumerate(items(value, "Chat.messages")):
        place = f"{name}[{index}]"
        with blamed(place):
            said.add(text(_block(given, TEXT_ALONE, place, f"{name!r}")["text"]))


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
            add_tool(draft, name, function | {"description": tool.get("description")}, "input_schema")


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
