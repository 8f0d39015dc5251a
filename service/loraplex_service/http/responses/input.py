"""The items of OpenAI's Responses as the messages of a conversation.

What an assistant thought, said and called are items that follow each other there, and one message here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.v1.prompt_pb2 import ToolCall, ToolMode
from loraplex_service.http.conversations import add_tool, begin, blamed
from loraplex_service.http.parameters import Draft, items, mapping, refuse_others, text, wrong
from loraplex_service.http.turns import Texts, Turn, put_turns

ITEMS: Mapping[str, tuple[str, ...]] = {  # with the keys of each
    "message": ("role", "content", "id", "status", "phase"),
    "reasoning": ("id", "summary", "content", "encrypted_content", "status"),
    "function_call": ("id", "call_id", "name", "arguments", "status"),
    "function_call_output": ("id", "call_id", "output", "status", "name"),
}
ROLES = ("user", "assistant", "system", "developer")
OF_ASSISTANT = ("reasoning", "function_call")
TEXTS = ("input_text", "output_text", "text", "refusal")  # the last: what another server's model would not do
PART = ("type", "text", "annotations", "logprobs")


def put_instructions(draft: Draft, value: Any) -> None:
    """What the conversation begins with."""
    put_turns(draft, [_spoken("system", value, "instructions")])


def put_input(draft: Draft, value: Any) -> None:
    """A text of the user, or the items of a conversation."""
    begin(draft, "input")
    if isinstance(value, str):
        put_turns(draft, [_spoken("user", value, "input")])
        return
    turns: list[Turn] = []
    for index, given in enumerate(items(value, "Chat.messages")):
        name = f"input[{index}]"
        with blamed(name):
            kind = _kind(mapping(given), name)
            role = "assistant" if kind in OF_ASSISTANT else text(given["role"]) if kind == "message" else "tool"
            if not _goes_on(turns, kind, role):
                turns.append(Turn(role, name))
            _put_item(turns[-1], kind, given, name)
    put_turns(draft, turns)


def _spoken(role: str, value: Any, place: str) -> Turn:
    turn = Turn(role, place)
    turn.said.add(text(value))
    return turn


def _goes_on(turns: Sequence[Turn], kind: str, role: str) -> bool:
    """Whether an item belongs to the turn before it: an assistant's, of which a message is the only one."""
    if not turns or role != "assistant" or turns[-1].role != role:
        return False
    return kind != "message" or turns[-1].said.joined is None


def _kind(item: Mapping[str, Any], name: str) -> str:
    kind = text(item.get("type", "message" if "role" in item else None))
    if kind not in ITEMS:
        problem = f"{kind!r} is no item that is taken here: {', '.join(ITEMS)} are"
        raise wrong(f"{name}.type", problem, code="unsupported_parameter")
    refuse_others(item, ("type", *ITEMS[kind]), name)
    if kind == "message" and item["role"] not in ROLES:
        raise wrong(f"{name}.role", f"must be one of {', '.join(ROLES)}")
    return kind


def _put_item(turn: Turn, kind: str, item: Mapping[str, Any], name: str) -> None:
    match kind:
        case "message":
            turn.places["content"] = f"{name}.content"
            _say(turn.said, item["content"], TEXTS, f"{name}.content")
        case "reasoning":
            thought = item.get("content") or item.get("summary") or []
            _say(turn.thought, thought, ("reasoning_text", "summary_text"), f"{name}.content")
        case "function_call":
            call = ToolCall(id=text(item["call_id"]), name=text(item["name"]), arguments_json=text(item["arguments"]))
            turn.call(call, name, {"id": "call_id", "arguments_json": "arguments"})
        case "function_call_output":
            turn.answers = text(item["call_id"])
            turn.places |= {"tool_call_id": f"{name}.call_id", "content": f"{name}.output"}
            _say(turn.said, item["output"], TEXTS, f"{name}.output")


def _say(said: Texts, value: Any, kinds: tuple[str, ...], name: str) -> None:
    """Add a text, or the texts of parts as they are."""
    if isinstance(value, str):
        said.add(value)
        return
    for index, part in enumerate(items(value)):
        place = f"{name}[{index}]"
        with blamed(place):
            kind = mapping(part).get("type")
            if kind not in kinds:
                raise wrong(f"{place}.type", f"{' and '.join(kinds)} are taken", code="unsupported_parameter")
            refuse_others({key: content for key, content in part.items() if content != []}, (*PART, kind), place)
            said.add(text(part.get("refusal" if kind == "refusal" else "text")))


# ---- tools -----------------------------------------------------------------------------------------------------------

TOOL = ("type", "name", "description", "parameters", "strict")
HARMLESS = {"allowed_callers": (["direct"],), "defer_loading": (False,), "async": (False,)}
MODES = ("auto", "none", "required")


def put_tools(draft: Draft, value: Any) -> None:
    """The functions that the model may call."""
    for index, given in enumerate(items(value, "Chat.tools")):
        name = f"tools[{index}]"
        with blamed(name):
            tool = {key: content for key, content in mapping(given).items() if content not in HARMLESS.get(key, ())}
            if tool.pop("type", None) != "function":
                problem = "tools of type 'function' are taken: the server runs none itself"
                raise wrong(f"{name}.type", problem, code="unsupported_parameter")
            refuse_others(tool, TOOL, name)
            add_tool(draft, name, {key: tool[key] for key in TOOL if key in tool})


def put_tool_choice(draft: Draft, value: Any) -> None:
    """Whether the model calls tools, or which."""
    choice = draft.message.prompt.chat.tool_choice
    if isinstance(value, str) and value in MODES:
        choice.mode = ToolMode.Value(f"TOOL_MODE_{value.upper()}")
    elif isinstance(value, dict) and value.get("type") == "function":
        choice.name = text(value.get("name"))
    elif isinstance(value, dict) and value.get("type") == "allowed_tools":
        problem = "leave those that are not allowed out of `tools`"
        raise wrong("tool_choice.type", problem, code="unsupported_parameter")
    else:
        raise ValueError('must be "auto", "none", "required" or {"type": "function", "name": …}')
