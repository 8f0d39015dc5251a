"""The Triton kernels in bfloat16 at the sizes of real models, against the reference in float32 on the same device."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from loraplex_kernels.ops import (  # noqa: E402  (after the skip)
    QUANTIZED_KV,
    AttentionMetadata,
    HeadShape,
    LayerKV,
    LoraSegments,
    LoraSlice,
    LoraWeights,
    Xielu,
)
from loraplex_kernels.quantized import AffineWeight, Float8Weight, InputRounding, IntegerWeight, TableWeight  # noqa: E402
from loraplex_kernels.reference import ReferenceOps  # noqa: E402
from tests.kernels.tolerance import Tolerance  # noqa: E402

# The inputs are bfloat16 on both sides. What is left is one rounding of the result (2^-9 of it) and one of the weights
# or shrunk rows in between (2^-9 of each term, most of which cancels).
TOLERANCE: Tolerance = {"rtol": 2**-6, "atol": 2**-6}


@pytest.fixture(scope="module")
def ops():
    from loraplex_kernels.triton import TritonOps

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
        ([20000, *[300] * 64], [1] * 65),
        ([1500], [1500]),
        ([3000, 700, 64, 1000, 1], [500, 1, 64, 1, 1]),
    ],
    ids=["few long", "many", "one long among many", "prompt", "mixed"],
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


@pytest.mark.parametrize("stored", QUANTIZED_KV)
@pytest.mark.parametrize(("lengths", "new"), [([8000, 3], [1, 1]), ([600, 40], [300, 40])], ids=["decoding", "prompts"])
def test_rounded_cache(ops, reference, random, stored, lengths, new):
    """Every number of a cache is what a code and a scale stand for; storing is compared at small sizes."""
    counts = [-(-length // 16) for length in lengths]
    tables = torch.zeros(2, max(counts), dtype=torch.int32, device="cuda")
    tables[0, : counts[0]] = torch.arange(counts[0])
    tables[1, : counts[1]] = torch.arange(counts[1]) + counts[0]
    slots = torch.zeros(sum(new), dtype=torch.long, device="cuda")
    metadata = AttentionMetadata(int32([0, new[0], sum(new)]), int32(lengths), tables, slots, max(new), max(lengths))
    cache = ops.allocate_kv(sum(counts), 16, HeadShape(32, 8, 128), stored)
    plain = []
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert scales is not None
        codes.copy_((random(*codes.shape).float() * 30).clamp(-120, 120).to(stored))
        scales.copy_(random(*scales.shape).float().abs() / 30)
        plain.append((codes.float() * scales.unsqueeze(-1)).transpose(1, 2).contiguous())
    q = random(sum(new), 32, 128)
    actual = ops.paged_attention(q, cache, metadata, 128**-0.5, None, None)
    wide = LayerKV(plain[0], plain[1], sum(counts), 16)
    expected = reference.paged_attention(q.float(), wide, metadata, 128**-0.5, None, None)
    torch.testing.assert_close(actual.float(), expected, **TOLERANCE)


@pytest.mark.parametrize("num_rows", [1, 16, 64, 600])
@pytest.mark.parametrize("kind", ["4 bit", "act-order", "8 bit", "nf4", "fp8", "w8a8"])
def test_quantised_linear(ops, reference, random, num_rows, kind):
    n, c = 6144, 4096
    codes = torch.randint(0, 256 if kind == "8 bit" else 16, (n, c), device="cuda", dtype=torch.uint8)
    scale, zero = random(c // 128, n).float().abs() / 8, torch.full((c // 128, n), 8.0, device="cuda")
    weight = {
        "4 bit": lambda: AffineWeight(codes, 4, scale, zero, 128),
        "act-order": lambda: AffineWeight(codes, 4, scale, zero, 128, torch.randperm(c, device="cuda")),
        "8 bit": lambda: AffineWeight(codes, 8, scale[:1] / 16, 16 * zero[:1], c),
        "nf4": lambda: TableWeight(codes, torch.linspace(-1, 1, 16, device="cuda"), scale.repeat(2, 1).flatten(), 64),
        "fp8": lambda: Float8Weight(random(n, c).to(torch.float8_e4m3fn), scale[:, : n // 128].t(), (128, 128)),
        "w8a8": lambda: IntegerWeight((codes.int() - 8).to(torch.int8), scale[0].contiguous(), InputRounding()),
    }[kind]()
    x = random(num_rows, c) / math.sqrt(c)
    actual = ops.linear(x, ops.pack_quantized(weight, None, x.dtype))
    expected = reference.linear(x.float(), reference.pack_quantized(weight, None, torch.float32))
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
    expected = reference.add_layer_norm(x, residual.clone(), weight, weight, 1e-6)
    torch.testing.assert_close(ops.add_layer_norm(x, residual, weight, weight, 1e-6), expected, **TOLERANCE)
    torch.testing.assert_close(ops.gelu_tanh(x), reference.gelu_tanh(x), **TOLERANCE)
    curve = Xielu(0.9, 1.3, 0.5, -1e-6)
    torch.testing.assert_close(ops.xielu(x, curve), reference.xielu(x, curve), **TOLERANCE)
    torch.testing.assert_close(ops.silu_and_mul(x), reference.silu_and_mul(x), **TOLERANCE)
    torch.testing.assert_close(ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x), **TOLERANCE)
