"""A rank's part of a quantised matrix stands for the same weights as in the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.quantization import LinearShape, cut, parse, round_to_nearest
from loraplex_kernels.quantized import QuantizedWeight, dequantize
from tests.engine.quantization.formats import FORMATS, INTEGERS

ALL = FORMATS | INTEGERS
N, C = 96, 384
LINEAR = LinearShape("model.layers.0.mlp.up_proj", N, C)
ALL_ROWS, ALL_COLUMNS = slice(0, N), slice(0, C)


def read(name: str) -> QuantizedWeight:
    section, packer = ALL[name]
    tensors, _ = packer(Generator().manual_seed(5), N, C)
    return parse(ConfigFields(section, "config.json")).read(LINEAR, tensors)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [slice(0, 48), slice(48, N)], ids=str)
def test_some_outputs(name: str, rows: slice) -> None:
    weight = read(name)
    assert torch.equal(dequantize(cut(weight, rows, ALL_COLUMNS)), dequantize(weight)[rows])


@pytest.mark.parametrize("name", [name for name in ALL if "act-order" not in name])
@pytest.mark.parametrize("columns", [slice(0, 192), slice(192, C)], ids=str)
def test_some_inputs(name: str, columns: slice) -> None:
    weight = read(name)
    assert torch.equal(dequantize(cut(weight, ALL_ROWS, columns)), dequantize(weight)[:, columns])


@pytest.mark.parametrize("name", ALL)
def test_all_of_it_is_the_matrix_itself(name: str) -> None:
    weight = read(name)
    assert cut(weight, ALL_ROWS, ALL_COLUMNS) is weight


def test_a_cut_through_a_group_is_refused() -> None:
    with pytest.raises(ModelError, match="0 to 48 of 384 features, cuts through a group or block of 32"):
        cut(read("gptq"), ALL_ROWS, slice(0, 48))


@pytest.mark.parametrize("shape", [(6, 64), (6, 32), (5, 24)], ids=["a block a row", "of two rows", "across rows"])
@pytest.mark.parametrize("columns", [slice(0, 12), slice(12, 24), slice(8, 16)], ids=str)
def test_blocks_that_are_longer_than_the_part_are_cut_with_it(shape: tuple[int, int], columns: slice) -> None:
    weight = round_to_nearest(torch.randn(shape, generator=Generator().manual_seed(1)), "nf4")
    rows = slice(1, 4)
    assert torch.equal(dequantize(cut(weight, rows, columns)), dequantize(weight)[rows, columns])


def test_groups_that_lie_across_the_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match="act-order cannot be divided by input features"):
        cut(read("gptq act-order"), ALL_ROWS, slice(0, 192))
