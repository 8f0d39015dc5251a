"""Small multimodal models of every class whose language model is served."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 10,
}
GEMMA3 = {**TEXT, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}
MROPE = {"rope_type": "default", "rope_theta": 900.0, "mrope_section": [1, 1, 2]}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 1, "temporal_patch_size": 1}


def wrapper(name: str, text: dict[str, Any], vision: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A model of a class by its name in transformers, with its tower of images or of sound."""
    config = getattr(transformers, f"{name}Config")
    kind = "audio_config" if "audio_config" in config.sub_configs else "vision_config"
    tower = {**(AUDIO if kind == "audio_config" else VISION), **(vision or {})}
    return getattr(transformers, f"{name}ForConditionalGeneration")(
        config(text_config=text, **{kind: tower, "tie_word_embeddings": False, **fields})
    )


def of(family: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": family, **TEXT, **fields}


def _text_of(model: Any) -> Any:
    """A model that computes text, where its class by itself asks for images that are not there."""
    model.forward = model.language_model.forward
    return model


WRAPPED: dict[str, Callable[[], Any]] = {
    "gemma3_with_vision": lambda: wrapper(
        "Gemma3", {**GEMMA3, "num_hidden_layers": 4, "sliding_window_pattern": 2}, mm_tokens_per_image=1
    ),
    "gemma3_with_vision_tied": lambda: wrapper("Gemma3", GEMMA3, mm_tokens_per_image=1, tie_word_embeddings=True),
    "mistral3": lambda: wrapper("Mistral3", of("mistral", head_dim=12, sliding_window=None), {"head_dim": 8}),
    "mistral3_around_ministral3": lambda: wrapper(
        "Mistral3",
        of("ministral3", head_dim=12, rope_parameters={**YARN, "llama_4_scaling_beta": 0.5}),
        {"head_dim": 8},
    ),
    "llama4": lambda: _text_of(
        wrapper(
            "Llama4",
            of("llama4_text", head_dim=8, intermediate_size_mlp=40, num_local_experts=4, interleave_moe_layer_step=2),
            {
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 1.0,
            },
        )
    ),
    "llava": lambda: wrapper("Llava", of("llama")),
    "llava_next": lambda: wrapper("LlavaNext", of("mistral", sliding_window=6)),
    "llava_next_video": lambda: wrapper("LlavaNextVideo", of("llama")),
    "llava_onevision": lambda: wrapper("LlavaOnevision", of("qwen2"), tie_word_embeddings=True),
    "vip_llava": lambda: wrapper("VipLlava", of("llama"), vision_feature_layers=[-1]),
    "qwen2_vl": lambda: wrapper(
        "Qwen2VL", of("qwen2_vl_text", rope_parameters=MROPE), {**QWEN_VISION, "embed_dim": 16, "hidden_size": 48}
    ),
    "qwen2_5_vl": lambda: wrapper(
        "Qwen2_5_VL", of("qwen2_5_vl_text", rope_parameters=MROPE), {**QWEN_VISION, "out_hidden_size": 48}
    ),
    "qwen3_vl": lambda: wrapper(
        "Qwen3VL",
        of("qwen3_vl_text", head_dim=8, rope_parameters={**MROPE, "mrope_interleaved": True}),
        {**QWEN_VISION, "out_hidden_size": 48, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        tie_word_embeddings=True,
    ),
    "qwen2_audio": lambda: wrapper("Qwen2Audio", of("qwen2")),
    "intern_vl": lambda: wrapper(
        "InternVL", of("qwen3", head_dim=8), {"image_size": [28, 28], "patch_size": [14, 14]}, image_seq_length=1
    ),
    "idefics3": lambda: wrapper("Idefics3", of("llama"), scale_factor=1),
    "smol_vlm": lambda: wrapper("SmolVLM", of("llama"), scale_factor=1, tie_word_embeddings=True),
    "voxtral": lambda: wrapper("Voxtral", of("llama", head_dim=10)),
}


def plain_name(name: str) -> str:
    """A module's path as the language model by itself has it."""
    return re.sub(r"^(model\.(language|text)_model|language_model\.model)\.", "model.", name)
