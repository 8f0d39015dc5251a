"""Chat templates tell how models write reasoning and calls; a response template beside the tokenizer comes first."""

import json
from pathlib import Path

import pytest

from loraplex_service.text import Reasoning, Tokenizer, TokenizerError
from loraplex_service.text.message_syntax import message_syntax

DATA = Path(__file__).parents[4] / "shared/data/tokenizer-configs"

THINK = Reasoning("<think>", "</think>")
# What a chat template of a family writes around calls, and in which form its calls are forced.
TEMPLATES = {
    "hermes": ("<|im_start|> <tool_call>", "<tool_call>\n"),
    "smollm2": ("<|im_start|> <tool_call>[", '{{"name": "'),
    "llama3": ('<|start_header_id|> {"name": "x", "parameters": {}}', '{{"name": "{name}", "parameters": '),
    "mistral": ("[INST] [/INST] [TOOL_CALLS] [", '{{"name": "'),
    "mistral-11": ("[INST] [/INST] [TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]{name}[ARGS]"),
    "gemma4": ("<|turn> <|tool_call> <tool_call|>", "<|tool_call>call:{name}"),
    "functiongemma": ("<start_of_turn> <start_function_call>", "<start_function_call>call:{name}"),
    "harmony": ("<|start|> <|channel|> <|message|>", "<|channel|>commentary to=functions.{name} "),
    "deepseek": ("<｜tool▁call▁begin｜> ```json", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"),
    "deepseek-3.1": ("<｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>"),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_family_is_known_by_the_marks_of_its_chat_template(family: str) -> None:
    template, head = TEMPLATES[family]
    syntax = message_syntax([template])
    assert syntax is not None
    assert syntax.has_calls
    assert syntax.calls is not None
    assert syntax.calls.head.startswith(head)


@pytest.mark.parametrize("template", ["", "{{ messages }}", "<|im_start|>{{ message.content }}<|im_end|>"])
def test_a_chat_template_that_writes_plain_text_has_no_syntax(template: str) -> None:
    assert message_syntax([template]) is None


@pytest.mark.parametrize(
    ("template", "reasoning"),
    [
        ("<|im_start|> <tool_call> </think>", THINK),
        ("<|im_start|> </think>", THINK),
        ("<|im_start|> <tool_call>", None),
        ("<｜Assistant｜> </think>", THINK),
        ("[TOOL_CALLS] [THINK] [/THINK]", Reasoning("[THINK]", "[/THINK]")),
        (
            "<|channel|>analysis<|message|>",
            Reasoning("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>"),
        ),
    ],
)
def test_reasoning_is_known_by_the_mark_that_ends_it(template: str, reasoning: Reasoning | None) -> None:
    syntax = message_syntax([template])
    assert syntax is not None
    assert syntax.reasoning == reasoning
    assert syntax.has_reasoning == (reasoning is not None)


def test_a_response_template_beside_the_tokenizer_comes_first() -> None:
    declared = {"start_anchor": "A:", "fields": {"thinking": {"open": "(", "close": ")"}, "content": {}}}
    syntax = message_syntax(["<|im_start|> <tool_call>"], declared)
    assert syntax is not None
    assert syntax.response_template is declared
    assert syntax.reasoning == Reasoning("(", ")")
    assert not syntax.has_calls


@pytest.mark.parametrize("declared", ["x", [], {}, {"fields": []}])
def test_a_response_template_that_is_none_is_refused(declared: object) -> None:
    with pytest.raises(TokenizerError, match="response_template must be"):
        message_syntax([], declared)


def test_a_model_with_a_bad_response_template_names_its_file(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_tokenizer_directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"response_template": 3}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: response_template"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="no files of other projects here")
@pytest.mark.parametrize(
    ("name", "reasoning", "calls"),
    [
        ("qwen3_30b-", THINK, True),
        ("qwen3_coder", None, True),
        ("deepseek_r1", THINK, True),
        ("deepseek_v31", THINK, True),
        ("qwen2_tokenizer", None, False),
        ("diag_adapter", None, False),
    ],
)
def test_chat_templates_that_people_have(name: str, reasoning: Reasoning | None, calls: bool) -> None:
    config = json.loads(next(DATA.glob(f"*{name}*")).read_text())
    syntax = message_syntax([config["chat_template"]])
    assert (None if syntax is None else syntax.reasoning) == reasoning
    assert (syntax is not None and syntax.has_calls) == calls
