"""A cache of rounded keys and values: the reference against the formula, the other backends against the reference."""

import pytest
import torch

from loraplex_kernels.cpu import library
from loraplex_kernels.ops import QUANTIZED_KV, AttentionMetadata, HeadShape, QKNorm
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = ReferenceOps(DEVICE)
STORED = list(QUANTIZED_KV)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


@pytest.fixture(params=["triton", *library.usable_instruction_sets()])
def ops(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        return select_ops(DEVICE, "triton")
    if DEVICE.type != "cpu":
        pytest.skip("on this device the CPU kernels compute nothing")
    return select_ops(DEVICE, "cpu", threads=2, isa=request.param)


def angles(random, positions, head_dim):
    turns = random(positions, head_dim // 2)
    return torch.stack((turns.cos(), turns.sin()), dim=1).contiguous()


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_reference_stores_the_nearest_multiple_of_the_scale(random):
    """With the largest magnitude of each head and token 127 steps from zero. A head of zeros stays zero."""
    shape, positions = HeadShape(2, 2, 8), torch.arange(5, device=DEVICE)
    qkv = random(5, 48)
    qkv[3] = 0
    still = torch.cat((torch.ones(5, 1, 4), torch.zeros(5, 1, 4)), dim=1).to(DEVICE)  # cosines, sines: no rotation
    cache = REFERENCE.allocate_kv(2, 4, shape, torch.int8)
    REFERENCE.rotary_store_kv(qkv, shape, None, positions, still, cache, positions + 1)
    for stored, scales, given in ((cache.k, cache.k_scale, qkv[:, 16:32]), (cache.v, cache.v_scale, qkv[:, 32:])):
        assert scales is not None
        for token in range(5):
            for head in range(2):
                x = given[token, 8 * head : 8 * head + 8]
                step = x.abs().max().item() / 127
                slot = divmod(token + 1, 4)
                assert scales[(*slot, head)].item() == pytest.approx(step, rel=1e-6)
                codes = [round(value / step) if step else 0 for value in x.tolist()]
                assert stored[(*slot, head)].tolist() == codes


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_reference_attends_to_what_the_cache_stands_for(random, stored):
    shape = HeadShape(4, 2, 8)
    metadata = AttentionMetadata(
        int32([0, 3, 4]), int32([9, 5]), int32([[1, 3, 2], [4, 5, 0]]), torch.zeros(4, device=DEVICE).long(), 3, 9
    )
    cache = REFERENCE.allocate_kv(6, 4, shape, stored)
    plain = REFERENCE.allocate_kv(6, 4, shape, torch.float32)
    for codes, scales, values in ((cache.k, cache.k_scale, plain.k), (cache.v, cache.v_scale, plain.v)):
        assert scales is not None
        codes.copy_((random(*codes.shape) * 20).to(stored))
        scales.copy_(random(*scales.shape).abs())
        values.copy_(codes.float() * scales.unsqueeze(-1))
    q = random(4, 4, 8)
    actual, expected = (REFERENCE.paged_attention(q, each, metadata, 0.1, 7, 5.0) for each in (cache, plain))
    assert torch.equal(actual, expected)


def test_cache_counts_its_scales():
    cache = REFERENCE.allocate_kv(3, 4, HeadShape(4, 2, 8), torch.int8)
    assert cache.nbytes == 2 * 3 * 4 * 2 * (8 + 4)


MOST_STORED = (
    64  # tokens of a sequence: a longer one has their blocks again and again, as storing is slow if interpreted
)
# Lengths and new tokens of sequences; the heads.
LOADS = {
    "prompts": ([5, 17, 1], [5, 17, 1], (4, 2, 16)),
    "decoding": ([30, 9, 1], [1, 1, 1], (4, 1, 64)),
    "both": ([30, 9, 20, 12], [1, 9, 3, 1], (3, 3, 80)),
    "one long enough to be split": ([530, 2], [1, 1], (2, 1, 16)),
    "wide heads": ([600, 2], [1, 1], (2, 1, 256)),
}


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize(
    ("load", "dtype"),
    [
        *((load, torch.float32) for load in LOADS),
        ("both", torch.float16),
        ("both", torch.bfloat16),
        ("wide heads", torch.float16),
    ],
)
def test_backend_equals_the_reference(random, ops, stored, dtype, load):
    """Everything is stored first, then the last tokens attend: storing and attending must agree on every layout."""
    lengths, new, heads = LOADS[load]
    shape, block_size = HeadShape(*heads), 8
    stored_lengths = [min(length, MOST_STORED) for length in lengths]
    counts = [-(-length // block_size) for length in stored_lengths]
    tables = torch.zeros(len(lengths), -(-max(lengths) // block_size), dtype=torch.int32, device=DEVICE)
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int().to(DEVICE)
    for sequence, ids in enumerate(order.split(counts)):
        num_blocks = -(-lengths[sequence] // block_size)
        tables[sequence, :num_blocks] = ids.repeat(-(-num_blocks // len(ids)))[:num_blocks]
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in stored_lengths])
    sequences = torch.arange(len(lengths), device=DEVICE).repeat_interleave(torch.tensor(stored_lengths, device=DEVICE))
    slots = tables[sequences, positions // block_size].long() * block_size + positions % block_size
    starts = int32([0, *torch.tensor(new).cumsum(0)])
    metadata = AttentionMetadata(starts, int32(lengths), tables, slots, max(new), max(lengths))
    ends = torch.tensor(stored_lengths).cumsum(0).tolist()
    last = torch.cat([torch.arange(end - n, end, device=DEVICE) for end, n in zip(ends, new, strict=True)])
    qkv = random(sum(stored_lengths), (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim).to(dtype)
    cos_sin = angles(random, max(stored_lengths), shape.head_dim)
    norm = QKNorm(random(shape.head_dim), random(shape.head_dim), 1e-6) if load == "both" else None
    results = []
    for each in (ops, REFERENCE):
        cache = each.allocate_kv(sum(counts), block_size, shape, stored)
        q = each.rotary_store_kv(qkv.clone(), shape, norm, positions, cos_sin, cache, slots)
        results.append(each.paged_attention(q[last].contiguous(), cache, metadata, shape.head_dim**-0.5, None, None))
    # Between one order of summation and another a rotated key may fall on either side of the middle between two codes,
    # and moves by a step: a 127th of the head's largest, an eighth of itself in fp8. A sum sees little of one number.
    tolerance = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
