"""The tiers of the prefix cache beside all else that an engine does: its outputs are those without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loraplex_engine.link.beams import Beams
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.grammar import regex_grammar
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from tests.engine.forms import EOS, VOCAB, Engine

SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"max_position_embeddings": 128, "num_attention_heads": 2}
LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT |= {"moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "heads": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=1)),
    "windows": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SHAPE, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=6
        )
    ),
    "latents": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SHAPE, **LATENT)),
}
DRAFTS = {"drafts": DraftConfig(kind=DraftKind.NGRAM, tokens=3)}
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("heads", {}),
    ("heads", {"run_ahead": True}),
    ("heads", {"kv_cache_dtype": "int8"}),
    ("heads", DRAFTS),
    ("heads", {**DRAFTS, "kv_cache_dtype": "fp8"}),
    ("windows", {"run_ahead": True}),
    ("latents", DRAFTS),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return folder


def run(model: Path, num_blocks: int, **fields: Any) -> tuple[Engine, dict[int, list[int]]]:
    """An engine with a cache of so many blocks, after requests of all kinds, each of them twice. → their tokens"""
    options: dict[str, Any] = {"kernels": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_batched_tokens": 24}
    probe = Engine(model, **(options | fields | {"disk_cache_bytes": 0, "disk_cache_directory": None}))
    block_bytes = probe.core.limits.kv_cache_bytes // probe.core.limits.total_blocks
    probe.core.close()
    engine = Engine(model, **(options | fields | {"kv_cache_bytes": num_blocks * block_bytes}))
    for number in range(0, 60, 5):
        ask(engine, number)
        if number % 15 == 0:  # the others arrive while it runs
            engine.step()
    engine.finish()
    engine.core.blocks.check()
    return engine, {number: engine.tokens(number) for number in engine.outputs}


def ask(engine: Engine, number: int) -> None:
    kind = number // 5 % 6
    prompt = [(3 * (kind // 2) + place) % 7 + 65 for place in range(21 + kind)]  # it repeats itself, for drafts
    sampling: dict[str, Any] = {"seed": number, "temperature": 0.0, "max_tokens": 12}
    beams = Beams(2, [number, number + 1]) if kind == 4 else None
    if beams is not None:
        sampling |= {"num_candidates": 4}
    grammar = regex_grammar("[a-f]{9}") if kind == 1 else ""
    if kind == 1:
        sampling |= {"eos_token_ids": (EOS,)}
    drafts = Drafts(DraftKind.NGRAM, 3) if engine.core.limits.drafts.offers(DraftKind.NGRAM) and not beams else Drafts()
    parameters = SamplingParams(**sampling)
    engine.core.add(AddRequest(number, prompt, parameters, drafts=drafts, grammar=grammar, beams=beams))


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_outputs_are_those_without_tiers(models: Path, tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    plain, expected = run(models / name, 400, **fields)
    plain.core.close()
    tiers: dict[str, Any] = {"host_cache_bytes": 1 << 17, "disk_cache_bytes": 1 << 20}
    tiers |= {"disk_cache_directory": str(tmp_path / "cache")}
    for life in range(2):
        engine, found = run(models / name, 18, **fields, **tiers)
        assert found == expected
        stats = engine.core.stats()
        assert stats.num_preemptions > 0
        assert stats.num_restored_blocks > 0
        assert bool(stats.num_blocks_read) == bool(life)
        assert stats.num_bad_files == 0
        engine.core.close()
