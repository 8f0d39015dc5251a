"""Command R, and R7B and A: parallel halves, layer norms without biases, neighbours turned together."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import HeadNormTensors, LayerAttention, LayerNorms, ModelConfig, Rope
from loraplex_engine.models.reading import Family, all_but_every, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import MAX_POSITIONS, read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 255_001,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
THETA = {"CohereForCausalLM": 500_000.0, "Cohere2ForCausalLM": 10_000.0}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(_rope(architecture, fields)),) * fields.integer("num_hidden_layers")
    config = _config(architecture, fields, layers)
    # Beside the positions of the training the first files state there what the model is for.
    longest = fields.integer("model_max_length", config.max_position_embeddings)
    if longest > MAX_POSITIONS:
        raise fields.error("model_max_length", longest, f"at most {MAX_POSITIONS}")
    head_norm: HeadNormTensors | None = "together" if fields.flag("use_qk_norm") else None
    return replace(config, head_norm=head_norm, max_position_embeddings=max(longest, config.max_position_embeddings))


def read_2(architecture: str, fields: ConfigFields) -> ModelConfig:
    """The second version: layers without a window do not turn."""
    fields = fields.with_defaults(DEFAULTS)
    window, rope = fields.optional_integer("sliding_window"), _rope(architecture, fields)
    pattern = all_but_every(fields.integer("sliding_window_pattern"), fields.integer("num_hidden_layers"))
    layers = tuple(
        LayerAttention(rope, window) if slides and window is not None else LayerAttention(None)
        for slides in sliding_layers(fields, pattern)
    )
    return _config(architecture, fields, layers)


def _rope(architecture: str, fields: ConfigFields) -> Rope:
    return replace(read_rope(fields, THETA[architecture]), interleaved=True)


def _config(architecture: str, fields: ConfigFields, layers: tuple[LayerAttention, ...]) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return replace(
        decoder_config(architecture, fields, layers, norm_eps=fields.number("layer_norm_eps")),
        qkv_bias=bias,
        o_bias=bias,
        layer_norm=True,
        norms=LayerNorms("input_layernorm"),
        parallel=True,
        logits_scale=fields.optional_number("logit_scale"),
    )


FAMILY = Family(("CohereForCausalLM",), ("cohere",), read)
FAMILY_2 = Family(("Cohere2ForCausalLM",), ("cohere2",), read_2)
