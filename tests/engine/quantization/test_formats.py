"""Each format's tensors become exactly the weights that they were packed from."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.quantization import LinearShape, parse
from loraplex_kernels.quantized import dequantize
from tests.engine.quantization.formats import FORMATS, INTEGERS

ALL = FORMATS | INTEGERS
LINEAR = LinearShape("model.layers.0.mlp.up_proj", 32, 128)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_read_exactly(name: str) -> None:
    section, packer = ALL[name]
    tensors, dense = packer(Generator().manual_seed(5), LINEAR.out_features, LINEAR.in_features)
    spec = parse(ConfigFields(section, "config.json"))
    expected = spec.tensors(LINEAR)
    assert {suffix for suffix, tensor in expected.items() if not tensor.optional} <= tensors.keys() <= expected.keys()
    found = dequantize(spec.read(LINEAR, tensors))
    if (
        name == "awq gemv_fast"
    ):  # its offsets are no multiples of the scale: added to a product, and not rounded with it
        torch.testing.assert_close(found, dense, rtol=0, atol=2**-22)
    else:
        assert torch.equal(found, dense)
    assert any(marker in tensors for marker in spec.markers)
