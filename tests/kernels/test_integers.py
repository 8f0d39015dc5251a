"""Products of integers, bit for bit: the reference and the CPU kernels on each instruction set of this processor."""

import pytest
import torch

from loraplex_kernels.cpu import library
from loraplex_kernels.integers import round_inputs
from loraplex_kernels.quantized import InputRounding, IntegerWeight, concatenate, dequantize
from loraplex_kernels.selection import select_ops
from tests.kernels.integers import ROUNDINGS, integer_product, random_inputs, random_weight

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 3), (32, 64), (33, 130), (100, 515)]


@pytest.fixture(scope="module", params=["reference", *library.usable_instruction_sets()])
def ops(request):
    if request.param == "reference":
        return select_ops(CPU, "reference")
    return select_ops(CPU, "cpu", threads=2, isa=request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_product_is_that_of_numpys_integers(ops, dtype, outputs, inputs, rounding):
    weight = random_weight(outputs, inputs, ROUNDINGS[rounding])
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rows in (0, 1, 2, 3, 5, 12, 13, 33):
        x = random_inputs(rows, inputs, dtype)
        for each in (None, bias):
            packed = ops.pack_quantized(weight, each, dtype)
            y = ops.linear(x, packed)
            assert y.dtype is dtype
            assert torch.equal(y, integer_product(x, weight, each))


def test_no_product_is_cut_off(ops):
    """All are as large as can be: an instruction that adds in 16 bits would not hold two of them."""
    codes = torch.full((40, 1024), -128, dtype=torch.int8)
    codes[1::2] = 127
    weight = IntegerWeight(codes, torch.ones(40), InputRounding(symmetric=False, scale=1.0))
    packed = ops.pack_quantized(weight, None, torch.float32)
    for value, rounded in ((-1000.0, -128), (1000.0, 127)):
        y = ops.linear(torch.full((9, 1024), value), packed)
        assert y[:, 0].tolist() == [1024 * -128 * rounded] * 9
        assert y[:, 1].tolist() == [1024 * 127 * rounded] * 9


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_row_with_a_number_that_is_not_finite_has_no_numbers(ops, rounding, value):
    packed = ops.pack_quantized(random_weight(40, 70, ROUNDINGS[rounding]), None, torch.float32)
    x = random_inputs(4, 70, torch.float32)
    wanted = ops.linear(x, packed)
    x[2, 69] = value
    found = ops.linear(x, packed)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], wanted[[0, 1, 3]])


def test_halves_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_inputs(x, InputRounding()).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_row_does_not_depend_on_the_others(ops, dtype, rounding):
    packed = ops.pack_quantized(random_weight(70, 129, ROUNDINGS[rounding]), None, dtype)
    x = random_inputs(230, 129, dtype)
    together = ops.linear(x, packed)
    for first, end in [(0, 1), (1, 3), (3, 9), (9, 21), (21, 38), (38, 230)]:
        assert torch.equal(ops.linear(x[first:end], packed), together[first:end])


@pytest.mark.parametrize("counts", [(1, 0, 5), (3, 40, 2), (0, 20, 0)])
def test_each_row_is_multiplied_by_its_own_expert(ops, dtype, counts):
    records = [random_weight(130, 66, each, seed) for seed, each in enumerate(list(ROUNDINGS.values())[:3])]
    experts = [ops.pack_quantized(record, None, dtype) for record in records]
    x = random_inputs(sum(counts), 66, dtype)
    y = ops.grouped_linear(x, torch.tensor([0, *counts]).cumsum(0), ops.group_linears(experts))
    alone = [integer_product(rows, record, None) for rows, record in zip(x.split(counts), records, strict=True)]
    assert torch.equal(y, torch.cat(alone))


def test_rows_of_the_weight_come_back(ops, dtype):
    weight = random_weight(70, 33, InputRounding())
    packed = ops.pack_quantized(weight, None, dtype)
    assert torch.equal(ops.dequantize(packed, 30, 70), dequantize(weight)[30:])


def test_a_weight_takes_a_byte_and_a_few_for_each_output(ops):
    packed = ops.pack_quantized(random_weight(512, 1024, InputRounding()), None, torch.bfloat16)
    assert 512 * 1024 <= packed.nbytes <= 512 * (1024 + 8)


def test_records_with_the_same_rounding_concatenate():
    parts = [random_weight(rows, 16, InputRounding()) for rows in (4, 2)]
    whole = concatenate(parts)
    assert whole is not None
    assert torch.equal(dequantize(whole), torch.cat([dequantize(part) for part in parts]))


def test_records_with_other_roundings_do_not_concatenate():
    assert concatenate([random_weight(4, 16, InputRounding(scale=scale)) for scale in (0.1, 0.2)]) is None
