"""Triton's products of integers against NumPy's: the same to the last bit of float32."""

import pytest
import torch

from loraplex_kernels.quantized import InputRounding, dequantize
from tests.kernels.integers import ROUNDINGS, integer_product, random_inputs, random_weight

triton = pytest.importorskip("triton")

from loraplex_kernels.triton import TritonOps  # noqa: E402  (imports triton)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = TritonOps(DEVICE)
# A compiler for GPUs joins a product and the addition of the bias, which then rounds once instead of twice. The
# interpreter truncates to bfloat16.
FLOAT32 = 0.0 if DEVICE.type == "cpu" else 1e-6
TOLERANCE = {torch.float32: FLOAT32, torch.float16: FLOAT32 and 2**-10, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_product_is_that_of_numpys_integers(dtype, rounding):
    assert_product(9, 33, 131, dtype, ROUNDINGS[rounding])


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 40, 96), (16, 64, 128), (30, 130, 200)])
def test_product_of_few_rows_and_many(rows, outputs, inputs):
    assert_product(rows, outputs, inputs, torch.float32, InputRounding())


def assert_product(rows, outputs, inputs, dtype, rounding):
    weight = random_weight(outputs, inputs, rounding)
    x = random_inputs(rows, inputs, dtype)
    bias = torch.linspace(-1, 1, outputs).to(dtype)
    packed = OPS.pack_quantized(on_device(weight), bias.to(DEVICE), dtype)
    found = OPS.linear(x.to(DEVICE), packed).cpu()
    assert found.dtype is dtype
    torch.testing.assert_close(found, integer_product(x, weight, bias), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rows_are_longer_than_what_is_rounded_at_once():
    weight, x = random_weight(5, 4100, InputRounding(symmetric=False)), random_inputs(3, 4100, torch.float32)
    found = OPS.linear(x.to(DEVICE), OPS.pack_quantized(on_device(weight), None, torch.float32)).cpu()
    torch.testing.assert_close(found, integer_product(x, weight, None), rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_row_with_a_number_that_is_not_finite_has_no_numbers(value):
    x = random_inputs(3, 96, torch.float32).to(DEVICE)
    x[1, 95] = value
    y = OPS.linear(x, OPS.pack_quantized(on_device(random_weight(20, 96, InputRounding())), None, torch.float32))
    assert y.isnan().all(1).tolist() == [False, True, False]


def test_no_rows():
    packed = OPS.pack_quantized(on_device(random_weight(20, 96, InputRounding())), None, torch.float32)
    assert OPS.linear(torch.empty(0, 96, device=DEVICE), packed).shape == (0, 20)


def test_each_row_is_multiplied_by_its_own_expert():
    records = [random_weight(24, 64, InputRounding(), seed) for seed in range(2)]
    experts = [OPS.pack_quantized(on_device(record), None, torch.float32) for record in records]
    x = random_inputs(5, 64, torch.float32)
    y = OPS.grouped_linear(x.to(DEVICE), torch.tensor([0, 2, 5], device=DEVICE), OPS.group_linears(experts)).cpu()
    wanted = [integer_product(rows, record, None) for rows, record in zip(x.split((2, 3)), records, strict=True)]
    torch.testing.assert_close(y, torch.cat(wanted), rtol=FLOAT32, atol=FLOAT32)


def test_rows_of_the_weight_come_back():
    weight = on_device(random_weight(20, 96, InputRounding()))
    packed = OPS.pack_quantized(weight, None, torch.float16)
    assert torch.equal(OPS.dequantize(packed, 2, 5), dequantize(weight)[2:5])


def on_device(weight):
    return type(weight)(weight.codes.to(DEVICE), weight.scale.to(DEVICE), weight.inputs)
