"""Scores from the client to the engine and back: they are the log-probabilities that generations have."""

from typing import Any

import pytest

from loraplex import AsyncClient, Watermark


@pytest.mark.parametrize("target", ["storyteller", "pirate"])
async def test_a_score_is_what_the_generation_of_that_text_says(client: AsyncClient, target: str) -> None:
    written = await client.generate(target, "A fox", max_tokens=6, seed=3, token_ids=True, logprobs=True)
    [output] = written.outputs
    answer = await client.score(target, "A fox", [output.token_ids, " is"], logprobs=True)
    expected = [token.logprob for token in output.logprobs]
    assert [token.logprob for token in answer.scores[0].token_logprobs] == pytest.approx(expected, abs=1e-4)
    assert answer.scores[0].logprob == pytest.approx(sum(expected), abs=1e-3)
    assert answer.scores[1].num_tokens == len(answer.scores[1].token_logprobs)


async def test_a_prompt_read_without_an_output_scores_as_its_parts(client: AsyncClient) -> None:
    whole = await client.generate("storyteller", [65, 32, 102, 111], max_tokens=0, prompt_logprobs=0)
    answer = await client.score("storyteller", [65], [[32, 102, 111]])
    assert answer.scores[0].logprob == pytest.approx(sum(token.logprob for token in whole.prompt_logprobs), abs=1e-4)
    assert (whole.usage.completion_tokens, whole.outputs[0].text) == (0, "")


@pytest.mark.parametrize("target", ["storyteller", "pirate"])
async def test_a_search_finds_outputs_as_likely_as_its_scores_say(client: AsyncClient, target: str) -> None:
    searched = await client.generate(target, "A fox", num_beams=4, n=3, max_tokens=8, ignore_eos=True, token_ids=True)
    scores = [output.finished.score for output in searched.outputs]
    assert scores == sorted(scores, reverse=True)
    answer = await client.score(target, "A fox", [output.token_ids for output in searched.outputs])
    assert [each.logprob / 8 for each in answer.scores] == pytest.approx(scores, abs=1e-3)
    greedy = await client.generate(target, "A fox", temperature=0, max_tokens=8, ignore_eos=True, token_ids=True)
    alone = await client.score(target, "A fox", [greedy.outputs[0].token_ids])
    assert answer.scores[0].logprob >= alone.scores[0].logprob - 1e-3


async def test_the_best_of_several_is_the_likeliest_of_them(client: AsyncClient) -> None:
    asked: dict[str, Any] = {"seed": 5, "max_tokens": 8, "ignore_eos": True, "logprobs": True}
    every = await client.generate("storyteller", "A fox", n=6, **asked)
    best = await client.generate("storyteller", "A fox", best_of=6, **asked)
    means = {sum(token.logprob for token in each.logprobs) / 8: each.text for each in every.outputs}
    assert best.outputs[0].text == means[max(means)]
    assert best.outputs[0].finished.score == pytest.approx(max(means), abs=1e-4)


async def test_a_watermark_is_found_by_who_has_its_key(client: AsyncClient) -> None:
    mark = Watermark(key=b"a secret of bytes", delta=4.0)
    answer = await client.generate(
        "storyteller", "A fox", max_tokens=120, ignore_eos=True, seed=1, token_ids=True, watermark=mark
    )
    plain = await client.generate("storyteller", "A fox", max_tokens=120, ignore_eos=True, seed=1, token_ids=True)
    assert mark.detect(answer.outputs[0].token_ids).z > 4
    assert mark.detect(plain.outputs[0].token_ids).z < 4
