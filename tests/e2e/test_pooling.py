"""Texts as numbers, from the client to the engine and back, beside generations."""

import asyncio
import math
from typing import Any

import pytest

from loraplex import AsyncClient, InvalidArgument

TEXTS = ["A fox ran by.", "A small fox.", "x" * 300]


async def test_vectors_are_of_length_one_and_differ_by_adapter(client: AsyncClient) -> None:
    answers, _ = await asyncio.gather(
        asyncio.gather(*(client.embed(name, TEXTS) for name in ("storyteller", "pirate", "poet"))),
        client.generate("pirate", "A fox", max_tokens=32),
    )
    embedded = [[list(one.values) for one in answer.embeddings] for answer in answers]
    for vectors in embedded:
        assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5) for vector in vectors)
    assert embedded[0] != embedded[1] != embedded[2] != embedded[0]


async def test_a_text_has_the_same_vector_whoever_shares_its_batch(client: AsyncClient) -> None:
    options: dict[str, Any] = {"bypass_prefix_cache": True, "pooling": "mean"}
    alone = await client.embed("pirate", TEXTS[:1], **options)
    beside = await client.embed("pirate", TEXTS, **options)
    assert list(alone.embeddings[0].values) == list(beside.embeddings[0].values)


async def test_a_vector_is_cut_before_it_is_scaled(client: AsyncClient) -> None:
    whole = (await client.embed("storyteller", TEXTS[0], normalize=False)).embeddings[0].values
    cut = (await client.embed("storyteller", TEXTS[0], dimensions=8)).embeddings[0].values
    length = math.hypot(*whole[:8])
    assert list(cut) == pytest.approx([value / length for value in whole[:8]], rel=1e-5)


async def test_more_dimensions_than_there_are_are_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match="dimensions"):
        await client.embed("storyteller", TEXTS[0], dimensions=1 << 20)
