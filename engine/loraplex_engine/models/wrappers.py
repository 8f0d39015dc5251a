"""Models that have towers for images or sound beside a language model, of which the language model is served.

Its computation is that of its own family: three-dimensional positions are three equal ones where there is only text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapters.files.names import TOWERS


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A class of such models, and what transformers takes for granted of its language model."""

    architecture: str  # as in config.json
    model_type: str  # for files that do not state an architecture
    text_type: str  # the model type of its language model, where the file does not say
    tied_inside: bool = False  # head and embedding are one where text_config says so, too
    defaults: Mapping[str, object] = field(default_factory=dict)


WRAPPERS = (
    Wrapper("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text"),
    Wrapper("Mistral3ForConditionalGeneration", "mistral3", "mistral"),
    Wrapper("Llama4ForConditionalGeneration", "llama4", "llama4_text"),
    Wrapper("LlavaForConditionalGeneration", "llava", "llama", tied_inside=True),
    Wrapper("LlavaNextForConditionalGeneration", "llava_next", "llama"),
    Wrapper("LlavaNextVideoForConditionalGeneration", "llava_next_video", "llama", tied_inside=True),
    Wrapper("LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2", tied_inside=True),
    Wrapper("VipLlavaForConditionalGeneration", "vipllava", "llama", tied_inside=True),
    Wrapper("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_vl_text", tied_inside=True),
    Wrapper("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_5_vl_text", tied_inside=True),
    Wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3_vl_text"),
    Wrapper("Qwen2AudioForConditionalGeneration", "qwen2_audio", "qwen2"),
    Wrapper("InternVLForConditionalGeneration", "internvl", "qwen2"),
    Wrapper("Idefics3ForConditionalGeneration", "idefics3", "llama", defaults={"rms_norm_eps": 1e-5}),
    Wrapper("SmolVLMForConditionalGeneration", "smolvlm", "llama", defaults={"rms_norm_eps": 1e-5}),
    Wrapper("VoxtralForConditionalGeneration", "voxtral", "llama"),
)

# What the files of wrappers leave out of text_config, because transformers' classes say it.
_SHAPE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama": {**_SHAPE, "intermediate_size": 11_008, "vocab_size": 32_000},
    "mistral": {**_SHAPE, "intermediate_size": 14_336, "vocab_size": 32_000},
    "qwen2": {**_SHAPE, "intermediate_size": 22_016, "vocab_size": 151_936},
}

_NEWLINES = ("image_newline", "model.image_newline")  # one vector, between the rows of an image
# Prefixes of the tensors that text does not need.
TOWER_TENSORS = (*(f"{root}{tower}." for root in ("", "model.") for tower in sorted(TOWERS)), *_NEWLINES)
