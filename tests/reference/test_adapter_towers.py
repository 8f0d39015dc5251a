"""Adapters that were trained on a multi-modal model, on the text model within it, against PEFT on the whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from tests.reference.peft_oracle import SHAPE, Engine, Oracle, random_prompt, randomised
from tests.reference.wrappers import WRAPPED

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

BOTH = ["embed_tokens", "lm_head"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": ".*(q_proj|linear_1|lm_head)"},
    "saved-projector": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    "saved-and-tied": {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True},
    "lora-and-tied": {"target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True},
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"model.language_model.embed_tokens": [3, 5]},
    },
    "pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 2},
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


def new_oracle(folder: Path, tied: bool, whole_served: bool) -> Oracle:
    """A small multi-modal model, which is the base that is served, or else its text model by itself is."""
    text = transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=tied, attention_bias=True)
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, tie_word_embeddings=tied, image_token_index=150
    )
    whole = randomised(transformers.LlavaForConditionalGeneration(config), 0)
    if whole_served:
        whole.save_pretrained(folder / "base")
        return Oracle(folder, {None: None}, {None: whole.eval()})
    base = transformers.Qwen3ForCausalLM(whole.config.text_config)
    base.model.load_state_dict(whole.model.language_model.state_dict())
    base.lm_head.load_state_dict(whole.lm_head.state_dict())
    base.eval().save_pretrained(folder / "base")
    return Oracle(folder, {None: None}, {None: whole.eval()})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("copies", [False, True], ids=["", "with-copies"])
@pytest.mark.parametrize("whole_served", [False, True], ids=["text", "whole"])
def test_adapters_of_a_multi_modal_model_serve_its_text(
    tmp_path: Path, tied: bool, copies: bool, whole_served: bool
) -> None:
    with warnings.catch_warnings(action="ignore"):
        oracle = new_oracle(tmp_path, tied, whole_served)
        for seed, (name, fields) in enumerate(ADAPTERS.items(), start=1):
            oracle.write(name, fields, seed, save_embedding_layers=copies)
            oracle.read(name)
    engine = Engine(oracle, kernels="reference")
    for index, adapter in enumerate(oracle.keys):
        engine.add([3, 90, *random_prompt(5 + index % 4, index), 5], adapter, 3)
    engine.finish()
    engine.check()
    engine.core.close()


@pytest.mark.parametrize("name", ["idefics3", "voxtral", "qwen2_5_vl"])
def test_adapters_are_read_in_the_names_of_every_generation(name: str, tmp_path: Path) -> None:
    whole = randomised(WRAPPED[name](), 0)
    whole.save_pretrained(tmp_path / "base")
    oracle = Oracle(tmp_path, {None: None}, {None: whole})
    for seed, adapter in enumerate(("later", "earlier"), start=1):
        oracle.write(adapter, {"target_modules": ".*(q_proj|down_proj|fc1)"}, seed)
        oracle.read(adapter)
    file = tmp_path / "earlier" / "adapter_model.safetensors"
    save_file({_earlier(key): tensor for key, tensor in load_file(file).items()}, file)
    oracle.keys["earlier"] = AdapterKey("shared/earlier", digest(tmp_path / "earlier"))
    engine = Engine(oracle, kernels="reference", max_model_len=64)
    for index, served in enumerate(("later", "earlier", None)):
        engine.add([token % 100 + 1 for token in random_prompt(9 + index, index)], served, 3)
    engine.finish()
    engine.check()
    engine.core.close()


def _earlier(key: str) -> str:
    return key.replace("model.model.language_model.", "model.language_model.model.")
