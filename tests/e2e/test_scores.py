"""Scores from the client to the engine and back: they are the log-probabilities that generations have."""

import pytest

from loraplex import AsyncClient


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
