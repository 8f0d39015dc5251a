"""The items of OpenAI's Responses as the messages of a conversation.

What an assistant thought, said and called are items that follow each other there, and one message here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.v1.prompt_pb2 import ChatMessage, ToolCall, ToolMode
from loraplex_service.http.conversations import add_tool, begin, blamed
from loraplex_service.http.parameters import Draft, bounded, items, mapping, refuse_others, text, wrong

ITEMS: Mapping[str, tuple[str, ...]] = {  # with the keys of each
    "message": ("role", "content", "id", "status", "phase"),
    "reasoning": ("id", "summary", "content", "encrypted_content", "status"),
    "function_call": ("id", "call_id", "name", "arguments", "status"),
    "function_call_output": ("id", "call_id", "output", "status", "name"),
}
OF_ASSISTANT = ("reasoning", "function_call")
TEXTS = ("input_text", "output_text", "text")
PART = ("type", "text", "annotations", "logprobs")


def put_instructions(draft: Draft, value: Any) -> None:
    """What the conversation begins with."""
    draft.paths.append(("prompt.chat.messages[0]", "instructions"))
    draft.message.prompt.chat.messages.add(role="system", content=text(value))


def put_input(draft: Draft, value: Any) -> None:
    """A text of the user, or the items of a conversation."""
    begin(draft, "input")
    chat = draft.message.prompt.chat
    if isinstance(value, str):
        chat.messages.add(role="user", content=value)
        return
    open_turn: ChatMessage | None = None  # of the assistant, to which further items may belong
    thoughts = defaultdict[int, list[str]](list)  # by message: joined once, since each time all before would be copied
    for index, given in enumerate(items(value, "Chat.messages")):
        name = f"input[{index}]"
        with blamed(name):
            item, kind = mapping(given), _kind(given, name)
            is_assistants = kind in OF_ASSISTANT or item.get("role") == "assistant"
            if not is_assistants or open_turn is None or (kind == "message" and open_turn.HasField("content")):
                draft.paths.append((f"prompt.chat.messages[{len(chat.messages)}]", name))
                open_turn = chat.messages.add(role="assistant")
            if kind == "reasoning":
                thoughts[len(chat.messages) - 1].append(_thought(item, name))
            _put_item(open_turn, kind, item, name)
            open_turn = open_turn if is_assistants else None
    for number, said in thoughts.items():
        chat.messages[number].reasoning_content = "".join(said)


def _kind(item: Mapping[str, Any], name: str) -> str:
    kind = text(item.get("type", "message" if "role" in item else None))
    if kind not in ITEMS:
        problem = f"{kind!r} is no item that is taken here: {', '.join(ITEMS)} are"
        raise wrong(f"{name}.type", problem, code="unsupported_parameter")
    refuse_others(item, ("type", *ITEMS[kind]), name)
    return kind


def _thought(item: Mapping[str, Any], name: str) -> str:
    said = item.get("content") or item.get("summary") or []
    return _said(said, ("reasoning_text", "summary_text"), f"{name}.content")


def _put_item(message: ChatMessage, kind: str, item: Mapping[str, Any], name: str) -> None:
    match kind:
        case "message":
            message.role = text(item["role"])
            message.content = _said(item["content"], TEXTS, f"{name}.content")
        case "function_call":
            call = ToolCall(id=text(item["call_id"]), name=text(item["name"]), arguments_json=text(item["arguments"]))
            bounded(message.tool_calls, "ChatMessage.tool_calls")
            message.tool_calls.append(call)
        case "function_call_output":
            message.role, message.tool_call_id = "tool", text(item["call_id"])
            message.content = _said(item["output"], TEXTS, f"{name}.output")


def _said(value: Any, kinds: tuple[str, ...], name: str) -> str:
    """A text, or the texts of parts joined as they are."""
    return value if isinstance(value, str) else "".join(_texts(value, kinds, name))


def _texts(parts: Any, kinds: tuple[str, ...], name: str) -> Iterator[str]:
    for index, part in enumerate(items(parts)):
        place = f"{name}[{index}]"
        if mapping(part).get("type") not in kinds:
            raise wrong(f"{place}.type", f"{' and '.join(kinds)} are taken", code="unsupported_parameter")
        refuse_others({key: content for key, content in part.items() if content != []}, PART, place)
        yield text(part.get("text"))


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
    else:
        raise ValueError('must be "auto", "none", "required" or {"type": "function", "name": …}')
