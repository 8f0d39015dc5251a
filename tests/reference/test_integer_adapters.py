"""Adapters on models whose inputs are rounded to int8, against PEFT on a model whose base linears round theirs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.quantization.checkpoints import MODEL, make_twins
from tests.engine.quantization.formats import INTEGERS
from tests.reference.peft_oracle import KINDS, VOCAB, Engine, Oracle, random_prompt, read_base

# Those that PEFT adds to what a linear of the base gives.
ADAPTERS = ("plain", "one-layer", "lora-bias", "embedding", "head", "saved-norms", "tokens")
# Of the largest logit. Where float32's sums differ in their last bit, an input in the middle between two codes may
# become the other one, and all that follows in its sequence differs: by 0.0007 to 0.005 in one row of forty here, by
# processor. All other rows are the same to 5e-7. Were an adapter's inputs rounded as well, all would be 0.005 to 0.02
# away, and 0.01 to 0.02 if those of the base were not. So each adapter has rows enough, and must be the same in most.
TOLERANCE = 1e-5
PROMPTS = 5  # for each adapter, with three rows each


def rounded_to_bytes(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(inputs[0] / scale) * scale, *inputs[1:])


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("integers")
    twins = make_twins(folder, *INTEGERS["w8a8 per token"], vocab_size=VOCAB)
    twins.quantised.rename(folder / "base")
    base = read_base(twins.dense)
    for path, module in base.named_modules():
        if path.endswith("_proj"):
            module.register_forward_pre_hook(rounded_to_bytes)
    oracle = Oracle(folder, {None: None}, {None: base})
    for seed, name in enumerate(ADAPTERS, start=1):
        oracle.add(name, KINDS[name], seed)
    return oracle


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_an_adapter_reads_inputs_that_are_not_rounded(oracle: Oracle, kernels: str) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 32, "max_resident_adapters": 8}
    engine = Engine(oracle, kernels=kernels, max_model_len=MODEL["max_position_embeddings"], **options)
    for index, adapter in enumerate([None, *ADAPTERS] * PROMPTS):
        engine.add(random_prompt(5 + index * 7 % 23, index), adapter, 3)
    engine.finish()
    errors: dict[str | None, list[Tensor]] = defaultdict(list)
    for number, (adapter, prompt) in engine.asked.items():
        wanted = oracle.logits(adapter, prompt + engine.tokens[number], len(prompt))
        errors[adapter].append(
            (torch.stack(engine.sampler.logits[number]) - wanted).abs().amax(-1) / wanted.abs().max()
        )
    for adapter, rows in errors.items():
        typical = torch.cat(rows).median()
        assert typical < TOLERANCE, f"{adapter}: most logits are off by {typical:.2e} of the largest"
    engine.core.close()
