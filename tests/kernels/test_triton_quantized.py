"""Triton's products with quantised weights against the reference: every record, every edge of its groups and tiles."""

import pytest
import torch

from loraplex_kernels.quantized import AffineWeight, Float8Weight, MinimumWeight, TableWeight, dequantize
from loraplex_kernels.reference import ReferenceOps
from tests.kernels.tolerance import Tolerance

triton = pytest.importorskip("triton")

from loraplex_kernels.triton import TritonOps  # noqa: E402  (imports triton)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS, REFERENCE = TritonOps(DEVICE), ReferenceOps(DEVICE)

# Sums of a few hundred products of numbers near one, in float32; 16-bit types round each weight once before (2^-11 and
# 2^-8, of which most cancels; the interpreter truncates to bfloat16) and the result.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 8e-2},
}


class Make:
    """Records of random numbers, of a size at which outputs are near one."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=self._generator) + 0.5).to(DEVICE)

    def x(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self._generator).to(dtype).to(DEVICE) / columns**0.5

    def codes(self, rows: int, columns: int, bits: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, (rows, columns), generator=self._generator, dtype=torch.uint8).to(DEVICE)

    def affine(self, rows, columns, bits=4, group=32, ordered=False, fraction=0.0):
        groups, middle = -(-columns // group), 1 << (bits - 1)
        zero = torch.randint(middle - 1, middle + 2, (groups, rows), generator=self._generator).to(DEVICE) + fraction
        order = torch.randperm(columns, generator=self._generator).to(DEVICE) if ordered else None
        scale = (self._uniform(groups, rows) / middle).half().float()
        return AffineWeight(self.codes(rows, columns, bits), bits, scale, zero.float(), group, order)

    def minimum(self, rows, columns, bits, group=32):
        scale, lowest = (self._uniform(columns // group, rows) / (1 << bits) for _ in range(2))
        return MinimumWeight(self.codes(rows, columns, bits), bits, scale, lowest, group)

    def table(self, rows, columns, block=64):
        values = torch.linspace(-1, 1, 16, device=DEVICE) ** 3
        return TableWeight(self.codes(rows, columns, 4), values, self._uniform(-(-rows * columns // block)), block)

    def float8(self, rows, columns, block):
        codes = torch.randn(rows, columns, generator=self._generator).to(torch.float8_e4m3fn).to(DEVICE)
        return Float8Weight(codes, self._uniform(-(-rows // block[0]), -(-columns // block[1])), block)


RECORDS = {
    "4 bit": lambda make: make.affine(40, 256, group=128),
    "4 bit, groups of 32": lambda make: make.affine(130, 96),
    "4 bit, one group": lambda make: make.affine(24, 136, group=136),
    "4 bit, groups of 24": lambda make: make.affine(9, 100, group=24),
    "3 bit": lambda make: make.affine(40, 64, bits=3),
    "2 bit": lambda make: make.affine(40, 64, bits=2, group=16),
    "8 bit": lambda make: make.affine(40, 200, bits=8, group=64),
    "8 bit, one group": lambda make: make.affine(7, 30, bits=8, group=30),
    "act-order": lambda make: make.affine(40, 160, ordered=True),
    "act-order, short last group": lambda make: make.affine(5, 101, ordered=True),
    "fractional zeros": lambda make: make.affine(16, 64, fraction=0.3),
    "minima": lambda make: make.minimum(40, 96, bits=4),
    "minima of bytes, groups of 16": lambda make: make.minimum(24, 64, bits=5, group=16),
    "6 bit, groups of 16": lambda make: make.affine(24, 64, bits=6, group=16),
    "table": lambda make: make.table(40, 192),
    "table, blocks across rows": lambda make: make.table(12, 80),
    "table, odd": lambda make: make.table(5, 9),
    "table, blocks of 16": lambda make: make.table(20, 96, block=16),
    "fp8 per channel": lambda make: make.float8(40, 100, (1, 100)),
    "fp8 blocks": lambda make: make.float8(200, 150, (128, 128)),
    "fp8 blocks of 32 in rows": lambda make: make.float8(20, 96, (1, 32)),
    "fp8 small blocks": lambda make: make.float8(10, 33, (4, 8)),
}


def atol_of(weight):
    """Zero points that stand for minima are rounded to float32, and weights near 0 are small beside them."""
    return 1e-6 * dequantize(weight).abs().max().item() if isinstance(weight, MinimumWeight) else 0


@pytest.mark.parametrize("record", RECORDS)
def test_packed_weight_stands_for_what_the_record_does(record):
    weight = RECORDS[record](Make())
    packed = OPS.pack_quantized(weight, None, torch.float16)
    assert (packed.out_features, packed.in_features) == weight.codes.shape
    torch.testing.assert_close(OPS.dequantize(packed, 2, 5), dequantize(weight)[2:5], rtol=1e-6, atol=atol_of(weight))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear(record, dtype):
    make = Make()
    weight = RECORDS[record](make)
    bias = make.x(1, len(weight.codes), dtype)[0]
    x = make.x(3, weight.codes.shape[1], dtype)
    actual, expected = (ops.linear(x, ops.pack_quantized(weight, bias, dtype)) for ops in (OPS, REFERENCE))
    assert actual.dtype is dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 65])
@pytest.mark.parametrize("ordered", [False, True])
def test_linear_of_few_rows_and_many(rows, ordered):
    make = Make()
    weight, x = make.affine(136, 96, ordered=ordered), make.x(rows, 96, torch.float32)
    actual, expected = (ops.linear(x, ops.pack_quantized(weight, None, x.dtype)) for ops in (OPS, REFERENCE))
    torch.testing.assert_close(actual, expected, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("splits", "weight"),
    [
        (4, lambda make: make.affine(20, 2100, group=128)),
        (16, lambda make: make.affine(8, 8192, group=64)),
        (4, lambda make: make.affine(20, 1100, bits=8, group=128, ordered=True)),
        (4, lambda make: make.table(300, 2048)),
    ],
)
def test_linear_split_over_the_inputs(monkeypatch, splits, weight, biased):
    from loraplex_kernels.triton import quantized

    chosen = []
    choose = quantized._choose_splits

    def noted(*args):
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(quantized, "_choose_splits", noted)
    monkeypatch.setattr(OPS, "_num_multiprocessors", 8)  # from which the choice follows
    make = Make()
    weight = weight(make)
    bias = make.x(1, len(weight.codes), torch.float16)[0] if biased else None
    x = make.x(2, weight.codes.shape[1], torch.float16)
    actual, expected = (ops.linear(x, ops.pack_quantized(weight, bias, x.dtype)) for ops in (OPS, REFERENCE))
    torch.testing.assert_close(actual, expected, **TOLERANCE[x.dtype])
    assert chosen == [splits]


def test_scales_and_zeros_take_the_least_room_that_holds_them():
    make = Make()
    packed = OPS.pack_quantized(make.affine(64, 256, group=128), None, torch.float16)
    assert packed.nbytes == 64 * 256 // 2 + 2 * 64 * (2 + 1)  # half a byte a code, float16 scales, byte zeros
