"""Adapters on the parameter of all experts, as PEFT's `target_parameters` write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapters.errors import BASE_MISMATCH, AdapterRejected
from loraplex_adapters.files.config import parse_config
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.targets import LoraTarget, TargetKind

EXPERTS, HIDDEN, SIZE, RANK = 3, 8, 5, 2
MODULE = "model.layers.0.mlp.experts"
PREFIX = f"base_model.model.{MODULE}"


def targets() -> dict[str, LoraTarget]:
    found: dict[str, LoraTarget] = {"model.layers.0.mlp.gate": LoraTarget("router", HIDDEN, 0, EXPERTS)}
    for expert in range(EXPERTS):
        site, path = f"{expert}.gate_up", f"{MODULE}.{expert}"
        for start, name in enumerate(("gate_proj", "up_proj")):
            found[f"{path}.{name}"] = LoraTarget(site, HIDDEN, start * SIZE, SIZE, TargetKind.EXPERT)
        stacks = (f"{MODULE}.gate_up_proj",)
        found[f"{path}.gate_up_proj"] = LoraTarget(site, HIDDEN, 0, 2 * SIZE, TargetKind.EXPERT, stacks=stacks)
        stacks = (f"{MODULE}.down_proj",)
        found[f"{path}.down_proj"] = LoraTarget(f"{expert}.down", SIZE, 0, HIDDEN, TargetKind.EXPERT, stacks=stacks)
    return found


def pair(module: str, in_features: int, out_features: int, rank: int = RANK, count: int = EXPERTS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(in_features)
    return {
        f"{module}.lora_A.weight": torch.randn(count * rank, in_features, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out_features, count * rank, generator=generator),
    }


def bound(tensors: dict[str, Tensor], **fields: Any) -> BoundAdapter:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_parameters": ["experts.down_proj"], **fields}
    return bind(tensors, parse_config(json.dumps(config).encode()), targets(), torch.float32, max_rank=4)


def both() -> dict[str, Tensor]:
    return pair(f"{PREFIX}.base_layer", HIDDEN, 2 * SIZE) | pair(PREFIX, SIZE, HIDDEN)


def test_each_expert_gets_its_ranks_of_the_parameter() -> None:
    tensors = both()
    weights = bound(tensors).weights
    assert weights.keys() == {f"{e}.{name}" for e in range(EXPERTS) for name in ("gate_up", "down")}
    for module, site in ((f"{PREFIX}.base_layer", "gate_up"), (PREFIX, "down")):
        a, b = (tensors[f"{module}.lora_{part}.weight"] for part in ("A", "B"))
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), RANK, EXPERTS), a.view(EXPERTS, RANK, -1))
        for expert in range(EXPERTS):
            own = weights[f"{expert}.{site}"]
            torch.testing.assert_close(own.slices[0].b @ own.a, delta[expert])


def test_which_parameter_is_meant_follows_from_shapes_in_whatever_order_they_are_wrapped() -> None:
    turned = pair(PREFIX, HIDDEN, 2 * SIZE) | pair(f"{PREFIX}.base_layer", SIZE, HIDDEN)
    assert bound(turned).weights.keys() == bound(both()).weights.keys()


def test_patterns_match_the_name_of_the_parameter() -> None:
    tensors = pair(f"{PREFIX}.base_layer", HIDDEN, 2 * SIZE, rank=3) | pair(PREFIX, SIZE, HIDDEN)
    found = bound(tensors, rank_pattern={"experts.gate_up_proj": 3})
    assert found.ranks[f"{MODULE}.2.gate_up_proj"] == 3
    assert found.ranks[f"{MODULE}.2.down_proj"] == RANK


def test_the_rank_of_one_expert_is_held_to_the_limit() -> None:
    assert bound(pair(PREFIX, SIZE, HIDDEN, rank=4), r=4).weights
    with pytest.raises(AdapterRejected, match="rank 5, this model takes at most 4"):
        bound(pair(PREFIX, SIZE, HIDDEN, rank=5), r=5)


def test_a_parameter_of_another_model_is_named_with_what_this_one_has() -> None:
    with pytest.raises(AdapterRejected, match=r"gate_up_proj \[10, 8\], down_proj \[8, 5\]") as refused:
        bound(pair(PREFIX, SIZE, HIDDEN + 1))
    assert refused.value.reason == BASE_MISMATCH


def test_another_number_of_experts_is_refused() -> None:
    with pytest.raises(AdapterRejected, match="parameters of 3 experts"):
        bound(pair(PREFIX, SIZE, HIDDEN, rank=1, count=4), r=1)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_of_a_pair_is_refused(part: str) -> None:
    tensors = both()
    del tensors[f"{PREFIX}.{part}.weight"]
    with pytest.raises(AdapterRejected, match="is missing"):
        bound(tensors)


def test_dora_on_a_parameter_is_refused() -> None:
    with pytest.raises(AdapterRejected, match="use_dora=true, but its tensor is missing"):
        bound(both(), use_dora=True)


def test_a_parameter_and_an_expert_of_it_are_not_trained_beside_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    own = f"{PREFIX}.1.up_proj"
    tensors = both() | {
        f"{own}.lora_A.weight": torch.randn(RANK, HIDDEN, generator=generator),
        f"{own}.lora_B.weight": torch.randn(SIZE, RANK, generator=generator),
    }
    with pytest.raises(AdapterRejected, match="changes the same outputs"):
        bound(tensors)


def test_a_full_copy_of_an_expert_is_refused() -> None:
    tensors = both() | {f"{PREFIX}.1.up_proj.weight": torch.ones(SIZE, HIDDEN)}
    with pytest.raises(AdapterRejected, match="is of kind linear of an expert"):
        bound(tensors, modules_to_save=["experts.1.up_proj"])
