"""The Triton kernels against the reference: on a GPU where there is one, else under Triton's interpreter."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.ops import (
    AttentionMetadata,
    HeadShape,
    LayerKV,
    LoraSegments,
    LoraSlice,
    LoraWeights,
    Ops,
    QKNorm,
    Xielu,
)
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops
from tests.kernels.tolerance import Tolerance

triton = pytest.importorskip("triton")

from loraplex_kernels.triton import TritonOps  # noqa: E402  (imports triton)
from loraplex_kernels.triton.primitives import RANGES_AT_ONCE  # noqa: E402

# exp(-x) of the gates overflows to infinity, as it should; numpy under the interpreter says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = TritonOps(DEVICE)
REFERENCE = ReferenceOps(DEVICE)
BOTH: tuple[Ops, Ops] = (OPS, REFERENCE)
INTERPRETED = triton.knobs.runtime.interpret

# Both sides see the same inputs and accumulate in float32; what differs is the order of summation (a few hundred terms,
# each rounded to 2^-24) and, for 16-bit types, that softmax weights and shrunk rows are rounded before the second
# product (2^-11 and 2^-8 of values near one, and sums of them) and the result once more.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
DTYPES = list(TOLERANCE)


@pytest.fixture
def random():
    """Normal numbers, the same on every run: random(shape, dtype)."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    return draw


def close(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])


# ---- the small operations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 48), (2, 1000), (1, 4096), (0, 8)])
def test_rms_norm(random, dtype, shape):
    x, weight = random(*shape, dtype=dtype) * 3, random(shape[1])
    close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual_as_the_reference_does(random, dtype):
    x, residual, weight = random(5, 100, dtype=dtype), random(5, 100, dtype=dtype), random(100)
    expected_residual = residual.clone()
    expected = REFERENCE.add_rms_norm(x, expected_residual, weight, 1e-6)
    close(OPS.add_rms_norm(x, residual, weight, 1e-6), expected)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates to bfloat16, a GPU rounds
        close(residual, expected_residual)
    else:
        assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 10), (2, 3000), (0, 10)])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(random, dtype, shape, name):
    x = random(*shape, dtype=dtype) * 4
    close(getattr(OPS, name)(x), getattr(REFERENCE, name)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 10), (2, 1500), (0, 10)])
def test_activations_without_a_gate(random, dtype, shape):
    x, curve = random(*shape, dtype=dtype) * 4, Xielu(0.9, 1.3, 0.5, -1e-6)
    close(OPS.gelu_tanh(x), REFERENCE.gelu_tanh(x))
    close(OPS.xielu(x, curve), REFERENCE.xielu(x, curve))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 48), (2, 1000), (0, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(random, dtype, shape, biased):
    x, weight, bias = random(*shape, dtype=dtype) * 3 + 1, random(shape[1]), random(shape[1]) if biased else None
    close(OPS.layer_norm(x, weight, bias, 1e-5), REFERENCE.layer_norm(x, weight, bias, 1e-5))
    residual = random(*shape, dtype=dtype)
    expected = REFERENCE.add_layer_norm(x, residual.clone(), weight, bias, 1e-5)
    close(OPS.add_layer_norm(x, residual, weight, bias, 1e-5), expected)


@pytest.mark.parametrize("vocab", [1, 31, 32, 1024, 2500])
def test_mask_logits(random, vocab):
    logits, generator = random(5, vocab), torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (3, vocab // 32 + 2), generator=generator).to(torch.int32)
    expected = logits.clone()
    REFERENCE.mask_logits(expected, [4, 0, 2], bits)
    OPS.mask_logits(logits, [4, 0, 2], bits)
    assert torch.equal(logits, expected)
    assert expected.isneginf().any()
    assert not expected[[1, 3]].isneginf().any()


def test_a_mask_for_no_row_changes_nothing(random):
    logits = random(2, 40)
    expected = logits.clone()
    OPS.mask_logits(logits, [], torch.zeros((0, 2), dtype=torch.int32))
    assert torch.equal(logits, expected)


def test_linear_with_bias(random):
    weight, bias, x = random(6, 10), random(6), random(3, 10)
    close(OPS.linear(x, OPS.pack_linear([weight], bias)), x @ weight.T + bias)


# ---- rotation and the cache ----------------------------------------------------------------------------------------

BLOCKS, BLOCK_SIZE = 3, 4


def stored(cache, shape):
    """→ [slots, K, D] of either backend's layout"""
    for tensor in (cache.k, cache.v):
        if tensor.shape[1] == shape.num_kv_heads != tensor.shape[2] or tensor.shape[2] == cache.block_size:
            tensor = tensor.transpose(1, 2)
        yield tensor.reshape(cache.num_blocks * cache.block_size, shape.num_kv_heads, shape.head_dim)


ROTATED_HEADS = [(3, 1, 8), (14, 2, 64), (2, 2, 80), (9, 3, 90), (1, 1, 256)]
ROTATED_PARTS = [(1.0, False), (0.5, False), (1.0, True), (0.25, True)]  # of a head; interleaved
# Types take turns: each meets each of the others' values, and what is done to numbers does not depend on theirs.
ROTATIONS = zip(itertools.product([False, True], ROTATED_HEADS, ROTATED_PARTS), itertools.cycle(DTYPES), strict=False)


@pytest.mark.parametrize(
    ("norm", "heads", "part", "interleaved", "dtype"),
    [(norm, heads, *part, dtype) for (norm, heads, part), dtype in ROTATIONS],
)
def test_rotary_store_kv(random, dtype, norm, heads, part, interleaved):
    shape = HeadShape(*heads)
    qkv = random(3, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, dtype=dtype)
    angles = random(10, int(shape.head_dim * part) // 2)
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()
    qk_norm = QKNorm(random(shape.head_dim), random(shape.head_dim), 1e-6) if norm else None
    positions, slots = torch.tensor([4, 0, 9], device=DEVICE), torch.tensor([5, 2, 11], device=DEVICE)
    caches = [ops.allocate_kv(BLOCKS, BLOCK_SIZE, shape, dtype) for ops in BOTH]
    queries = [
        ops.rotary_store_kv(qkv.clone(), shape, qk_norm, positions, cos_sin, cache, slots, interleaved)
        for ops, cache in zip(BOTH, caches, strict=True)
    ]
    close(*queries)
    (k, v), (expected_k, expected_v) = (stored(cache, shape) for cache in caches)
    close(k, expected_k)
    assert torch.equal(v, expected_v)


def test_rotary_store_kv_of_no_tokens(random):
    shape, nobody = HeadShape(2, 1, 8), torch.zeros(0, dtype=torch.long, device=DEVICE)
    cache = OPS.allocate_kv(BLOCKS, BLOCK_SIZE, shape, torch.float32)
    q = OPS.rotary_store_kv(random(0, 32), shape, None, nobody, random(4, 2, 4), cache, nobody)
    assert q.shape == (0, 2, 8)
    assert not cache.k.any()


def test_negative_slot_stores_nothing(random):
    shape = HeadShape(2, 1, 8)
    cache = OPS.allocate_kv(BLOCKS, BLOCK_SIZE, shape, torch.float32)
    cos_sin = torch.ones(4, 2, 4, device=DEVICE)
    positions, slots = torch.tensor([1, 2], device=DEVICE), torch.tensor([-1, 3], device=DEVICE)
    OPS.rotary_store_kv(random(2, 32), shape, None, positions, cos_sin, cache, slots)
    k, v = stored(cache, shape)
    for tensor in (k, v):
        assert tensor[3].all()
        assert not tensor[[s for s in range(12) if s != 3]].any()


# ---- attention -----------------------------------------------------------------------------------------------------


class Attention:
    """Sequences with cached keys and values in blocks of permuted order, in the layouts of both backends."""

    def __init__(self, random, heads, lengths, new, block_size, dtype):
        num_heads, num_kv_heads, head_dim = heads
        counts = [-(-length // block_size) for length in lengths]
        num_blocks = sum(counts) + 1
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for s, ids in enumerate(order.split(counts)):
            tables[s, : counts[s]] = ids
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        k, v = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
        self.expected_cache = LayerKV(k, v, num_blocks, block_size)
        self.cache = LayerKV(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), num_blocks, block_size)
        self.q = random(sum(new), num_heads, head_dim, dtype=dtype)
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        self.metadata = AttentionMetadata(
            query_starts=starts.to(DEVICE),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            block_tables=tables.to(DEVICE),
            slot_mapping=torch.zeros(sum(new), dtype=torch.long, device=DEVICE),
            max_query_len=max(new),
            max_seq_len=max(lengths),
        )

    def check(self, window=None, soft_cap=None, sinks=None):
        how = self.metadata, self.q.shape[-1] ** -0.5, window, soft_cap, sinks
        expected = REFERENCE.paged_attention(self.q, self.expected_cache, *how)
        close(OPS.paged_attention(self.q, self.cache, *how), expected)


MIXED = ([1, 9, 70, 75, 8], [1, 1, 70, 3, 8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (None, 2.0), (66, 1.0)])
def test_attention_of_prompts_and_decoding_together(random, dtype, window, soft_cap):
    Attention(random, (4, 2, 64), *MIXED, 16, dtype).check(window, soft_cap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5])
def test_attention_with_sinks(random, dtype, window):
    Attention(random, (4, 2, 64), *MIXED, 16, dtype).check(window, sinks=2 * random(4))


def test_decoding_with_sinks_split_over_the_keys(random):
    Attention(random, (4, 1, 64), [1100, 3, 300], [1, 1, 1], 16, torch.float16).check(sinks=2 * random(4))


@pytest.mark.parametrize(
    "heads", [(2, 2, 128), (7, 1, 80), (3, 1, 256), (2, 1, 96), (4, 4, 18), (71, 1, 64), (2, 1, 192)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_with_other_heads(random, dtype, heads):
    Attention(random, heads, [12, 33, 6], [3, 1, 6], 4, dtype).check()


@pytest.mark.parametrize("block_size", [1, 2, 128])
def test_attention_with_other_block_sizes(random, block_size):
    Attention(random, (2, 1, 64), [12, 130, 6], [3, 1, 6], block_size, torch.float16).check(window=100)


@pytest.mark.parametrize("queries", [129, 64, 400])
def test_attention_of_a_chunk_longer_than_a_tile(random, queries):
    Attention(random, (2, 1, 32), [queries + 21], [queries], 16, torch.float32).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (700, None), (40, 3.0)])
def test_decoding_split_over_the_keys(random, dtype, window, soft_cap):
    """1100 keys in five chunks; one sequence has keys for a single chunk, one for two."""
    Attention(random, (4, 1, 64), [1100, 3, 300], [1, 1, 1], 16, dtype).check(window, soft_cap)


def test_decoding_split_beside_a_prompt(random):
    Attention(random, (2, 1, 64), [600, 20, 520], [1, 5, 1], 32, torch.float32).check()


def test_sequence_of_length_zero_gets_zeros(random):
    """As the padding of a captured batch: nothing may become NaN or be read out of bounds."""
    case = Attention(random, (2, 1, 64), [9, 1], [1, 1], 4, torch.float32)
    case.metadata.seq_lens[1] = 0
    out = OPS.paged_attention(case.q, case.cache, case.metadata, 0.1, None, None)
    assert not out[1].any()


def test_what_was_stored_is_attended_to(random):
    """Through `rotary_store_kv`, so that both agree about the layout of a block."""
    shape, positions = HeadShape(2, 2, 8), torch.arange(6, device=DEVICE)
    angles = random(6, 4)
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()
    tables = torch.tensor([[2, 1]], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([8, 9, 10, 11, 4, 5], device=DEVICE)
    starts, lens = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([0, 6], [6]))
    metadata = AttentionMetadata(starts, lens, tables, slots, 6, 6)
    qkv, outs = random(6, 48), []
    for ops in BOTH:
        cache = ops.allocate_kv(BLOCKS, BLOCK_SIZE, shape, torch.float32)
        q = ops.rotary_store_kv(qkv.clone(), shape, None, positions, cos_sin, cache, slots)
        outs.append(ops.paged_attention(q, cache, metadata, 0.3, None, None))
    close(*outs)


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapter(random, in_features, parts, dtype):
    """parts: (rank, first output column, number of output columns)"""
    slices, rank = [], 0
    for r, first, n in parts:
        slices.append(LoraSlice(rank, first, random(n, r, dtype=dtype) / r))
        rank += r
    return LoraWeights(random(rank, in_features, dtype=dtype) / math.sqrt(in_features), tuple(slices))


def segments_of(*ranges):
    columns = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 3).T.contiguous().to(DEVICE)
    return LoraSegments(tuple(ranges), *columns)


def check_lora(random, shape, adapters, ranges, num_rows, dtype):
    """shape: (C, N). Rows of the base model must keep every bit."""
    in_features, out_features = shape
    tables = [ops.lora_table(in_features, out_features, num_slots=4) for ops in BOTH]
    for slot, parts in adapters.items():
        weights = adapter(random, in_features, parts, dtype)
        for ops, table in zip(BOTH, tables, strict=True):
            table.put(slot, ops.pack_lora(weights))
    x, y = random(num_rows, in_features, dtype=dtype), random(num_rows, out_features, dtype=dtype)
    before, expected = y.clone(), y.clone()
    segments = segments_of(*ranges)
    OPS.segmented_lora(y, x, segments, tables[0])
    REFERENCE.segmented_lora(expected, x, segments, tables[1])
    close(y, expected)
    in_segment = {row for slot, start, end in ranges for row in range(start, end) if slot in adapters}
    for row in set(range(num_rows)) - in_segment:
        assert torch.equal(y[row], before[row])
    if in_segment and adapters:
        assert not torch.equal(y, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_of_mixed_ranks_slices_and_segments(random, dtype):
    """A fused projection; empty segments, a slot twice, a slot that is not held, rows of the base model."""
    held = {0: [(4, 0, 16), (2, 16, 8), (3, 24, 16)], 2: [(17, 24, 16)], 3: [(5, 3, 20)]}
    ranges = [(2, 1, 2), (0, 2, 20), (1, 20, 22), (2, 23, 25), (0, 25, 25), (3, 25, 26)]
    check_lora(random, (24, 40), held, ranges, 28, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [2, 40])
def test_lora_scales_and_shifts_what_it_adds_to(random, dtype, num_rows):
    tables = [ops.lora_table(24, 200, num_slots=4) for ops in BOTH]
    parts = {0: [], 1: [(5, 3, 150)], 2: [(4, 0, 200)]}
    for slot, slices in parts.items():
        weights = adapter(random, 24, slices, dtype)
        if slot != 2:
            weights = replace(weights, affine=random(2, 200, dtype=torch.float32))
        for ops, table in zip(BOTH, tables, strict=True):
            table.put(slot, ops.pack_lora(weights))
    ranges = [(slot, slot * num_rows + 1, (slot + 1) * num_rows) for slot in range(4)]
    x, y = random(4 * num_rows, 24, dtype=dtype), random(4 * num_rows, 200, dtype=dtype)
    before, expected = y.clone(), y.clone()
    OPS.segmented_lora(y, x, segments_of(*ranges), tables[0])
    REFERENCE.segmented_lora(expected, x, segments_of(*ranges), tables[1])
    close(y, expected)
    base = [*range(0, 4 * num_rows, num_rows), *range(3 * num_rows, 4 * num_rows)]
    assert torch.equal(y[base], before[base])


def test_the_first_adapter_that_scales_makes_captured_graphs_stale(random):
    ops = TritonOps(DEVICE)
    table = ops.lora_table(16, 24, num_slots=2)
    weights = adapter(random, 16, [(4, 0, 24)], torch.float32)
    growth = []
    for put in (weights, replace(weights, affine=random(2, 24)), replace(weights, affine=random(2, 24))):
        table.put(0, ops.pack_lora(put))
        growth.append(ops.lora_growth)
    assert growth[0] < growth[1] == growth[2]


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 31, 32, 33, 64, 100, 512])
def test_lora_of_any_rank(random, rank):
    check_lora(random, (48, 136), {1: [(rank, 0, 136)]}, [(1, 0, 3)], 3, torch.float32)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 64, 65, 200, 2000])
def test_lora_of_one_token_to_hundreds(random, num_rows):
    ranges = [(0, 1, 1 + num_rows), (1, 1 + num_rows, 3 + num_rows)]
    held = {0: [(8, 0, 24), (8, 24, 16)], 1: [(3, 24, 16)]}
    check_lora(random, (32, 40), held, ranges, num_rows + 4, torch.float16)


@pytest.mark.parametrize("shape", [(7, 9), (130, 40), (2100, 300)])
def test_lora_of_odd_and_wide_linears(random, shape):
    check_lora(random, shape, {0: [(6, 0, 3), (2, 3, shape[1] - 3)]}, [(0, 0, 4)], 5, torch.float32)


def test_lora_of_empty_segments_alone_adds_nothing(random):
    check_lora(random, (16, 24), {0: [(4, 0, 24)]}, [(0, 0, 0), (0, 2, 2), (1, 5, 5)], 5, torch.float32)


def test_lora_without_rows_adds_nothing(random):
    check_lora(random, (16, 24), {0: [(4, 0, 24)]}, [(0, 0, 0)], 0, torch.float32)


@pytest.mark.parametrize("count", [37, pytest.param(RANGES_AT_ONCE.value + 9, marks=pytest.mark.slow)])
def test_lora_of_many_segments(random, count):
    """More of them than a program looks at together, too."""
    held = {slot: [(2 + 15 * slot, 0, 24)] for slot in range(3)}
    ranges = [(i % 4, 2 * i, 2 * i + 1) for i in range(count)]
    check_lora(random, (16, 24), held, ranges, 2 * count + 1, torch.float32)


def test_padding_segments_after_the_last_row_add_nothing(random):
    """As in a captured batch, which has room for more segments than there are."""
    table = OPS.lora_table(16, 24, num_slots=2)
    table.put(0, OPS.pack_lora(adapter(random, 16, [(4, 0, 24)], torch.float32)))
    x, y = random(8, 16), random(8, 24)
    padded, plain = y.clone(), y.clone()
    OPS.segmented_lora(plain, x, segments_of((0, 2, 5)), table)
    OPS.segmented_lora(padded, x, segments_of((0, 2, 5), (0, 8, 8), (0, 8, 8)), table)
    assert torch.equal(padded, plain)
    assert torch.equal(padded[5:], y[5:])


def test_removed_and_replaced_adapters(random):
    table, expected_table = (ops.lora_table(16, 24, num_slots=2) for ops in BOTH)
    first, second = (adapter(random, 16, [(rank, 0, 24)], torch.float32) for rank in (4, 20))
    x, y = random(3, 16), random(3, 24)
    before = y.clone()
    table.put(1, OPS.pack_lora(first))
    table.remove(1)
    table.remove(1)
    OPS.segmented_lora(y, x, segments_of((1, 0, 3)), table)
    assert torch.equal(y, before)
    for ops, held in ((OPS, table), (REFERENCE, expected_table)):
        held.put(1, ops.pack_lora(first))
        held.put(1, ops.pack_lora(second))
    OPS.segmented_lora(y, x, segments_of((1, 0, 3)), table)
    REFERENCE.segmented_lora(before, x, segments_of((1, 0, 3)), expected_table)
    close(y, before)


def test_wider_adapter_is_told_apart_from_a_replacement(random):
    """A CUDA graph captured earlier must be captured again only when a table has widened."""
    ops = TritonOps(DEVICE)
    table = ops.lora_table(16, 24, num_slots=2)
    growth = [ops.lora_growth]
    for rank in (4, 16, 17, 30, 4):
        table.put(0, ops.pack_lora(adapter(random, 16, [(rank, 0, 24)], torch.float32)))
        growth.append(ops.lora_growth)
    assert growth == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (LoraWeights(torch.ones(2, 9), ()), "input features"),
        (LoraWeights(torch.ones(2, 8), (LoraSlice(1, 0, torch.ones(6, 2)),)), "reads ranks"),
        (LoraWeights(torch.ones(2, 8), (LoraSlice(0, 1, torch.ones(6, 2)),)), "writes columns"),
        (LoraWeights(torch.ones(2, 8), (LoraSlice(0, 0, torch.ones(6, 2).half()),)), "share a dtype"),
        (
            LoraWeights(torch.ones(2, 8), tuple(LoraSlice(0, c, torch.ones(4, 2)) for c in (0, 2))),
            "two LoRA projections write column 2",
        ),
        (LoraWeights(torch.ones(2, 8), tuple(LoraSlice(0, 0, torch.ones(0, 2)) for _ in range(9))), "at most 8"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        OPS.lora_table(8, 6, num_slots=1).put(0, OPS.pack_lora(weights))


def test_adapter_without_slices_adds_nothing(random):
    table = OPS.lora_table(8, 8, num_slots=1)
    table.put(0, OPS.pack_lora(LoraWeights(random(0, 8), ())))
    y = random(2, 8)
    before = y.clone()
    OPS.segmented_lora(y, random(2, 8), segments_of((0, 0, 2)), table)
    assert torch.equal(y, before)


def test_second_dtype_at_one_linear_is_refused(random):
    table = OPS.lora_table(8, 8, num_slots=2)
    table.put(0, OPS.pack_lora(adapter(random, 8, [(2, 0, 8)], torch.float32)))
    with pytest.raises(ValueError, match="share a dtype"):
        table.put(1, OPS.pack_lora(adapter(random, 8, [(2, 0, 8)], torch.float16)))


# ---- choosing the backend ------------------------------------------------------------------------------------------


def test_backend_is_chosen_by_name():
    assert isinstance(select_ops(DEVICE, "triton"), TritonOps)


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("counts", "n", "c"), [((1,), 8, 16), ((0, 3, 0), 70, 33), ((5, 0, 1, 40, 0, 2), 130, 96), ((90, 70), 33, 160)]
)
def test_each_row_is_multiplied_by_its_own_expert(random, dtype, bias, counts, n, c):
    linears = []
    for _ in counts:
        weight = random(n, c, dtype=dtype) / c**0.5
        linears.append(OPS.pack_linear([weight], random(n, dtype=dtype) if bias else None))
    x, starts = random(sum(counts), c, dtype=dtype), torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    y = OPS.grouped_linear(x, starts, OPS.group_linears(linears))
    close(y, REFERENCE.grouped_linear(x, starts, REFERENCE.group_linears(linears)))


def test_adapters_of_all_experts_are_found_in_one_table(random):
    tables = [OPS.lora_table(24, 40, 3) for _ in range(2)]
    weights = [LoraWeights(random(2, 24), (LoraSlice(0, 0, random(40, 2)),)) for _ in range(2)]
    tables[0].put(2, OPS.pack_lora(weights[0]))
    together = OPS.group_lora_tables(tables)
    tables[1].put(0, OPS.pack_lora(weights[1]))
    x, y = random(9, 24), random(9, 40)
    expected = y.clone()
    for part, rows in ((weights[0], slice(1, 5)), (weights[1], slice(6, 9))):
        expected[rows] += x[rows] @ part.a.T @ part.slices[0].b.T
    columns = torch.tensor([[4, 1], [1, 6], [5, 9]], dtype=torch.int32, device=DEVICE)
    OPS.segmented_lora(y, x, LoraSegments(((4, 1, 5), (1, 6, 9)), *columns), together)
    close(y, expected)
