"""Sampling: each parameter means what the field means by it, and a row never depends on its neighbours."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_engine.execution.arrays import History
from loraplex_engine.execution.sampler import draws, logit_changes
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import SampledToken
from loraplex_kernels import sampling
from loraplex_kernels.draws import uniform
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import ReferenceOps
from tests.engine.drawn import drawn

V = 50
OPS: Ops = ReferenceOps(torch.device("cpu"))


def make_history(prompt: list[int] | None = None, output: list[int] | None = None, **fields: Any) -> History:
    sampling = SamplingParams(**({"seed": 1, "max_tokens": 99} | fields))
    request = Request(AddRequest(1, prompt or [3, 4], sampling), 1, now=0.0)
    request.token_ids.extend(output or [])
    return History.of(request)


def random_logits(rows: int, seed: int = 0, vocab: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draw_many(logits: torch.Tensor, count: int = 2000, **fields: Any) -> torch.Tensor:
    """The frequency of each token over `count` seeds, from one row of logits."""
    histories = [make_history(seed=seed, **fields) for seed in range(count)]
    tokens = OPS.draw_tokens(logits.repeat(count, 1), draws(histories))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def adjust_logits(logits: torch.Tensor, histories: list[History]) -> None:
    OPS.adjust_logits(logits, logit_changes(histories, logits.shape[-1]))


def sample(logits: torch.Tensor, histories: list[History]) -> list[SampledToken]:
    """What is drawn for each row, of which there must be a token. The logits stay as they are."""
    tokens: list[SampledToken] = []
    for token in drawn(OPS, logits.clone(), histories):
        assert token is not None
        tokens.append(token)
    return tokens


def test_greedy_takes_the_most_likely():
    logits = random_logits(4)
    tokens = sample(logits, [make_history(temperature=0.0) for _ in range(4)])
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()


def test_frequencies_follow_the_distribution():
    logits = random_logits(1, vocab=8)[0]
    expected = torch.softmax(logits / 0.7, -1)
    frequencies = draw_many(logits, temperature=0.7)
    # 2000 draws: the standard error of a frequency is at most 0.0112
    assert torch.allclose(frequencies, expected, atol=0.045)


# In the order in which transformers' generation applies them, after the temperature.
WARPERS = {
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"top_k": 10, "top_p": 0.7},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
        {"top_k": 8, "typical_p": 0.5},
        {"top_p": 0.7, "typical_p": 0.5},
        {"min_p": 0.1, "typical_p": 0.4},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.3, "temperature": 1.5},
        {"top_k": 3, "top_p": 0.5, "typical_p": 0.9, "temperature": 2.0},
        {"typical_p": 0.01},
        {"top_p": 1e-300, "typical_p": 1e-300},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_candidates", [512, 4])  # with and without the fall-back to a whole row
def test_support_equals_transformers(fields, num_candidates, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", num_candidates)
    logits = random_logits(1, seed=3)[0]
    scores = (logits / fields.get("temperature", 1.0))[None]
    for name, warper in WARPERS.items():
        if name in fields:
            scores = getattr(transformers, warper)(fields[name])(None, scores)
    expected = torch.softmax(scores[0], -1)
    frequencies = draw_many(logits, **fields)
    assert torch.equal(frequencies > 0, (expected > 0) & (frequencies > 0))  # nothing outside the support
    assert torch.allclose(frequencies, expected, atol=0.045)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 30, 200]),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    typical_p=st.floats(0.05, 1.0),
)
def test_what_is_drawn_is_always_in_the_support_of_transformers(seed, temperature, top_k, top_p, min_p, typical_p):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(1, seed=seed)
    values = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    scores = logits.double() / temperature
    for name, warper in WARPERS.items():
        if values[name] != off[name]:
            scores = getattr(transformers, warper)(values[name])(None, scores)
    histories = [make_history(seed=number, temperature=temperature, **values) for number in range(20)]
    assert torch.isfinite(scores[0, OPS.draw_tokens(logits.repeat(20, 1), draws(histories))]).all()


def test_equally_likely_tokens_are_drawn_alike_from_few_candidates_and_from_the_whole_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = random_logits(1, vocab=4000).round()  # many times the same values
    histories = [make_history(seed=seed, top_k=1 + seed % 60) for seed in range(200)]
    few = OPS.draw_tokens(logits.repeat(200, 1), draws(histories))
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 0)
    assert OPS.draw_tokens(logits.repeat(200, 1), draws(histories)).tolist() == few.tolist()


def test_tokens_that_are_equally_typical_stay_together():
    logits = torch.zeros(8)  # each has the same information, none is nearer to the expected one
    assert (draw_many(logits, typical_p=0.3) > 0).all()


def test_penalties_equal_transformers_and_the_openai_formula():
    transformers = pytest.importorskip("transformers")
    logits = random_logits(1)
    prompt, output = [1, 2, 3], [3, 4, 4, 4]
    ours = logits.clone()
    adjust_logits(ours, [make_history(prompt, output, repetition_penalty=1.3)])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    assert torch.allclose(ours, theirs)

    ours = logits.clone()
    adjust_logits(ours, [make_history(prompt, output, presence_penalty=0.5, frequency_penalty=0.25)])
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 0.25 * 1
    expected[0, 4] -= 0.5 + 0.25 * 3
    assert torch.allclose(ours, expected)


def test_bias_allow_list_and_min_tokens():
    logits = torch.zeros(3, V)
    histories = [
        make_history(logit_bias={7: 2.5, 8: -100.0}),
        make_history(allowed_token_ids=(4, 9)),
        make_history(output=[5], min_tokens=2, eos_token_ids=(0,), stop_token_ids=(1,)),
    ]
    adjust_logits(logits, histories)
    assert (logits[0, 7], logits[0, 8], logits[0, 9]) == (2.5, -100.0, 0.0)
    assert torch.isfinite(logits[1]).nonzero().flatten().tolist() == [4, 9]
    assert torch.isinf(logits[2]).nonzero().flatten().tolist() == [0, 1]


def test_min_tokens_reached_allows_endings_again():
    logits = torch.zeros(1, V)
    adjust_logits(logits, [make_history(output=[5, 6], min_tokens=2, eos_token_ids=(0,))])
    assert torch.isfinite(logits).all()


@settings(max_examples=50, deadline=None)
@given(
    params=st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
                "top_k": st.sampled_from([0, 1, 3, 40]),
                "top_p": st.sampled_from([0.1, 0.9, 1.0]),
                "min_p": st.sampled_from([0.0, 0.2]),
                "typical_p": st.sampled_from([0.5, 1.0]),
                "repetition_penalty": st.sampled_from([1.0, 1.5]),
                "seed": st.integers(0, 2**63),
            }
        ),
        min_size=2,
        max_size=6,
    )
)
def test_a_row_is_drawn_alike_alone_and_in_company(params):
    logits = random_logits(len(params), seed=7)
    histories = [make_history(output=[5, 6], **fields) for fields in params]
    together = [t.token_id for t in sample(logits, histories)]
    alone = [sample(logits[i : i + 1], [r])[0].token_id for i, r in enumerate(histories)]
    assert together == alone


def test_another_seed_and_another_position_draw_other_numbers():
    numbers = uniform(np.repeat(np.arange(30, dtype=np.uint64), 30), np.tile(np.arange(30), 30))
    assert len(set(numbers.tolist())) == 900
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.04  # standard error 0.0096


def test_logprobs_are_of_the_model_not_of_the_sampler():
    logits = random_logits(2)
    expected = torch.log_softmax(logits, -1)
    histories = [
        make_history(temperature=0.5, top_k=1, num_logprobs=3, logit_bias={11: 50.0}),
        make_history(temperature=0.0, num_logprobs=None),
    ]
    first, second = sample(logits, histories)
    assert second.logprobs is None
    assert first.token_id == 11
    details = first.logprobs
    assert details is not None
    assert math.isclose(details.logprob, expected[0, 11].item(), rel_tol=1e-5)
    assert details.rank == int((expected[0] > expected[0, 11]).sum()) + 1
    assert details.top_ids == expected[0].topk(3).indices.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.3},
        {"top_p": 0.6, "repetition_penalty": 1.3},
        {"typical_p": 0.5, "min_tokens": 9, "eos_token_ids": (11,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_candidates", [512, 4])
def test_processed_logprobs_are_of_the_distribution_that_transformers_draws_from(fields, num_candidates, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", num_candidates)
    logits = random_logits(1, seed=3)
    scores = logits.clone()
    if "repetition_penalty" in fields:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"])
        scores = penalty(torch.tensor([[3, 4, 5]]), scores)
    scores[:, list(fields.get("eos_token_ids", ()))] = -math.inf
    scores /= fields.get("temperature", 1.0)
    for name, warper in WARPERS.items():
        if name in fields:
            scores = getattr(transformers, warper)(fields[name])(None, scores)
    expected = torch.log_softmax(scores[0], -1)

    named = tuple(range(V))
    history = make_history(output=[5], num_logprobs=V, processed_logprobs=True, logprob_token_ids=named, **fields)
    details = sample(logits, [history])[0].logprobs
    assert details is not None
    assert torch.allclose(torch.tensor(details.named_logprobs), expected, atol=1e-5)
    possible = int(torch.isfinite(expected).sum())
    assert details.top_ids == expected.topk(possible).indices.tolist()  # and none that could not be drawn
    assert details.logprob == details.named_logprobs[details.token_id]


def test_processed_logprobs_of_a_greedy_row_are_neither_divided_nor_cut():
    logits = random_logits(1)
    history = make_history(temperature=0.0, top_k=1, num_logprobs=1, processed_logprobs=True, logit_bias={7: 30.0})
    details = sample(logits, [history])[0].logprobs
    logits[0, 7] += 30.0
    assert details is not None
    expected = torch.log_softmax(logits.double(), -1)[0, 7].item()  # next to 0: float32 has two digits of it
    assert math.isclose(details.logprob, expected, rel_tol=1e-5)


def test_rows_that_name_different_tokens_get_their_own():
    logits = random_logits(3)
    expected = torch.log_softmax(logits, -1)
    named = [(5, 6, 5), (), (49,)]
    histories = [make_history(num_logprobs=0, logprob_token_ids=ids) for ids in named]
    for row, token in enumerate(sample(logits, histories)):
        assert token.logprobs is not None
        assert torch.allclose(torch.tensor(token.logprobs.named_logprobs), expected[row, list(named[row])])


@pytest.mark.parametrize("processed", [False, True])
def test_a_row_that_cannot_be_drawn_costs_its_neighbours_no_logprobs(processed):
    logits = random_logits(2)
    logits[0, 3] = math.nan
    history = make_history(num_logprobs=2, processed_logprobs=processed, top_k=3)
    spoilt, whole = drawn(OPS, logits, [history, history])
    assert spoilt is None
    assert whole is not None
    assert whole.logprobs is not None


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(temperature, value, everywhere):
    logits = random_logits(3)
    if everywhere:
        logits[1] = value
    else:
        logits[1, V - 1] = value
    histories = [make_history(temperature=temperature, num_logprobs=1) for _ in range(3)]
    tokens = drawn(OPS, logits, histories)
    drawable = not everywhere and value == -math.inf  # a probability of 0, among others
    assert [token is None for token in tokens] == [False, not drawable, False]


def test_log_probabilities_that_are_no_numbers_are_not_told():
    logits = random_logits(2)
    logits[0, 7] = math.nan
    history = make_history(allowed_token_ids=(1, 2), num_logprobs=1)
    first, second = drawn(OPS, logits, [history, history])
    assert first is None
    assert second is not None


def test_logits_that_overflow_when_divided_by_the_temperature_are_refused():
    logits = random_logits(1) * 1e36
    assert drawn(OPS, logits.clone(), [make_history(temperature=1.0)]) != [None]
    assert drawn(OPS, logits.clone(), [make_history(temperature=0.01)]) == [None]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(4)
    tokens = sample(logits, [make_history(temperature=temperature, seed=s) for s in range(4)])
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()


def test_the_smallest_temperature_that_draws_draws_by_the_distribution():
    logits = torch.tensor([3.0, 3.0 + 1e-5, -50.0])
    expected = torch.softmax((logits / 1e-5).double(), -1).float()
    assert torch.allclose(draw_many(logits, temperature=1e-5), expected, atol=0.045)


def test_rows_of_the_head_without_a_token_are_never_drawn():
    logits = random_logits(4)
    logits[:, 40:] += 50.0
    limits = [40, None, 40, 45]
    for temperature in (0.0, 1.0):
        histories = [make_history(temperature=temperature, num_token_ids=limit, num_logprobs=1) for limit in limits]
        tokens = [token.token_id for token in sample(logits, histories)]
        assert [token < 40 for token in tokens] == [True, False, True, False]
        assert tokens[3] < 45
