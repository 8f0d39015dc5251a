"""How a model writes its messages: where its reasoning ends, and how it calls tools.

A `response_template` is what transformers' ResponseParser reads messages by. The one in tokenizer_config.json counts.
Where there is none, it is one of those below: the chat template says which, by the marks that it writes around calls.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex_service.text.errors import TokenizerError

Fields = Mapping[str, Mapping[str, Any]]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # one thing, by the names that templates use

_CALL = {"type": "function", "function": "{content}"}
_NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_LISTED: Mapping[str, Any] = {
    "repeats": False,
    "transform_each": True,
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
}
_NAME = r"(?P<name>[\w./:-]{1,256})"


@dataclass(frozen=True, slots=True)
class CallSpelling:
    """How calls are spelled out: begin, then head, arguments as JSON and tail of each call, then end."""

    head: str  # with {name}
    tail: str = ""
    begin: str = ""
    between: str | None = None  # of calls; None: a message has one call at most
    end: str = ""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The texts between which a model reasons. The prompt may hold the first, or both."""

    begin: str
    end: str  # calls begin behind it, and the answer
    answer: str = ""  # begins the answer, with reasoning and without


@dataclass(frozen=True, slots=True)
class MessageSyntax:
    """What is known of the messages of one chat template."""

    response_template: Mapping[str, Any]
    reasoning: Reasoning | None  # None: there is none, or nothing is known of it
    calls: CallSpelling | None  # None: calls cannot be forced
    is_declared: bool = False  # the template lies beside the tokenizer

    @property
    def max_call_chars(self) -> int:
        """How long a call, or a list of them, may be: to read strings and tags may take as long as the square of it."""
        return 1 << 14 if self._is_read_slowly else 1 << 17

    @property
    def long_chars(self) -> int:
        """How long a call is, or what may yet be one, when to read it begins to take a millisecond."""
        return 1 << 8 if self._is_read_slowly else 1 << 11

    @property
    def _is_read_slowly(self) -> bool:
        return "string_delims" in self.marks or (self.is_declared and "tag_pattern" in self.marks)

    @property
    def has_calls(self) -> bool:
        return "tool_calls" in self.response_template["fields"]

    @property
    def marks(self) -> str:
        """All that marks the parts of a message, with what else the response template says of them."""
        return json.dumps(self.response_template["fields"], ensure_ascii=False).replace("\\", "")

    @property
    def has_reasoning(self) -> bool:
        return any(name in self.response_template["fields"] for name in REASONING_FIELDS)


@dataclass(frozen=True, slots=True)
class _Family:
    """Models that write their messages in one way."""

    marks: tuple[str, ...]  # all of which their chat templates hold
    start_anchor: str | list[str]  # what the chat template ends with, before the model's message
    tool_calls: Fields = field(default_factory=dict)  # the field of that name; empty: they call no tools
    calls: CallSpelling | None = None
    reasoning: Reasoning = Reasoning("<think>", "</think>")  # of those whose chat template holds its end
    reasoning_close: str | list[str] = "</think>"
    content: Fields = field(default_factory=lambda: {"content": {}})

    def syntax(self, chat_template: str) -> MessageSyntax | None:
        """The syntax of a chat template of this family; None: it is of another, or writes plain text alone."""
        if not all(mark in chat_template for mark in self.marks):
            return None
        reasons = self.reasoning.begin in chat_template or self.reasoning.end in chat_template
        reasoning = {"reasoning_content": {"open": self.reasoning.begin, "close": self.reasoning_close}}
        fields = {**(reasoning if reasons else {}), **self.tool_calls}
        if not fields:
            return None
        template = {
            "defaults": {"role": "assistant"},
            "start_anchor": self.start_anchor,
            "fields": {**fields, **self.content},
        }
        return MessageSyntax(template, self.reasoning if reasons else None, self.calls)


def _tool_calls(content: str = "json", **options: Any) -> Fields:
    return {"tool_calls": {"repeats": True, "content": content, "transform": _NAMED_CALL, **options}}


_JSON_CALL = '{{"name": "{name}", "arguments": '
_CHAT_ML = "<|im_start|>assistant\n"
_DEEPSEEK = ["<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>"]
_BETWEEN_CALLS: Fields = {"content": {"close": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]}}
_LLAMA = "<|start_header_id|>assistant<|end_header_id|>"
_MISTRAL = ["[/INST]", "[/TOOL_RESULTS]"]
_MISTRAL_THOUGHT = Reasoning("[THINK]", "[/THINK]")
_TO_FUNCTION = rf"to=functions\.{_NAME}"

# The first that fits counts.
_FAMILIES = (
    # gpt-oss: a message is several parts on channels; whom a part is for stands before its channel or behind it
    _Family(
        marks=("<|channel|>", "<|message|>"),
        start_anchor="<|start|>assistant",
        reasoning=Reasoning(
            "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>"
        ),
        reasoning_close=["<|end|>", "<|return|>"],
        content={
            "content": {
                "open_pattern": r"<\|channel\|>(?:final|commentary)(?: ?<\|constrain\|>\w{1,32})?<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
            }
        },
        tool_calls=_tool_calls(
            open_pattern=rf"(?:<\|channel\|>(?:commentary|analysis) {_TO_FUNCTION}"
            rf"| {_TO_FUNCTION}<\|channel\|>(?:commentary|analysis))"
            r"(?: ?<\|constrain\|>)?(?: ?\w{1,32})?<\|message\|>",
            close=["<|call|>", "<|end|>"],
        ),
        calls=CallSpelling("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"),
    ),
    # Gemma 4
    _Family(
        marks=("<|tool_call>", "<tool_call|>"),
        start_anchor=["<|turn>model\n", "<tool_response|>"],
        reasoning=Reasoning("<|channel>thought\n", "<channel|>"),
        reasoning_close="<channel|>",
        tool_calls=_tool_calls(
            open_pattern=rf"<\|tool_call>call:{_NAME}",
            close="<tool_call|>",
            content_args={"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        ),
        content={"content": {"close": ["<turn|>", "<|tool_response>"]}},  # the second follows calls
        calls=CallSpelling("<|tool_call>call:{name}", "<tool_call|>", between=""),
    ),
    # FunctionGemma
    _Family(
        marks=("<start_function_call>",),
        start_anchor=["<start_of_turn>model\n", "<end_function_response>"],
        tool_calls=_tool_calls(
            open_pattern=rf"<start_function_call>call:{_NAME}",
            close="<end_function_call>",
            content_args={"unquoted_keys": True, "string_delims": [["<escape>", "<escape>"]]},
        ),
        calls=CallSpelling("<start_function_call>call:{name}", "<end_function_call>", between=""),
    ),
    # DeepSeek V3, R1
    _Family(
        marks=("<｜tool▁call▁begin｜>", "```json"),
        start_anchor=_DEEPSEEK,
        tool_calls=_tool_calls(
            open_pattern=rf"\s{{0,8}}<｜tool▁call▁begin｜>\w{{1,32}}<｜tool▁sep｜>{_NAME}\n```json\n",
            close="\n```<｜tool▁call▁end｜>",
        ),
        content=_BETWEEN_CALLS,
        calls=CallSpelling(
            begin="<｜tool▁calls▁begin｜>",
            head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            tail="\n```<｜tool▁call▁end｜>",
            between="\n",
            end="<｜tool▁calls▁end｜>",
        ),
    ),
    # DeepSeek V3.1
    _Family(
        marks=("<｜tool▁call▁begin｜>",),
        start_anchor=_DEEPSEEK,
        tool_calls=_tool_calls(
            open_pattern=rf"\s{{0,8}}<｜tool▁call▁begin｜>{_NAME}<｜tool▁sep｜>", close="<｜tool▁call▁end｜>"
        ),
        content=_BETWEEN_CALLS,
        calls=CallSpelling(
            begin="<｜tool▁calls▁begin｜>",
            head="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            tail="<｜tool▁call▁end｜>",
            between="",
            end="<｜tool▁calls▁end｜>",
        ),
    ),
    _Family(marks=("<｜Assistant｜>",), start_anchor=_DEEPSEEK),
    # Mistral from version 11 of its tokenizer on
    _Family(
        marks=("[TOOL_CALLS]", "[ARGS]"),
        start_anchor=_MISTRAL,
        reasoning=_MISTRAL_THOUGHT,
        reasoning_close=_MISTRAL_THOUGHT.end,
        tool_calls=_tool_calls(
            open_pattern=rf"\[TOOL_CALLS\]{_NAME}(?:\[CALL_ID\]\w{{1,64}})?\[ARGS\]",
            close_pattern=r"(?=\[TOOL_CALLS\])",
        ),
        calls=CallSpelling("[TOOL_CALLS]{name}[ARGS]", between=""),
    ),
    # Mistral before
    _Family(
        marks=("[TOOL_CALLS]",),
        start_anchor=_MISTRAL,
        reasoning=_MISTRAL_THOUGHT,
        reasoning_close=_MISTRAL_THOUGHT.end,
        tool_calls=_tool_calls(open="[TOOL_CALLS]", **_LISTED),
        calls=CallSpelling(_JSON_CALL, "}}", begin="[TOOL_CALLS] [", between=", ", end="]"),
    ),
    _Family(
        marks=(_MISTRAL_THOUGHT.begin,),
        start_anchor=_MISTRAL,
        reasoning=_MISTRAL_THOUGHT,
        reasoning_close=_MISTRAL_THOUGHT.end,
    ),
    # SmolLM 2: all calls are one list
    _Family(
        marks=("<|im_start|>", "<tool_call>["),
        start_anchor=_CHAT_ML,
        tool_calls=_tool_calls(open_pattern=r"\s{0,8}<tool_call>", close="</tool_call>", **_LISTED),
        calls=CallSpelling(_JSON_CALL, "}}", begin="<tool_call>[", between=", ", end="]</tool_call>"),
    ),
    # Qwen 3 Coder, Qwen 3.5: arguments are no JSON
    _Family(
        marks=("<|im_start|>", "<tool_call>", "<function="),
        start_anchor=_CHAT_ML,
        tool_calls=_tool_calls(
            "xml-inline",
            open_pattern=rf"\s{{0,8}}<tool_call>\s{{0,8}}<function={_NAME}>",
            close_pattern=r"</function>\s{0,8}</tool_call>",
            content_args={
                "tag_pattern": r"<parameter=(?P<key>[^>\n]{1,256})>(?P<value>(?:(?!</?parameter).)*+)</parameter>",
                "value_parser": {"name": "text"},
            },
        ),
    ),
    # Hermes, Qwen 2.5, Qwen 3, SmolLM 3
    _Family(
        marks=("<|im_start|>", "<tool_call>"),
        start_anchor=_CHAT_ML,
        tool_calls=_tool_calls(open_pattern=r"\s{0,8}<tool_call>", close="</tool_call>", transform=_CALL),
        calls=CallSpelling("<tool_call>\n" + _JSON_CALL, "}}\n</tool_call>", between="\n"),
    ),
    _Family(marks=("<|im_start|>",), start_anchor=_CHAT_ML),
    # Llama 3: a call is the whole message
    _Family(
        marks=(_LLAMA.partition("assistant")[0], '"parameters"'),
        start_anchor=[f"{_LLAMA}\n\n", _LLAMA],
        tool_calls=_tool_calls(
            open_pattern=r"\A\s{0,8}(?:<\|python_tag\|>\s{0,8})?(?=\{)",
            transform={
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        ),
        calls=CallSpelling('{{"name": "{name}", "parameters": ', "}}"),
    ),
)


def message_syntax(chat_templates: Iterable[str], declared: object = None) -> MessageSyntax | None:
    """The syntax of a model's messages; None: it is not known.

    `declared`: the `response_template` beside the tokenizer. Raises TokenizerError if that cannot be one.
    """
    template = "\n".join(chat_templates)
    known = next((syntax for family in _FAMILIES if (syntax := family.syntax(template)) is not None), None)
    if declared is None:
        return known
    fields = declared.get("fields") if isinstance(declared, Mapping) else None
    if not isinstance(declared, Mapping) or not isinstance(fields, Mapping):
        raise TokenizerError("response_template must be an object that has `fields`, an object.")
    return MessageSyntax(declared, _reasoning(fields), None if known is None else known.calls, is_declared=True)


def _reasoning(fields: Mapping[str, Any]) -> Reasoning | None:
    """The reasoning that a response template tells of, if it does so with plain texts."""
    for name in REASONING_FIELDS:
        told = fields.get(name)
        if isinstance(told, Mapping) and isinstance(told.get("open"), str) and isinstance(told.get("close"), str):
            return Reasoning(told["open"], told["close"])
    return None
