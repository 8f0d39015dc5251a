"""Quantised weights against their formulas, written out element by element."""

import pytest
import torch

from loraplex_kernels.quantized import AffineWeight, Float8Weight, TableWeight, concatenate, dequantize
from loraplex_kernels.reference import ReferenceOps

OPS = ReferenceOps(torch.device("cpu"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


def affine(generator, rows, columns, bits=4, group_size=8, ordered=False, fraction=False):
    groups = -(-columns // group_size)
    zero = torch.randint(0, 1 << bits, (groups, rows), generator=generator).float()
    return AffineWeight(
        codes=torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8),
        bits=bits,
        scale=torch.rand(groups, rows, generator=generator).half().float() + 0.01,
        zero=zero + 0.3 if fraction else zero,
        group_size=group_size,
        input_order=torch.randperm(columns, generator=generator) if ordered else None,
    )


def table(generator, rows, columns, block=8, values=None):
    return TableWeight(
        codes=torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        table=torch.linspace(-1, 1, 16) if values is None else values,
        absmax=torch.rand(-(-rows * columns // block), generator=generator),
        block=block,
    )


def float8(generator, rows, columns, block):
    size = -(-rows // block[0]), -(-columns // block[1])
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    return Float8Weight(codes, torch.rand(size, generator=generator) + 0.1, block)


def element(weight, n, c):
    """W[n, c] of the *records'* columns, in the order of the docstrings."""
    code = weight.codes[n, c].double()
    if isinstance(weight, AffineWeight):
        g = c // weight.group_size
        return weight.scale[g, n].double() * (code - weight.zero[g, n].double())
    if isinstance(weight, TableWeight):
        return weight.table[int(code)].double() * weight.absmax[(n * weight.codes.shape[1] + c) // weight.block]
    return code * weight.scale[n // weight.block[0], c // weight.block[1]].double()


def written_out(weight):
    """float64 [N, C], columns in the order of the input features."""
    rows, columns = weight.codes.shape
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    order = getattr(weight, "input_order", None)
    for n in range(rows):
        for c in range(columns):
            dense[n, c if order is None else int(order[c])] = element(weight, n, c)
    return dense


RECORDS = {
    "4 bit": lambda g: affine(g, 5, 24),
    "2 bit": lambda g: affine(g, 5, 24, bits=2),
    "3 bit": lambda g: affine(g, 5, 24, bits=3),
    "8 bit, one group": lambda g: affine(g, 5, 24, bits=8, group_size=24),
    "act-order": lambda g: affine(g, 5, 24, ordered=True),
    "short last group": lambda g: affine(g, 5, 21, ordered=True),
    "fractional zeros": lambda g: affine(g, 5, 24, fraction=True),
    "table": lambda g: table(g, 4, 16),
    "table, blocks across rows": lambda g: table(g, 5, 9),
    "fp8 per channel": lambda g: float8(g, 5, 12, (1, 12)),
    "fp8 blocks, cut at the edges": lambda g: float8(g, 5, 11, (2, 4)),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_dequantised_weight_is_the_formula(generator, kind):
    weight = RECORDS[kind](generator)
    # float32 rounds the zero's difference and the product once each.
    torch.testing.assert_close(dequantize(weight).double(), written_out(weight), rtol=2**-22, atol=1e-12)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_multiplies_by_the_dequantised_weight(generator, kind, dtype):
    weight = RECORDS[kind](generator)
    rows, columns = weight.codes.shape
    bias = torch.randn(rows, generator=generator).to(dtype)
    x = torch.randn(3, columns, generator=generator).to(dtype)
    packed = OPS.pack_quantized(weight, bias, dtype)
    expected = x.double() @ written_out(weight).T + bias.double()
    # The sum of a few dozen terms in float32, then one rounding to the dtype of x.
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    y = OPS.linear(x, packed)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert (packed.in_features, packed.out_features) == (columns, rows)
    assert packed.nbytes == weight.nbytes + bias.nbytes


def test_rows_of_a_packed_weight_come_back(generator):
    weight = affine(generator, 6, 16, ordered=True)
    packed = OPS.pack_quantized(weight, torch.ones(6), torch.float32)
    assert torch.equal(OPS.dequantize(packed, 2, 5), dequantize(weight)[2:5])
    dense = torch.randn(6, 16, generator=generator).bfloat16()
    assert torch.equal(OPS.dequantize(OPS.pack_linear([dense], None), 1, 3), dense[1:3].float())


@pytest.mark.parametrize(
    "make",
    [
        lambda g, rows: affine(g, rows, 16),
        lambda g, rows: affine(g, rows, 16, bits=8, group_size=16),
        lambda g, rows: table(g, rows, 16),
        lambda g, rows: float8(g, rows, 16, (2, 4)),
    ],
)
def test_concatenated_records_are_their_rows_one_after_another(generator, make):
    parts = [make(generator, rows) for rows in (4, 2, 6)]
    whole = concatenate(parts)
    assert whole is not None
    assert torch.equal(dequantize(whole), torch.cat([dequantize(part) for part in parts]))


@pytest.mark.parametrize(
    "pair",
    [
        lambda g: (affine(g, 4, 16), affine(g, 4, 16, bits=8)),
        lambda g: (affine(g, 4, 16), affine(g, 4, 16, group_size=4)),
        lambda g: (affine(g, 4, 16), affine(g, 4, 16, ordered=True)),
        lambda g: (affine(g, 4, 16, ordered=True), affine(g, 4, 16, ordered=True)),
        lambda g: (affine(g, 4, 16), table(g, 4, 16)),
        lambda g: (table(g, 4, 16), table(g, 4, 16, block=4)),
        lambda g: (table(g, 4, 16), table(g, 4, 16, values=torch.linspace(-1, 2, 16))),
        lambda g: (table(g, 3, 12), table(g, 4, 12)),  # the first ends within a block
        lambda g: (float8(g, 3, 16, (2, 4)), float8(g, 4, 16, (2, 4))),
        lambda g: (float8(g, 4, 16, (2, 4)), float8(g, 4, 16, (1, 16))),
    ],
)
def test_records_that_differ_do_not_concatenate(generator, pair):
    assert concatenate(pair(generator)) is None
