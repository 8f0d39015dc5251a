"""The reference operations against formulas written out row by row in float64."""

import math
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.ops import AttentionMetadata, HeadShape, LoraSegments, LoraSlice, LoraWeights, QKNorm, Xielu
from loraplex_kernels.reference import ReferenceOps
from tests.kernels.tolerance import Tolerance

OPS = ReferenceOps(torch.device("cpu"))

# float32: a few hundred terms, each rounded to 2^-24. bfloat16: inputs are exact in the formula too, so the error is
# one rounding of the result, 2^-9, and one of the residual or the rotated key before it.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), **TOLERANCE[actual.dtype])


def segments_of(*ranges):
    columns = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 3).T.contiguous()
    return LoraSegments(tuple(ranges), *columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(generator, dtype, bias):
    x, weight = (torch.randn(5, 33, generator=generator).to(dtype), torch.randn(7, 33, generator=generator).to(dtype))
    b = torch.randn(7, generator=generator).to(dtype) if bias else None
    packed = OPS.pack_linear([weight], b)
    expected = x.double() @ weight.double().T + (0 if b is None else b.double())
    close(OPS.linear(x, packed), expected)
    assert (packed.in_features, packed.out_features) == (33, 7)
    assert packed.nbytes == weight.nbytes + (0 if b is None else b.nbytes)


def adapter(generator, in_features, parts, dtype):
    """parts: (rank, first output column, number of output columns)"""
    slices, rank = [], 0
    for r, first, n in parts:
        slices.append(LoraSlice(rank, first, (torch.randn(n, r, generator=generator) / r).to(dtype)))
        rank += r
    return LoraWeights(
        (torch.randn(rank, in_features, generator=generator) / in_features**0.5).to(dtype), tuple(slices)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_segmented_lora_adds_each_segments_adapter(generator, dtype):
    table = OPS.lora_table(24, 40, num_slots=3)
    held = {
        0: adapter(generator, 24, [(4, 0, 16), (2, 16, 8), (3, 24, 16)], dtype),
        2: adapter(generator, 24, [(7, 24, 16)], dtype),
    }
    for slot, weights in held.items():
        table.put(slot, OPS.pack_lora(weights))
    ranges = [(2, 1, 2), (0, 2, 6), (1, 6, 7), (2, 7, 9), (0, 9, 9)]
    x = torch.randn(11, 24, generator=generator).to(dtype)
    before = torch.randn(11, 40, generator=generator).to(dtype)
    y, expected = before.clone(), before.double()
    OPS.segmented_lora(y, x, segments_of(*ranges), table)
    for slot, start, end in ranges:
        for row in range(start, end):
            for part in held[slot].slices if slot in held else ():
                n, r = part.b.shape
                shrunk = held[slot].a[part.rank_start : part.rank_start + r].double() @ x[row].double()
                expected[row, part.out_start : part.out_start + n] += part.b.double() @ shrunk
    close(y, expected)
    for base_row in (0, 6, 9, 10):
        assert torch.equal(y[base_row], before[base_row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_segmented_lora_scales_and_shifts_what_it_adds_to(generator, dtype, rank):
    weights = adapter(generator, 24, [(rank, 8, 16)] if rank else [], dtype)
    affine = torch.randn(2, 40, generator=generator)
    table = OPS.lora_table(24, 40, num_slots=1)
    table.put(0, OPS.pack_lora(replace(weights, affine=affine)))
    x = torch.randn(5, 24, generator=generator).to(dtype)
    before = torch.randn(5, 40, generator=generator).to(dtype)
    y, expected = before.clone(), before.clone()
    OPS.segmented_lora(y, x, segments_of((0, 1, 4)), table)
    table.put(0, OPS.pack_lora(weights))
    OPS.segmented_lora(expected, x, segments_of((0, 1, 4)), table)
    close(y[1:4], expected[1:4].double() * affine[0] + affine[1])
    assert torch.equal(y[[0, 4]], before[[0, 4]])


def test_rows_of_a_weight_are_given_back(generator):
    weight = torch.randn(7, 5, generator=generator)
    assert torch.equal(OPS.dequantize(OPS.pack_linear([weight], torch.ones(7)), 2, 6), weight[2:6])


def test_removed_adapter_adds_nothing(generator):
    table = OPS.lora_table(8, 8, num_slots=1)
    table.put(0, OPS.pack_lora(adapter(generator, 8, [(2, 0, 8)], torch.float32)))
    table.remove(0)
    table.remove(0)
    y = torch.ones(2, 8)
    OPS.segmented_lora(y, torch.ones(2, 8), segments_of((0, 0, 2)), table)
    assert torch.equal(y, torch.ones(2, 8))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (LoraWeights(torch.ones(2, 9), ()), "input features"),
        (LoraWeights(torch.ones(2, 8), (LoraSlice(1, 0, torch.ones(6, 2)),)), "reads ranks"),
        (LoraWeights(torch.ones(2, 8), (LoraSlice(0, 1, torch.ones(6, 2)),)), "writes columns"),
        (LoraWeights(torch.ones(2, 8), (), torch.ones(2, 5)), "gain and offset"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        OPS.lora_table(8, 6, num_slots=1).put(0, OPS.pack_lora(weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(generator, dtype):
    x = torch.randn(3, 48, generator=generator).to(dtype)
    weight = torch.rand(48, generator=generator) + 0.5
    expected = [row / math.sqrt(sum(v * v for v in row.tolist()) / 48 + 1e-5) * weight for row in x.double()]
    close(OPS.rms_norm(x, weight, 1e-5), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(generator, dtype):
    x, residual = torch.randn(2, 3, 48, generator=generator).to(dtype)
    weight = torch.rand(48, generator=generator) + 0.5
    total = x + residual
    out = OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(out, OPS.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(generator, dtype, biased):
    x = (torch.randn(3, 48, generator=generator) + 2).to(dtype)
    weight, bias = torch.rand(2, 48, generator=generator) + 0.5
    apart = x.double() - x.double().mean(1, keepdim=True)
    expected = apart / (apart.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + (bias if biased else 0)
    close(OPS.layer_norm(x, weight, bias if biased else None, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm_updates_the_residual(generator, dtype):
    x, residual = torch.randn(2, 3, 48, generator=generator).to(dtype)
    weight, bias = torch.rand(2, 48, generator=generator) + 0.5
    total = x + residual
    out = OPS.add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(out, OPS.layer_norm(total, weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_without_a_gate(generator, dtype):
    x = (torch.randn(3, 10, generator=generator) * 3).to(dtype)
    wide = x.double()
    gelu = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    close(OPS.gelu_tanh(x), gelu)
    below = 1.3 * (torch.expm1(wide.clamp(max=-1e-6)) - wide)
    curve = torch.where(wide > 0, 0.9 * wide**2, below) + 0.5 * wide
    close(OPS.xielu(x, Xielu(positive=0.9, negative=1.3, beta=0.5, eps=-1e-6)), curve)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_activations(generator, dtype, name):
    x = (torch.randn(3, 10, generator=generator) * 3).to(dtype)
    gate, up = x.double()[:, :5], x.double()[:, 5:]
    if name == "silu":
        actual, activated = OPS.silu_and_mul(x), gate / (1 + torch.exp(-gate))
    else:
        actual = OPS.gelu_tanh_and_mul(x)
        activated = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(actual, activated * up)


class Cache:
    """A cache filled through `rotary_store_kv` without rotation, beside the keys and values that went in."""

    def __init__(self, generator, shape, lengths, block_size, dtype):
        self.shape, self.lengths, self.block_size = shape, lengths, block_size
        counts = [-(-length // block_size) for length in lengths]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.kv = OPS.allocate_kv(sum(counts) + 1, block_size, shape, dtype)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        self.keys, self.values = [], []
        unrotated = torch.stack((torch.ones(1, shape.head_dim // 2), torch.zeros(1, shape.head_dim // 2)), dim=1)
        width = shape.num_heads + 2 * shape.num_kv_heads
        for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.tables[s, :count] = torch.tensor([order.pop() for _ in range(count)])
            qkv = torch.randn(length, width * shape.head_dim, generator=generator).to(dtype)
            where = torch.arange(length)
            slots = self.tables[s].long()[where // block_size] * block_size + where % block_size
            OPS.rotary_store_kv(qkv, shape, None, torch.zeros(length, dtype=torch.long), unrotated, self.kv, slots)
            heads = qkv.view(length, width, shape.head_dim)[:, shape.num_heads :]
            self.keys.append(heads[:, : shape.num_kv_heads])
            self.values.append(heads[:, shape.num_kv_heads :])

    def metadata(self, new):
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        lens = torch.tensor(self.lengths, dtype=torch.int32)
        slots = torch.zeros(sum(new), dtype=torch.long)  # only `rotary_store_kv` reads it
        return AttentionMetadata(starts, lens, self.tables, slots, max(new), max(self.lengths))


def attention_formula(cache, q, new, scale, window, soft_cap, sinks=None):
    rows, group = [], cache.shape.num_heads // cache.shape.num_kv_heads
    for s, n in enumerate(new):
        for i in range(n):
            p = cache.lengths[s] - n + i
            first = 0 if window is None else max(0, p - window + 1)
            for h in range(cache.shape.num_heads):
                keys = cache.keys[s][first : p + 1, h // group].double()
                scores = scale * (keys @ q[sum(new[:s]) + i, h].double())
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                rows.append(
                    torch.softmax(scores, 0)[: p + 1 - first] @ cache.values[s][first : p + 1, h // group].double()
                )
    return torch.stack(rows).view(sum(new), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (None, 2.0), (3, 1.0)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_paged_attention(generator, dtype, window, soft_cap, heads: tuple[int, int]):
    lengths, new = [1, 9, 17, 12, 8, 30], [1, 1, 17, 3, 8, 1]
    cache = Cache(generator, HeadShape(*heads, 8), lengths, 4, dtype)
    q = torch.randn(sum(new), heads[0], 8, generator=generator).to(dtype)
    actual = OPS.paged_attention(q, cache.kv, cache.metadata(new), 0.3, window, soft_cap)
    close(actual, attention_formula(cache, q, new, 0.3, window, soft_cap))


@pytest.mark.parametrize("window", [None, 5])
def test_a_sink_takes_its_share_of_the_weights(generator, window):
    lengths, new = [1, 9, 17, 12], [1, 1, 17, 3]
    cache = Cache(generator, HeadShape(6, 2, 8), lengths, 4, torch.float32)
    q, sinks = torch.randn(sum(new), 6, 8, generator=generator), torch.randn(6, generator=generator)
    actual = OPS.paged_attention(q, cache.kv, cache.metadata(new), 0.3, window, None, sinks)
    close(actual, attention_formula(cache, q, new, 0.3, window, None, sinks))


def test_paged_attention_in_bounded_pieces(generator, monkeypatch):
    lengths, new = [9, 17, 30], [1, 17, 1]
    cache = Cache(generator, HeadShape(4, 2, 8), lengths, 4, torch.float32)
    q = torch.randn(sum(new), 4, 8, generator=generator)
    monkeypatch.setattr("loraplex_kernels.reference.MAX_ATTENTION_ELEMENTS", 300)
    actual = OPS.paged_attention(q, cache.kv, cache.metadata(new), 0.3, None, None)
    close(actual, attention_formula(cache, q, new, 0.3, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [8, 6, 2])
def test_rotary_store_kv(generator, dtype, norm, interleaved, dims):
    shape, positions = HeadShape(3, 1, 8), torch.tensor([4, 0, 9])
    angles = torch.rand(10, dims // 2, generator=generator) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    qkv = torch.randn(3, 5 * 8, generator=generator).to(dtype)
    weights = torch.rand(2, 8, generator=generator) + 0.5
    qk_norm = QKNorm(weights[0], weights[1], 1e-6) if norm else None
    cache, slots = OPS.allocate_kv(3, 4, shape, dtype), torch.tensor([5, 2, 11])

    def rotated(head, weight, position):
        head = head.double()
        if norm:
            head = head / torch.sqrt((head * head).mean() + 1e-6) * weight
        turns = [complex(math.cos(angle), math.sin(angle)) for angle in angles[position]]
        firsts, seconds = slice(0, dims // 2), slice(dims // 2, dims)
        if interleaved:
            firsts, seconds = slice(0, dims, 2), slice(1, dims, 2)
        pairs = [complex(a, b) * turn for a, b, turn in zip(head[firsts], head[seconds], turns, strict=True)]
        head = head.clone()
        head[firsts] = torch.tensor([z.real for z in pairs]).double()
        head[seconds] = torch.tensor([z.imag for z in pairs]).double()
        return head

    heads = qkv.clone().view(3, 5, 8)
    q = OPS.rotary_store_kv(qkv, shape, qk_norm, positions, cos_sin, cache, slots, interleaved)
    stored_k, stored_v = cache.k.view(12, 1, 8), cache.v.view(12, 1, 8)
    for t, position in enumerate(positions.tolist()):
        for h in range(3):
            close(q[t, h], rotated(heads[t, h], weights[0], position))
        close(stored_k[slots[t], 0], rotated(heads[t, 3], weights[1], position))
        assert torch.equal(stored_v[slots[t], 0], heads[t, 4])
    untouched = [s for s in range(12) if s not in slots.tolist()]
    assert not stored_k[untouched].any()
    assert not stored_v[untouched].any()


@pytest.mark.parametrize("vocab", [1, 31, 32, 70])
def test_mask_logits(generator, vocab):
    logits = torch.randn(4, vocab, generator=generator)
    bits = torch.randint(-(2**31), 2**31, (2, vocab // 32 + 1), generator=generator).to(torch.int32)
    expected = logits.clone()
    for row, words in zip((3, 1), bits.tolist(), strict=True):
        for token in range(vocab):
            if not words[token // 32] >> token % 32 & 1:
                expected[row, token] = -math.inf
    OPS.mask_logits(logits, [3, 1], bits)
    assert torch.equal(logits, expected)
