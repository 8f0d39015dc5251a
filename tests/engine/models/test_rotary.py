"""The tables of cosines and sines, against transformers' own frequencies."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from loraplex_engine.checkpoint.model_config import ModelError, QueryGrowth, Rope
from loraplex_engine.layers.query_scale import QueryScale, growth_table
from loraplex_engine.layers.rotary import cos_sin_table, inverse_frequencies
from loraplex_engine.models import parse_model_config

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
    ours = rope_of({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})

    assert torch.equal(inverse_frequencies(ours, HEAD_DIM, 131_072), theirs.inv_freq)
    positions = torch.tensor([0, 1, 77, 4097, 131_071])
    cos, sin = theirs(torch.zeros(1), positions.unsqueeze(0))
    table = cos_sin_table(ours, HEAD_DIM, 131_072, torch.device("cpu"))[positions]
    torch.testing.assert_close(table[:, 0], cos[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 1], sin[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_positions", [1, 4096, 4097, 9000, 16_384])
def test_a_dynamic_base_is_that_of_transformers_for_the_longest_sequence(num_positions: int) -> None:
    raw = {**LLAMA, "rope_theta": 3e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    theirs(torch.zeros(1), torch.tensor([[num_positions - 1]]))
    ours = inverse_frequencies(rope_of(raw), HEAD_DIM, num_positions)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)  # their base is a float32


LLAMA: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 2 * HEAD_DIM,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}


def rope_of(raw: dict[str, Any]) -> Rope:
    rope = parse_model_config({"architectures": ["LlamaForCausalLM"], **raw}, "config.json").layers[0].rope
    assert rope is not None
    return rope


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e4}, "rope_theta": 3e4},
        {"rope_theta": 3e4, "rope_parameters": {}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": None}},
        {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [8, 12, 12]}},
    ],
    ids=str,
)
def test_each_spelling_means_what_transformers_reads(spelling: dict[str, Any]) -> None:
    raw = {**LLAMA, **spelling}
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**deepcopy(raw)))
    ours = rope_of(raw)
    assert torch.equal(inverse_frequencies(ours, HEAD_DIM, 4096), theirs.inv_freq)
    assert getattr(ours.scaling, "attention_factor", 1.0) == theirs.attention_scaling


def test_positions_in_three_dimensions_are_one_for_text() -> None:
    scaling = {"type": "mrope", "mrope_section": [8, 12, 12]}
    text = transformers.Qwen2VLConfig(
        text_config={**LLAMA, "num_key_value_heads": 2, "rope_scaling": scaling}
    ).text_config
    theirs = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLRotaryEmbedding(text)
    ours = rope_of({**LLAMA, "rope_scaling": scaling, "rope_theta": text.rope_parameters["rope_theta"]})
    assert torch.equal(inverse_frequencies(ours, HEAD_DIM, 4096), theirs.inv_freq)


FULL, SLIDING = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 2e4}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}},
        {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
        {"rope_scaling": {**LINEAR, "rope_theta": 9e4}, "rope_parameters": {"full_attention": FULL}},
        {"rope_parameters": {"sliding_attention": SLIDING}},
        {"rope_theta": 7e5, "rope_local_base_freq": 3e4, "rope_parameters": {"full_attention": LINEAR}},
        {"rope_theta": 7e5, "rope_local_base_freq": 3e4, "rope_scaling": {}},
    ],
    ids=str,
)
def test_each_spelling_of_gemma3_means_what_transformers_reads(spelling: dict[str, Any]) -> None:
    raw = {**LLAMA, "num_hidden_layers": 6, "head_dim": HEAD_DIM, "num_key_value_heads": 2, **spelling}
    text = transformers.Gemma3TextConfig(**deepcopy(raw))
    theirs = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(text)
    layers = parse_model_config({"architectures": ["Gemma3ForCausalLM"], **raw}, "config.json").layers
    for kind, layer in (("sliding_attention", layers[0]), ("full_attention", layers[5])):
        assert layer.rope is not None
        ours = inverse_frequencies(layer.rope, HEAD_DIM, 4096)
        assert torch.equal(ours, getattr(theirs, f"{kind}_inv_freq"))


def test_angles_that_are_no_finite_numbers_are_refused() -> None:
    scaling = {"rope_type": "linear", "factor": 1e-37}
    with pytest.raises(ModelError, match="its angles are not finite numbers; correct rope_theta or rope_scaling"):
        cos_sin_table(rope_of({**LLAMA, "rope_scaling": scaling}), HEAD_DIM, 4096, torch.device("cpu"))


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


@pytest.mark.parametrize("rounded", [True, False])
def test_the_factor_of_growing_queries_is_rounded_where_the_model_has_it_so(rounded: bool) -> None:
    """Ministral 3 rounds it, Llama 4 does not: at position 8191 it is 1.0693."""
    growth = QueryGrowth(0.1, 8192, ahead=1, rounded=rounded)
    table = growth_table(growth, 8192, torch.bfloat16, torch.device("cpu"))
    queries = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    factor = 1 + 0.1 * torch.log1p(torch.ones(()))
    expected = queries * factor.bfloat16() if rounded else (queries.float() * factor).bfloat16()
    QueryScale(None, table)(queries, torch.tensor([8191]))
    assert torch.equal(queries, expected)
