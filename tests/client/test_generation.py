"""GenerateSpec from keyword arguments."""

import datetime
import json
from typing import Any

import pytest

from loraplex import GenerateOptions, Watermark, constraint, generate_spec
from loraplex.generation import duration
from loraplex.v1 import generation_pb2, prompt_pb2


def test_zero_is_set_and_none_is_absent() -> None:
    spec = generate_spec("demo", "Once", temperature=0, top_k=None, ignore_eos=False)
    assert spec.sampling.HasField("temperature")
    assert spec.sampling.temperature == 0
    assert not spec.sampling.HasField("top_k")
    assert spec.stopping.HasField("ignore_eos")


def test_nothing_is_sent_that_was_not_given() -> None:
    assert generate_spec("demo", "Once") == generation_pb2.GenerateSpec(
        model="demo", prompt=prompt_pb2.Prompt(text="Once")
    )


VALUES: dict[str, Any] = {
    "labels": {"team": "x"},
    "logit_bias": {5: -1.5},
    "allowed_token_ids": [1, 2],
    "stop_token_ids": [3],
    "logprob_token_ids": [4],
    "early_stopping": generation_pb2.EARLY_STOPPING_NEVER,
    "logprobs_mode": generation_pb2.LOGPROBS_MODE_PROCESSED,
    "bad_words": ["no"],
    "stop": ["end"],
    "on_cold": generation_pb2.ON_COLD_FAIL,
    "client_request_id": "mine",
    "salt": "s",
    "time_limit": 1.5,
    "max_load_wait": 1.5,
    "max_chunk_delay": 1.5,
}
PARTS = ("sampling", "beam_search", "stopping", "output", "cache", "adapter_policy", "drafts", "stream")
SPEC: Any = generation_pb2.GenerateSpec.DESCRIPTOR
FIELDS = [(part, field.name) for part in PARTS for field in SPEC.fields_by_name[part].message_type.fields] + [
    (None, "priority"),
    (None, "client_request_id"),
    (None, "labels"),
]


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_every_field_is_reached_by_its_own_name(part: str | None, name: str) -> None:
    value = VALUES.get(name, 1)
    options: Any = {name: value}
    spec = generate_spec("demo", "Once", **options)
    message: Any = spec if part is None else getattr(spec, part)
    assert [field.name for field, _ in message.ListFields() if field.name not in ("model", "prompt")] == [name]
    got = getattr(message, name)
    if name in ("time_limit", "max_load_wait", "max_chunk_delay"):
        assert got.ToTimedelta() == datetime.timedelta(seconds=1.5)
    elif isinstance(value, dict):
        assert dict(got) == value
    else:
        assert (list(got) if isinstance(value, list) else got) == value


def test_a_watermark_is_an_option_with_its_key() -> None:
    spec = generate_spec("demo", "Once", watermark=Watermark(key=b"k" * 16, gamma=0.5, context_tokens=2))
    mark = spec.watermark
    assert (mark.key, mark.gamma, mark.delta, mark.context_tokens) == (b"k" * 16, 0.5, 2.0, 2)


def test_options_are_the_fields_of_the_contract() -> None:
    content = prompt_pb2.Prompt.DESCRIPTOR.oneofs_by_name["content"].fields
    prompt = {field.name for field in prompt_pb2.Prompt.DESCRIPTOR.fields} - {field.name for field in content}
    chat = {field.name for field in prompt_pb2.Chat.DESCRIPTOR.fields} - {"messages"}
    constraint = {field.name for field in generation_pb2.Constraint.DESCRIPTOR.fields}
    assert (
        set(GenerateOptions.__annotations__)
        == {name for _, name in FIELDS} | {"watermark"} | prompt | chat | constraint
    )


def test_options_come_before_the_spec() -> None:
    base = generate_spec("demo", "Once", temperature=0.5, stop=["a", "b"], seed=3)
    spec = generate_spec(spec=base, model="other", temperature=0, stop="c")
    assert (spec.model, spec.prompt.text, spec.sampling.seed) == ("other", "Once", 3)
    assert spec.sampling.temperature == 0
    assert list(spec.stopping.stop) == ["c"]


def test_the_spec_of_the_caller_stays_as_it_was() -> None:
    base = generate_spec("demo", "Once")
    generate_spec(spec=base, temperature=1)
    assert base == generate_spec("demo", "Once")


def test_labels_of_the_spec_are_replaced_as_a_whole() -> None:
    base = generate_spec("demo", "Once", labels={"a": "1"})
    assert dict(generate_spec(spec=base, labels={"b": "2"}).labels) == {"b": "2"}


@pytest.mark.parametrize("name", ["wait", "fail", "use_base"])
def test_on_cold_by_name(name: str) -> None:
    spec = generate_spec("demo", "Once", on_cold=name)
    assert generation_pb2.OnCold.Name(spec.adapter_policy.on_cold) == f"ON_COLD_{name.upper()}"


@pytest.mark.parametrize("name", ["off", "ngram", "model"])
def test_draft_kind_by_name(name: str) -> None:
    spec = generate_spec("demo", "Once", draft_kind=name)
    assert generation_pb2.DraftKind.Name(spec.drafts.draft_kind) == f"DRAFT_KIND_{name.upper()}"


def test_chat_options_go_into_the_chat() -> None:
    parameters = {"type": "object", "properties": {"b": {"minimum": 1}, "a": {}}}
    spec = generate_spec(
        "demo",
        [{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "look", "parameters": parameters}}],
        template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        truncate_to_tokens=10,
    )
    chat = spec.prompt.chat
    assert chat.tools[0].name == "look"
    assert chat.tools[0].parameters_json == json.dumps(parameters)
    assert chat.template_kwargs["enable_thinking"] is False
    assert chat.HasField("add_generation_prompt")
    assert spec.prompt.truncate_to_tokens == 10


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", prompt_pb2.ToolChoice(mode=prompt_pb2.TOOL_MODE_AUTO)),
        ("none", prompt_pb2.ToolChoice(mode=prompt_pb2.TOOL_MODE_NONE)),
        ("required", prompt_pb2.ToolChoice(mode=prompt_pb2.TOOL_MODE_REQUIRED)),
        ("look", prompt_pb2.ToolChoice(name="look")),
        (prompt_pb2.ToolChoice(name="none"), prompt_pb2.ToolChoice(name="none")),
    ],
)
def test_tool_choice_is_a_mode_or_the_name_of_a_tool(choice: Any, expected: prompt_pb2.ToolChoice) -> None:
    spec = generate_spec("demo", [{"role": "user", "content": "Hi"}], tools=[{"name": "look"}], tool_choice=choice)
    assert spec.prompt.chat.tool_choice == expected


def test_chat_options_without_chat_are_refused() -> None:
    with pytest.raises(ValueError, match="tools only go with chat messages"):
        generate_spec("demo", "Once", tools=[{"name": "look"}])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json_schema": {"type": "object"}}, generation_pb2.Constraint(json_schema='{"type": "object"}')),
        ({"json_schema": "{}"}, generation_pb2.Constraint(json_schema="{}")),
        ({"json_object": True}, generation_pb2.Constraint(json_object=generation_pb2.JsonObject())),
        ({"regex": "a+"}, generation_pb2.Constraint(regex="a+")),
        ({"choices": ["a", "b"]}, generation_pb2.Constraint(choices=generation_pb2.Choices(values=["a", "b"]))),
        ({"grammar": 'root ::= "a"'}, generation_pb2.Constraint(grammar='root ::= "a"')),
        ({"any_text": True}, generation_pb2.Constraint(any_text=generation_pb2.AnyText())),
    ],
)
def test_constraints(options: Any, expected: generation_pb2.Constraint) -> None:
    assert generate_spec("demo", "Once", **options).constraint == expected
    assert constraint(**options) == expected


def test_json_object_false_is_no_constraint() -> None:
    assert not generate_spec("demo", "Once", json_object=False).HasField("constraint")


def test_two_constraints_are_refused() -> None:
    with pytest.raises(ValueError, match="regex, grammar"):
        generate_spec("demo", "Once", regex="a", grammar="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": "many"}, "top_k='many'"),
        ({"max_tokens": 2**40}, f"max_tokens={2**40}"),
        ({"seed": -1}, "seed=-1"),
        ({"on_cold": "hope"}, "ON_COLD_HOPE"),
    ],
)
def test_a_value_that_does_not_fit_is_named(options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generate_spec("demo", "Once", **options)


def test_an_unknown_option_is_named() -> None:
    options: Any = {"temprature": 0}
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        generate_spec("demo", "Once", **options)


@pytest.mark.parametrize(("model", "prompt", "missing"), [(None, "Once", "no model"), ("demo", None, "no prompt")])
def test_model_and_prompt_are_required(model: str | None, prompt: str | None, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        generate_spec(model, prompt)


@pytest.mark.parametrize("value", [0.25, datetime.timedelta(milliseconds=250)])
def test_durations_are_seconds_or_timedeltas(value: float | datetime.timedelta) -> None:
    assert duration(value).ToNanoseconds() == 250_000_000
