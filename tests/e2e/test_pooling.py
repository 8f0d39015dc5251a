"""Texts as numbers, from the client to the engine and back, beside generations."""

import asyncio
import math

import pytest

from loraplex import AsyncAdminClient, AsyncClient, InvalidArgument, Unsupported
from tests.e2e.conftest import HEADS
from tests.waits import MOST_SECONDS

TEXTS = ["A fox ran by.", "A small fox.", "x" * 300]


async def test_vectors_are_of_length_one_and_differ_by_adapter(client: AsyncClient) -> None:
    generating = asyncio.ensure_future(client.generate("pirate", "A fox", max_tokens=32))
    answers = await asyncio.gather(*(client.embed(name, TEXTS) for name in ("storyteller", "pirate", "poet")))
    assert (await generating).outputs[0].text
    embedded = [[list(one.values) for one in answer.embeddings] for answer in answers]
    for vectors in embedded:
        assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5) for vector in vectors)
    assert embedded[0] != embedded[1] != embedded[2] != embedded[0]


async def test_a_text_has_the_same_vector_whoever_shares_its_batch(client: AsyncClient) -> None:
    alone, beside = [
        await client.embed("pirate", texts, bypass_prefix_cache=True, pooling="mean") for texts in (TEXTS[:1], TEXTS)
    ]
    assert list(alone.embeddings[0].values) == list(beside.embeddings[0].values)


async def test_a_vector_is_cut_before_it_is_scaled(client: AsyncClient) -> None:
    whole = (await client.embed("storyteller", TEXTS[0], normalize=False)).embeddings[0].values
    cut = (await client.embed("storyteller", TEXTS[0], dimensions=8)).embeddings[0].values
    length = math.hypot(*whole[:8])
    assert list(cut) == pytest.approx([value / length for value in whole[:8]], rel=1e-5)


async def test_more_dimensions_than_there_are_are_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match="dimensions"):
        await client.embed("storyteller", TEXTS[0], dimensions=1 << 20)


async def test_heads_classify_and_rerank_beside_generations(client: AsyncClient, admin: AsyncAdminClient) -> None:
    for name in HEADS:
        await admin.create_adapter(name, base_model="storyteller", source=name, wait=MOST_SECONDS)
    tagged, judged, ranked, generated = await asyncio.gather(
        client.classify("entities", TEXTS),
        client.classify("judge", [f"fox\n{text}" for text in TEXTS]),
        client.rerank("judge", "fox", TEXTS),
        client.generate("pirate", "A fox", max_tokens=8),
    )
    assert [len(one.logits) for one in tagged.classifications] == [
        3 * one.prompt_tokens for one in tagged.classifications
    ]
    assert all(sum(one.probabilities[:3]) == pytest.approx(1) for one in tagged.classifications)
    scores = [one.probabilities[0] for one in judged.classifications]
    assert {one.index: one.score for one in ranked.documents} == pytest.approx(dict(enumerate(scores)))
    assert [one.score for one in ranked.documents] == sorted(scores, reverse=True)
    assert generated.outputs[0].text
    with pytest.raises(Unsupported, match="has a classification head"):
        await client.generate("judge", "A fox")
    with pytest.raises(Unsupported, match="has no classification head"):
        await client.classify("pirate", "A fox")
