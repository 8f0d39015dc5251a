"""The detector of watermarks: it finds what the engine's kernels mark, and nothing where there is no mark."""

import random

import numpy as np
import pytest
import torch

from loraplex import Watermark
from loraplex_engine.execution.arrays import History
from loraplex_engine.execution.sampler import logit_changes
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.link.watermark import Watermark as Mark
from loraplex_engine.scheduling.request import Request
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import ReferenceOps
from tests.engine.drawn import drawn

V = 200
KEY = bytes(range(16))
OPS: Ops = ReferenceOps(torch.device("cpu"))


def history(output: list[int], drafts: list[int], **fields: float) -> History:
    mark = Mark(**({"key": KEY, "gamma": 0.25, "delta": 2.0, "context_tokens": 1} | fields))  # type: ignore[arg-type]
    request = Request(AddRequest(1, [3, 4], SamplingParams(seed=1, max_tokens=999, watermark=mark)), 1, now=0.0)
    request.token_ids.extend(output)
    return History.of(request, drafts)


@pytest.mark.parametrize("context", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.01, 0.25, 0.9])
def test_kernels_raise_the_tokens_that_the_detector_calls_green(context: int, gamma: float) -> None:
    tokens = [3, 4, 17, 180, 5]
    mark = Watermark(KEY, gamma=gamma, context_tokens=context)
    logits = torch.zeros(2, V)
    fields = {"gamma": gamma, "context_tokens": context, "delta": 1.5}
    rows = [history([17, 180, 5], [], **fields), history([17], [180, 5], **fields)]  # a draft is as good as a token
    OPS.adjust_logits(logits, logit_changes(rows, V))
    expected = [1.5 if mark.is_green(tokens, token) else 0.0 for token in range(V)]
    assert logits.tolist() == [expected, expected]


def test_a_row_without_a_watermark_stays_as_it_is() -> None:
    plain = History.of(Request(AddRequest(1, [3, 4], SamplingParams(seed=1, max_tokens=9)), 1, now=0.0))
    logits = torch.zeros(2, V)
    OPS.adjust_logits(logits, logit_changes([plain, history([], [])], V))
    assert not logits[0].any()
    assert logits[1].any()


def written(count: int, **fields: float) -> list[int]:
    """Tokens drawn with a watermark from a flat distribution."""
    tokens = list[int]()
    for _ in range(count):
        [token] = drawn(OPS, torch.zeros(1, V), [history(tokens, [], **fields)])
        assert token is not None
        tokens.append(token.token_id)
    return tokens


@pytest.mark.parametrize("context", [1, 3])
def test_a_marked_output_is_found_with_its_key_alone(context: int) -> None:
    tokens = written(200, context_tokens=context)
    found = Watermark(KEY, context_tokens=context).detect(tokens)
    assert found.z > 6
    assert found.p_value < 1e-9
    assert abs(Watermark(b"x" * 16, context_tokens=context).detect(tokens).z) < 4


def test_what_is_not_marked_has_as_many_green_tokens_as_chance_gives() -> None:
    generator = random.Random(3)
    scores = [Watermark(KEY).detect([generator.randrange(5000) for _ in range(400)]).z for _ in range(100)]
    assert abs(np.mean(scores)) < 0.4  # of 100 standard normal ones: 0.1
    assert 0.7 < np.std(scores) < 1.3


def test_a_repeated_text_is_no_surer_than_one() -> None:
    tokens = written(40)
    once, often = Watermark(KEY).detect(tokens), Watermark(KEY).detect(tokens * 20)
    assert often.num_scored <= once.num_scored + 1


def test_too_few_tokens_say_nothing() -> None:
    found = Watermark(KEY, context_tokens=4).detect([1, 2, 3, 4])
    assert (found.num_scored, found.z, found.p_value) == (0, 0.0, 0.5)


def test_no_text_of_a_watermark_shows_its_key() -> None:
    params = SamplingParams(seed=1, max_tokens=9, watermark=Mark(KEY, 0.25, 2.0, 1))
    for shown in (repr(Watermark(KEY)), repr(params), f"{AddRequest(1, [3], params)}"):
        assert repr(KEY) not in shown
        assert "key" not in shown
