"""What a model writes is read as transformers reads it, however the text is cut; what is no call is text."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import ResponseParser, parse_response

from loraplex_service.text import TokenizerError
from loraplex_service.text.message_reader import Call, MessageReader, MessageRules
from loraplex_service.text.message_syntax import REASONING_FIELDS, MessageSyntax, message_syntax
from loraplex_service.text.part_parser import LOOKED_BACK


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", city={"type": "string"}, days={"type": "integer"}), tool("now")]

# Chat templates of the families, as far as they tell which family it is.
TEMPLATES = {
    "hermes": "<|im_start|> <tool_call> <think> </think>",
    "smollm2": "<|im_start|> <tool_call>[",
    "qwen-coder": "<|im_start|> <tool_call> <function=x> </think>",
    "llama3": '<|start_header_id|> "parameters"',
    "mistral": "[TOOL_CALLS] [ [/THINK]",
    "mistral-11": "[TOOL_CALLS]f[ARGS] [/THINK]",
    "gemma4": "<|tool_call> <tool_call|> <channel|>",
    "functiongemma": "<start_function_call>",
    "harmony": "<|channel|>analysis<|message|>",
    "deepseek": "<｜tool▁call▁begin｜> ```json </think>",
    "deepseek-3.1": "<｜tool▁call▁begin｜> </think>",
}
SYNTAXES = {name: syntax for name, template in TEMPLATES.items() if (syntax := message_syntax([template])) is not None}
RULES = {name: MessageRules(syntax) for name, syntax in SYNTAXES.items()}

PARIS = '{"city": "Paris", "days": 3}'
# (family, what the model writes, text, reasoning, names of the tools that it calls)
CONVERSATIONS = [
    ("hermes", "Hello there.", "Hello there.", "", []),
    ("hermes", "<think>\nHm.\n</think>\n\nHello.", "Hello.", "Hm.", []),
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>', "", "", ["weather"]),
    (
        "hermes",
        f'<think>Two.</think>I ask.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "I ask.",
        "Two.",
        ["weather", "now"],
    ),
    (
        "smollm2",
        f'<tool_call>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]</tool_call>',
        "",
        "",
        ["weather", "now"],
    ),
    ("smollm2", "I cannot.", "I cannot.", "", []),
    (
        "qwen-coder",
        "Yes.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>"
        "\n</function>\n</tool_call>",
        "Yes.",
        "",
        ["weather"],
    ),
    ("llama3", f'{{"name": "weather", "parameters": {PARIS}}}', "", "", ["weather"]),
    ("llama3", f'<|python_tag|>{{"name": "weather", "parameters": {PARIS}}}', "", "", ["weather"]),
    ("llama3", 'It is {"name": "weather"}.', 'It is {"name": "weather"}.', "", []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        "",
        ["weather", "now"],
    ),
    ("mistral", "[THINK]Hm.[/THINK]Hello.", "Hello.", "Hm.", []),
    ("mistral-11", f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}", "", "", ["weather", "now"]),
    ("mistral-11", f"Well: [TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{PARIS}", "Well:", "", ["weather"]),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>Paris, "F"<|"|>,days:3}<tool_call|>', "", "", ["weather"]),
    ("gemma4", f"<|channel>thought\nHm.<channel|><|tool_call>call:weather{PARIS}<tool_call|>", "", "Hm.", ["weather"]),
    ("gemma4", f"<|tool_call>call:weather{PARIS}<tool_call|><|tool_response>", "", "", ["weather"]),
    (
        "functiongemma",
        "<start_function_call>call:weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        "",
        "",
        ["weather", "now"],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
        "Hello.",
        "They ask.",
        [],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>I ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{PARIS}<|call|>",
        "",
        "I ask.",
        ["weather"],
    ),
    ("harmony", f" to=functions.weather<|channel|>commentary json<|message|>{PARIS}", "", "", ["weather"]),
    ("harmony", "<|channel|>commentary<|message|>I will ask.<|end|>", "I will ask.", "", []),
    (
        "deepseek",
        "<think>Hm.</think>So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "So.",
        "Hm.",
        ["weather", "now"],
    ),
    (
        "deepseek-3.1",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "",
        ["weather", "now"],
    ),
]


def read(reader: MessageReader, pieces: Sequence[str], cut_short: bool = False) -> tuple[str, str, list[Call]]:
    text, reasoning = "", ""
    calls: list[Call] = []
    for piece in [*pieces, None]:
        reader.finish(cut_short) if piece is None else reader.feed(piece)
        part = reader.take()
        text, reasoning = text + part.text, reasoning + part.reasoning
        calls += part.calls
    return text, reasoning, calls


def whole(rules: MessageRules, source: str, **options: Any) -> tuple[str, str, list[Call]]:
    return read(MessageReader(rules, tools=TOOLS), [source], **options)


def shown(answer: tuple[str, str, list[Call]]) -> dict[str, Any]:
    """An answer in the form of transformers, whose messages have no ids."""
    text, reasoning, calls = answer
    functions = [{"name": call.name, "arguments": json.loads(call.arguments_json)} for call in calls]
    return {"text": text, "reasoning": reasoning, "calls": functions}


def as_transformers_reads(template: Mapping[str, Any], source: str, tools: Any = TOOLS) -> dict[str, Any]:
    message = parse_response(source, dict(template), prefix="", tools=tools)
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), "")
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {"text": message.get("content", ""), "reasoning": reasoning, "calls": calls}


@pytest.mark.parametrize(("family", "source", "text", "reasoning", "names"), CONVERSATIONS)
def test_a_message_is_text_and_reasoning_and_calls(
    family: str, source: str, text: str, reasoning: str, names: list[str]
) -> None:
    answer = whole(RULES[family], source)
    assert answer[:2] == (text, reasoning)
    assert [call.name for call in answer[2]] == names
    assert all(json.loads(call.arguments_json)["days"] == 3 for call in answer[2] if call.name == "weather")


@pytest.mark.parametrize(("family", "source"), [conversation[:2] for conversation in CONVERSATIONS])
def test_a_message_is_read_as_transformers_reads_it(family: str, source: str) -> None:
    assert shown(whole(RULES[family], source)) == as_transformers_reads(SYNTAXES[family].response_template, source)


@given(st.sampled_from(CONVERSATIONS), st.data())
def test_a_message_is_the_same_however_it_is_cut(conversation: tuple[str, str], data: st.DataObject) -> None:
    family, source = conversation[:2]
    borders = sorted(data.draw(st.lists(st.integers(0, len(source)), max_size=len(source))))
    pieces = [source[start:end] for start, end in zip([0, *borders], [*borders, len(source)], strict=True)]
    reader = MessageReader(RULES[family], tools=TOOLS)
    assert shown(read(reader, pieces)) == shown(whole(RULES[family], source))


@given(
    st.sampled_from(sorted(RULES)),
    st.lists(
        st.sampled_from(
            [part for _, source, *_ in CONVERSATIONS for part in (source, source[: len(source) // 2])]
            + ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "<|channel|>", "{", "}", " ", "\n"]
        )
        | st.text(max_size=5),
        max_size=6,
    ),
    st.data(),
)
def test_whatever_a_model_writes_is_the_same_however_it_is_cut(
    family: str, parts: list[str], data: st.DataObject
) -> None:
    source = "".join(parts)
    borders = sorted(data.draw(st.lists(st.integers(0, len(source)), max_size=20)))
    pieces = [source[start:end] for start, end in zip([0, *borders], [*borders, len(source)], strict=True)]
    reader = MessageReader(RULES[family], tools=TOOLS)
    assert shown(read(reader, pieces)) == shown(whole(RULES[family], source))


CALLS = [(family, source) for family, source, *_, names in CONVERSATIONS if names]


@pytest.mark.parametrize(("family", "source"), CALLS)
def test_a_call_of_a_tool_that_is_not_offered_is_text_as_it_was_written(family: str, source: str) -> None:
    text, _, calls = read(MessageReader(RULES[family], tools=[tool("other")]), [source])
    assert calls == []
    assert "weather" in text
    assert "Paris" in text


@pytest.mark.parametrize(("family", "source"), CALLS)
def test_a_call_that_is_cut_short_is_text_as_it_was_written(family: str, source: str) -> None:
    cut = source[: source.index("Paris") + 3]
    text, _, calls = whole(RULES[family], cut, cut_short=True)
    assert calls == []
    assert text.endswith("Par")
    assert "weather" in text


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "weather", "arguments": {"city": ',
        '{"name": "weather", "arguments": "Paris"}',
        '{"name": "weather", "arguments": {"city": NaN}}',
        '{"name": "weather", "arguments": {"city": "\\ud800"}}',
        '{"name": "weather", "arguments": {"days": ' + "1" * 5000 + "}}",
        '{"name": "weather", "arguments": {"city": ' + "[" * 100_000 + "}}",
        '{"name": ["weather"], "arguments": {}}',
        '["weather"]',
        "null",
        "",
    ],
)
def test_a_call_that_is_none_is_text_and_what_follows_is_read(call: str) -> None:
    source = f'<tool_call>{call}</tool_call>\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>Bye.'
    text, _, calls = whole(RULES["hermes"], source)
    assert text == f"<tool_call>{call}</tool_call>\nBye."
    assert [call.name for call in calls] == ["now"]


def test_ids_of_calls_are_nine_letters_and_digits_and_differ() -> None:
    _, source, *_ = CONVERSATIONS[3]
    ids = [call.id for _ in range(50) for call in whole(RULES["hermes"], source)[2]]
    assert all(len(call_id) == 9 and call_id.isalnum() and call_id.isascii() for call_id in ids)
    assert len(set(ids)) == 100


def test_a_message_of_one_call_is_over_after_it() -> None:
    _, source, *_ = CONVERSATIONS[3]
    reader = MessageReader(RULES["hermes"], tools=TOOLS, one_call=True)
    text, _, calls = read(reader, [source, "And more."])
    assert reader.is_over
    assert text == "I ask."
    assert [call.name for call in calls] == ["weather"]


def test_what_the_prompt_has_opened_goes_on_and_does_not_come_again() -> None:
    reader = MessageReader(RULES["hermes"], opened="<think>\nI know: ", tools=TOOLS)
    assert read(reader, ["it is", " so.</think>Yes."])[:2] == ("Yes.", "it is so.")


def test_a_call_that_the_prompt_has_begun_is_read_whole() -> None:
    reader = MessageReader(RULES["hermes"], opened='<tool_call>\n{"name": "weather", ', tools=TOOLS)
    [call] = read(reader, ['"arguments": {}}', "</tool_call>"])[2]
    assert call.name == "weather"


class CountedRules(MessageRules):
    """Counts what is read by them."""

    def __init__(self, syntax: MessageSyntax) -> None:
        super().__init__(syntax)
        self.num_parsers = self.num_calls = self.most_chars_kept = 0
        rules = self

        class Parser(ResponseParser):
            def __init__(self, *args: Any, **options: Any) -> None:
                rules.num_parsers += 1
                super().__init__(*args, **options)

            def _can_grow(self, *args: Any) -> bool:
                rules.most_chars_kept = max(rules.most_chars_kept, len(self._buffer))
                return super()._can_grow(*args)

        self.new_parser = Parser

    def calls(self, source: str, tools: Sequence[Mapping[str, Any]]) -> Sequence[Call]:
        self.num_calls += 1
        return super().calls(source, tools)


def test_calls_that_the_prompt_tells_of_are_not_read() -> None:
    rules = CountedRules(SYNTAXES["hermes"])
    call = f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call> '
    reader = MessageReader(rules, opened=call * 20, tools=TOOLS)
    assert (rules.num_calls, reader.num_calls) == (0, 0)
    assert len(read(reader, [call])[2]) == 1
    assert (rules.num_calls, reader.num_calls) == (1, 1)


@pytest.mark.parametrize("cut", [7, 1 << 17])
def test_marks_are_looked_for_in_a_bounded_text(cut: int) -> None:
    rules = CountedRules(SYNTAXES["hermes"])
    text = "x<tool_call></tool_call>" * 4000
    reader = MessageReader(rules, opened=text, tools=TOOLS)
    said, _, _ = read(reader, [text[start : start + cut] for start in range(0, len(text), cut)])
    assert len(said) >= len(text)
    assert 0 < rules.most_chars_kept <= 4 * LOOKED_BACK


def test_what_begins_a_message_is_looked_for_at_its_beginning_alone() -> None:
    begun, call = "x" * 3 * LOOKED_BACK, '{"name": "now", "parameters": {}}'
    assert read(MessageReader(RULES["llama3"], tools=TOOLS), [begun, call]) == (begun + call, "", [])


BEGINS_WITH_A_MARK = ("llama3", "harmony")


@pytest.mark.parametrize(
    ("family", "source", "names"),
    [(each[0], each[1], each[4]) for each in CONVERSATIONS if each[0] not in BEGINS_WITH_A_MARK],
)
def test_calls_far_behind_the_beginning_are_found(family: str, source: str, names: list[str]) -> None:
    calls = read(MessageReader(RULES[family], tools=TOOLS), ["word " * 4000, source])[2]
    assert [call.name for call in calls] == names


@pytest.mark.parametrize("family", RULES)
def test_twins_read_on_by_themselves_without_reading_again_what_they_have_read(family: str) -> None:
    rules = CountedRules(SYNTAXES[family])
    for _, source, text, reasoning, names in (each for each in CONVERSATIONS if each[0] == family):
        rules.num_parsers = 0
        begun, rest = source[: len(source) // 2], source[len(source) // 2 :]
        first = MessageReader(rules, tools=TOOLS)
        first.feed(begun)
        twins = [first.twin(), first.twin()]
        twins[0].feed(" and <other>")
        for reader in (first, twins[1]):
            answer = read(reader, [rest])
            assert (*answer[:2], [call.name for call in answer[2]]) == (text, reasoning, names)
        assert rules.num_parsers == 1


@pytest.mark.parametrize(
    ("family", "begun"), [("gemma4", "<|tool_call>call:now{"), ("functiongemma", "<start_function_call>call:now{")]
)
def test_a_call_whose_strings_are_quadratic_to_read_is_long_early(family: str, begun: str) -> None:
    reader = MessageReader(RULES[family], tools=TOOLS)
    reader.feed(begun)
    assert not reader.takes_long(4)
    reader.feed(r"\"" * 128)
    assert reader.takes_long(4)


def test_text_that_goes_on_with_the_prompts_keeps_the_white_space_before_it() -> None:
    assert read(MessageReader(RULES["hermes"], opened="Once upon"), [" a time", " \n"])[0] == " a time"


def test_what_is_opened_is_behind_the_last_beginning_of_a_message() -> None:
    prompt = "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>assistant\n<think>"
    assert RULES["hermes"].opened(prompt) == "<think>"
    assert RULES["hermes"].opened("no such thing") is None


def test_text_comes_as_it_is_written_but_for_white_space_that_may_end_it() -> None:
    reader = MessageReader(RULES["hermes"], tools=TOOLS)
    came = []
    for piece in ["\n", "Hello", " ", "there <", "b>", "\n"]:
        reader.feed(piece)
        came.append(reader.take().text)
    assert came == ["", "Hello", "", " there", " <b>", ""]


# As other projects write theirs: with joined stretches, lists of calls, anchors of several kinds.
DECLARED = {
    "joined": (
        {
            "start_anchor": "<|model|>",
            "fields": {
                "thinking": {
                    "open_pattern": r"(?:<\|model\|>)?[^<]*<\|think\|>",
                    "close": "<|end|>",
                    "repeats": True,
                    "join": "",
                    "content_args": {"strip": False},
                },
                "content": {
                    "open_pattern": r"(?:<\|model\|>)?[^<]*<\|text\|>",
                    "close": "<|end|>",
                    "repeats": True,
                    "join": "",
                    "content_args": {"strip": False},
                },
                "tool_calls": {
                    "open_pattern": r"(?:<\|model\|>)?[^<]*<\|tool\|>",
                    "close": "<|end|>",
                    "repeats": True,
                    "content": "json",
                    "transform": {"type": "function", "function": {"name": "{content.f}", "arguments": "{content.x}"}},
                },
            },
        },
        '<|think|> a <|end|><|model|>me<|text|> b<|end|><|model|><|text|>c <|end|><|tool|>{"f": "now", "x": {}}<|end|>',
    ),
    "listed": (
        {
            "start_anchor_pattern": r"<bot>\s*",
            "fields": {
                "reasoning": {"open_pattern": r"(?:^|<think>\s*)", "close": "</think>"},
                "content": {"open": ["<answer>\n", "<reply>"], "close_pattern": r"\n?</answer>"},
                "tool_calls": {
                    "open": ["<do>", "<act>"],
                    "close": ["</do>", "</act>"],
                    "content": "json",
                    "transform_each": True,
                    "transform": {"type": "function", "function": {"name": "{tool}", "arguments": "{args}"}},
                },
            },
        },
        'I think.</think>\n<act>[{"tool": "weather", "args": {"city": "P", "days": "3"}}, '
        '{"tool": "now", "args": {}}]</act>'
        "<answer>\nDone.\n</answer>",
    ),
    "named at its end": (
        {
            "start_anchor": "A:",
            "fields": {
                "tool_calls": {
                    "open": "{{",
                    "close_pattern": r"\}\}=>(?P<name>\w+);",
                    "repeats": True,
                    "content": "kv-lines",
                    "content_args": {"line_sep": ","},
                    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
                },
                "content": {"close": "<eos>"},
            },
        },
        "Two: {{city: P,days: 3}}=>weather;{{}}=>now;<eos>",
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_response_template_beside_the_tokenizer_is_read_as_transformers_reads_it(name: str) -> None:
    template, source = DECLARED[name]
    expected = as_transformers_reads(template, source)
    assert len(expected["calls"]) > 0
    syntax = message_syntax([], template)
    assert syntax is not None
    for size in (1, 2, 3, 7, len(source)):
        pieces = [source[start : start + size] for start in range(0, len(source), size)]
        assert shown(read(MessageReader(MessageRules(syntax), tools=TOOLS), pieces)) == expected


def test_a_response_template_that_transformers_refuses_is_refused() -> None:
    with pytest.raises(TokenizerError, match="unknown content parser"):
        MessageRules(MessageSyntax({"start_anchor": "A", "fields": {"content": {"content": "x"}}}, None, None))


GREEDY = {
    "start_anchor": "A:",
    "fields": {
        "content": {},
        "tool_calls": {
            "open_pattern": r"\s*<call=(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>\s*(?P<value>.*?)\s*</\w+>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


def greedy() -> MessageReader:
    syntax = message_syntax([], GREEDY)
    assert syntax is not None
    return MessageReader(MessageRules(syntax), tools=TOOLS)


def test_where_an_expression_waits_for_too_long_all_that_follows_is_text() -> None:
    pieces = [*"Hi", *(" " * 64 for _ in range(70)), "Bye. ", "<call=now></call>"]
    assert read(greedy(), pieces) == ("Hi\nBye. <call=now></call>", "", [])


def test_a_call_that_an_expression_takes_too_long_to_read_is_text() -> None:
    short, long = (f"<call=weather><city>{'x' * size}</city></call>" for size in (10_000, 17_000))
    text, _, [call] = read(greedy(), [short, long])
    assert (call.name, text) == ("weather", long)


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("piece", [" ", "\n" * 64, "<tool_call>", "[TOOL_CALLS]", "<", "<|channel|>", "{{[[", '<|"|>a'])
def test_no_text_takes_long_to_read(family: str, piece: str) -> None:
    reader = MessageReader(RULES[family], tools=TOOLS)
    began = time.process_time()
    for _ in range(2000):
        reader.feed(piece)
        reader.take()
    reader.finish(cut_short=False)
    assert time.process_time() - began < 8  # some 0.1 s; what takes ever longer takes minutes
