"""Classifying and reranking with the heads that adapters bring, and what has no head."""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from grpc import StatusCode as Code

from loraplex.v1.generation_pb2 import ON_COLD_USE_BASE, AdapterPolicy
from loraplex.v1.inference_pb2 import FINISH_REASON_MAX_TOKENS
from loraplex.v1.pooling_pb2 import (
    ACTIVATION_SIGMOID,
    ACTIVATION_SOFTMAX,
    ClassifyRequest,
    EmbedRequest,
    RerankRequest,
    RunOptions,
)
from loraplex.v1.prompt_pb2 import Prompt, TokenIds
from loraplex_engine.link.pooling import ClassifierFacts, PoolingMethod, PoolingParams
from loraplex_service.ports.interceptors import CallLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec


def add_head(plane: DataPlane, num_labels: int, each_token: bool = False) -> None:
    """Register the adapter "judge" with such a head."""
    plane.engine.heads["/adapters/default/judge"] = ClassifierFacts(num_labels, each_token)
    plane.add_adapter("default/judge")


def classify(*texts: str, **fields: Any) -> ClassifyRequest:
    return ClassifyRequest(**({"model": "judge", "prompts": [Prompt(text=text) for text in texts]} | fields))


def rerank(*documents: str, **fields: Any) -> RerankRequest:
    return RerankRequest(**({"model": "judge", "query": "q", "documents": documents} | fields))


def softmax(*logits: float) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


# ---- classify --------------------------------------------------------------------------------------------------------


async def test_each_prompt_has_logits_and_probabilities_of_its_last_token(plane: DataPlane) -> None:
    add_head(plane, 3)
    response = await plane.pooling.Classify(classify("xa", "c"))
    assert [list(one.logits) for one in response.classifications] == [[0, -1, -2], [2, 1, 0]]
    for one in response.classifications:
        assert list(one.probabilities) == pytest.approx(softmax(2, 1, 0), rel=1e-6)
    assert (list(response.labels), response.each_token) == (["LABEL_0", "LABEL_1", "LABEL_2"], False)
    assert [one.prompt_tokens for one in response.classifications] == [2, 1]
    assert {request.pooling for request in plane.engine.requests} == {PoolingParams(classify=True)}
    assert response.report.usage.prompt_tokens == 3


async def test_each_token_has_a_row_of_its_own(plane: DataPlane) -> None:
    add_head(plane, 2, each_token=True)
    response = await plane.pooling.Classify(classify("ab"))
    [one] = response.classifications
    assert list(one.logits) == [0, -1, 1, 0]
    assert list(one.probabilities) == pytest.approx(softmax(1, 0) * 2, rel=1e-6)
    assert response.each_token
    [request] = plane.engine.requests
    assert request.pooling == PoolingParams(method=PoolingMethod.EACH, classify=True)


@pytest.mark.parametrize(
    ("num_labels", "activation", "expected"),
    [
        (2, ACTIVATION_SIGMOID, [sigmoid(1), sigmoid(0)]),
        (1, ACTIVATION_SOFTMAX, [1.0]),
        (1, 0, [sigmoid(1)]),
    ],
)
async def test_the_activation_is_the_callers_or_that_of_the_number_of_labels(
    plane: DataPlane, num_labels: int, activation: Any, expected: list[float]
) -> None:
    add_head(plane, num_labels)
    response = await plane.pooling.Classify(classify("b", activation=activation))
    assert list(response.classifications[0].probabilities) == pytest.approx(expected, rel=1e-6)


async def test_labels_are_those_of_the_model_where_it_has_as_many(plane: DataPlane) -> None:
    limits = msgspec.structs.replace(plane.engine.limits, labels=["bad", "good"])
    plane.models.models["demo"] = replace(plane.models.models["demo"], limits=limits)
    add_head(plane, 2)
    assert list((await plane.pooling.Classify(classify("a"))).labels) == ["bad", "good"]


async def test_probabilities_of_far_logits_are_numbers(plane: DataPlane) -> None:
    add_head(plane, 2)
    tokens = [Prompt(token_ids=TokenIds(ids=[token])) for token in (0, 255)]
    for activation in (ACTIVATION_SIGMOID, ACTIVATION_SOFTMAX):
        response = await plane.pooling.Classify(classify(prompts=tokens, activation=activation))
        assert all(0 <= value <= 1 for one in response.classifications for value in one.probabilities)


def give_base_a_head(plane: DataPlane, num_labels: int, labels: list[str], each_token: bool = False) -> None:
    """Have the model be a classifier."""
    head = ClassifierFacts(num_labels, each_token)
    plane.engine.limits = msgspec.structs.replace(plane.engine.limits, labels=labels, classifier=head)
    plane.models.models["demo"] = replace(plane.models.models["demo"], limits=plane.engine.limits)


@pytest.mark.parametrize("model", ["demo", "pirate", "pirate*0.5"])
async def test_the_head_of_a_model_serves_whoever_brings_none(plane: DataPlane, model: str) -> None:
    give_base_a_head(plane, 2, ["bad", "good"])
    plane.add_adapter()
    response = await plane.pooling.Classify(classify("xa", "c", model=model))
    assert [list(one.logits) for one in response.classifications] == [[0, -1], [2, 1]]
    assert (list(response.labels), response.each_token) == (["bad", "good"], False)


async def test_the_head_of_an_adapter_goes_before_that_of_the_model(plane: DataPlane) -> None:
    give_base_a_head(plane, 2, ["bad", "good"], each_token=True)
    add_head(plane, 3)
    response = await plane.pooling.Classify(classify("xa"))
    assert list(response.classifications[0].logits) == [0, -1, -2]
    assert (list(response.labels), response.each_token) == (["LABEL_0", "LABEL_1", "LABEL_2"], False)


async def test_a_model_reranks_with_its_head(plane: DataPlane) -> None:
    give_base_a_head(plane, 1, [])
    response = await plane.pooling.Rerank(rerank("a", "c", "b", model="demo"))
    assert [ranked.index for ranked in response.documents] == [1, 2, 0]


async def test_a_model_for_another_purpose_is_named(plane: DataPlane) -> None:
    give_base_a_head(plane, 3, [])
    failed = await failure(plane.pooling.Rerank(rerank("a", model="demo")))
    assert (failed.reason, failed.fields) == ("FEATURE_UNSUPPORTED", ["model"])
    assert "models/demo classifies texts with 3 labels" in failed.message


@pytest.mark.parametrize("model", ["demo", "pirate", "judge"])
async def test_a_model_with_a_head_generates_nothing_and_embeds(plane: DataPlane, model: str) -> None:
    give_base_a_head(plane, 2, [])
    plane.add_adapter()
    add_head(plane, 2)
    failed = await failure(plane.generate(make_spec(model=model)))
    assert (failed.code, failed.reason, failed.fields) == (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED", ["spec.model"])
    assert "has a classification head, and generates no text: ask Classify" in failed.message
    assert plane.engine.requests == []
    embedded = await plane.pooling.Embed(EmbedRequest(model=model, prompts=[Prompt(text="ab")]))
    assert list(embedded.embeddings[0].values) == [97, 98]


@pytest.mark.parametrize("model", ["demo", "pirate", "pirate*0.5"])
async def test_what_has_no_head_cannot_classify_and_is_named(plane: DataPlane, model: str) -> None:
    plane.add_adapter()
    failed = await failure(plane.pooling.Classify(classify("a", model=model)))
    assert (failed.code, failed.reason, failed.fields) == (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED", ["model"])
    assert "has no classification head" in failed.message
    assert plane.engine.requests == []


async def test_a_cold_head_is_waited_for_rather_than_replaced_by_the_base(plane: DataPlane) -> None:
    add_head(plane, 2)
    plane.engine.loads_allowed = False
    options = RunOptions(adapter_policy=AdapterPolicy(on_cold=ON_COLD_USE_BASE))
    failed = await failure(plane.pooling.Classify(classify("a", options=options)))
    assert failed.reason == "FEATURE_UNSUPPORTED"


async def test_an_adapter_with_a_head_generates_nothing_and_embeds(plane: DataPlane) -> None:
    add_head(plane, 2)
    failed = await failure(plane.generate(make_spec(model="judge")))
    assert (failed.code, failed.reason, failed.fields) == (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED", ["spec.model"])
    assert "has a classification head" in failed.message
    assert plane.engine.requests == []
    answer = await plane.generate(make_spec())
    assert answer.outputs[0].finished.reason == FINISH_REASON_MAX_TOKENS


async def test_an_answer_about_too_many_tokens_is_refused_before_it_is_computed(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=1000)) as plane:
        add_head(plane, 2, each_token=True)
        failed = await failure(plane.pooling.Classify(classify("a" * 63)))
        assert (failed.reason, plane.engine.requests) == ("MESSAGE_TOO_LARGE", [])
        await plane.pooling.Classify(classify("a" * 40))


# ---- rerank ----------------------------------------------------------------------------------------------------------


async def test_the_best_document_comes_first_and_the_earlier_of_equal_ones(plane: DataPlane) -> None:
    add_head(plane, 1)
    response = await plane.pooling.Rerank(rerank("a", "xc", "b", "c"))
    assert [ranked.index for ranked in response.documents] == [1, 3, 2, 0]
    assert [ranked.logit for ranked in response.documents] == [2, 2, 1, 0]
    assert [ranked.score for ranked in response.documents] == pytest.approx(list(map(sigmoid, (2, 2, 1, 0))))
    assert [ranked.prompt_tokens for ranked in response.documents] == [4, 3, 3, 3]
    assert [bytes(request.prompt_token_ids) for request in plane.engine.requests] == [
        b"q\na",
        b"q\nxc",
        b"q\nb",
        b"q\nc",
    ]


@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({"keep_order": True}, [0, 1, 2]),
        ({"top_n": 2}, [1, 2]),
        ({"top_n": 2, "keep_order": True}, [1, 2]),
        ({"top_n": 9}, [1, 2, 0]),
    ],
)
async def test_documents_come_as_the_caller_wants_them(
    plane: DataPlane, fields: dict[str, Any], order: list[int]
) -> None:
    add_head(plane, 1)
    response = await plane.pooling.Rerank(rerank("a", "c", "b", **fields))
    assert [ranked.index for ranked in response.documents] == order


async def test_of_two_labels_the_second_says_relevant(plane: DataPlane) -> None:
    add_head(plane, 2)
    [ranked] = (await plane.pooling.Rerank(rerank("a"))).documents
    assert ranked.score == pytest.approx(softmax(0, -1)[1])
    assert ranked.logit == -1


async def test_a_template_says_where_query_and_document_go(plane: DataPlane) -> None:
    add_head(plane, 1)
    template = "Is {document} about {query}?"
    await plane.pooling.Rerank(rerank("{query}", query="{document}", template=template))
    [request] = plane.engine.requests
    assert bytes(request.prompt_token_ids) == b"Is {query} about {document}?"


@pytest.mark.parametrize(("num_labels", "each_token", "why"), [(3, False, "3 labels"), (1, True, "tokens")])
async def test_a_head_for_another_purpose_is_refused(
    plane: DataPlane, num_labels: int, each_token: bool, why: str
) -> None:
    add_head(plane, num_labels, each_token)
    failed = await failure(plane.pooling.Rerank(rerank("a")))
    assert (failed.reason, failed.fields) == ("FEATURE_UNSUPPORTED", ["model"])
    assert why in failed.message


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a" * 200]}, "documents[0]"),
        ({"documents": ["a"] * 256, "query": "q" * 20_000}, "documents"),
        ({"template": "{query} alone"}, "template"),
        ({"template": "{query}{document}{document}"}, "template"),
        ({"top_n": 0}, "top_n"),
    ],
)
async def test_a_field_at_fault_is_named(plane: DataPlane, fields: dict[str, Any], at_fault: str) -> None:
    add_head(plane, 1)
    failed = await failure(plane.pooling.Rerank(rerank(**({"documents": ["a"]} | fields))))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, [at_fault])
