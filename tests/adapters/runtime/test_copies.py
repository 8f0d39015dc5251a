"""Copies and ties that PEFT could not mean: tests/reference compares those that it does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from loraplex_adapters.runtime.targets import LoraTarget, TargetKind
from tests.adapters.runtime.test_binding import Q, bound, problems_with

TensorMaker = Callable[..., dict[str, torch.Tensor]]
Targets = dict[str, LoraTarget]

VOCABULARY, WIDTH = 9, 8
WEIGHT = torch.arange(VOCABULARY * WIDTH, dtype=torch.float32).view(VOCABULARY, WIDTH)
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


class Rows:
    """A weight that the model has, as the rows of a linear."""

    bias = None

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def dequantize(self, start: int, end: int) -> torch.Tensor:
        return self._weight[start:end]


@pytest.fixture
def tied(targets: Targets) -> Targets:
    """With an embedding and a head that share their weight."""
    embedding = LoraTarget("embed_tokens", VOCABULARY, 0, WIDTH, TargetKind.EMBEDDING, Rows(WEIGHT.t()))
    head = LoraTarget("lm_head", WIDTH, 0, VOCABULARY, base=Rows(WEIGHT), tied_to="model.embed_tokens")
    return {**targets, "model.embed_tokens": embedding, "lm_head": head}


def test_a_trained_weight_that_differs_from_what_was_saved_beside_it_is_refused(
    lora_tensors: TensorMaker, tied: Targets
) -> None:
    beside = {f"{HEAD}.weight": WEIGHT, f"{HEAD}.modules_to_save.weight": WEIGHT + 1}
    (problem,) = problems_with(lora_tensors([Q]) | beside, tied, modules_to_save=["lm_head"])
    assert problem == f"{HEAD}.modules_to_save.weight: differs from {HEAD}.weight, with which it is one and the same"


def test_two_copies_of_one_base_weight_that_differ_are_refused(lora_tensors: TensorMaker, tied: Targets) -> None:
    copies = {f"{EMBEDDING}.base_layer.weight": WEIGHT, f"{HEAD}.weight": WEIGHT + 1}
    (problem,) = problems_with(lora_tensors([Q]) | copies, tied)
    assert f"differs from {EMBEDDING}.base_layer.weight" in problem


def test_weights_that_the_config_ties_and_that_differ_are_refused(lora_tensors: TensorMaker, tied: Targets) -> None:
    trained = {f"{EMBEDDING}.weight": WEIGHT, f"{HEAD}.weight": WEIGHT + 1}
    saved = {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True}
    (problem,) = problems_with(lora_tensors([Q]) | trained, tied, **saved)
    assert "if each is to count, say ensure_weight_tying=false" in problem


def test_lora_that_the_config_ties_is_the_embedding_s_transposed(lora_tensors: TensorMaker, tied: Targets) -> None:
    a, b = torch.ones(4, VOCABULARY), torch.full((WIDTH, 4), 2.0)
    embedding = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    head = {f"{HEAD}.lora_A.weight": b.t().contiguous(), f"{HEAD}.lora_B.weight": a.t().contiguous()}
    assert bound(embedding | head, tied, ensure_weight_tying=True).ranks == {"model.embed_tokens": 4, "lm_head": 4}
    other = {f"{HEAD}.lora_A.weight": torch.ones(4, WIDTH)}
    (problem,) = problems_with(embedding | head | other, tied, ensure_weight_tying=True)
    assert problem.startswith(f"{HEAD}.lora_A.weight: differs from {EMBEDDING}.lora_embedding_B")


def test_lora_that_the_config_ties_has_come_apart_on_a_16_bit_base(tied: Targets) -> None:
    """As PEFT has it: tests/reference shows that it reads each as it is."""
    embedding = {
        f"{EMBEDDING}.lora_embedding_A": torch.ones(4, VOCABULARY),
        f"{EMBEDDING}.lora_embedding_B": torch.ones(WIDTH, 4),
    }
    head = {f"{HEAD}.lora_A.weight": torch.full((4, WIDTH), 2.0), f"{HEAD}.lora_B.weight": torch.ones(VOCABULARY, 4)}
    weights = bound(embedding | head, tied, torch.bfloat16, ensure_weight_tying=True).weights
    assert torch.equal(weights["lm_head"].a, torch.full((4, WIDTH), 2.0, dtype=torch.bfloat16))


def test_half_of_what_the_config_ties_is_refused(lora_tensors: TensorMaker, tied: Targets) -> None:
    saved = {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True}
    (problem,) = problems_with(lora_tensors([Q]) | {f"{EMBEDDING}.weight": WEIGHT}, tied, **saved)
    assert problem.endswith("ensure_weight_tying is true, but the same of lm_head is missing")


def test_a_module_that_is_saved_and_has_lora_is_refused(lora_tensors: TensorMaker, tied: Targets) -> None:
    lora = {f"{HEAD}.lora_A.weight": torch.ones(4, WIDTH), f"{HEAD}.lora_B.weight": torch.ones(VOCABULARY, 4)}
    problems = problems_with(lora | {f"{HEAD}.weight": WEIGHT}, tied, modules_to_save=["lm_head"])
    assert any("modules_to_save and target_modules both mean this module" in problem for problem in problems)


def test_a_copy_is_compared_with_the_head_before_it_was_rounded(lora_tensors: TensorMaker, tied: Targets) -> None:
    rounded = replace(tied["lm_head"], base=Rows(WEIGHT.round(decimals=-1)), tied_to=None)
    rounded = replace(rounded, rounding=lambda rows: rows.round(decimals=-1))
    copy = {f"{HEAD}.base_layer.weight": WEIGHT}
    assert bound(lora_tensors([Q]) | copy, tied | {"lm_head": rounded}).replaced is None
    assert bound(lora_tensors([Q]) | {f"{HEAD}.base_layer.weight": WEIGHT + 7}, tied).replaced is not None


def test_a_copy_that_was_never_gathered_is_named_so(lora_tensors: TensorMaker, tied: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q]) | {f"{EMBEDDING}.base_layer.weight": torch.ones(0)}, tied)
    assert "empty, as DeepSpeed ZeRO-3 and FSDP leave" in problem
    assert "save_embedding_layers=False" in problem


def test_a_copy_of_a_resized_vocabulary_names_both_ways_out(lora_tensors: TensorMaker, tied: Targets) -> None:
    copy = {f"{EMBEDDING}.base_layer.weight": torch.ones(VOCABULARY + 1, WIDTH)}
    (problem,) = problems_with(lora_tensors([Q]) | copy, tied)
    assert "serve that base model, or save the adapter with save_embedding_layers=False" in problem
