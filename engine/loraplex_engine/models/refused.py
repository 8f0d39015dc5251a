"""Architectures that are known, and that neither the decoder nor transformers' classes over the paged cache compute."""

from __future__ import annotations

from collections.abc import Mapping

STATES = "some of its layers keep a state of their own in place of keys and values"
CHOSEN = "its layers attend to a choice of tokens"
STREAMS = "its layers have several streams, embeddings of their own, and keys and values of other layers"
HEADS = "its layers have heads of different sizes, embeddings of their own, and keys and values of other layers"

REFUSED: Mapping[str, str] = {
    "Qwen3NextForCausalLM": STATES,
    "Qwen3_5ForCausalLM": STATES,
    "Qwen3_5MoeForCausalLM": STATES,
    "Qwen3_5ForConditionalGeneration": STATES,
    "Qwen3_5MoeForConditionalGeneration": STATES,
    "FalconH1ForCausalLM": STATES,
    "NemotronHForCausalLM": STATES,
    "Lfm2ForCausalLM": STATES,
    "Lfm2MoeForCausalLM": STATES,
    "Mamba2ForCausalLM": STATES,
    "JambaForCausalLM": STATES,
    "KimiLinearForCausalLM": STATES,
    "MiniMaxForCausalLM": STATES,
    "DeepseekV32ForCausalLM": CHOSEN,
    "GlmMoeDsaForCausalLM": CHOSEN,
    "Gemma3nForCausalLM": STREAMS,
    "Gemma3nForConditionalGeneration": STREAMS,
    "Gemma4ForCausalLM": HEADS,
    "Gemma4ForConditionalGeneration": HEADS,
    "DbrxForCausalLM": "its projections are clipped, and its experts' matrices lie as rows of one",
    "PaliGemmaForConditionalGeneration": "it attends to its prompts in both directions",
    "MllamaForConditionalGeneration": "some of its layers attend to images alone",
}
