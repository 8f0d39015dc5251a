"""Calls that are required: whatever follows their grammar is read as calls of the tools offered, in each family."""

import json
import random
import re
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from loraplex.v1.generation_pb2 import Constraint
from loraplex.v1.prompt_pb2 import TOOL_MODE_REQUIRED, Chat, Tool
from loraplex_engine.link.grammar import GRAMMAR_LIMITS
from loraplex_service.errors import InvalidRequest
from loraplex_service.requests.calls import CallForm, answer_grammar
from loraplex_service.requests.forms import checked_grammar
from loraplex_service.requests.messages import typed_tools
from loraplex_service.text import Call, MessageReader
from tests.service.text.test_message_reader import RULES, SYNTAXES, read

MARKS = {
    "hermes": ["<|im_end|>"],
    "llama3": ["<|python_tag|>", "<|eot_id|>"],
    "mistral": ["[TOOL_CALLS]", "</s>"],
    "mistral-11": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"],
    "functiongemma": ["<start_function_call>", "<end_function_call>", "<escape>"],
    "harmony": ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"],
    "deepseek": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ],
}
MARKS["deepseek-3.1"] = MARKS["deepseek"]
FORCED = [name for name, syntax in SYNTAXES.items() if syntax.calls is not None]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city"],
}
TOOLS = [Tool(name="weather", parameters_json=json.dumps(WEATHER)), Tool(name="time.now")]


class Vocabulary:
    """Each byte, and tokens that have no text."""

    bos_token_id, special_token_ids = None, ()

    def __init__(self, marks: list[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"" for _ in marks] + [b""]
        self.eos_token_id = len(self.tokens) - 1
        self.control = {mark: 256 + number for number, mark in enumerate(marks)}

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError


def form(family: str, opened: str = "", **chat: Any) -> CallForm:
    syntax = SYNTAXES[family]
    assert syntax.calls is not None
    control = Vocabulary(MARKS.get(family, [])).control
    values = {"tools": TOOLS, "tool_choice": {"mode": TOOL_MODE_REQUIRED}}
    return CallForm(syntax, syntax.calls, control, opened, Chat(**{**values, **chat}))


def written(family: str, grammar: str, seed: int, begins: str = "") -> str:
    """A text of the grammar, token by token at random, that begins so."""
    vocabulary = Vocabulary(MARKS.get(family, []))
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary))
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=GRAMMAR_LIMITS)
    texts = [*(bytes([byte]) for byte in range(256)), *(mark.encode() for mark in MARKS.get(family, [])), b"\xff"]
    draw = random.Random(seed)
    data, wanted = b"", begins.encode()
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(len(vocabulary.tokens)) if mask[token // 8] >> token % 8 & 1]
        assert allowed, (data, matcher.get_error())
        if len(data) < len(wanted):
            fitting = [token for token in allowed if wanted[len(data) :].startswith(texts[token])]
            assert fitting, (data, wanted)
            allowed = [max(fitting)]  # a mark rather than its first character
        elif vocabulary.eos_token_id in allowed:
            break
        token = draw.choice(allowed)
        matcher.consume_token(token)
        data += texts[token]
    return data.decode()


def calls_in(family: str, text: str, opened: str = "") -> list[Call]:
    reader = MessageReader(RULES[family], opened, typed_tools(Chat(tools=TOOLS)))
    said, _, calls = read(reader, [text])
    assert said == ""
    for call in calls:
        arguments = json.loads(call.arguments_json)
        if call.name == "weather":
            assert arguments["city"] in ("Paris", "Rome")
            assert set(arguments) <= {"city", "days"}
            assert 1 <= arguments.get("days", 1) <= 99
        else:
            assert (call.name, arguments) == ("time.now", {})
    return calls


def calls_begin(family: str) -> str:
    calls = SYNTAXES[family].calls
    assert calls is not None
    return calls.begin + calls.head.partition("{name}")[0].format()


@pytest.mark.parametrize("family", FORCED)
def test_what_follows_the_grammar_is_a_valid_call(family: str) -> None:
    grammar = form(family).grammar("chat")
    for seed in range(10):
        assert len(calls_in(family, written(family, grammar, seed, calls_begin(family)))) >= 1


@pytest.mark.parametrize("family", FORCED)
def test_a_tool_of_a_name_is_called_once(family: str) -> None:
    grammar = form(family, tool_choice={"name": "weather"}).grammar("chat")
    for seed in range(5):
        [call] = calls_in(family, written(family, grammar, seed, calls_begin(family)))
        assert call.name == "weather"


@pytest.mark.parametrize("family", FORCED)
def test_without_parallel_calls_there_is_one(family: str) -> None:
    grammar = form(family, parallel_tool_calls=False).grammar("chat")
    assert all(len(calls_in(family, written(family, grammar, seed, calls_begin(family)))) == 1 for seed in range(5))


PARALLEL = [name for name in FORCED if (calls := SYNTAXES[name].calls) is not None and calls.between is not None]


@pytest.mark.parametrize("family", PARALLEL)
def test_calls_may_follow_each_other(family: str) -> None:
    syntax = SYNTAXES[family]
    assert syntax.calls is not None
    assert syntax.calls.between is not None
    one = syntax.calls.head.format(name="time.now") + "{}" + syntax.calls.tail.format()
    begins = syntax.calls.begin + one + syntax.calls.between + one
    assert len(calls_in(family, written(family, form(family).grammar("chat"), 1, begins))) >= 2


REASONING = [name for name in FORCED if SYNTAXES[name].reasoning is not None]


@pytest.mark.parametrize("family", REASONING)
def test_reasoning_comes_before_the_calls(family: str) -> None:
    syntax = SYNTAXES[family]
    assert syntax.calls is not None
    assert syntax.reasoning is not None
    end = syntax.reasoning.end
    behind = f"I ask.{end}{calls_begin(family)}"
    text = written(family, form(family).grammar("chat"), 1, syntax.reasoning.begin + behind)
    assert len(calls_in(family, text)) >= 1
    opened = syntax.reasoning.begin
    text = written(family, form(family, opened).grammar("chat"), 1, behind)
    assert len(calls_in(family, text, opened)) >= 1


@pytest.mark.parametrize("family", REASONING)
def test_reasoning_that_the_prompt_has_ended_does_not_come_again(family: str) -> None:
    syntax = SYNTAXES[family]
    assert syntax.calls is not None
    assert syntax.reasoning is not None
    end = syntax.reasoning.end
    grammar = form(family, f"{syntax.reasoning.begin}\n\n{end}\n\n").grammar("chat")
    assert grammar == form(family, f"{syntax.reasoning.begin}{end}").grammar("chat")
    assert written(family, grammar, 1).startswith(calls_begin(family))


@pytest.mark.parametrize("family", REASONING)
@pytest.mark.parametrize("constraint", [Constraint(regex="[0-9]{3}"), Constraint(grammar='root ::= "}" root | "{"')])
def test_an_answer_of_a_form_comes_behind_the_reasoning(family: str, constraint: Constraint) -> None:
    reasoning, grammar = SYNTAXES[family].reasoning, checked_grammar(constraint)
    assert reasoning is not None
    control = Vocabulary(MARKS.get(family, [])).control
    ended = f"I know.{reasoning.end}{reasoning.answer}"
    first = "1" if constraint.regex else "{"
    for opened, before in (("", f"{reasoning.begin}{ended}"), (reasoning.begin, ended), ("", reasoning.answer)):
        begins = before + first
        text = written(family, answer_grammar(grammar, reasoning, opened, control), 1, begins)
        said, thought, _ = read(MessageReader(RULES[family], opened), [text])
        assert (thought, bool(re.fullmatch("[0-9]{3}|}*{", said))) == ("I know." if ended in text else "", True)
    answered = f"{reasoning.begin}{reasoning.end}{reasoning.answer}"
    assert answer_grammar(grammar, reasoning, answered, control) == grammar


def tool(schema: Any) -> list[Tool]:
    return [Tool(name="a"), Tool(name="b", parameters_json=schema if isinstance(schema, str) else json.dumps(schema))]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("{", "it is not JSON"),
        ("[]", "must be a JSON object"),
        ({"properties": {"x": {"uniqueItems": True}}}, "uniqueItems at /properties/x; leave it out"),
        ({"type": "array"}, "its type is 'array'"),
        ({"$ref": "#"}, "no text can complete"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_its_place(schema: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        form("hermes", tools=tool(schema)).grammar("chat")
    assert [violation.field for violation in refused.value.violations] == ["chat.tools[1].parameters_json"]


def test_schemas_that_are_too_much_together_are_refused() -> None:
    tools = [Tool(name=f"t{n}", parameters_json='{"title": "' + "x" * 60_000 + '"}') for n in range(5)]
    with pytest.raises(InvalidRequest, match="300065 bytes of schemas") as refused:
        form("hermes", tools=tools).grammar("chat")
    assert [violation.field for violation in refused.value.violations] == ["chat.tools"]


def test_forms_of_other_tools_and_other_prompts_are_kept_apart() -> None:
    keys = [
        form("hermes").key,
        form("hermes", opened="<think>").key,
        form("hermes", tools=TOOLS[:1]).key,
        form("hermes", parallel_tool_calls=False).key,
        form("harmony").key,
    ]
    assert len(set(keys)) == len(keys)
