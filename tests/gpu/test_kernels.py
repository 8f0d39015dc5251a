"""The Triton kernels in bfloat16 at the sizes of real models, against the reference in float32 on the same device."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from kernels.ops import AttentionMetadata, LayerKV, LoraSegments, LoraSlice, LoraWeights  # noqa: E402  (after the skip)
from kernels.reference import ReferenceOps  # noqa: E402

# The inputs are bfloat16 on both sides. What is left is one rounding of the result (2^-9 of it) and one of the weights
# or shrunk rows in between (2^-9 of each term, most of which cancels).
TOLERANCE = {"rtol": 2**-6, "atol": 2**-6}


@pytest.fixture(scope="module")
def ops():
    from kernels.triton import TritonOps

    return TritonOps(torch.device("cuda"))


@pytest.fixture(scope="module")
def reference():
    return ReferenceOps(torch.device("cuda"))


@pytest.fixture
def random():
    generator = torch.Generator(device="cuda").manual_seed(17)
    return lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (8, 4, 256)])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([8000, 3, 4097], [1, 1, 1]),
        ([100 + 7 * i for i in range(64)], [1] * 64),
        ([1500], [1500]),
        ([3000, 700, 64, 1000, 1], [500, 1, 64, 1, 1]),
    ],
    ids=["few long", "many", "prompt", "mixed"],
)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (512, 30.0)])
def test_attention(ops, reference, random, heads, lengths, new, window, soft_cap):
    num_heads, num_kv_heads, head_dim = heads
    counts = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for s, ids in enumerate(order.split(counts)):
        tables[s, : counts[s]] = ids
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    slots = torch.zeros(sum(new), dtype=torch.long, device="cuda")
    metadata = AttentionMetadata(int32(starts), int32(lengths), tables.cuda(), slots, max(new), max(lengths))
    k, v = random(sum(counts), 16, num_kv_heads, head_dim), random(sum(counts), 16, num_kv_heads, head_dim)
    q, scale = random(sum(new), num_heads, head_dim), head_dim**-0.5
    cache = LayerKV(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), sum(counts), 16)
    actual = ops.paged_attention(q, cache, metadata, scale, window, soft_cap)
    wide = replace(cache, k=k.float(), v=v.float())
    expected = reference.paged_attention(q.float(), wide, metadata, scale, window, soft_cap)
    torch.testing.assert_close(actual.float(), expected, **TOLERANCE)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 600])
@pytest.mark.parametrize("ranks", [[16] * 8, [8, 64, 16, 256, 32, 128, 512, 1]], ids=["equal", "mixed"])
def test_lora(ops, reference, random, num_rows, ranks):
    c, parts = 4096, [(0, 4096), (4096, 1024), (5120, 1024)]
    tables = [each.lora_table(c, 6144, len(ranks)) for each in (ops, reference)]
    for slot, rank in enumerate(ranks):
        a = random(rank * len(parts), c) / math.sqrt(c)
        slices = [LoraSlice(i * rank, o, random(n, rank) / math.sqrt(rank)) for i, (o, n) in enumerate(parts)]
        for each, table in zip((ops, reference), tables, strict=True):
            table.put(slot, each.pack_lora(LoraWeights(a, tuple(slices))))
    bounds = torch.linspace(num_rows // 8, num_rows, len(ranks) + 1).int().tolist()
    ranges = tuple((slot, start, end) for slot, (start, end) in enumerate(pairwise(bounds)))
    columns = [int32(column) for column in zip(*ranges, strict=True)]
    segments = LoraSegments(ranges, *columns)
    x, y = random(num_rows, c), random(num_rows, 6144)
    before, expected = y.clone(), y.float()
    ops.segmented_lora(y, x, segments, tables[0])
    reference.segmented_lora(expected, x.float(), segments, tables[1])
    torch.testing.assert_close(y.float(), expected, **TOLERANCE)
    assert torch.equal(y[: bounds[0]], before[: bounds[0]])


def test_lora_gives_the_same_bits_every_time(ops, random):
    table = ops.lora_table(4096, 4096, 1)
    table.put(0, ops.pack_lora(LoraWeights(random(32, 4096), (LoraSlice(0, 0, random(4096, 32)),))))
    segments, x = LoraSegments(((0, 0, 40),), int32([0]), int32([0]), int32([40])), random(40, 4096)
    first, again = torch.zeros(2, 40, 4096, dtype=torch.bfloat16, device="cuda")
    ops.segmented_lora(first, x, segments, table)
    ops.segmented_lora(again, x, segments, table)
    assert torch.equal(first, again)


@pytest.mark.parametrize("width", [896, 4096, 14336])
def test_small_operations(ops, reference, random, width):
    x, residual, weight = random(300, width), random(300, width), random(width).float()
    expected = reference.add_rms_norm(x, expected_residual := residual.clone(), weight, 1e-6)
    torch.testing.assert_close(ops.add_rms_norm(x, residual, weight, 1e-6), expected, **TOLERANCE)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(ops.silu_and_mul(x), reference.silu_and_mul(x), **TOLERANCE)
    torch.testing.assert_close(ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x), **TOLERANCE)
