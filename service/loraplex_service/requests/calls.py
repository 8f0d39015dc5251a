"""The form of an output that has to call tools: the grammar of calls as the model writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.v1.prompt_pb2 import Chat
from loraplex_engine.link.grammar import behind_thought, calls_grammar, literal, thought_rules
from loraplex_service.errors import InvalidRequest, Violation
from loraplex_service.requests.forms import compilable, read_schema, unkept_keywords
from loraplex_service.text import CallSpelling, MessageSyntax, Reasoning

MAX_SCHEMA_BYTES = 1 << 18  # of all tools: engines keep grammars for requests to come
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class CallForm:
    """The calls that one chat requires, as one model spells them."""

    def __init__(
        self, syntax: MessageSyntax, calls: CallSpelling, control_tokens: Mapping[str, int], opened: str, chat: Chat
    ) -> None:
        """`opened`: what the prompt has of the message already."""
        self._control = control_tokens
        self._calls = calls
        self._tools = chat.tools
        self._wanted = [number for number, tool in enumerate(chat.tools) if chat.tool_choice.name in ("", tool.name)]
        one = bool(chat.tool_choice.name) or (chat.HasField("parallel_tool_calls") and not chat.parallel_tool_calls)
        self._between = None if one or calls.between is None else self._literal(calls.between)
        self._before, self._rules = thought(syntax.reasoning, opened, control_tokens)

    @property
    def key(self) -> bytes:
        """What the grammar follows from."""
        spelled = [
            self._literal(text) for text in (self._calls.begin, self._calls.head, self._calls.tail, self._calls.end)
        ]
        tools = [self._tools[number].SerializeToString(deterministic=True) for number in self._wanted]
        return repr((spelled, self._between, self._before, self._rules)).encode() + b"".join(tools)

    def grammar(self, path: str) -> str:
        """`path`: where the chat is in the request. Raises InvalidRequest for the first schema at fault."""
        size = sum(len(self._tools[number].parameters_json.encode()) for number in self._wanted)
        if size > MAX_SCHEMA_BYTES:
            problem = f"have {size} bytes of schemas; where calls are required, {MAX_SCHEMA_BYTES} are allowed"
            raise InvalidRequest.at(f"{path}.tools", problem)
        schemas = [self._schema(number, path) for number in self._wanted]
        heads = [self._literal(self._calls.head.format(name=self._tools[number].name)) for number in self._wanted]
        tail = self._literal(self._calls.tail.format())
        calls = [(head, schema, tail) for head, schema in zip(heads, schemas, strict=True)]
        begin, end = self._literal(self._calls.begin), self._literal(self._calls.end)
        try:
            grammar = calls_grammar(f"{self._before} {begin}", calls, self._between, end)
            return compilable(grammar + self._rules)
        except ValueError as error:
            raise InvalidRequest(self._fault(schemas, error, path)) from error

    def _fault(self, schemas: Sequence[Mapping[str, Any]], error: ValueError, path: str) -> Violation:
        for number, schema in zip(self._wanted, schemas, strict=True):
            if keywords := unkept_keywords(schema, error):
                problem = (
                    f"cannot be kept to: this server does not know {keywords}; leave it out, or let the model decide"
                )
                return Violation(_schema_path(path, number), problem)
        return Violation(f"{path}.tools", f"cannot be kept to: {error}")

    def _schema(self, number: int, path: str) -> Mapping[str, Any]:
        """The schema of a tool's arguments, which are an object and, unless it says so, have nothing that it lacks."""
        text = self._tools[number].parameters_json
        if not text:
            return _NOTHING
        try:
            schema = read_schema(text)
        except ValueError as error:
            raise InvalidRequest.at(_schema_path(path, number), f"cannot be kept to: {error}") from error
        closed = {"additionalProperties": False} if "properties" in schema else {}
        schema = {"type": "object", **closed, **schema}
        if schema["type"] != "object":
            problem = f"cannot be kept to: its type is {schema['type']!r}, and arguments are an object"
            raise InvalidRequest.at(_schema_path(path, number), problem)
        return schema

    def _literal(self, text: str) -> str:
        return literal(text, self._control)


def thought(reasoning: Reasoning | None, opened: str, control_tokens: Mapping[str, int]) -> tuple[str, str]:
    """The expression of the reasoning that may come before all else, and its rules; "": there is none to come.

    `opened`: what the prompt has of the message already.
    """
    if reasoning is None:
        return "", ""
    begun, ended = opened.rfind(reasoning.begin), opened.rfind(reasoning.end)
    if ended > begun:
        return "", ""
    rules = thought_rules(reasoning.end, control_tokens)
    return ("thought" if begun >= 0 else f"({literal(reasoning.begin, control_tokens)} thought)?"), rules


def answer_grammar(grammar: str, reasoning: Reasoning, opened: str, control_tokens: Mapping[str, int]) -> str:
    """The grammar of a message whose answer follows a grammar. `opened`: as `thought` has it."""
    before, rules = thought(reasoning, opened, control_tokens)
    if reasoning.answer and reasoning.answer not in opened:
        before = f"{before} {literal(reasoning.answer, control_tokens)}"
    return behind_thought(grammar, before, rules) if before else grammar


def _schema_path(path: str, number: int) -> str:
    return f"{path}.tools[{number}].parameters_json"
