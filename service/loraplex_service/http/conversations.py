"""OpenAI's messages and tools as those of the contract, and what other APIs' have in common with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from loraplex.prompts import build_message, build_tool
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.prompt_pb2 import Prompt, TokenIds, ToolMode
from loraplex_service.http.parameters import (
    Draft,
    Put,
    bounded,
    checked,
    flag,
    items,
    mapping,
    refuse_others,
    text,
    wrong,
)

# Keys of messages in answers, which clients send back as they came. With a value they are refused by name.
EMPTY_IN_ANSWERS = ("refusal", "audio", "function_call", "annotations")
CACHED = ("prompt_cache_breakpoint", "cache_control")  # what prompts begin with is cached without being asked
PART = ("type", "text", *CACHED)
CALL = ("id", "type", "function", "index")  # the last: in the stream that it came in


def begin(draft: Draft, name: str = "messages") -> None:
    """Make the prompt a conversation: what is wrong with it is wrong with `name`, also where that is not given."""
    draft.message.prompt.chat.SetInParent()
    draft.paths += [(path, name) for path in ("prompt", "prompt.chat", "prompt.chat.messages")]


def put_messages(draft: Draft, value: Any) -> None:
    """The conversation."""
    begin(draft)
    chat = draft.message.prompt.chat
    for index, message in enumerate(items(value, "Chat.messages")):
        with blamed(f"messages[{index}]"):
            chat.messages.append(build_message(_own(mapping(message), f"messages[{index}]")))


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Have what is wrong in the block be a fault of this part of the body."""
    try:
        yield
    except KeyError as error:
        raise wrong(name, f"has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise wrong(name, str(error)) from error


def _own(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The message by our names, without what says nothing. Raises Refusal for what would be passed over within it."""
    own = _telling(message)
    for index, part in enumerate(_objects(own.get("content"))):
        if part.get("type") == "text":
            refuse_others(_telling(part), PART, f"{name}.content[{index}]")
    for index, call in enumerate(_objects(own.get("tool_calls"))):
        place = f"{name}.tool_calls[{index}]"
        refuse_others(call, CALL, place)
        refuse_others(mapping(call["function"]), ("name", "arguments"), f"{place}.function")
    reasoning = own.pop("reasoning", None)
    return {**own, "reasoning_content": reasoning} if own.get("reasoning_content") is None else own


def _telling(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value or key not in EMPTY_IN_ANSWERS}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [mapping(each) for each in value] if isinstance(value, list) else []


def put_tools(draft: Draft, value: Any) -> None:
    """The tools that the model may call."""
    for index, tool in enumerate(items(value, "Chat.tools")):
        name = f"tools[{index}]"
        with blamed(name):
            if mapping(tool).get("type", "function") != "function":
                raise wrong(f"{name}.type", "tools of type 'function' are taken", code="unsupported_parameter")
            refuse_others(tool, ("type", "function", *CACHED), name)
            add_tool(draft, f"{name}.function", dict(mapping(tool["function"])))


def add_tool(draft: Draft, name: str, function: dict[str, Any], schema: str = "parameters") -> None:
    """Offer a tool. `name`: of the part of the body that describes it. `schema`: its key for what it takes."""
    if (strict := function.pop("strict", None)) is not None:
        flag(strict)  # required calls follow their schemas, and nothing can hold others to them
    tools = draft.message.prompt.chat.tools
    path = f"prompt.chat.tools[{len(tools)}]"
    draft.paths += [(path, name), (f"{path}.parameters_json", f"{name}.{schema}")]
    tools.append(build_tool(function))


def put_tool_choice(draft: Draft, value: Any) -> None:
    """Whether the model calls tools, or which."""
    choice = draft.message.prompt.chat.tool_choice
    modes = {mode: ToolMode.Value(f"TOOL_MODE_{mode.upper()}") for mode in ("auto", "none", "required")}
    if isinstance(value, str) and value in modes:
        choice.mode = modes[value]
    elif isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        refuse_others(value, ("type", "function"), "tool_choice")
        refuse_others(value["function"], ("name",), "tool_choice.function")
        choice.name = text(value["function"].get("name"))
    else:
        raise ValueError('must be "auto", "none", "required" or {"type": "function", "function": {"name": …}}')


def check_tools(draft: Draft) -> None:
    """Where calls are required, any text is no wish: the contract knows no form beside them."""
    choice = draft.message.prompt.chat.tool_choice
    forced = choice.WhichOneof("kind") == "name" or choice.mode == ToolMode.TOOL_MODE_REQUIRED
    if forced and draft.message.constraint.HasField("any_text"):
        draft.message.ClearField("constraint")


def set_variable(draft: Draft, name: str, value: Any) -> None:
    """Set a variable of the chat template."""
    draft.message.prompt.chat.template_kwargs.update({name: value})


def put_template_kwargs(draft: Draft, value: Any) -> None:
    """Further variables of the chat template."""
    draft.message.prompt.chat.template_kwargs.update(mapping(value))


def put_documents(draft: Draft, value: Any) -> None:
    """What templates for retrieval read."""
    set_variable(draft, "documents", items(value))


def put_reasoning_effort(draft: Draft, value: Any) -> None:
    """How much a model is to think, for templates that know the word."""
    set_variable(draft, "reasoning_effort", text(value))


# ---- prompts of completions, embeddings and tokens -------------------------------------------------------------------


def prompts(value: Any, of: str) -> list[Prompt]:
    """What a text, a list of token ids, or a list of either means. `of`: the field that bounds their number."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    return [_prompt(one) for one in (items(value, of) if several else [value])]


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt(text=value)
    if not isinstance(value, list) or not all(type(token) is int for token in bounded(value, "TokenIds.ids")):
        raise TypeError("must be a text, a list of token ids, or a list of either")
    return Prompt(token_ids=TokenIds(ids=value))


def put_prompts(draft: Draft, value: Any) -> None:
    """What a completion goes on from; each of several has choices of its own."""
    draft.prompts = prompts(value, "BatchGenerateRequest.specs")
    draft.paths.append(("specs", "prompt"))


def put_inputs(draft: Draft, value: Any) -> None:
    """What is embedded."""
    draft.message.prompts.extend(prompts(value, "EmbedRequest.prompts"))


def put_in_each(name: str) -> Put:
    """An option of each prompt."""

    def put(draft: Draft, value: Any) -> None:
        for prompt in draft.message.prompts:
            setattr(prompt, name, checked(prompt.DESCRIPTOR.fields_by_name[name], value))

    return put


def put_text(draft: Draft, value: Any) -> None:
    """What is tokenised."""
    draft.message.prompt.text = text(value)


def put_spec(draft: Draft, value: Any) -> None:
    """Fields of the contract by its own names, but those that the body has parameters for in any case."""
    spec = GenerateSpec()
    try:
        ParseDict(mapping(value), spec)
    except (ParseError, AttributeError) as error:
        raise ValueError(str(error)) from error
    prompt = spec.prompt
    given: dict[str, object] = {"model": spec.model, "prompt.chat.messages": len(prompt.chat.messages)}
    given |= {"prompt.text": prompt.HasField("text"), "prompt.token_ids": prompt.HasField("token_ids")}
    for name in filter(given.get, given):
        raise wrong(f"loraplex.{name}", "the body has a parameter of its own for it", code="unsupported_parameter")
    draft.message.MergeFrom(spec)
