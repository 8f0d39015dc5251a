"""Reads a message while the model writes it: its text, its reasoning, its calls of tools.

transformers' ResponseParser finds the parts of a message, by the response template of the model. A part that could be a
call is read only once it has ended. One that turns out to be none is text, and nothing that the model wrote is lost.
"""

import copy
import json
import re
import secrets
import string
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.message_syntax import REASONING_FIELDS, MessageSyntax
from loraplex_service.text.part_parser import PartParser

MAX_UNTOLD_CHARS = 1 << 12  # that may yet begin something: what marks parts may be any expression, tried on all of them

_TEXT, _CALLS = "content", "tool_calls"
_ID_CHARS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    id: str  # 9 letters and digits: chat templates of Mistral take no others
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class MessagePart:
    """What has been read of a message since the last time."""

    text: str
    reasoning: str = ""
    calls: Sequence[Call] = ()


class Message(Protocol):
    """A message that grows."""

    @property
    def num_calls(self) -> int:
        """Calls found so far."""

    @property
    def is_over(self) -> bool:
        """Whether the message ends here, whatever follows."""

    def takes_long(self, num_chars: int) -> bool:
        """Whether to feed so many characters may take more than a millisecond."""

    def feed(self, text: str) -> None:
        """Add what the model wrote."""

    def finish(self, cut_short: bool) -> None:
        """No more comes. `cut_short`: it was not the model that ended the message."""

    def take(self) -> MessagePart:
        """What has been read since the last call."""


class PlainMessage:
    """A message that is all text."""

    num_calls = 0
    is_over = False

    def __init__(self) -> None:
        self._text: list[str] = []

    def takes_long(self, num_chars: int) -> bool:
        return False

    def feed(self, text: str) -> None:
        self._text.append(text)

    def finish(self, cut_short: bool) -> None:
        pass

    def take(self) -> MessagePart:
        text = "".join(self._text)
        self._text.clear()
        return MessagePart(text)


class MessageRules:
    """A syntax as transformers reads it. Off the event loop: the first one imports transformers, which takes a second.

    Raises TokenizerError for a response template that transformers refuses.
    """

    def __init__(self, syntax: MessageSyntax) -> None:
        from transformers.utils.chat_parsing import ResponseParser, parse_response
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self.new_parser, self._parse = ResponseParser, parse_response
        template = syntax.response_template
        fields = template["fields"]
        anchor = {name: template[name] for name in ("start_anchor", "start_anchor_pattern") if name in template}
        try:
            load_response_template(dict(template))
            self.parts = load_response_template(
                {**anchor, "fields": {name: _part(name, fields[name]) for name in fields}}
            )
            self._calls = load_response_template({**anchor, "fields": {_CALLS: fields.get(_CALLS, {})}})
        except ValueError as error:
            raise TokenizerError(f"response_template cannot be used: {error}") from error
        self.max_call_chars, self.long_chars = syntax.max_call_chars, syntax.long_chars
        self.fields: Mapping[str, Mapping[str, Any]] = fields

    def opened(self, prompt: str) -> str | None:
        """What the prompt says of the message that the model goes on with; None: it does not say where that begins."""
        last = deque(self.parts.start_anchor_re.finditer(prompt), maxlen=1)
        return prompt[last[0].end() :] if last else None

    def calls(self, source: str, tools: Sequence[Mapping[str, Any]]) -> Sequence[Call]:
        """The calls in a part of a message; none if they are not what calls of these tools should be."""
        try:
            found = self._parse(source, self._calls, prefix="", tools=[dict(tool) for tool in tools]).get(_CALLS)
            calls = [_call(value["function"]) for value in _flat(found)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # whatever a model may write
            return ()
        offered = {tool["function"]["name"] for tool in tools}
        return calls if all(call.name in offered for call in calls) else ()


class MessageReader:
    """Reads one message by the rules of its syntax."""

    def __init__(
        self, rules: MessageRules, opened: str = "", tools: Sequence[Mapping[str, Any]] = (), one_call: bool = False
    ) -> None:
        """`opened`: what the prompt says of the message, which is not read again: a part of it that could be a call
        passes for one. `tools`: those offered, as chat templates see them. `one_call`: the message is over after the
        first call.
        """
        self.num_calls = 0
        self._rules, self._tools, self._one_call = rules, tools, one_call
        self._texts = {name: _Stretches.of(rules.fields.get(name, {})) for name in (_TEXT, *REASONING_FIELDS)}
        self._calls: list[Call] = []
        self._call_chars = 0  # of the part that is open and could be a call
        self._untold_chars = 0  # of which it is not known what they are
        self._cut_short = False
        self._is_plain = False  # nothing more is looked for
        self._parser = PartParser(rules.new_parser(rules.parts, prefix=""))
        for event in self._parser.feed(opened):
            self._see(event, is_told=True)
        for text in self._texts.values():
            text.forget()

    def twin(self) -> "MessageReader":
        """One that has read the same, and reads on by itself."""
        shared = (self._rules, self._rules.parts, self._tools)
        return copy.deepcopy(self, {id(each): each for each in shared})

    @property
    def is_over(self) -> bool:
        return self._one_call and self.num_calls > 0

    def takes_long(self, num_chars: int) -> bool:
        return self._call_chars + self._untold_chars + num_chars > self._rules.long_chars

    def feed(self, text: str) -> None:
        if not text or self.is_over:
            return
        if self._is_plain:
            self._texts[_TEXT].push(text)
            return
        events = self._parser.feed(text)
        self._untold_chars = 0 if events else self._untold_chars + len(text)
        for event in events:
            self._see(event)
        if self._untold_chars > MAX_UNTOLD_CHARS:
            self.finish(cut_short=True)

    def finish(self, cut_short: bool) -> None:
        if not self._is_plain:
            self._is_plain, self._cut_short = True, cut_short
            for event in self._parser.finish():
                self._see(event)

    def take(self) -> MessagePart:
        calls, self._calls = self._calls, []
        reasoning = "".join(self._texts[name].take() for name in REASONING_FIELDS)
        return MessagePart(self._texts[_TEXT].take(), reasoning, calls)

    def _see(self, event: Mapping[str, Any], is_told: bool = False) -> None:
        """`is_told`: the prompt says so."""
        name, kind = event["field"], event["type"]
        if self.is_over or kind == "region_open":
            return
        if name == _CALLS and kind == "region_chunk":
            self._call_chars += len(event["text"])
        elif name == _CALLS:
            self._call_chars = 0
            if not is_told:
                self._end_call(**event["value"])
        elif name in self._texts and kind == "region_chunk":
            self._texts[name].push(event["text"])
        elif name in self._texts:
            self._texts[name].close()

    def _end_call(self, opening: str, body: str, closing: str) -> None:
        """Take a part that could be a call for what it is."""
        source = opening + body + closing
        is_whole = bool(closing) or not self._cut_short
        calls = self._rules.calls(source, self._tools) if is_whole and len(source) <= self._rules.max_call_chars else ()
        if not calls:
            self._texts[_TEXT].push(source)
            self._texts[_TEXT].close()
        calls = calls[:1] if self._one_call else calls
        self._calls += calls
        self.num_calls += len(calls)


class _Stretches:
    """The text of a field: stretches, each without the white space around it."""

    def __init__(self, strip: bool, separator: str) -> None:
        self._strip, self._separator = strip, separator
        self._said: list[str] = []  # not taken yet
        self._blank: list[str] = []  # white space that may be the end of its stretch
        self._is_open = False  # this stretch has text
        self._is_first = True

    @classmethod
    def of(cls, field: Mapping[str, Any]) -> "_Stretches":
        """Those of a field of a response template."""
        return cls(field.get("content_args", {}).get("strip", True), field.get("join", "\n"))

    def push(self, text: str) -> None:
        if self._strip and not self._is_open:
            text = text.lstrip()
        said = text.rstrip() if self._strip else text
        if said:
            if not self._is_open and not self._is_first:
                self._said.append(self._separator)
            self._is_open, self._is_first = True, False
            self._said += [*self._blank, said]
            self._blank = []
        if len(said) < len(text):
            self._blank.append(text[len(said) :])

    def close(self) -> None:
        """End a stretch."""
        self._is_open = False
        self._blank = []

    def forget(self) -> None:
        """Leave out what has been said so far."""
        self._said, self._blank = [], []

    def take(self) -> str:
        text = "".join(self._said)
        self._said.clear()
        return text


def _part(name: str, field: Mapping[str, Any]) -> dict[str, Any]:
    """A field that finds the parts which this one finds, and has them as they were written."""
    if name != _CALLS:
        anchors = {key: field[key] for key in ("open", "open_pattern", "close", "close_pattern") if key in field}
        return {**anchors, "content": "text", "transform": "{content}"}
    # What ends the part counts before what began it: without an end of its own, `closing` is empty.
    part = {"open_pattern": f"(?P<opening>{_pattern(field, 'open')})(?P<closing>)"}
    if "close" in field or "close_pattern" in field:
        part["close_pattern"] = f"(?P<closing>{_pattern(field, 'close')})"
    shape = {"opening": "{opening}", "body": "{content}", "closing": "{closing}"}
    return {**part, "content": "text", "content_args": {"strip": False}, "transform": shape}


def _pattern(field: Mapping[str, Any], anchor: str) -> str:
    """The regular expression of an anchor that may be given as text."""
    if f"{anchor}_pattern" in field:
        return str(field[f"{anchor}_pattern"])
    literals = field.get(anchor, ())
    literals = [literals] if isinstance(literals, str) else literals
    return "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True))


def _flat(value: Any) -> list[Any]:
    """The calls in what a field holds: one, or lists of them."""
    return [call for each in value for call in _flat(each)] if isinstance(value, list) else [value]


def _call(function: Mapping[str, Any]) -> Call:
    """A call as the parser has read it. Raises ValueError, LookupError or TypeError if it is none."""
    name, arguments = function["name"], function.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError("a call has a name, and an object of arguments")
    arguments_json = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    arguments_json.encode()  # half a surrogate pair is no text
    return Call("".join(secrets.choice(_ID_CHARS) for _ in range(9)), name, arguments_json)
