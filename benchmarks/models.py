"""Make the checkpoints that the serving benchmark runs on: random weights in Hugging Face and PEFT format.

    python -m benchmarks.models --out DIR [--models llama-160m ...] [--adapters 32]

Writes DIR/MODEL/base and DIR/MODEL/adapters/a00 … Nothing is downloaded. Needs transformers and peft.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.workload import VOCAB

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS: dict[str, Any] = {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}
EXPERT_TARGETS: dict[str, Any] = {
    "target_modules": ATTENTION,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

# qwen-0.5b has the body of Qwen2.5-0.5B and a smaller vocabulary, so that one workload suits all; qwen-0.5b-152k has
# the real one. qwen-moe has what Qwen3-30B-A3B is made of, a fraction of its size, with half as many experts.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # whose steps take no longer than what is around them
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
    },
    "llama-160m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "tie_word_embeddings": False,
    },
    "qwen-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "qwen-0.5b-152k": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "tie_word_embeddings": True,
        "vocab_size": 151_936,
    },
    "qwen-moe": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
}


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Every id decodes: the bytes first, then made-up words. Speed is measured with it, not sense."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġword{index}" for index in range(vocab_size - len(words))]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("Ġword1", "0")]  # llama.cpp takes no vocabulary without merges
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )


def family_of(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    if "num_experts" in SHAPES[name]:
        return Qwen3MoeConfig, Qwen3MoeForCausalLM
    return (Qwen2Config, Qwen2ForCausalLM) if name.startswith("qwen") else (LlamaConfig, LlamaForCausalLM)


def make_model(name: str, folder: Path, num_adapters: int, rank: int) -> None:
    common = {"vocab_size": VOCAB, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
    shape = common | SHAPES[name]
    torch.manual_seed(7)
    config, causal_lm = family_of(name)
    model = causal_lm(config(**shape))
    model.bfloat16()
    model.save_pretrained(folder / "base")
    make_tokenizer(shape["vocab_size"]).save_pretrained(folder / "base")

    targets = EXPERT_TARGETS if "num_experts" in shape else TARGETS
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **targets)
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for index in range(num_adapters):
        generator = torch.Generator().manual_seed(7000 + index)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    # B small enough that the model stays tame, large enough that the tokens change
                    gain = 1.0 if "lora_A" in key else 0.05
                    noise = torch.randn(parameter.shape, generator=generator) * gain / parameter.shape[1] ** 0.5
                    parameter.copy_(noise.to(parameter.dtype))
        adapted.peft_config["default"].base_model_name_or_path = name
        adapted.save_pretrained(str(folder / "adapters" / f"a{index:02d}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    for name in args.models:
        make_model(name, args.out / name, args.adapters, args.rank)
        print(args.out / name)


if __name__ == "__main__":
    main()
