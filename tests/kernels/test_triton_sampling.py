"""The kernels that change logits and draw from them give what the reference gives, bit for bit: on a GPU where there is
one, else under Triton's interpreter, with few rows (`test_sampling` has many, and takes minutes so).

Weights are added in another order than the reference adds them. In float64 that decides a token only where a sum and
its bound are equal in fifteen digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex_kernels.draws import Draws, LogitChanges, Penalties, RowTokens, Watermarks
from loraplex_kernels.reference import ReferenceOps

triton = pytest.importorskip("triton")

from loraplex_kernels.triton import TritonOps, draw  # noqa: E402  (imports triton)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("no GPU, and not under the interpreter", allow_module_level=True)
OPS, REFERENCE = TritonOps(DEVICE), ReferenceOps(DEVICE)

UNCUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
CUTS: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 0.7},
    {"top_k": 4},
    {"top_p": 0.6, "temperature": 1.5},
    {"min_p": 0.2},
    {"typical_p": 0.4},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.02, "typical_p": 0.6},
    {"top_k": 1000, "top_p": 0.9, "min_p": 0.5},
]


def draws(rows: list[dict[str, Any]]) -> Draws:
    columns = [np.array([(UNCUT | row)[name] for row in rows]) for name in UNCUT]
    columns += [np.arange(len(rows), dtype=np.uint64), np.arange(len(rows)) + 7]
    return Draws(*columns)


def logits_of(num_rows: int, vocab_size: int) -> torch.Tensor:
    return (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some dozen tokens take several blocks, with each pivot or without."""
    monkeypatch.setattr(draw, "BLOCKS", draw.Blocks(32, 16))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", ["random", "rounded", "masked"])
def test_tokens_are_those_of_the_reference(shape: str) -> None:
    logits = logits_of(len(CUTS), 75)
    if shape == "rounded":  # many times the same logits, and zeros of both signs
        logits = (logits / 2).round()
    elif shape == "masked":
        logits[logits < logits.median()] = -torch.inf
    expected = REFERENCE.draw_tokens(logits.clone(), draws(CUTS))
    assert OPS.draw_tokens(logits, draws(CUTS)).tolist() == expected.tolist()


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.95}], ids=["uncut", "cut"])
def test_tokens_of_a_large_vocabulary_are_those_of_the_reference(fields: dict[str, Any]) -> None:
    logits = logits_of(1, 152_064)
    expected = REFERENCE.draw_tokens(logits.clone(), draws([fields]))
    assert OPS.draw_tokens(logits, draws([fields])).tolist() == expected.tolist()


def test_the_highest_number_draws_a_token_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product with the sum of all weights may be rounded to that sum."""
    monkeypatch.setattr(Draws, "numbers", property(lambda self: np.full(len(self.seeds), 1 - 2.0**-53)))
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 0.5, -torch.inf]] * 2, device=DEVICE)
    assert OPS.draw_tokens(logits, draws([{}, {"top_k": 5}])).tolist() == [3, 0]


@pytest.mark.usefixtures("small_blocks")
def test_what_is_cut_is_what_the_reference_cuts() -> None:
    rows = [CUTS[0], CUTS[1], CUTS[6], {}]
    logits = logits_of(len(rows), 75)
    logits[-1, 4] = torch.nan
    expected = logits.clone()
    REFERENCE.cut_logits(expected, draws(rows))
    OPS.cut_logits(logits, draws(rows))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
    assert logits.isneginf().any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(temperature: float, value: float) -> None:
    logits = logits_of(3, 40)
    logits[1] = value
    tokens = OPS.draw_tokens(logits, draws([{"temperature": temperature}] * 3)).tolist()
    assert [token < 0 for token in tokens] == [False, True, False]


@pytest.mark.parametrize("vocab_size", [45, 1500])
def test_logits_are_changed_as_the_reference_changes_them(vocab_size: int) -> None:
    generator = np.random.default_rng(0)
    had = RowTokens.of([0, 2, 3], [generator.permutation(vocab_size)[:count] for count in (5, 1300, 40)])
    assert had is not None
    numbers = {"repetition": [0.8, 1.0, 1.5], "presence": [-1.0, 0.0, 1.1], "frequency": [0.0, 0.7, 0.3]}
    seeds, deltas = np.array([2**63 + 5, 7], dtype=np.uint64), np.array([2.0, 3.0], dtype=np.float32)
    changes = LogitChanges(
        limits=np.array([vocab_size, vocab_size - 1, vocab_size - 5, vocab_size]),
        penalties=Penalties(had, generator.integers(0, 4, len(had.token_ids)), *map(np.array, numbers.values())),
        bias=RowTokens.of([0, 1], [[3, 5], [7]]),
        bias_values=np.array([1.5, -100.0, 2.0], dtype=np.float32),
        allowed=RowTokens.of([1], [[3, 7, vocab_size - 2]]),
        forbidden=RowTokens.of([2, 3], [[4], []]),
        watermarks=Watermarks(np.array([1, 3]), seeds, np.array([0.5, 0.3]), deltas),
    )
    logits = logits_of(4, vocab_size)
    expected = logits.clone()
    REFERENCE.adjust_logits(expected, changes)
    OPS.adjust_logits(logits, changes)
    assert torch.equal(logits, expected)
