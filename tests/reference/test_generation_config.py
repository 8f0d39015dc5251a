"""Sampling defaults from generation_config.json, against transformers' own reading of the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from loraplex_service.models.generation_defaults import UNREAD, default_sampling, unread
from loraplex_service.text import TextError

FILES: dict[str, dict[str, Any]] = {
    "llama": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009]},
    "qwen": {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "gemma": {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    "minimal": {"do_sample": True, "min_p": 0.1, "typical_p": 0.95},
    "greedy": {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1},
    "nulls": {"do_sample": True, "temperature": None, "top_k": None},
    "off": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1},
    "empty": {"_from_model_config": True, "eos_token_id": 2},
}
FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_what_transformers_reads(name: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(FILES[name]))
    oracle = GenerationConfig.from_pretrained(tmp_path)
    sampling = default_sampling(FILES[name])
    stated = {field.name for field, _ in sampling.ListFields()}
    found: dict[str, Any] = {field: getattr(sampling, field) for field in FIELDS if field in stated}
    expected = {field: value for field in FIELDS if (value := getattr(oracle, field)) is not None}
    if oracle.do_sample is False:
        assert oracle.get_generation_mode() is GenerationMode.GREEDY_SEARCH
        expected["temperature"] = 0
    assert found == expected


def test_a_negative_top_k_is_off() -> None:
    assert default_sampling({"top_k": -1}).top_k == 0
    assert default_sampling({"top_k": -1}).HasField("top_k")


@pytest.mark.parametrize(
    "values", [{"top_p": 7}, {"temperature": "hot"}, {"temperature": float("nan")}, {"top_k": 2.5}, {"min_p": 10**400}]
)
def test_a_value_that_no_request_could_ask_for_is_refused_with_its_field(values: dict[str, Any]) -> None:
    with pytest.raises(TextError, match=rf"generation_config.json.*{next(iter(values))}"):
        default_sampling(values)


def test_what_would_choose_other_tokens_and_is_not_done_is_named() -> None:
    config = {"num_beams": 4, "no_repeat_ngram_size": 3, "penalty_alpha": None, "guidance_scale": 1, "eos_token_id": 2}
    assert unread(config) == ["num_beams", "no_repeat_ngram_size"]


def test_all_of_what_is_named_is_known_to_transformers() -> None:
    assert set(UNREAD) <= GenerationConfig().to_dict().keys()
