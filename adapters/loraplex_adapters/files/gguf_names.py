"""The names of a decoder's parts in GGUF files, and in the Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Mapping

LAYER = re.compile(r"blk\.(\d+)\.(\w+)")

OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Whose tensors are known: what their converters rename and reorder.
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "granite", "olmo2", "exaone4", "glm4"),
    *("ernie4_5", "seed_oss", "arcee", "qwen2moe", "qwen3moe", "olmoe", "granitemoe", "gpt-oss"),
)
# Gate and up are one tensor there, named as up alone.
FUSED_GATE = {"phi3": "mlp.gate_up_proj", "glm4": "mlp.gate_up_proj"}
# Of each head's rows of query and key, a dimension of one half and its partner in the other are neighbours there.
NEIGHBOURED = ("llama", "granite", "smollm3", "arcee", "granitemoe")
NEIGHBOURED_PARTS = ("attn_q", "attn_k")


def module_name(architecture: str, stored: str, others: Mapping[str, str]) -> str | None:
    """The path in the Hugging Face model of a module ("blk.0.attn_q"); None: it is of no kind that is known.

    others: the norms of a layer and what not all architectures have, by their names in GGUF.
    """
    layer = LAYER.fullmatch(stored)
    if layer is None:
        return OUTSIDE_LAYERS.get(stored)
    part = layer[2]
    known = {**LINEARS, **HEAD_NORMS, **others}
    if architecture in FUSED_GATE:
        known["ffn_up"] = FUSED_GATE[architecture]
    return f"model.layers.{layer[1]}.{known[part]}" if part in known else None
