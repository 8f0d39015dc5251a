"""The language models within multimodal ones, against transformers on the whole, from text alone."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.refused import REFUSED
from loraplex_engine.models.registry import ARCHITECTURES
from loraplex_engine.models.wrappers import WRAPPERS
from tests.reference.test_model_logits import LENGTHS, Stepper, assert_same, expected_logits, load, prompts, randomised
from tests.reference.wrappers import WRAPPED, of

LATER = {  # names since transformers 4.52 → those before
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.": "",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_text_is_computed_as_by_the_whole_model(name: str, tmp_path: Path) -> None:
    theirs = randomised(WRAPPED[name]())
    theirs.save_pretrained(tmp_path)
    stepper = Stepper(load(tmp_path), prompts())
    stepper.step((0, 20), (2, 14))
    stepper.step((1, LENGTHS[1]), (0, 1))
    for _ in range(2):
        stepper.step((0, 1))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


def test_every_class_is_tried() -> None:
    tried = {type(model()).__name__ for model in WRAPPED.values()}
    assert tried == {each.architecture for each in WRAPPERS}


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "voxtral"])
@pytest.mark.parametrize("since", [False, True], ids=["before", "since"])
def test_both_generations_of_names_are_read(name: str, since: bool, tmp_path: Path) -> None:
    theirs = randomised(WRAPPED[name]())
    theirs.save_pretrained(tmp_path)
    tensors = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if not since:
        tensors = {_earlier(key): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert any(key.startswith("model.") for key in load_file(tmp_path / "model.safetensors")) == since
    stepper = Stepper(load(tmp_path), prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


def _earlier(key: str) -> str:
    for pattern, replacement in LATER.items():
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def test_fields_beside_those_of_the_tower_are_read(tmp_path: Path) -> None:
    """As the published files of Qwen 2 VL state them."""
    theirs = randomised(WRAPPED["qwen2_vl"]())
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    text = {name: value for name, value in raw.pop("text_config").items() if name != "model_type"}
    del text["rope_parameters"]
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 900.0}
    (tmp_path / "config.json").write_text(json.dumps({**text, **raw, **rope}))
    stepper = Stepper(load(tmp_path), prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


def test_what_is_passed_over_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    WRAPPED["llava_next"]().save_pretrained(tmp_path)
    num_unused = sum("language_model" not in key for key in load_file(tmp_path / "model.safetensors"))
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    said = [record.message for record in caplog.records if "passed over" in record.message]
    assert said == [
        f"LlavaNextForConditionalGeneration: {num_unused} tensors are passed over "
        "(image_newline …, multi_modal_projector. …, vision_tower. …): text alone is served"
    ]


def test_a_tower_beside_a_plain_model_is_unexpected(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{name: value for name, value in of("llama").items() if name != "model_type"})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "vision_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors unexpected: vision_tower\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_are_more_than_their_parts_are_refused_with_the_reason(architecture: str) -> None:
    assert architecture not in ARCHITECTURES
    with pytest.raises(ModelError, match=f"not supported: {architecture}: {REFUSED[architecture]}"):
        parse_model_config({"architectures": [architecture], "text_config": of("gemma")}, "config.json")


@pytest.mark.parametrize(
    ("text", "num_heads"), [({"model_type": "llama", "num_key_value_heads": 8}, 8), ({"model_type": "mistral"}, 8)]
)
def test_what_text_config_leaves_out_is_what_transformers_takes(text: dict[str, Any], num_heads: int) -> None:
    """As in the published files of LLaVA."""
    config = parse_model_config(
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {**text, "vocab_size": 32_064}}, "c"
    )
    assert (config.hidden_size, config.num_layers, config.num_heads) == (4096, 32, 32)
    assert (config.num_kv_heads, config.vocab_size) == (num_heads, 32_064)


def test_a_language_model_of_another_family_is_refused_by_its_name() -> None:
    raw = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}}
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration around opt, which is not supported; the known"):
        parse_model_config(raw, "config.json")
