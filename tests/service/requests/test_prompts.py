"""Prompts as Generate reads them and Tokenize tells them: what is cut, and what is literal."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from loraplex.v1.generation_pb2 import Sampling
from loraplex.v1.inference_pb2 import FINISH_REASON_CONTEXT_LIMIT, FINISH_REASON_MAX_TOKENS
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, TokenIds
from loraplex.v1.tokenizer_pb2 import TokenizeRequest, TokenizeResponse
from loraplex_service.admission.tenants import Tenants
from loraplex_service.control.tokenizer import _encoding, _told
from loraplex_service.requests.prompts import prompt_text
from loraplex_service.requests.turns import whole
from loraplex_service.text import Tokenizer
from tests.service.data_plane import BOS, EOS, DataPlane, data_plane, failure, make_spec


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte; <bos> in front of a text and <eos> behind it."""
    directory = tmp_path_factory.mktemp("bos")
    backend = tokenizers.Tokenizer.from_file(str(byte_tokenizer_directory / "tokenizer.json"))
    special = [("<bos>", BOS), ("<eos>", EOS)]
    backend.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=special)
    backend.save(str(directory / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@pytest.fixture
async def plane(tokenizer: Tokenizer) -> AsyncIterator[DataPlane]:
    async with data_plane(tokenizer) as plane:
        yield plane


async def read(plane: DataPlane, prompt: Prompt) -> list[int]:
    """What the model reads; what Tokenize tells must be the same."""
    await plane.generate(make_spec(prompt=prompt))
    read = plane.engine.requests[-1].prompt_token_ids
    told = await tokenized(plane, prompt)
    assert list(told.token_ids) == read
    assert len(told.token_starts) == len(told.token_ends) == len(read)
    return read


async def tokenized(plane: DataPlane, prompt: Prompt) -> TokenizeResponse:
    model = plane.models.models["demo"]
    text = await prompt_text(prompt, model, plane.servicer._preparation._texts, Tenants().get("default"), "prompt")
    request = TokenizeRequest(prompt=prompt, include_offsets=True)
    return whole(_told(request, model, text.text, _encoding(request, model, text)))


def chat(*contents: str) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content=content) for content in contents])


# ---- what is cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(text="abc", truncate_to_tokens=5), [BOS, *b"abc", EOS]),
        (Prompt(text="abc", truncate_to_tokens=4), [BOS, *b"bc", EOS]),
        (Prompt(text="abc", truncate_to_tokens=2), [BOS, EOS]),
        (Prompt(text="abc", truncate_to_tokens=1), [EOS]),
        (Prompt(text="abc", truncate_to_tokens=2, add_special_tokens=False), [*b"bc"]),
        (Prompt(chat=chat("ab", "cd"), truncate_to_tokens=4), [BOS, *b"cd", EOS]),
        (Prompt(chat=chat("ab"), truncate_to_tokens=3, add_special_tokens=True), [BOS, EOS, EOS]),
    ],
)
async def test_truncation_keeps_what_stands_in_front_of_a_text(
    plane: DataPlane, prompt: Prompt, expected: Sequence[int]
) -> None:
    assert await read(plane, prompt) == expected


async def test_truncation_of_token_ids_keeps_the_last(plane: DataPlane) -> None:
    await plane.generate(make_spec(prompt=Prompt(token_ids=TokenIds(ids=[BOS, 1, 2, 3]), truncate_to_tokens=2)))
    assert plane.engine.requests[0].prompt_token_ids == [2, 3]


# ---- as many as fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "reason", "tokens"),
    [(10, FINISH_REASON_MAX_TOKENS, 10), (123, FINISH_REASON_MAX_TOKENS, 123), (500, FINISH_REASON_CONTEXT_LIMIT, 123)],
)
async def test_max_tokens_is_cut_to_what_fits_if_that_is_asked_for(
    plane: DataPlane, max_tokens: int, reason: int, tokens: int
) -> None:
    stopping = {"max_tokens": max_tokens, "fit_max_tokens": True, "ignore_eos": True}
    [output] = (await plane.generate(make_spec("abc", stopping=stopping))).outputs
    assert (output.finished.reason, output.finished.completion_tokens) == (reason, tokens)


async def test_max_tokens_that_do_not_fit_are_refused_otherwise(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec("abc", stopping={"max_tokens": 124})))
    assert (failed.reason, failed.fields) == ("PROMPT_TOO_LONG", ["spec.stopping.max_tokens"])


# ---- whose default it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["allowed_token_ids", "logit_bias"])
async def test_a_default_that_does_not_fit_is_no_fault_of_a_field_that_the_caller_left_out(
    plane: DataPlane, field: str
) -> None:
    value: Any = {300: 1.0} if field == "logit_bias" else [300]
    plane.models.models["demo"].default_sampling.MergeFrom(Sampling(**{field: value}))
    failed = await failure(plane.generate(make_spec()))
    assert failed.fields == ["spec.model"]
    assert f"default sampling whose {field} holds 300" in failed.message
    failed = await failure(plane.generate(make_spec(sampling={field: value})))
    assert failed.fields == [f"spec.sampling.{field}"]


# ---- what is literal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(text="a<eos>"), [BOS, *b"a", EOS, EOS]),
        (Prompt(text="a<eos>", literal_content=True), [BOS, *b"a<eos>", EOS]),
        (Prompt(chat=chat("a<eos>")), [BOS, *b"a", EOS, EOS]),
        (Prompt(chat=chat("a<eos>"), literal_content=True), [BOS, *b"a<eos>", EOS]),
        (Prompt(chat=chat("<eo", "s>"), literal_content=True), [BOS, *b"<eo", EOS, *b"s>", EOS]),
        (Prompt(chat=chat("é<bos>"), literal_content=True, truncate_to_tokens=4), [BOS, *b"s>", EOS]),
    ],
)
async def test_control_tokens_that_are_said_are_text_if_that_is_asked_for(
    plane: DataPlane, prompt: Prompt, expected: Sequence[int]
) -> None:
    assert await read(plane, prompt) == expected


async def test_the_configuration_says_what_chats_do_not(plane: DataPlane) -> None:
    plane.models.models["demo"] = replace(plane.models.models["demo"], literal_content=True)
    assert await read(plane, Prompt(chat=chat("<eos>"))) == [BOS, *b"<eos>", EOS]
    assert await read(plane, Prompt(chat=chat("<eos>"), literal_content=False)) == [BOS, EOS, EOS]
    assert await read(plane, Prompt(text="<eos>")) == [BOS, EOS, EOS]


async def test_literal_token_ids_make_no_sense(plane: DataPlane) -> None:
    prompt = Prompt(token_ids=TokenIds(ids=[1]), literal_content=True)
    assert (await failure(plane.generate(make_spec(prompt=prompt)))).fields == ["spec.prompt.literal_content"]
