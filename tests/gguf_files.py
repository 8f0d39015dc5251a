"""Writes small models as llama.cpp's converter does: with the gguf package's own table of names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

gguf = pytest.importorskip("gguf")

PERMUTED = ("llama", "granite", "smollm3", "arcee", "granitemoe")
GEMMAS = ("gemma", "gemma2", "gemma3")
QUANTISABLE = 2  # dimensions


def write_gguf(path: Path, model: Any, architecture: str, type_name: str = "F32", vocabulary: Any = None) -> None:
    """A Hugging Face model as a file.

    type_name: of the matrices whose rows are whole blocks of it; all others are F32. vocabulary: called with the
    writer, to add its entries.
    """
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, model.config, architecture)
    if vocabulary is not None:
        vocabulary(writer)
    numbered = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(numbered, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, matrices in apart(name, tensor, architecture):
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            add_tensor(writer, stored, converted(part, matrices, model.config, architecture), type_name)
    finish(writer)


def apart(name: str, tensor: Tensor, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face model, those of experts as a converter cuts them up, by names that gguf knows."""
    bias = ".bias" if name.endswith("_bias") else ".weight"
    part = name.removesuffix(".weight").rpartition(".")[2].removesuffix("_bias")
    layer = ".".join(name.split(".")[:3])
    if part == "gate_up_proj" and tensor.dim() + (bias == ".bias") == 3:
        if architecture == "gpt-oss":
            whole = tensor if bias == ".bias" else tensor.transpose(1, 2)
            gate, up = whole[:, ::2], whole[:, 1::2]
        else:
            gate, up = tensor.chunk(2, dim=1)
        yield f"{layer}.mlp.experts.gate_proj{bias}", gate.contiguous()
        yield f"{layer}.mlp.experts.up_proj{bias}", up.contiguous()
    elif part == "down_proj" and tensor.dim() + (bias == ".bias") == 3:
        turned = architecture == "gpt-oss" and bias == ".weight"
        yield f"{layer}.mlp.experts.down_proj{bias}", (tensor.transpose(1, 2) if turned else tensor).contiguous()
    elif name.endswith("block_sparse_moe.router.weight"):
        yield name.replace("router", "router.layer"), tensor
    elif name.endswith("sinks"):
        yield f"{name}.weight", tensor
    elif "shared_expert_gate" in name:
        yield name, tensor.squeeze()
    else:
        yield name, tensor


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def unpack(packed: Path, dense: Path, architecture: str) -> None:
    """The same file with numbers in place of blocks."""
    reader, writer = gguf.GGUFReader(packed), gguf.GGUFWriter(dense, architecture)
    for key, field in reader.fields.items():
        if key.startswith(f"{architecture}."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(numbers, dtype=np.float32))
    finish(writer)


def add_metadata(writer: Any, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if count := getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        part = rope.get("partial_rotary_factor") or 1.0
        writer.add_rope_dimension_count(int(part * head_dim(config)))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    elif getattr(config, "sliding_window", None) and not architecture.startswith("qwen"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def converted(name: str, tensor: Tensor, config: Any, architecture: str) -> Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if architecture in PERMUTED and part in heads:
        halves = tensor.view(heads[part], 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if architecture in GEMMAS and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def add_tensor(writer: Any, name: str, tensor: Tensor, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    elements, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.dim() == 1 or tensor.shape[-1] % elements or type_name == "F32":
        writer.add_tensor(name, tensor.float().numpy())
        return
    rows = tensor.float().numpy()
    packed = blocks(rows.reshape(-1, rows.shape[-1]), kind)
    writer.add_tensor(name, packed.reshape(*rows.shape[:-1], -1), raw_dtype=kind)


def blocks(numbers: np.ndarray, kind: Any) -> np.ndarray:
    """The numbers in blocks; of a type that the package only reads, random blocks with scales that are numbers."""
    try:
        return np.asarray(gguf.quants.quantize(numbers, kind))
    except NotImplementedError:
        return random_blocks(numbers.shape[0], numbers.shape[1], kind)


def random_blocks(rows: int, columns: int, kind: Any, seed: int = 0) -> np.ndarray:
    """Any bytes, but for the float16 factors, which are small numbers."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    count = columns // elements
    packed = generator.integers(0, 256, (rows, count, nbytes), dtype=np.uint8)
    for place in FACTORS[kind.name]:
        factor = (generator.standard_normal((rows, count, 1)) * 0.01).astype(np.float16)
        packed[..., place : place + 2] = factor.view(np.uint8)
    return packed.reshape(rows, count * nbytes)


# Where a block has float16 numbers.
FACTORS = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()},
}
