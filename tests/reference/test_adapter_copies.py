"""What PEFT writes beside what was trained, against PEFT: copies of embedding and head, and the tie between them."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_adapters.runtime.replaced import REPLACED_SITE
from loraplex_adapters.runtime.weights import load_adapter
from loraplex_engine.models.layout import HEAD_SITE
from tests.reference.peft_oracle import FAMILIES, Engine, Oracle, random_prompt, randomised, read_base

pytest.importorskip("peft")

BOTH = ["embed_tokens", "lm_head"]
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-both": {"modules_to_save": BOTH},
    "tokens": {"trainable_token_indices": [3, 5, 90]},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 7]}},
    "same-tokens": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "tokens-of-head": {"trainable_token_indices": {"lm_head": [5, 7]}},
    "saved-embedding-tokens-of-head": {"modules_to_save": BOTH[:1], "trainable_token_indices": {"lm_head": [5, 7]}},
    "saved-head-tokens": {"modules_to_save": BOTH[1:], "trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", *BOTH], "rank_pattern": {"lm_head": 2}},
    "both-other-rank": {
        "target_modules": ["q_proj", *BOTH],
        "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"embed_tokens": 3},
    },
    "both-dora": {"target_modules": ["q_proj", *BOTH], "use_dora": True},
    "head-saved-embedding": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    "embedding-saved-head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "head-tokens": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]},
    "container": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
}


def new_oracle(family: str, folder: Path, num_tokens: int | None = None) -> Oracle:
    base = randomised(FAMILIES[family](), 0)
    base.save_pretrained(folder / "before")
    if num_tokens is not None:
        torch.manual_seed(1)
        base.resize_token_embeddings(num_tokens)
    base.save_pretrained(folder / "base")
    oracle = Oracle(folder, {None: None}, {None: read_base(folder / "base")})
    oracle.models[None].config._name_or_path = str(folder / "before")  # where PEFT looks for the vocabulary's size
    return oracle


def write_all(oracle: Oracle, tying: bool, save: bool | str) -> list[str]:
    """Adapters of those recipes that PEFT saves, reads and runs."""
    written: list[str] = []
    for seed, (name, fields) in enumerate(RECIPES.items(), start=1):
        options = {"target_modules": ["q_proj"], "ensure_weight_tying": tying} | fields
        with suppress(ValueError, TypeError):
            oracle.write(name, copy.deepcopy(options), seed, save_embedding_layers=save)
            oracle.read(name)
            oracle.logits(name, [3, 5, 7], 1)
            written.append(name)
    oracle.keys = {None: None, **{name: oracle.key(name) for name in written}}
    return written


def check_all(oracle: Oracle) -> None:
    engine = Engine(oracle, kernels="reference")
    try:
        for index, name in enumerate(oracle.keys):
            engine.add([3, 90, *random_prompt(6 + index % 5, index), 5, 7], name, 3)
        engine.finish()
        engine.check()
    finally:
        engine.core.close()


@pytest.mark.parametrize("num_tokens", [None, 160], ids=["beside", "resized"])
@pytest.mark.parametrize(
    ("family", "tying", "allowed"), [("llama", False, 19), ("qwen3-tied", False, 18), ("qwen3-tied", True, 14)]
)
def test_copies_that_are_the_base_s_own_change_nothing(
    tmp_path: Path, family: str, tying: bool, allowed: int, num_tokens: int | None
) -> None:
    oracle = new_oracle(family, tmp_path, num_tokens)
    save: bool | str = "auto" if num_tokens else True  # a resized vocabulary is saved unasked
    assert len(write_all(oracle, tying, save)) == allowed
    check_all(oracle)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
@pytest.mark.parametrize("tying", [False, True])
def test_copies_of_another_base_take_the_place_of_the_served_one_s(tmp_path: Path, family: str, tying: bool) -> None:
    oracle = new_oracle(family, tmp_path)
    changed = 0
    for name in write_all(oracle, tying, True):
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            trained = key.replace(".weight", ".modules_to_save.weight") in tensors or ".mlp." in key
            if key.endswith(".weight") and not trained and ".lora_" not in key and ".modules_to_save." not in key:
                tensors[key] = tensor * 1.5
                changed += 1
        save_file(tensors, file, metadata={"format": "pt"})
        oracle.read(name)
    assert changed > 20
    check_all(oracle)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_copies_are_compared_with_the_head_that_was_loaded_not_with_what_it_was_rounded_to(
    tmp_path: Path, family: str
) -> None:
    oracle = new_oracle(family, tmp_path)
    oracle.add("head", RECIPES["head"], seed=1)
    engine = Engine(oracle, kernels="reference", head_quantization="int8")
    model = engine.core.runner.model
    loaded = load_adapter(
        oracle.key("head"), tmp_path / "head", model.lora_targets(), torch.float32, 8, engine.core.runner.ops.pack_lora
    )
    engine.core.close()
    assert HEAD_SITE in loaded.packed
    assert REPLACED_SITE not in loaded.packed


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, True), (torch.float32, False)])
def test_peft_ties_lora_in_float32_alone(tmp_path: Path, dtype: torch.dtype, own: bool) -> None:
    """What `contradictions` goes by: on a 16-bit base embedding and head have each their own."""
    base = FAMILIES["qwen3-tied"]().to(dtype)
    oracle = Oracle(tmp_path, {None: None}, {None: base})
    oracle.write("both", {"target_modules": BOTH, "ensure_weight_tying": True}, seed=1)
    file = tmp_path / "both/adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.lora_A.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    oracle.read("both")
    embedding = oracle.models["both"].base_model.model.model.embed_tokens.lora_embedding_B["default"]
    saved = tensors["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert torch.equal(embedding.float(), saved.float()) is own
