"""Beam search against transformers' `generate(num_beams=…)`, token by token, beside requests of all other kinds."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.beams import BLOCK, EARLY, FAMILIES, Bench, Family, prompt_of


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


SEARCHES = [  # width, outputs, length penalty, early stopping, most tokens, least tokens
    (2, 1, 1.0, EarlyStopping.HEURISTIC, 12, 0),
    (4, 4, 1.0, EarlyStopping.ALWAYS, 16, 0),
    (3, 2, 0.0, EarlyStopping.NEVER, 20, 0),
    (5, 3, 2.0, EarlyStopping.NEVER, 14, 4),
    (4, 2, -1.0, EarlyStopping.HEURISTIC, 18, 6),
    (8, 8, 0.6, EarlyStopping.HEURISTIC, 9, 0),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 11},
        {"kv_cache_bytes": 28 * BLOCK * 2 * 2 * 2 * 16 * 4},
        {"enable_prefix_caching": False},
    ],
    ids=["plain", "chunked", "preempted", "uncached"],
)
def test_searches_equal_transformers_token_by_token(family: Family, settings: dict[str, Any]) -> None:
    bench = Bench(family, **settings)
    asked = {number: (prompt_of(3 + 5 * number, number), bool(number % 2), *SEARCHES[number]) for number in range(6)}
    for number, (prompt, tuned, width, count, penalty, early, most, least) in asked.items():
        beams = Beams(width, [0] * count, penalty, early)
        bench.search(number, prompt, tuned, beams, max_tokens=most, min_tokens=least)
        sampling = SamplingParams(seed=number, max_tokens=10)
        bench.core.add(AddRequest(9000 + number, prompt, sampling, None if tuned else bench.key))
        bench.step()
    bench.finish()
    for number, (prompt, tuned, width, count, penalty, early, most, least) in asked.items():
        outputs, scores = family.searched(
            prompt,
            tuned,
            num_beams=width,
            num_return_sequences=count,
            length_penalty=penalty,
            early_stopping=EARLY[early],
            max_new_tokens=most,
            **({"min_new_tokens": least} if least else {}),
        )
        found, found_scores = bench.found(number, count)
        assert found == outputs, (number, found_scores, scores)
        assert found_scores == pytest.approx(scores, rel=1e-3, abs=1e-3)
    if "kv_cache_bytes" in settings:
        assert bench.core.scheduler.num_preemptions > 0
    assert bench.core.blocks.num_used == 0
    bench.core.blocks.check()
    bench.core.close()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": {11: 2.0}}, {"sequence_bias": [[[11], 2.0]]}),
    ],
    ids=["penalty", "bias"],
)
def test_what_changes_logits_changes_log_probabilities_as_in_transformers(
    family: Family, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    bench = Bench(family)
    prompt = prompt_of(9, 3)
    bench.search(0, prompt, True, Beams(4, [0, 0]), max_tokens=12, **ours)
    bench.finish()
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12} | theirs
    outputs, scores = family.searched(prompt, True, **options)
    found, found_scores = bench.found(0, 2)
    assert found == outputs
    assert found_scores == pytest.approx(scores, rel=1e-3)
    bench.core.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("llama", tmp_path_factory.mktemp("one"))


def test_a_search_that_is_dropped_leaves_nothing(llama: Family) -> None:
    bench = Bench(llama)
    bench.search(0, prompt_of(9, 1), True, Beams(4, [0, 0]), max_tokens=40, eos_token_ids=())
    for _ in range(6):
        bench.step()
    bench.core.abort([0])
    bench.finish()
    assert [output.token_ids for output in bench.outputs[0]] == [[]] * len(bench.outputs[0])
    assert bench.core.blocks.num_used == 0
    bench.core.blocks.check()
    bench.core.close()


def test_a_search_at_its_time_limit_gives_the_best_that_it_has(llama: Family) -> None:
    bench = Bench(llama)
    now = 0.0
    bench.core.scheduler.clock = lambda: now
    bench.search(0, prompt_of(9, 1), False, Beams(3, [0, 0]), max_tokens=40, eos_token_ids=(), time_limit_seconds=1e9)
    for _ in range(6):
        bench.step()
    now = 1e12
    bench.finish()
    found, scores = bench.found(0, 2)
    assert [len(output) for output in found] == [6, 6]
    assert scores == sorted(scores, reverse=True)
    assert bench.outputs[0][-1].finish_reason is FinishReason.TIME_LIMIT
    assert bench.core.blocks.num_used == 0
    bench.core.close()


def test_a_search_whose_beams_do_not_fit_fails_alone(llama: Family) -> None:
    bench = Bench(llama, kv_cache_bytes=26 * BLOCK * 2 * 2 * 2 * 16 * 4)  # 26 blocks
    bench.search(0, prompt_of(9, 1), False, Beams(8, [0]), max_tokens=60, eos_token_ids=(), min_tokens=0)
    bench.core.add(AddRequest(9, prompt_of(5, 2), SamplingParams(seed=0, max_tokens=8)))
    bench.finish()
    assert "too few blocks" in bench.outputs[0][-1].error
    assert bench.outputs[9][-1].finish_reason is FinishReason.MAX_TOKENS
    assert bench.core.blocks.num_used == 0
    bench.core.close()


def test_a_search_says_what_it_takes_step_by_step(llama: Family) -> None:
    bench = Bench(llama)
    bench.search(0, prompt_of(9, 1), False, Beams(3, [0]), max_tokens=5, eos_token_ids=())
    bench.finish()
    assert [output.num_searched for output in bench.outputs[0]] == [1, 3, 3, 3, 3, 0]
    bench.core.close()
