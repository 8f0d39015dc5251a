"""Every number that is read from a model's config.json, at the ends of what a number can be: refused by name, or
harmless, which means that no request gets a token that was drawn from what is no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.core import NOT_FINITE, EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.layout import tensor_shapes

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.1,
    "rope_theta": 5e3,
    "partial_rotary_factor": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama linear": {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama dynamic": {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama llama3": {"architectures": ["LlamaForCausalLM"], "rope_parameters": LLAMA3},
    "qwen3 yarn": {"architectures": ["Qwen3ForCausalLM"], "rope_parameters": YARN},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 4,
        "rope_local_base_freq": 1e4,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
REFUSED = (float("nan"), float("inf"), -float("inf"), -1.0, 5e-324, 1e-40, 3.5e38, 1e308, 10**400, True, "1", [1.0])
ENDS = (0.0, 1.2e-38, 1e-6, 1e6, 3.4e38)  # of what a float32 can be


def numbers_read(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """The section ("config.json", "config.json: rope_scaling") and name of each number that parsing asks for."""
    found: set[tuple[str, str]] = set()
    read: Callable[..., float] = ConfigFields.number

    def recording(self: ConfigFields, name: str, default: float | None = None) -> float:
        found.add((self.where, name))
        return read(self, name, default)

    with monkeypatch.context() as patch:
        patch.setattr(ConfigFields, "number", recording)
        parse_model_config(SMALL | config, "config.json")
    return found


def changed(config: dict[str, Any], where: str, name: str, value: object) -> dict[str, Any]:
    raw = deepcopy(SMALL | config)
    section = raw
    for part in where.split(": ")[1:]:
        section = section[part]
    section[name] = value
    return raw


def write(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(1)
    shapes = tensor_shapes(parse_model_config(raw, "config.json"))
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def last_output(directory: Path) -> RequestOutput:
    config = EngineConfig(
        model=str(directory), kernels="reference", kv_cache_bytes=1 << 20, max_model_len=32, max_resident_adapters=1
    )
    core = EngineCore.load(config)
    core.add(AddRequest(1, [1, 2, 3, 4, 5], SamplingParams(seed=1, max_tokens=3, num_prompt_logprobs=1)))
    outputs: list[RequestOutput] = []
    while core.has_work():
        outputs += [output for event in core.step() if isinstance(event, StepOutput) for output in event.outputs]
    core.close()
    return outputs[-1]


def is_refused_or_harmless(directory: Path, raw: dict[str, Any], name: str) -> bool:
    try:
        output = last_output(write(directory, raw))
    except ModelError as error:
        return name in str(error) or "rope_scaling" in str(error)  # what comes of several numbers names them all
    return output.finish_reason is FinishReason.MAX_TOKENS or output.error == NOT_FINITE


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_no_number_of_float32_is_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[kind]
    for where, name in numbers_read(config, monkeypatch):
        for value in REFUSED:
            with pytest.raises(ModelError, match=name):
                parse_model_config(changed(config, where, name, value), "config.json")


@pytest.mark.slow  # a model is loaded for each number and each end
@pytest.mark.parametrize("kind", CONFIGS)
def test_all_numbers_of_float32_are_harmless_or_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = CONFIGS[kind]
    for where, name in sorted(numbers_read(config, monkeypatch)):
        for value in ENDS:
            assert is_refused_or_harmless(tmp_path, changed(config, where, name, value), name), (where, name, value)
