"""Every backend draws the tokens that the reference draws, over rows that ask for all kinds of things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.draws import Draws, LogitChanges, Penalties, RowTokens, Watermarks
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = ReferenceOps(DEVICE)
# Under the interpreter a row takes half a second: `test_triton_sampling` has few of them.
BACKENDS = ["cpu", pytest.param("triton", marks=pytest.mark.long)] if DEVICE.type == "cpu" else ["triton"]

SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x * 3,
    "flat": lambda x: x * 0.01,
    "peaked": lambda x: x * 30,
    "equal": lambda x: x * 0,
    "ties": torch.round,
    "masked": lambda x: x.masked_fill(x > 0, -torch.inf),
    "nearly all masked": lambda x: x.masked_fill(x < x.amax(-1, keepdim=True) - 0.3, -torch.inf),
    "far apart": lambda x: x * 1e30,
}
TOKENS = st.floats(0, 1, exclude_max=True)  # of any vocabulary: the share of its ids that come before
CUTS = {
    "temperature": st.sampled_from([0.0, 0.02, 0.3, 1.0, 1.7, 90.0]),
    "top_k": st.sampled_from([0, 1, 5, 40, 90, 700, 2500, 10**6]),
    "top_p": st.sampled_from([1e-6, 0.05, 0.5, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 1e-20, 0.02, 0.5, 1.0]),
    "typical_p": st.sampled_from([0.2, 0.5, 1.0]),
    "seed": st.integers(0, 2**64 - 1),
    "shape": st.sampled_from(sorted(SHAPES)),
}
CHANGES = {
    "repetition": st.sampled_from([0.8, 1.0, 1.5]),
    "presence": st.sampled_from([-1.0, 0.0, 1.0]),
    "frequency": st.sampled_from([0.0, 0.7]),
    "bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, 1.5]), max_size=3),
    "allowed": st.none() | st.lists(TOKENS, min_size=1, max_size=20),
    "forbidden": st.lists(TOKENS, max_size=2),
    "watermark": st.none() | st.sampled_from([(0.0, 1.0), (0.25, 2.0), (1.0, -3.0)]),  # gamma, delta
    "masked": st.booleans(),
    "spoilt": st.none() | st.tuples(TOKENS, st.sampled_from([float("nan"), float("inf"), -float("inf")])),
}
CUT_ROWS = st.lists(st.fixed_dictionaries(CUTS), min_size=1, max_size=3)
VOCABULARIES = [1, 31, 100, 600, 3000, 4099, 152_064]


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "triton":
        triton = pytest.importorskip("triton")
        if DEVICE.type == "cpu" and not triton.knobs.runtime.interpret:
            pytest.skip("no GPU, and not under the interpreter")
    try:
        return select_ops(DEVICE, request.param, threads=2)
    except ValueError as error:
        pytest.skip(str(error))


def changes(rows: list[dict[str, Any]], vocab_size: int) -> LogitChanges:
    generator = np.random.default_rng(len(rows))
    every = range(len(rows))
    tokens = RowTokens.of(every, [generator.permutation(vocab_size)[: 5 + 90 * row] for row in every])
    assert tokens is not None
    biases = [{int(place * vocab_size): value for place, value in row["bias"].items()} for row in rows]
    allowed = [row for row in every if rows[row]["allowed"] is not None]
    marked = [row for row in every if rows[row]["watermark"] is not None]
    return LogitChanges(
        limits=np.full(len(rows), max(vocab_size - len(rows) % 2, 1)),
        penalties=Penalties(
            tokens,
            generator.integers(0, 4, len(tokens.token_ids)),
            *(np.array([row[name] for row in rows]) for name in ("repetition", "presence", "frequency")),
        ),
        bias=RowTokens.of(every, [list(bias) for bias in biases]),
        bias_values=np.array([value for bias in biases for value in bias.values()], dtype=np.float32),
        allowed=RowTokens.of(allowed, [ids(rows[row]["allowed"], vocab_size) for row in allowed]),
        forbidden=RowTokens.of(every, [ids(row["forbidden"], vocab_size) for row in rows]),
        watermarks=Watermarks(
            np.array(marked, dtype=np.int64),
            np.array([rows[row]["seed"] for row in marked], dtype=np.uint64),
            np.array([rows[row]["watermark"][0] for row in marked]),
            np.array([rows[row]["watermark"][1] for row in marked], dtype=np.float32),
        )
        if marked
        else None,
    )


def ids(places: list[float], vocab_size: int) -> list[int]:
    return [int(place * vocab_size) for place in places]


def draws(rows: list[dict[str, Any]]) -> Draws:
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    columns = [np.array([row[name] for row in rows]) for name in names]
    columns += [np.array([row["seed"] for row in rows], dtype=np.uint64), np.arange(len(rows)) + 7]
    return Draws(*columns)


def logits_of(rows: list[dict[str, Any]], vocab_size: int) -> torch.Tensor:
    """Different for each set of rows."""
    generator = torch.Generator().manual_seed(rows[0]["seed"] % 2**32)
    logits = torch.randn(len(rows), vocab_size, generator=generator)
    return torch.stack([SHAPES[row["shape"]](each) for row, each in zip(rows, logits, strict=True)]).to(DEVICE)


def mask(ops: Ops, logits: torch.Tensor, rows: list[dict[str, Any]]) -> None:
    """Allow each second token of some rows, at random."""
    masked, words = [row for row, fields in enumerate(rows) if fields["masked"]], -(-logits.shape[-1] // 32)
    generator = torch.Generator().manual_seed(len(rows))
    bits = torch.randint(-(2**31), 2**31, (len(masked), words), dtype=torch.int32, generator=generator)
    if masked:
        ops.mask_logits(logits, masked, bits)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries(CUTS | CHANGES), min_size=1, max_size=3),
    vocab_size=st.sampled_from(VOCABULARIES),
)
def test_a_backend_draws_what_the_reference_draws(ops: Ops, rows: list[dict[str, Any]], vocab_size: int) -> None:
    mine, theirs = (logits_of(rows, vocab_size) for _ in range(2))
    for each, logits in ((ops, mine), (REFERENCE, theirs)):
        for row, fields in enumerate(rows):
            if fields["spoilt"] is not None:
                logits[row, int(fields["spoilt"][0] * vocab_size)] = fields["spoilt"][1]
        each.adjust_logits(logits, changes(rows, vocab_size))
        mask(each, logits, rows)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    tokens = ops.draw_tokens(mine.clone(), draws(rows))
    assert tokens.tolist() == REFERENCE.draw_tokens(theirs, draws(rows)).tolist()


@settings(max_examples=100, deadline=None)
@given(
    rows=CUT_ROWS,
    vocab_size=st.sampled_from(VOCABULARIES),
)
def test_a_backend_draws_what_the_reference_draws_from_unchanged_rows(
    ops: Ops, rows: list[dict[str, Any]], vocab_size: int
) -> None:
    logits = logits_of(rows, vocab_size)
    tokens = ops.draw_tokens(logits.clone(), draws(rows))
    assert tokens.tolist() == REFERENCE.draw_tokens(logits, draws(rows)).tolist()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
    vocab_size=st.sampled_from([1, 31, 32, 1000]),
    data=st.data(),
)
def test_a_backend_masks_what_the_bits_forbid(ops: Ops, rows: list[int], vocab_size: int, data: st.DataObject) -> None:
    words = -(-vocab_size // 32) + 1
    bits = np.array([[data.draw(st.integers(-(2**31), 2**31 - 1)) for _ in range(words)] for _ in rows], dtype=np.int32)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = logits.cpu().clone()
    for row, of_row in zip(rows, bits, strict=True):
        for token in range(vocab_size):
            if not int(of_row[token // 32]) >> token % 32 & 1:
                expected[row, token] = -torch.inf
    ops.mask_logits(logits, rows, torch.from_numpy(bits))
    assert torch.equal(logits.cpu(), expected)


@settings(max_examples=50, deadline=None)
@given(rows=CUT_ROWS, vocab_size=st.sampled_from([100, 600, 3000, 152_064]))  # so large that no shape masks all
def test_what_a_backend_cuts_is_never_drawn_and_the_rest_is_as_the_reference_has_it(
    ops: Ops, rows: list[dict[str, Any]], vocab_size: int
) -> None:
    mine, theirs = (logits_of(rows, vocab_size) for _ in range(2))
    tokens = ops.draw_tokens(mine.clone(), draws(rows))
    ops.cut_logits(mine, draws(rows))
    REFERENCE.cut_logits(theirs, draws(rows))
    assert torch.equal(mine, theirs)
    assert torch.isfinite(mine.gather(-1, tokens[:, None])).all()
    kept = torch.isfinite(mine).sum(-1).tolist()
    assert all(
        count <= row["top_k"] for count, row in zip(kept, rows, strict=True) if row["top_k"] and row["temperature"]
    )


@settings(max_examples=50, deadline=None)
@given(rows=CUT_ROWS, vocab_size=st.sampled_from([200, 600, 152_064]), num_top=st.sampled_from([0, 1, 5, 20]))
def test_a_backend_finds_the_likelihoods_that_the_reference_finds(
    ops: Ops, rows: list[dict[str, Any]], vocab_size: int, num_top: int
) -> None:
    logits = logits_of(rows, vocab_size)
    token_ids = torch.arange(len(rows), device=DEVICE)[:, None] * 50 + torch.arange(3, device=DEVICE)
    mine, theirs = (each.likelihoods(logits.clone(), token_ids, num_top) for each in (ops, REFERENCE))
    torch.testing.assert_close(mine.logprobs, theirs.logprobs)
    torch.testing.assert_close(mine.top_logprobs, theirs.top_logprobs)
    assert mine.ranks.tolist() == theirs.ranks.tolist()
    assert torch.equal(logits.gather(-1, mine.top_ids), logits.gather(-1, theirs.top_ids))  # the ids, but for ties
    assert all(len(set(top)) == num_top for top in mine.top_ids.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_backend_draws_nothing_from_logits_that_are_no_numbers(ops: Ops, temperature: float, value: float) -> None:
    row = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "seed": 3}
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1] = value
    assert [token < 0 for token in ops.draw_tokens(logits, draws([row] * 3)).tolist()] == [False, True, False]
