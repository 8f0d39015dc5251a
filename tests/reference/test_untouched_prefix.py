"""Adapters that leave all keys and values alone share the base model's cached blocks, and compute what PEFT does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.peft_oracle import ALL, Engine, Oracle, make_base, random_prompt

LAST = {"layers_to_transform": [1], "layers_pattern": "layers"}
UNTOUCHED: dict[str, dict[str, Any]] = {
    "head-alone": {"target_modules": ["lm_head"]},
    "last-layer-behind": {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **LAST},
    "last-queries-biased": {"target_modules": ["q_proj"], "lora_bias": True, **LAST},
}
TOUCHED: dict[str, dict[str, Any]] = {
    "last-keys": {"target_modules": ["k_proj"], **LAST},
    "last-values": {"target_modules": ["v_proj", "o_proj"], **LAST},
    "first-layer": {"target_modules": ["down_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "everything": {"target_modules": ALL},
    "dora-first": {"target_modules": ["o_proj"], "use_dora": True},
    "saved-head-and-keys": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("untouched")
    oracle = Oracle(folder, {None: None}, {None: make_base("llama", folder)})
    for seed, (name, fields) in enumerate((UNTOUCHED | TOUCHED).items(), start=1):
        oracle.add(name, fields, seed)
    return oracle


@pytest.fixture(params=["cpu", "reference"])
def engine(oracle: Oracle, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(oracle, kernels=request.param)
    yield engine
    engine.core.close()


def cached(engine: Engine, *adapters: str | None) -> list[int]:
    """How many tokens of one prompt are found in the cache, one adapter after the other."""
    prompt = random_prompt(30, 3)
    numbers = []
    for adapter in adapters:
        numbers.append(engine.add(prompt, adapter))
        engine.finish()
    engine.check()
    return [engine.cached[number] for number in numbers]


def test_adapters_behind_the_last_keys_and_values_take_the_base_s_blocks(engine: Engine) -> None:
    assert cached(engine, None, *UNTOUCHED) == [0, 28, 28, 28]


def test_the_base_takes_theirs(engine: Engine) -> None:
    assert cached(engine, "last-layer-behind", None, "head-alone") == [0, 28, 28]


def test_all_others_have_their_own(engine: Engine) -> None:
    assert cached(engine, None, *TOUCHED) == [0] * (1 + len(TOUCHED))


def test_salts_are_kept_apart(engine: Engine) -> None:
    cached(engine, None)
    sampling = SamplingParams(seed=0, max_tokens=1)
    key = engine.oracle.keys["head-alone"]
    engine.core.add(AddRequest(99, random_prompt(30, 3), sampling, key, cache_salt="another"))
    engine.finish()
    assert engine.cached[99] == 0


def changed(oracle: Oracle, folder: Path, change: Callable[[str, Tensor], Tensor]) -> AdapterKey:
    """The adapter on everything with other weights, in a folder of its own."""
    file = oracle.folder / "everything" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, folder / file.name)
    (folder / "adapter_config.json").write_bytes((file.parent / "adapter_config.json").read_bytes())
    return AdapterKey("shared/changed", digest(folder))


def test_matrices_of_zeros_change_nothing(oracle: Oracle, engine: Engine, tmp_path: Path) -> None:
    key = changed(oracle, tmp_path, lambda name, tensor: tensor * 0 if "lora_A" in name else tensor)
    engine.core.want_adapter(WantAdapter(key, 2, str(tmp_path)))
    prompt = random_prompt(30, 3)
    engine.add(prompt, None)
    engine.finish()
    engine.core.add(AddRequest(99, prompt, SamplingParams(seed=0, max_tokens=1), key))
    engine.finish()
    assert engine.cached[99] == 28


def test_zeros_times_infinity_do_not_reach_the_base_s_blocks(oracle: Oracle, engine: Engine, tmp_path: Path) -> None:
    key = changed(oracle, tmp_path, lambda name, tensor: torch.full_like(tensor, 3e38 if "lora_A" in name else 0.0))
    engine.core.want_adapter(WantAdapter(key, 2, str(tmp_path)))
    prompt = random_prompt(30, 3)
    engine.core.add(AddRequest(99, prompt, SamplingParams(seed=0, max_tokens=0), key))
    engine.finish()
    engine.add(prompt, None)
    engine.finish()
    engine.check()
