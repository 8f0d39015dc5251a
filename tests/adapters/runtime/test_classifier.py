"""Classification heads in an adapter's file: bound as PEFT saves them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import parse_config
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.classifier import (
    CLASSIFIER_MODULES,
    CLASSIFIER_SITE,
    MAX_LABELS,
    ClassifierHead,
    ClassifierSite,
)
from loraplex_adapters.runtime.composition import combine
from loraplex_adapters.runtime.targets import LoraTarget, TargetKind
from loraplex_adapters.runtime.weights import pack_adapter

TensorMaker = Callable[..., dict[str, torch.Tensor]]

Q = "model.layers.0.self_attn.q_proj"
WIDTH = 8
SCORE = "base_model.model.score"
SAVED = ["classifier", "score"]  # PEFT names both, whichever there is


@pytest.fixture
def bound(lora_tensors: TensorMaker, targets: dict[str, LoraTarget]) -> Callable[..., BoundAdapter]:
    """An adapter with LoRA at one place, the tensors of a head, and these fields of its config."""
    head = LoraTarget(CLASSIFIER_SITE, WIDTH, 0, 0, TargetKind.CLASSIFIER)
    all_targets = targets | dict.fromkeys(CLASSIFIER_MODULES, head)

    def bound(tensors: dict[str, torch.Tensor], **fields: Any) -> BoundAdapter:
        stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", "modules_to_save": SAVED}
        config = parse_config(json.dumps(stated | fields).encode())
        return bind(lora_tensors([Q]) | tensors, config, all_targets, torch.bfloat16, max_rank=64)

    return bound


@pytest.mark.parametrize("module", CLASSIFIER_MODULES)
@pytest.mark.parametrize(("task", "each_token"), [("SEQ_CLS", False), ("TOKEN_CLS", True)])
def test_a_head_is_kept_in_float32_whatever_the_model_computes_in(
    bound: Callable[..., BoundAdapter], module: str, task: str, each_token: bool
) -> None:
    weight, bias = torch.randn(3, WIDTH), torch.randn(3)
    head = f"base_model.model.{module}"
    head_of = bound({f"{head}.weight": weight, f"{head}.bias": bias}, task_type=task).head
    assert head_of is not None
    assert torch.equal(head_of.weight, weight)
    assert head_of.bias is not None
    assert torch.equal(head_of.bias, bias)
    assert (head_of.each_token, head_of.num_labels, head_of.nbytes) == (each_token, 3, 4 * 3 * (WIDTH + 1))
    hidden = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(head_of(hidden), torch.nn.functional.linear(hidden.float(), weight, bias))


def test_a_head_without_a_bias_and_in_sixteen_bits_is_one(bound: Callable[..., BoundAdapter]) -> None:
    head = bound({f"{SCORE}.weight": torch.ones(2, WIDTH, dtype=torch.float16)}).head
    assert head is not None
    assert (head.weight.dtype, head.bias) == (torch.float32, None)


def test_an_adapter_without_a_head_has_none(bound: Callable[..., BoundAdapter]) -> None:
    assert bound({}, task_type="CAUSAL_LM", modules_to_save=None).head is None


@pytest.mark.parametrize(
    ("tensors", "fields", "problem"),
    [
        (
            {".weight": torch.ones(2, WIDTH)},
            {"task_type": "CAUSAL_LM"},
            "task_type='CAUSAL_LM', not SEQ_CLS or TOKEN_CLS",
        ),
        ({".weight": torch.ones(2, WIDTH)}, {"modules_to_save": None}, "modules_to_save does not name"),
        ({".weight": torch.ones(2, WIDTH + 1)}, {}, f"shape [2, {WIDTH + 1}], this model needs [labels, {WIDTH}]"),
        ({".weight": torch.ones(0, WIDTH)}, {}, "with 1 to"),
        ({".weight": torch.ones(MAX_LABELS + 1, WIDTH)}, {}, f"with 1 to {MAX_LABELS} labels"),
        ({".weight": torch.ones(WIDTH)}, {}, "this model needs [labels, "),
        ({".weight": torch.ones(2, WIDTH), ".bias": torch.ones(3)}, {}, "shape [3], its weight has 2 rows"),
        ({".bias": torch.ones(3)}, {}, "its weight is missing"),
        ({".weight": torch.full((2, WIDTH), torch.nan)}, {}, "NaN, infinite or too large"),
        ({".weight": torch.ones(2, WIDTH, dtype=torch.int8)}, {}, "dtype torch.int8, a float is expected"),
        ({".lora_A.weight": torch.ones(4, WIDTH)}, {}, "takes no such tensor"),
        ({}, {}, "modules_to_save names 'score', of which this model and the file hold no weight"),
    ],
)
def test_a_head_that_cannot_be_served_exactly_is_refused_by_name(
    bound: Callable[..., BoundAdapter], tensors: dict[str, torch.Tensor], fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(AdapterRejected) as caught:
        bound({SCORE + end: tensor for end, tensor in tensors.items()}, **fields)
    assert any(problem in each for each in caught.value.problems)


def test_two_heads_are_refused(bound: Callable[..., BoundAdapter]) -> None:
    heads = {f"base_model.model.{module}.weight": torch.ones(2, WIDTH) for module in CLASSIFIER_MODULES}
    with pytest.raises(AdapterRejected, match="a second classification head"):
        bound(heads)


def test_a_head_is_part_of_no_sum(bound: Callable[..., BoundAdapter]) -> None:
    adapter = bound({f"{SCORE}.weight": torch.ones(2, WIDTH)})
    with pytest.raises(AdapterRejected, match="it has a classification head"):
        combine([("a", adapter, 1.0), ("b", adapter, 1.0)])


def test_a_head_comes_and_goes_with_its_slot(bound: Callable[..., BoundAdapter]) -> None:
    packed = pack_adapter(bound({f"{SCORE}.weight": torch.ones(2, WIDTH)}), lambda weights: weights)
    base = ClassifierHead(torch.zeros(3, WIDTH), None, each_token=False)
    table = ClassifierSite(torch.device("cpu"), base).table
    table.put(3, packed[CLASSIFIER_SITE])
    assert table.of(3).num_labels == 2
    assert [table.of(None), table.of(4)] == [base, base]
    table.remove(3)
    table.remove(4)
    assert table.of(3) is base
