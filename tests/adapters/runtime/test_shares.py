"""A rank that holds a part of a linear takes the part of an adapter that goes beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import parse_config
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.mirror import Total, own_total
from loraplex_adapters.runtime.targets import LoraTarget, Share

N, C, R = 6, 8, 2
OUTPUTS = Share(N, C, (slice(1, 3), slice(4, 5)), slice(0, C), adds_bias=True)
INPUTS = Share(N, C, (slice(0, N),), slice(4, 8), adds_bias=False)
random = torch.Generator().manual_seed(1)
A, B, BIAS, WHOLE = (torch.randn(shape, generator=random) for shape in ((R, C), (N, R), (N,), (N, C)))


class Base:
    """The rank's part of a weight of ones."""

    bias = None

    def __init__(self, share: Share) -> None:
        self._columns = share.num_columns

    def dequantize(self, start: int, end: int) -> torch.Tensor:
        return torch.ones(end - start, self._columns)


def bound(share: Share, fields: str = "", total: Total = own_total, /, **parts: torch.Tensor) -> BoundAdapter:
    target = LoraTarget("site", share.num_columns, 0, share.num_rows, base=Base(share), share=share)
    config = parse_config(
        f'{{"peft_type": "LORA", "r": {R}, "lora_alpha": {R}, "target_modules": ["q"]{fields}}}'.encode()
    )
    tensors = {f"base_model.model.q.{name.replace('__', '.')}": tensor for name, tensor in parts.items()}
    return bind(tensors, config, {"q": target}, torch.float32, 8, total=total)


LORA = {"lora_A__weight": A, "lora_B__weight": B}


def test_beside_some_outputs_goes_some_of_b() -> None:
    weights = bound(OUTPUTS, **LORA).weights["site"]
    assert torch.equal(weights.a, A)
    assert torch.equal(weights.slices[0].b, B[[1, 2, 4]])


def test_beside_some_inputs_goes_some_of_a() -> None:
    weights = bound(INPUTS, **LORA).weights["site"]
    assert torch.equal(weights.a, A[:, 4:])
    assert torch.equal(weights.slices[0].b, B)


@pytest.mark.parametrize("adds", [True, False])
def test_where_outputs_are_summed_up_one_rank_adds_the_bias(adds: bool) -> None:
    weights = bound(replace(INPUTS, adds_bias=adds), ', "lora_bias": true', **LORA, lora_B__bias=BIAS).weights["site"]
    assert weights.affine is not None
    assert torch.equal(weights.affine[1], BIAS if adds else torch.zeros(N))


@pytest.mark.parametrize(("share", "part"), [(OUTPUTS, WHOLE[[1, 2, 4]]), (INPUTS, WHOLE[:, 4:])])
def test_a_replaced_weight_is_cut_as_the_base_is(share: Share, part: torch.Tensor) -> None:
    target = LoraTarget("other", share.num_columns, 0, share.num_rows, base=Base(share), share=share)
    lora = LoraTarget("site", C, 0, N)
    raw = f'{{"peft_type": "LORA", "r": {R}, "lora_alpha": 2, "target_modules": ["q"], "modules_to_save": ["k"]}}'
    tensors = {
        "base_model.model.q.lora_A.weight": A,
        "base_model.model.q.lora_B.weight": B,
        "base_model.model.k.weight": WHOLE,
    }
    adapter = bind(tensors, parse_config(raw.encode()), {"q": lora, "k": target}, torch.float32, 8)
    assert adapter.replaced is not None
    assert torch.equal(adapter.replaced.sites["other"][0].weight, part)


def test_magnitudes_beside_some_outputs_are_of_whole_rows() -> None:
    magnitude = torch.linspace(1, 2, N)
    weights = bound(OUTPUTS, ', "use_dora": true', **LORA, lora_magnitude_vector=magnitude).weights["site"]
    assert weights.affine is not None
    wanted = magnitude / torch.linalg.vector_norm(1 + B @ A, dim=1)
    torch.testing.assert_close(weights.affine[0], wanted[[1, 2, 4]])


def test_magnitudes_beside_some_inputs_are_of_the_rows_on_all_ranks_together() -> None:
    magnitude, parts = torch.linspace(1, 2, N), (1 + B @ A).square()
    elsewhere = parts[:, :4].sum(dim=1)

    def total(name: str, part: Tensor) -> Tensor:
        assert name.endswith("lora_magnitude_vector")
        return part + elsewhere

    weights = bound(INPUTS, ', "use_dora": true', total, **LORA, lora_magnitude_vector=magnitude).weights["site"]
    assert weights.affine is not None
    torch.testing.assert_close(weights.affine[0], magnitude / parts.sum(dim=1).sqrt())


def test_the_file_is_held_to_the_whole_shape() -> None:
    with pytest.raises(AdapterRejected, match=r"shape \[2, 4\], this model needs \[rank, 8\]"):
        bound(INPUTS, lora_A__weight=A[:, 4:], lora_B__weight=B)
