"""Adapters on quantised models against the dequantised model + PEFT, which mixes no adapters on quantised ones."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_engine.models.layout import HEAD
from loraplex_engine.quantization import round_to_nearest
from loraplex_kernels.quantized import dequantize
from tests.engine.linears import linear_at
from tests.engine.quantization.checkpoints import MODEL, load, make_twins
from tests.engine.quantization.formats import FORMATS
from tests.reference.peft_oracle import KINDS, VOCAB, Engine, Oracle, add_all_kinds, random_prompt, read_base

CHECKPOINTS = ("gptq act-order", "awq gemm", "bitsandbytes nf4", "bitsandbytes int8", "fp8 blocks")
WHILE_LOADED = {
    "nf4 while loaded": {"quantization": "nf4"},
    "int8 while loaded": {"quantization": "int8"},
    "int4 while loaded": {"quantization": "int4"},
    "int8 head while loaded": {"head_quantization": "int8"},
}
SUMS = {
    "sum": {"plain": 0.7, "one-layer": -0.4},
    "sum-with-vocabulary": {"plain": 1.25, "embedding": 0.5, "head": -0.75},
}


@dataclass
class Quantised:
    """A quantised base, what the engine is told about it, and PEFT's models of the matrices that it stands for."""

    oracle: Oracle
    options: dict[str, str]


@pytest.fixture(scope="module", params=[*CHECKPOINTS, *WHILE_LOADED])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder = tmp_path_factory.mktemp("quantised")
    options = WHILE_LOADED.get(request.param, {})
    section, packer = FORMATS["gptq" if options else request.param]
    twins = make_twins(folder, section, packer, vocab_size=VOCAB)
    (twins.dense if options else twins.quantised).rename(folder / "base")
    if options:
        dequantised(folder / "base", twins.dense, **options)

    oracle = add_all_kinds(folder, read_base(twins.dense))
    parts = {part for weights in SUMS.values() for part in weights}
    merged = {part: copy.deepcopy(oracle.models[part]).merge_and_unload().state_dict() for part in parts}
    for name, weights in SUMS.items():
        oracle.add_sum(name, weights, merged)
    return Quantised(oracle, options)


def dequantised(
    dense: Path, rounded: Path, quantization: str | None = None, head_quantization: str | None = None
) -> None:
    """Write a model with the linears that the quantised one has in place of its own."""
    shutil.copytree(dense, rounded)
    tensors = load_file(dense / "model.safetensors")
    for name, tensor in tensors.items():
        method = quantization if name.endswith("_proj.weight") else head_quantization if name == HEAD else None
        if method is not None:
            tensors[name] = dequantize(round_to_nearest(tensor, method))
    save_file(tensors, rounded / "model.safetensors")


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_all_kinds_in_one_batch_equal_each_alone(base: Quantised, kernels: str) -> None:
    """In chunks, with adapters that come and go: float32, to 1e-5 of the largest logit."""
    engine = Engine(
        base.oracle,
        kernels=kernels,
        max_model_len=MODEL["max_position_embeddings"],
        max_num_batched_tokens=32,
        max_resident_adapters=8,
        **base.options,
    )
    for index, adapter in enumerate([None, *KINDS, *SUMS, None, *reversed(SUMS), *reversed(KINDS)]):
        length = 3 + index * 7 % 23
        activated = adapter is not None and adapter.startswith("activated")
        engine.add(random_prompt(length, index, length // 2 if activated else None), adapter, 3 + index % 4)
        if index % 3 == 0:
            engine.step()
    engine.finish()
    engine.check()
    engine.core.close()


def test_the_weights_beside_an_adapter_can_be_read_back(tmp_path: Path) -> None:
    """By rows of a fused linear, whose parts may be matrices of their own."""
    twins = make_twins(tmp_path, *FORMATS["gptq act-order"], skipped=("k_proj",))
    models = load(twins.quantised), load(twins.dense)
    for site in (name for name in models[0].lora_sites() if name.startswith("layers.")):
        held = [linear_at(model, site) for model in models]
        last = held[0].out_features
        for start, end in ((0, last), (last // 2, last - 3), (5, 6)):
            found, wanted = (linear.linear.dequantize(start, end) for linear in held)
            assert torch.equal(found, wanted)
