"""The compiled products with quantised weights, on each instruction set of this processor, against the reference."""

import pytest
import torch

from loraplex_kernels.cpu import library
from loraplex_kernels.quantized import AffineWeight, Float8Weight, MinimumWeight, TableWeight, dequantize
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops

CPU = torch.device("cpu")
REFERENCE = ReferenceOps(CPU)

# float32: the same sums in another order. 16 bits: float32 sums on both sides, rounded once at the end; and with
# bfloat16 products a table's entries are rounded to bfloat16 as well, as they would be in a dense bfloat16 model.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# The values of bitsandbytes' nf4 (arXiv 2305.14314): none but -1, 0 and 1 is a short fraction.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]

pytestmark = pytest.mark.skipif(
    not library.usable_instruction_sets(), reason="the CPU kernels are not compiled: install with a C++17 compiler"
)


@pytest.fixture(scope="module", params=library.usable_instruction_sets())
def ops(request):
    return select_ops(CPU, "cpu", threads=2, isa=request.param)


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request):
    return request.param


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def affine(n, c, bits=4, group=128, *, ordered=False, symmetric=False, fraction=0.0):
    g, groups = generator(), -(-c // group)
    zero = torch.randint(0, 1 << bits, (groups, n), generator=g).float() + fraction
    return AffineWeight(
        codes=torch.randint(0, 1 << bits, (n, c), generator=g, dtype=torch.uint8),
        bits=bits,
        scale=(torch.rand(groups, n, generator=g) / 16 + 0.01).half().float(),
        zero=torch.full_like(zero, 1 << (bits - 1)) if symmetric else zero,
        group_size=group,
        input_order=torch.randperm(c, generator=g) if ordered else None,
    )


def table(n, c, block=64):
    g = generator()
    codes = torch.randint(0, 16, (n, c), generator=g, dtype=torch.uint8)
    return TableWeight(codes, torch.tensor(NF4), torch.rand(-(-n * c // block), generator=g) + 0.1, block)


def float8(n, c, block):
    g = generator()
    codes = (torch.randn(n, c, generator=g) * 10.0 ** torch.randint(-3, 2, (n, c), generator=g)).to(torch.float8_e4m3fn)
    return Float8Weight(codes, torch.rand(-(-n // block[0]), -(-c // block[1]), generator=g) + 0.1, block)


def multiples(n, c, group, low, high):
    """Scales that are whole multiples of a float16 number for each 256 columns, and these numbers."""
    g = generator()
    unit = (torch.rand(-(-c // 256), n, generator=g) / 64).half().float()
    factors = torch.randint(low, high + 1, (c // group, n), generator=g)
    return unit.repeat_interleave(256 // group, dim=0)[: c // group] * factors, unit


def minimum(n, c, bits, group, in_units=True):
    codes = torch.randint(0, 1 << bits, (n, c), generator=generator(), dtype=torch.uint8)
    (scale, scale_unit), (lowest, lowest_unit) = multiples(n, c, group, 0, 63), multiples(n, c, group, 0, 15)
    units = (scale_unit, lowest_unit) if in_units else ()
    return MinimumWeight(codes, bits, scale, lowest, group, *units)


def affine_in_units(n, c, bits, group):
    codes = torch.randint(0, 1 << bits, (n, c), generator=generator(), dtype=torch.uint8)
    scale, unit = multiples(n, c, group, -128, 127)
    return AffineWeight(codes, bits, scale, torch.full_like(scale, 1 << (bits - 1)), group, scale_unit=unit)


WEIGHTS = {
    "minima": lambda: minimum(70, 96, 4, 32, in_units=False),
    "minima of bytes": lambda: minimum(70, 96, 5, 32, in_units=False),
    "minima in units": lambda: minimum(70, 768, 4, 32),
    "minima of bytes in units": lambda: minimum(33, 512, 5, 32),
    "minima in units, groups of 16": lambda: minimum(130, 512, 2, 16),
    "scales in units": lambda: affine_in_units(70, 768, 3, 16),
    "scales of bytes in units": lambda: affine_in_units(130, 512, 6, 16),
    "groups of 32": lambda: affine(64, 128, group=32),
    "groups of 64, symmetric": lambda: affine(100, 256, group=64, symmetric=True),
    "groups of 128": lambda: affine(130, 384),
    "whole columns": lambda: affine(70, 600, group=600),
    "odd groups, the last one short": lambda: affine(33, 100, group=33),
    "groups of one": lambda: affine(5, 7, group=1),
    "fractional zeros": lambda: affine(64, 96, group=32, fraction=0.37),
    "act-order": lambda: affine(65, 192, group=64, ordered=True),
    "act-order, the last group short": lambda: affine(65, 100, group=32, ordered=True, symmetric=True),
    "2 bit": lambda: affine(40, 64, bits=2, group=32),
    "3 bit": lambda: affine(40, 64, bits=3, group=32),
    "8 bit per channel": lambda: affine(66, 300, bits=8, group=300, symmetric=True),
    "8 bit in groups": lambda: affine(66, 256, bits=8, group=64),
    "table": lambda: table(64, 256),
    "table, a block of several rows": lambda: table(30, 24, block=96),
    "table, blocks across rows": lambda: table(37, 160),
    "table, blocks of 16": lambda: table(37, 96, block=16),
    "table, blocks across odd rows": lambda: table(10, 33),
    "float8 per channel": lambda: float8(70, 129, (1, 129)),
    "float8 blocks": lambda: float8(150, 300, (128, 128)),
    "float8 blocks of 32 in rows": lambda: float8(37, 96, (1, 32)),
}


def rand(rows, columns, dtype):
    return torch.randn(rows, columns, generator=generator(rows)).to(dtype)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_product_is_the_references(ops, dtype, kind):
    weight = WEIGHTS[kind]()
    n, c = weight.codes.shape
    bias = torch.randn(n, generator=generator()).to(dtype)
    packed, expected = (backend.pack_quantized(weight, bias, dtype) for backend in (ops, REFERENCE))
    assert (packed.in_features, packed.out_features) == (c, n)
    for rows in (0, 1, 2, 5, 12, 13, 40):
        x = rand(rows, c, dtype)
        y, wanted = ops.linear(x, packed), REFERENCE.linear(x, expected)
        assert y.dtype is dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            y, wanted, rtol=tolerance, atol=tolerance * float(wanted.float().std()) if rows else 0
        )


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param((affine(64, 128, group=32), affine(64, 128, group=32)), id="of one layout"),
        pytest.param((affine(64, 128, group=128), affine(64, 128, group=32)), id="groups that get shorter"),
        pytest.param((affine(64, 128, group=32), affine(64, 128, group=128)), id="groups that get longer"),
        pytest.param((affine(64, 128, group=32), affine(64, 128, group=20)), id="groups that need padding"),
        pytest.param((affine(64, 128, group=20), affine(64, 128, group=32)), id="groups that needed padding"),
        pytest.param((affine(64, 128), affine(64, 128, ordered=True)), id="one with act-order"),
        pytest.param((affine(64, 128, symmetric=True), affine(64, 128)), id="one with offsets"),
        pytest.param((affine(64, 128), affine(64, 128, bits=8)), id="of different codecs"),
    ],
)
@pytest.mark.parametrize("counts", [(2, 2), (0, 3), (40, 1)])
def test_experts_may_have_other_codes_than_the_first(ops, dtype, weights, counts):
    packed = [ops.pack_quantized(weight, None, dtype) for weight in weights]
    x = rand(sum(counts), 128, dtype)
    y = ops.grouped_linear(x, torch.tensor([0, *counts]).cumsum(0), ops.group_linears(packed))
    alone = [ops.linear(rows, expert) for rows, expert in zip(x.split(counts), packed, strict=True)]
    assert torch.equal(y, torch.cat(alone))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_row_does_not_depend_on_the_others(ops, dtype, kind):
    weight = WEIGHTS[kind]()
    packed = ops.pack_quantized(weight, None, dtype)
    x = rand(230, packed.in_features, dtype)
    together = ops.linear(x, packed)
    for first, end in [(0, 1), (1, 3), (3, 9), (9, 21), (21, 38), (38, 230)]:
        assert torch.equal(ops.linear(x[first:end], packed), together[first:end])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_come_back_as_the_record_says(ops, dtype, kind):
    weight = WEIGHTS[kind]()
    packed = ops.pack_quantized(weight, None, dtype)
    last = packed.out_features
    # scale · (code − zero) with the middle of the codes subtracted from both: fractional zeros round once more.
    torch.testing.assert_close(
        ops.dequantize(packed, 1, last - 1), dequantize(weight)[1 : last - 1], rtol=1e-5, atol=1e-7
    )


def test_rows_of_a_dense_weight_come_back(ops, dtype):
    weight = rand(70, 33, dtype)
    assert torch.equal(ops.dequantize(ops.pack_linear([weight], None), 30, 70), weight[30:].float())


def test_result_in_bfloat16_is_no_worse_than_of_a_dense_bfloat16_model(ops):
    for weight in (affine(200, 1024), table(200, 1024)):
        x, dense = rand(20, 1024, torch.bfloat16), dequantize(weight)
        exact = x.double() @ dense.double().T
        ours = ops.linear(x, ops.pack_quantized(weight, None, torch.bfloat16))
        theirs = (x.double() @ dense.bfloat16().double().T).bfloat16()
        assert (ours.double() - exact).norm() <= 1.05 * (theirs.double() - exact).norm()


@pytest.mark.parametrize(
    "weight",
    [affine(512, 1024, group=32), affine(512, 1024, group=128), affine(512, 1024, group=1024), table(512, 1024)],
    ids=["32", "128", "column", "table"],
)
def test_four_bits_take_at_most_35_hundredths_of_bfloat16(ops, weight):
    assert ops.pack_quantized(weight, None, torch.bfloat16).nbytes <= 0.35 * 2 * 512 * 1024


def test_number_of_threads_does_not_change_a_bit():
    weight, x, results = affine(300, 256, ordered=True), rand(70, 256, torch.bfloat16), []
    for threads in (1, 2, 5):
        ops = select_ops(CPU, "cpu", threads=threads)
        results.append(ops.linear(x, ops.pack_quantized(weight, None, torch.bfloat16)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_float8_that_is_no_number_is_refused(ops):
    codes = torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="not numbers"):
        ops.pack_quantized(Float8Weight(codes, torch.ones(1, 1), (1, 2)), None, torch.float32)


def test_dtype_that_is_not_computed_in_is_refused(ops):
    with pytest.raises(ValueError, match="not in float64"):
        ops.pack_quantized(affine(2, 2), None, torch.float64)


@pytest.mark.parametrize("counts", [(1, 0, 5), (3, 40, 2), (0, 20, 300)])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "some offsets", "ordered", "table", "float8", "mixed"])
def test_each_row_is_multiplied_by_its_own_expert(ops, dtype, counts, kind):
    n, c = 130, 160
    records = {
        "symmetric": [affine(n, c, symmetric=True) for _ in counts],
        "asymmetric": [affine(n, c, group=32) for _ in counts],
        "some offsets": [affine(n, c, symmetric=index == 1) for index, _ in enumerate(counts)],
        "ordered": [affine(n, c, ordered=True) for _ in counts],
        "table": [table(n, c, 32) for _ in counts],
        "float8": [float8(n, c, (128, 128)) for _ in counts],
        "mixed": [affine(n, c), affine(n, c, bits=8), table(n, c)],
    }[kind]
    experts = [ops.pack_quantized(record, None, dtype) for record in records]
    x = torch.randn(sum(counts), c, generator=generator()).to(dtype)
    y = ops.grouped_linear(x, torch.tensor([0, *counts]).cumsum(0), ops.group_linears(experts))
    alone = [ops.linear(rows, expert) for rows, expert in zip(x.split(counts), experts, strict=True)]
    assert torch.equal(y, torch.cat(alone))
