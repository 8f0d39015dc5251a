"""The tables of cosines and sines, against transformers' own frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.layers.rotary import cos_sin_table, inverse_frequencies
from engine.models import parse_model_config

transformers = pytest.importorskip("transformers")

HEAD_DIM = 64
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768},
    "yarn_all_options": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.8,
    },
    "yarn_no_ramp": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 1,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_those_of_transformers(kind: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=2 * HEAD_DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters=KINDS[kind],
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = parse_model_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "config.json").layers[0].rope

    assert torch.equal(inverse_frequencies(ours, HEAD_DIM), theirs.inv_freq)
    positions = torch.tensor([0, 1, 77, 4097, 131_071])
    cos, sin = theirs(torch.zeros(1), positions.unsqueeze(0))
    table = cos_sin_table(ours, HEAD_DIM, 131_072, torch.device("cpu"))[positions]
    torch.testing.assert_close(table[:, 0], cos[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 1], sin[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-6)


def test_a_table_has_the_layout_that_the_kernels_read() -> None:
    rope = (
        parse_model_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 8,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
            "config.json",
        )
        .layers[0]
        .rope
    )
    table = cos_sin_table(rope, 8, 5, torch.device("cpu"))
    assert table.shape == (5, 2, 4)
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table[0].tolist() == [[1.0] * 4, [0.0] * 4]
