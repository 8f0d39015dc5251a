"""What callers ask of the form of an output, they get: from the client to the engine and back."""

import json
import re

import pytest

from loraplex import AsyncClient, InvalidArgument
from loraplex.v1.inference_pb2 import FINISH_REASON_EOS, FINISH_REASON_STOP, GenerateResponse

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}
TARGETS = ["storyteller", "pirate", "json"]


def whole_texts(response: GenerateResponse) -> list[str]:
    """The texts of the outputs, all of which ended because they were complete."""
    assert {output.finished.reason for output in response.outputs} <= {FINISH_REASON_STOP, FINISH_REASON_EOS}
    assert not any(output.finished.HasField("stop") for output in response.outputs)
    return [output.text for output in response.outputs]


@pytest.mark.parametrize("target", TARGETS)
async def test_every_output_satisfies_its_schema(client: AsyncClient, target: str) -> None:
    response = await client.generate(target, "A fox", json_schema=SCHEMA, n=8, temperature=1.5, seed=1)
    for text in whole_texts(response):
        value = json.loads(text)
        assert list(value) == ["animal", "age"]
        assert value["animal"] in ("fox", "owl")
        assert 1 <= value["age"] <= 99


async def test_every_output_is_one_of_the_choices(client: AsyncClient) -> None:
    choices = ["yes", "no", 'per "haps"']
    response = await client.generate("storyteller", "Is it?", choices=choices, n=8, temperature=2.0)
    assert set(whole_texts(response)) <= set(choices)


async def test_every_output_matches_its_regular_expression(client: AsyncClient) -> None:
    pattern = r"\d{4}-(0[1-9]|1[0-2])/[a-f]?"
    response = await client.generate("pirate", "When?", regex=pattern, n=8, temperature=2.0)
    assert all(re.fullmatch(pattern, text) for text in whole_texts(response))


async def test_every_output_is_text_of_its_grammar(client: AsyncClient) -> None:
    grammar = 'root ::= word (" " word){2}\nword ::= "ahoy" | "arr"'
    response = await client.generate("pirate", "Speak.", grammar=grammar, n=4, temperature=2.0)
    assert all(re.fullmatch("(ahoy|arr)( (ahoy|arr)){2}", text) for text in whole_texts(response))


async def test_an_output_is_a_json_object_from_its_first_token_on(client: AsyncClient) -> None:
    response = await client.generate("storyteller", "A fox", json_object=True, max_tokens=8)
    assert response.outputs[0].text.startswith("{")


async def test_no_output_has_a_bad_word(client: AsyncClient) -> None:
    plain = await client.generate("storyteller", "A fox", max_tokens=40, temperature=0)
    word = max(plain.outputs[0].text.split(), key=len)
    words = [word, "the", "e "]
    response = await client.generate("storyteller", "A fox", max_tokens=40, bad_words=words, n=4)
    assert not any(word in output.text for output in response.outputs for word in words)


async def test_a_stop_string_ends_a_form_where_it_stands(client: AsyncClient) -> None:
    response = await client.generate("storyteller", "A fox", regex="[ab]{4}(-[ab]{4}){9}", stop=["-"], n=4)
    for output in response.outputs:
        assert re.fullmatch("[ab]{4}", output.text)
        assert (output.finished.reason, output.finished.stop) == (FINISH_REASON_STOP, "-")


async def test_a_form_that_turns_out_to_have_no_end_is_the_callers_mistake(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.constraint: .* loosen allowed_token_ids") as raised:
        await client.generate("storyteller", "A fox", regex="[a-f]{3}", allowed_token_ids=[0])
    assert [one.field for one in raised.value.violations] == ["spec.constraint"]


async def test_streams_with_a_form_and_without_share_an_engine(client: AsyncClient) -> None:
    plain = await client.generate("storyteller", "A fox", max_tokens=20, temperature=0)
    formed = client.stream_generate("storyteller", "A fox", regex="[xyz]{30}")
    again = await client.generate("storyteller", "A fox", max_tokens=20, temperature=0)
    assert re.fullmatch("[xyz]{30}", (await formed.collect()).outputs[0].text)
    assert again.outputs[0].text == plain.outputs[0].text
