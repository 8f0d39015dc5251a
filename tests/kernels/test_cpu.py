"""The compiled kernels, on every instruction set that this processor has, against the reference."""

import logging
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.cpu import library
from loraplex_kernels.cpu.ops import CpuOps
from loraplex_kernels.ops import (
    QUANTIZED_KV,
    AttentionMetadata,
    HeadShape,
    LoraSegments,
    LoraSlice,
    LoraWeights,
    QKNorm,
    Xielu,
)
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops
from tests.kernels.tolerance import Tolerance
from tests.own_log import own_records

CPU = torch.device("cpu")
REFERENCE = ReferenceOps(CPU)

# float32: the same sums in another order. 16 bits: both sides accumulate in float32 and round once, so they differ by
# one step of the type where the sums fall on different sides of a rounding boundary.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}
DTYPES = list(TOLERANCE)

# Rounded caches. A rotated key or a value that lies in the middle between two codes may fall on either; weights times
# the scales of values round once more in 16 bits.
ROUNDED_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2**-6, torch.float16: 5e-3}

pytestmark = pytest.mark.skipif(
    not library.usable_instruction_sets(), reason="the CPU kernels are not compiled: install with a C++17 compiler"
)


@pytest.fixture(scope="module", params=library.usable_instruction_sets())
def ops(request):
    return select_ops(CPU, "cpu", threads=2, isa=request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def rand(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def close(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype])


# ------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "c"),
    [(1, 1, 1), (1, 31, 33), (2, 32, 64), (5, 100, 7), (13, 70, 128), (33, 64, 257), (300, 40, 96), (0, 8, 8)],
)
def test_linear(ops, dtype, rows, n, c, bias):
    weight, x = rand(n, c, dtype=dtype) / c**0.5, rand(rows, c, dtype=dtype, seed=1)
    b = rand(n, dtype=dtype) if bias else None
    packed = ops.pack_linear([weight], b)
    close(ops.linear(x, packed), REFERENCE.linear(x, REFERENCE.pack_linear([weight], b)))
    assert (packed.in_features, packed.out_features) == (c, n)
    assert packed.nbytes >= weight.nbytes


def test_linear_of_many_rows_and_wide_inputs(ops, dtype):
    weight, x = rand(96, 4000, dtype=dtype) / 4000**0.5, rand(150, 4000, dtype=dtype, seed=1)
    close(ops.linear(x, ops.pack_linear([weight], None)), x @ weight.T)


@pytest.mark.parametrize(("parts", "c"), [((64, 32, 32), 96), ((33, 20, 50), 71), ((1, 1), 130)])
def test_linear_of_several_matrices_is_that_of_one(ops, dtype, parts, c):
    weights, bias = [rand(n, c, dtype=dtype, seed=n) for n in parts], rand(sum(parts), dtype=dtype)
    x = rand(5, c, dtype=dtype, seed=1)
    together, joined = ops.pack_linear(weights, bias), torch.cat(weights)
    assert torch.equal(ops.linear(x, together), ops.linear(x, ops.pack_linear([joined], bias)))
    assert torch.equal(ops.dequantize(together, 0, sum(parts)), joined.float())


def test_packed_weights_share_no_memory_with_what_they_were(ops):
    weight = rand(64, 64)
    before, packed = weight.clone(), ops.pack_linear([weight], None)
    weight.zero_()
    assert ops.packing_copies
    assert torch.equal(ops.dequantize(packed, 0, 64), before)


def test_linear_takes_rows_that_are_not_contiguous(ops, dtype):
    weight, x = rand(20, 16, dtype=dtype) / 4, rand(6, 32, dtype=dtype)[:, :16]
    packed = ops.pack_linear([weight], None)
    assert torch.equal(ops.linear(x, packed), ops.linear(x.contiguous(), packed))


def test_row_of_a_linear_does_not_depend_on_the_others(ops, dtype):
    weight, x = rand(70, 129, dtype=dtype) / 11, rand(90, 129, dtype=dtype, seed=1)
    packed = ops.pack_linear([weight], rand(70, dtype=dtype))
    alone = torch.cat([ops.linear(row, packed) for row in x.split(1)])
    for first, end in [(0, 90), (0, 2), (3, 20), (17, 90), (40, 53)]:
        assert torch.equal(ops.linear(x[first:end], packed), alone[first:end])


# ------------------------------------------------------------------------------------------------------------ experts


def experts(ops, dtype, count, n, c, bias=True):
    weights = [rand(n, c, dtype=dtype, seed=e) / c**0.5 for e in range(count)]
    biases = [rand(n, dtype=dtype, seed=e) if bias else None for e in range(count)]
    return [ops.pack_linear([weight], b) for weight, b in zip(weights, biases, strict=True)]


def starts_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("counts", [(1,), (0, 3, 0), (5, 0, 1, 40, 0, 2), (0, 300, 7)])
@pytest.mark.parametrize(("n", "c"), [(31, 33), (70, 128), (1, 1)])
def test_each_row_is_multiplied_by_its_own_expert(ops, dtype, counts, n, c):
    x, packed = rand(sum(counts), c, dtype=dtype), experts(ops, dtype, len(counts), n, c)
    y = ops.grouped_linear(x, starts_of(counts), ops.group_linears(packed))
    alone = [ops.linear(rows, expert) for rows, expert in zip(x.split(counts), packed, strict=True)]
    assert torch.equal(y, torch.cat(alone))


def test_no_rows_at_all_are_multiplied_by_experts(ops, dtype):
    group = ops.group_linears(experts(ops, dtype, 3, 8, 16))
    assert ops.grouped_linear(rand(0, 16, dtype=dtype), starts_of([0, 0, 0]), group).shape == (0, 8)


def test_adapters_of_all_experts_are_found_in_one_table(ops, dtype):
    apart, tables = ([ops.lora_table(24, 40, 3) for _ in range(2)] for _ in range(2))
    before = LoraWeights(rand(2, 24, dtype=dtype), (LoraSlice(0, 8, rand(32, 2, dtype=dtype, seed=1)),))
    after = LoraWeights(rand(5, 24, dtype=dtype, seed=2), (LoraSlice(0, 0, rand(40, 5, dtype=dtype, seed=3)),))
    tables[0].put(2, ops.pack_lora(before))
    together = ops.group_lora_tables(tables)
    tables[1].put(0, ops.pack_lora(after))
    apart[0].put(2, ops.pack_lora(before))
    apart[1].put(0, ops.pack_lora(after))
    x, y = rand(9, 24, dtype=dtype, seed=4), rand(9, 40, dtype=dtype, seed=5)
    expected = y.clone()
    parts = torch.tensor([[4, 1, 5], [0, 3, 5], [3, 5, 9]], dtype=torch.int32)  # slot · 2 + expert, rows
    for table, slot, (_, first, end) in ((apart[0], 2, parts.T[0]), (apart[1], 0, parts.T[1])):
        own = torch.tensor([[slot], [first], [end]], dtype=torch.int32)
        ops.segmented_lora(expected, x, LoraSegments(((slot, int(first), int(end)),), *own), table)
    ops.segmented_lora(y, x, LoraSegments(tuple(map(tuple, parts.T.tolist())), *parts), together)
    assert torch.equal(y, expected)
    tables[0].remove(2)
    before_it = y.clone()
    ops.segmented_lora(y, x, LoraSegments(((4, 1, 5),), *parts[:, :1].contiguous()), together)
    assert torch.equal(y, before_it)


@pytest.mark.parametrize(("rows", "k", "c"), [(1, 1, 1), (3, 2, 33), (70, 8, 257), (0, 2, 8)])
def test_weighted_sums(ops, dtype, rows, k, c):
    x, weights = rand(rows * k, c, dtype=dtype), rand(rows, k, seed=1)
    places = torch.randperm(rows * k, generator=torch.Generator().manual_seed(2)).view(rows, k)
    close(ops.weighted_sums(x, places, weights), REFERENCE.weighted_sums(x, places, weights))


def test_nan_and_infinity_pass_through_a_linear(ops, dtype):
    x = torch.ones(3, 8, dtype=dtype)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    y = ops.linear(x, ops.pack_linear([torch.ones(4, 8, dtype=dtype)], None))
    assert y[0].isnan().all()
    assert y[1].isposinf().all()
    assert torch.equal(y[2], torch.full((4,), 8, dtype=dtype))


def test_dtype_that_is_not_computed_in_is_refused(ops):
    with pytest.raises(ValueError, match="float32, bfloat16, float16, not in float64"):
        ops.pack_linear([torch.ones(2, 2, dtype=torch.float64)], None)


def test_weights_released_make_room_for_others(ops):
    weight = rand(64, 64)
    kept = ops.pack_linear([weight], None)
    for seed in range(20):
        ops.pack_linear([rand(64, 64, seed=seed)], None)
    assert torch.equal(ops.linear(torch.eye(64), kept), weight.T)


# --------------------------------------------------------------------------------------------------------------- LoRA


def adapter(c, parts, dtype, seed=0):
    """parts: (rank, first output column, number of output columns)"""
    slices, rank = [], 0
    for r, first, n in parts:
        slices.append(LoraSlice(rank, first, rand(n, r, dtype=dtype, seed=seed) / max(r, 1)))
        rank += r
    return LoraWeights(rand(rank, c, dtype=dtype, seed=seed + 1) / c**0.5, tuple(slices))


def segments_of(*ranges):
    columns = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 3).T.contiguous()
    return LoraSegments(tuple(ranges), *columns)


def tables(ops, c, n, held):
    """The same adapters in a table of the kernels and in one of the reference."""
    made = [backend.lora_table(c, n, num_slots=4) for backend in (ops, REFERENCE)]
    for backend, table in zip((ops, REFERENCE), made, strict=True):
        for slot, weights in held.items():
            table.put(slot, backend.pack_lora(weights))
    return made


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 16, 31, 64, 512])
@pytest.mark.parametrize("c", [33, 256])
def test_segmented_lora_of_any_rank(ops, dtype, rank, c):
    ours, theirs = tables(ops, c, 70, {0: adapter(c, [(rank, 0, 70)], dtype)})
    x, y = rand(6, c, dtype=dtype), rand(6, 70, dtype=dtype, seed=1)
    actual, expected, segments = y.clone(), y.clone(), segments_of((0, 1, 2), (0, 3, 6))
    ops.segmented_lora(actual, x, segments, ours)
    REFERENCE.segmented_lora(expected, x, segments, theirs)
    close(actual, expected)
    assert torch.equal(actual[[0, 2]], y[[0, 2]])


def test_segmented_lora_of_fused_projections_and_mixed_ranks(ops, dtype):
    held = {
        0: adapter(96, [(4, 0, 64), (2, 64, 16), (3, 80, 16)], dtype),
        1: adapter(96, [(7, 80, 16)], dtype, seed=5),
        3: adapter(96, [(16, 0, 64), (33, 80, 16)], dtype, seed=9),
    }
    ours, theirs = tables(ops, 96, 96, held)
    ranges = [(0, 2, 3), (1, 3, 40), (2, 40, 42), (3, 42, 43), (0, 43, 243), (1, 243, 243), (3, 243, 244)]
    x, y = rand(247, 96, dtype=dtype), rand(247, 96, dtype=dtype, seed=1)
    actual, expected = y.clone(), y.clone()
    ops.segmented_lora(actual, x, segments_of(*ranges), ours)
    REFERENCE.segmented_lora(expected, x, segments_of(*ranges), theirs)
    close(actual, expected)
    base = [0, 1, 40, 41, 244, 245, 246]
    assert torch.equal(actual[base], y[base])


@pytest.mark.parametrize("n", [1, 31, 70])
@pytest.mark.parametrize("num_rows", [3, 700])  # parts divided, and parts whole
def test_segmented_lora_scales_and_shifts_what_it_adds_to(ops, dtype, n, num_rows):
    scaled = [replace(adapter(48, parts, dtype), affine=rand(2, n, seed=7)) for parts in ([], [(5, 0, n)])]
    held = {0: scaled[0], 1: scaled[1], 2: adapter(48, [(5, 0, n)], dtype)}
    ours, theirs = tables(ops, 48, n, held)
    ranges = [(slot, slot * num_rows + 1, (slot + 1) * num_rows) for slot in range(4)]
    x, y = rand(4 * num_rows, 48, dtype=dtype), rand(4 * num_rows, n, dtype=dtype, seed=1)
    actual, expected = y.clone(), y.clone()
    ops.segmented_lora(actual, x, segments_of(*ranges), ours)
    REFERENCE.segmented_lora(expected, x, segments_of(*ranges), theirs)
    close(actual, expected)
    base = [*range(0, 4 * num_rows, num_rows), *range(3 * num_rows, 4 * num_rows)]
    assert torch.equal(actual[base], y[base])
    first, end = ranges[1][1], ranges[1][1] + 2  # alone, each row has the same bits
    alone = y[first:end].clone()
    ops.segmented_lora(alone, x[first:end].contiguous(), segments_of((1, 0, 2)), ours)
    assert torch.equal(alone, actual[first:end])


@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (96, 64)])
def test_rows_of_a_weight_are_given_back(ops, dtype, shape):
    weight = rand(*shape, dtype=dtype)
    packed = ops.pack_linear([weight], None)
    for start in (0, shape[0] // 2):
        assert torch.equal(ops.dequantize(packed, start, shape[0]), weight[start:].float())


def test_row_of_an_adapter_does_not_depend_on_the_others(ops, dtype):
    held = {0: adapter(64, [(5, 0, 40), (6, 40, 30)], dtype), 1: adapter(64, [(9, 0, 70)], dtype, seed=3)}
    table, _ = tables(ops, 64, 70, held)
    x, y = rand(130, 64, dtype=dtype), rand(130, 70, dtype=dtype, seed=1)

    def run(first, end, *ranges):
        out = y[first:end].clone()
        ops.segmented_lora(out, x[first:end].contiguous(), segments_of(*ranges), table)
        return out

    together = run(0, 130, (0, 0, 100), (1, 100, 130))
    alone = torch.cat([run(row, row + 1, (0 if row < 100 else 1, 0, 1)) for row in range(130)])
    assert torch.equal(together, alone)
    assert torch.equal(run(90, 110, (0, 0, 10), (1, 10, 20)), together[90:110])


def test_slot_is_replaced_and_emptied(ops, dtype):
    table = ops.lora_table(8, 8, num_slots=2)
    x, segments = torch.ones(1, 8, dtype=dtype), segments_of((1, 0, 1))

    def run():
        y = torch.zeros(1, 8, dtype=dtype)
        ops.segmented_lora(y, x, segments, table)
        return y[0, 0].item()

    assert run() == 0
    for value in (1.0, 2.0):
        b = torch.full((8, 1), value, dtype=dtype)
        table.put(1, ops.pack_lora(LoraWeights(torch.ones(1, 8, dtype=dtype), (LoraSlice(0, 0, b),))))
        assert run() == 8 * value
    table.remove(1)
    table.remove(0)
    assert run() == 0


def test_packed_adapter_lives_as_long_as_a_slot_holds_it(ops, dtype):
    table = ops.lora_table(8, 8, num_slots=2)
    packed = ops.pack_lora(
        LoraWeights(torch.ones(1, 8, dtype=dtype), (LoraSlice(0, 0, torch.ones(8, 1, dtype=dtype)),))
    )
    for slot in range(2):
        table.put(slot, packed)
    table.remove(0)
    del packed
    x, y = torch.ones(2, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype)
    ops.segmented_lora(y, x, segments_of((0, 0, 1), (1, 1, 2)), table)
    assert y[:, 0].tolist() == [0, 8]


@pytest.mark.parametrize(
    ("slot", "weights", "message"),
    [
        (0, LoraWeights(torch.ones(2, 9), ()), "input features"),
        (0, LoraWeights(torch.ones(2, 8), (LoraSlice(1, 0, torch.ones(6, 2)),)), "reads ranks"),
        (0, LoraWeights(torch.ones(2, 8), (LoraSlice(0, 1, torch.ones(6, 2)),)), "writes columns"),
        (0, LoraWeights(torch.ones(2, 8), (LoraSlice(0, 0, torch.ones(6, 2).half()),)), "convert them first"),
        (0, LoraWeights(torch.ones(1, 8), (LoraSlice(0, 0, torch.ones(4, 1)),) * 2), "two LoRA projections write"),
        (2, LoraWeights(torch.ones(2, 8), ()), "slot 2"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(ops, slot, weights, message):
    with pytest.raises(ValueError, match=message):
        ops.lora_table(8, 6, num_slots=1).put(slot, ops.pack_lora(weights))


# ---------------------------------------------------------------------------------------------------------- attention


class Caches:
    """The same random keys and values in a cache of the kernels and in one of the reference."""

    def __init__(self, ops, shape, lengths, block_size, dtype, stored=None):
        self.shape, self.lengths = shape, lengths
        self.backends = (ops, REFERENCE)
        counts = [-(-length // block_size) for length in lengths]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)) + 1).tolist()
        self.kv = [b.allocate_kv(sum(counts) + 1, block_size, shape, stored or dtype) for b in self.backends]
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.tables[s, :count] = torch.tensor([order.pop() for _ in range(count)])
            where = torch.arange(length)
            slots = self.tables[s].long()[where // block_size] * block_size + where % block_size
            qkv = rand(length, width, dtype=dtype, seed=s)
            for backend, kv in zip(self.backends, self.kv, strict=True):
                backend.rotary_store_kv(qkv.clone(), shape, None, where, unrotated(length, shape.head_dim), kv, slots)

    def metadata(self, new, lengths=None):
        """`lengths` other than those stored: as at an earlier step."""
        lengths = lengths or self.lengths
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        slots = torch.zeros(sum(new), dtype=torch.long)  # attention does not read it
        lens = torch.tensor(lengths, dtype=torch.int32)
        return AttentionMetadata(starts, lens, self.tables, slots, max(new), max(lengths))

    def attend(self, q, new, window=None, soft_cap=None, sinks=None):
        scale = q.shape[-1] ** -0.5
        return [
            backend.paged_attention(q, kv, self.metadata(new), scale, window, soft_cap, sinks)
            for backend, kv in zip(self.backends, self.kv, strict=True)
        ]


def unrotated(positions, head_dim):
    return torch.stack((torch.ones(positions, head_dim // 2), torch.zeros(positions, head_dim // 2)), dim=1)


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, None), (40, 2.0), (1, None)])
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (14, 2)])
def test_paged_attention(ops, dtype, heads: tuple[int, int], window, soft_cap):
    lengths, new = [1, 16, 17, 130, 33, 64], [1, 1, 17, 90, 3, 1]
    caches = Caches(ops, HeadShape(*heads, 64), lengths, 16, dtype)
    close(*caches.attend(rand(sum(new), heads[0], 64, dtype=dtype), new, window, soft_cap))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(3, 1), (14, 2)])
def test_paged_attention_with_sinks(ops, dtype, heads: tuple[int, int], window):
    lengths, new = [1, 16, 17, 600, 33, 64], [1, 1, 17, 90, 3, 1]
    caches = Caches(ops, HeadShape(*heads, 64), lengths, 16, dtype)
    sinks = 2 * rand(heads[0])
    close(*caches.attend(rand(sum(new), heads[0], 64, dtype=dtype), new, window, sinks=sinks))


@pytest.mark.parametrize("head_dim", [2, 8, 40, 64, 72, 80, 96, 128, 192, 256])
def test_paged_attention_of_any_head_dim(ops, dtype, head_dim):
    lengths, new = [20, 35], [1, 35]
    caches = Caches(ops, HeadShape(4, 2, head_dim), lengths, 16, dtype)
    close(*caches.attend(rand(sum(new), 4, head_dim, dtype=dtype), new))


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 32, 128, 1024])
def test_paged_attention_of_any_block_size(ops, dtype, block_size):
    lengths, new = [50, 37, 3], [1, 20, 3]
    caches = Caches(ops, HeadShape(4, 2, 16), lengths, block_size, dtype)
    close(*caches.attend(rand(sum(new), 4, 16, dtype=dtype), new, window=30))


def test_paged_attention_over_thousands_of_keys(ops, dtype):
    lengths, new = [3000, 1024, 1025, 2000], [1, 1, 2, 70]
    caches = Caches(ops, HeadShape(2, 1, 16), lengths, 16, dtype)
    q = rand(sum(new), 2, 16, dtype=dtype)
    close(*caches.attend(q, new))
    close(*caches.attend(q, new, window=600))


@pytest.mark.parametrize("stored", QUANTIZED_KV, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 32, 128, 1024])
def test_paged_attention_over_a_rounded_cache(ops, dtype, stored, block_size):
    """Of any block size, with a window and a cap, and with more keys than are widened or scored at once."""
    lengths, new = [700, 37, 3], [1, 20, 3]
    caches = Caches(ops, HeadShape(4, 2, 24), lengths, block_size, dtype, stored)
    q = rand(sum(new), 4, 24, dtype=dtype)
    tolerance = ROUNDED_TOLERANCE[dtype]
    for window, soft_cap in ((None, None), (30, 2.0)):
        torch.testing.assert_close(*caches.attend(q, new, window, soft_cap), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", [None, *QUANTIZED_KV], ids=str)
def test_attention_of_a_query_does_not_depend_on_its_step(ops, dtype, stored):
    length, shape = 1100, HeadShape(6, 2, 32)
    caches = Caches(ops, shape, [length, 50], 16, dtype, stored)
    q = rand(length, 6, 32, dtype=dtype)
    for window in (None, 600):
        whole, parts = caches.metadata([length, 1]), []
        together = ops.paged_attention(torch.cat((q, q[:1])), caches.kv[0], whole, 0.2, window, None)
        for first, end in [(0, 1), (1, 500), (500, 513), (513, 530), (530, 1099), (1099, 1100)]:
            part = caches.metadata([end - first, 1], [end, 50])
            rows = torch.cat((q[first:end], q[:1]))
            parts.append(ops.paged_attention(rows, caches.kv[0], part, 0.2, window, None)[:-1])
        assert torch.equal(torch.cat(parts), together[:-1])


@pytest.mark.parametrize("stored", [None, *QUANTIZED_KV], ids=str)
def test_stale_nan_in_a_block_does_not_reach_its_next_owner(ops, dtype, stored):
    shape = HeadShape(2, 1, 16)
    caches = Caches(ops, shape, [21], 16, dtype, stored)
    q = rand(1, 2, 16, dtype=dtype)
    clean, _ = caches.attend(q, [1])
    poison = torch.full((3, 4 * 16), torch.nan, dtype=dtype)
    block = int(caches.tables[0, 1]) * 16
    slots = torch.tensor([block + 5, block + 9, block + 15])
    ops.rotary_store_kv(poison, shape, None, torch.zeros(3, dtype=torch.long), unrotated(1, 16), caches.kv[0], slots)
    assert torch.equal(caches.attend(q, [1])[0], clean)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("stored", QUANTIZED_KV, ids=str)
def test_number_that_is_not_finite_is_not_rounded_away(ops, dtype, stored, column):
    """Not a query's, nor a key's, nor a value's: whoever attends to it learns of it."""
    kv = ops.allocate_kv(1, 16, HeadShape(1, 1, 16), stored)
    qkv = rand(2, 3 * 16, dtype=dtype)
    qkv[0, column * 16 + 3] = torch.nan if column else torch.inf
    positions = torch.arange(2)
    q = ops.rotary_store_kv(qkv, HeadShape(1, 1, 16), None, positions, unrotated(2, 16), kv, positions)
    starts, lengths, tables = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [2], [[0]]))
    metadata = AttentionMetadata(starts, lengths, tables, positions, 2, 2)
    out = ops.paged_attention(q, kv, metadata, 0.25, None, None)
    assert out[0].isnan().any()
    assert out[1].isnan().any() == (column > 0)


@pytest.mark.parametrize("stored", [None, *QUANTIZED_KV], ids=str)
def test_chunks_divided_among_threads_give_the_same_bits(dtype, stored):
    shape, lengths, new = HeadShape(2, 1, 16), [2500, 700], [1, 3]
    q, results = rand(4, 2, 16, dtype=dtype), []
    for threads in (1, 2, 5):
        caches = Caches(CpuOps(CPU, threads), shape, lengths, 16, dtype, stored)
        results.append([caches.attend(q, new, window)[0] for window in (None, 900)])
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize(
    ("block_size", "head_dim", "message"), [(24, 16, "24 is not a power of two"), (16, 2048, "up to 1024 dimensions")]
)
def test_cache_that_is_not_supported_is_refused(ops, block_size, head_dim, message):
    with pytest.raises(ValueError, match=message):
        ops.allocate_kv(1, block_size, HeadShape(1, 1, head_dim), torch.float32)


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 100), (40, 768), (5, 33)])
def test_rms_norm(ops, dtype, rows, width):
    x, weight = rand(rows, width, dtype=dtype), rand(width).abs()
    close(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (3, 48), (40, 768)])
def test_add_rms_norm(ops, dtype, rows, width):
    x, weight = rand(rows, width, dtype=dtype), rand(width).abs()
    ours, theirs = rand(rows, width, dtype=dtype, seed=1), rand(rows, width, dtype=dtype, seed=1)
    close(ops.add_rms_norm(x, ours, weight, 1e-6), REFERENCE.add_rms_norm(x, theirs, weight, 1e-6))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (3, 48), (40, 768), (5, 33)])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(ops, dtype, rows, width, biased):
    x, weight, bias = rand(rows, width, dtype=dtype) + 1, rand(width), rand(width, seed=2) if biased else None
    close(ops.layer_norm(x, weight, bias, 1e-5), REFERENCE.layer_norm(x, weight, bias, 1e-5))
    ours, theirs = rand(rows, width, dtype=dtype, seed=1), rand(rows, width, dtype=dtype, seed=1)
    expected = REFERENCE.add_layer_norm(x, theirs, weight, bias, 1e-6)
    close(ops.add_layer_norm(x, ours, weight, bias, 1e-6), expected)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (30, 1000), (2, 33)])
def test_activations_without_a_gate(ops, dtype, rows, width):
    x, curve = rand(rows, width, dtype=dtype) * 4, Xielu(0.9, 1.3, 0.5, -1e-6)
    close(ops.gelu_tanh(x), REFERENCE.gelu_tanh(x))
    close(ops.xielu(x, curve), REFERENCE.xielu(x, curve))


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (3, 96), (30, 1000), (2, 66)])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(ops, dtype, rows, width, name):
    x = rand(rows, width, dtype=dtype) * 4
    close(getattr(ops, name)(x), getattr(REFERENCE, name)(x))


def test_activations_of_extreme_values(ops):
    x = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, torch.nan] + [1.0] * 8])
    close(ops.silu_and_mul(x)[0, :7], REFERENCE.silu_and_mul(x)[0, :7])
    close(ops.gelu_tanh_and_mul(x)[0, :7], REFERENCE.gelu_tanh_and_mul(x)[0, :7])
    close(ops.gelu_tanh(x)[0, :7], REFERENCE.gelu_tanh(x)[0, :7])
    curve = Xielu(0.9, 1.3, 0.5, -1e-6)
    close(ops.xielu(x, curve)[0, :7], REFERENCE.xielu(x, curve)[0, :7])
    assert ops.xielu(x, curve)[0, 7].isnan()
    assert ops.silu_and_mul(x)[0, 7].isnan()
    assert ops.gelu_tanh_and_mul(x)[0, 7].isnan()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((3, 1), 8), ((4, 2), 64), ((2, 2), 80), ((12, 4), 128)])
@pytest.mark.parametrize(("part", "interleaved"), [(1.0, False), (0.5, False), (1.0, True), (0.25, True)])
def test_rotary_store_kv(ops, dtype, heads: tuple[int, int], head_dim, norm, part, interleaved):
    """Where the keys and values went is seen through attention over them."""
    shape, rows = HeadShape(*heads, head_dim), 30
    angles = torch.rand(rows, int(head_dim * part) // 2, generator=torch.Generator().manual_seed(1)) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    weights = rand(2, head_dim).abs()
    qk_norm = QKNorm(weights[0], weights[1], 1e-6) if norm else None
    positions, slots = torch.randperm(rows), torch.arange(rows) + 16
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    metadata = AttentionMetadata(
        torch.tensor([0, rows], dtype=torch.int32), torch.tensor([rows], dtype=torch.int32), table, slots, rows, rows
    )
    qkv, outputs = rand(rows, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype), []
    for backend in (ops, REFERENCE):
        kv = backend.allocate_kv(3, 16, shape, dtype)
        q = backend.rotary_store_kv(qkv.clone(), shape, qk_norm, positions, cos_sin, kv, slots, interleaved)
        outputs.append((q, backend.paged_attention(q, kv, metadata, head_dim**-0.5, None, None)))
    close(outputs[0][0], outputs[1][0])
    close(outputs[0][1], outputs[1][1])


def test_rows_of_every_operation_do_not_depend_on_the_others(ops, dtype):
    x, weight = rand(50, 68, dtype=dtype), rand(68).abs()
    for operation in (
        lambda part: ops.rms_norm(part, weight, 1e-5),
        lambda part: ops.add_rms_norm(part, part.clone(), weight, 1e-5),
        lambda part: ops.layer_norm(part, weight, weight, 1e-5),
        lambda part: ops.add_layer_norm(part, part.clone(), weight, None, 1e-5),
        lambda part: ops.xielu(part, Xielu(0.9, 1.3, 0.5, -1e-6)),
        ops.gelu_tanh,
        ops.silu_and_mul,
        ops.gelu_tanh_and_mul,
    ):
        assert torch.equal(operation(x), torch.cat([operation(row) for row in x.split(1)]))


# ---------------------------------------------------------------------------------------------------------- selection


def test_number_of_threads_does_not_change_a_bit():
    weight, x = rand(200, 64, dtype=torch.bfloat16), rand(70, 64, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        ops = CpuOps(CPU, threads)
        results.append(ops.linear(x, ops.pack_linear([weight], None)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_threads_follow_the_time_that_the_control_group_grants(monkeypatch, tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(library, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert library.available_cores() == expected


def test_best_instruction_set_is_taken_and_said(caplog):
    with caplog.at_level(logging.INFO):
        ops = select_ops(CPU, threads=3)
    assert ops.name == "cpu"
    [said] = own_records(caplog)
    assert said.getMessage() == f"kernels: cpu, {library.usable_instruction_sets()[-1]}, 3 threads"


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'avx9' cannot be used here"):
        select_ops(CPU, "cpu", isa="avx9")


@pytest.mark.parametrize(("device", "backend"), [("cpu", "metal"), ("meta", "cpu")])
def test_backend_that_cannot_run_is_refused(device, backend):
    with pytest.raises(ValueError, match="choose auto"):
        select_ops(torch.device(device), backend)


@pytest.fixture
def not_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "library_path", lambda isa: tmp_path / f"{isa}.so")


def test_without_a_compiled_library_the_reference_serves_and_says_so(not_compiled, caplog):
    assert select_ops(CPU).name == "reference"
    [said] = own_records(caplog)
    assert "install with a C++17 compiler" in said.getMessage()


def test_library_of_an_older_build_is_not_called(monkeypatch):
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    with pytest.raises(ValueError, match="older build: install again"):
        select_ops(CPU, "cpu")


def test_asking_for_kernels_that_are_not_compiled_is_an_error(not_compiled):
    with pytest.raises(ValueError, match=r"install with a C\+\+17 compiler"):
        select_ops(CPU, "cpu")
