"""Every model family, in odd shapes, against transformers: the same logits from the same files, however the tokens are
spread over steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_engine.execution.kv_cache import create_kv_cache
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model
from loraplex_engine.models.model import Model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LoraSegments, LoraSlice, LoraWeights, Ops
from loraplex_kernels.selection import select_ops
from tests.engine.linears import linear_at
from tests.reference.wrappers import WRAPPED, plain_name

transformers = pytest.importorskip("transformers")

BLOCK_SIZE = 4
NUM_BLOCKS = 48
LENGTHS = (23, 9, 14)  # tokens of the three sequences
VOCAB = 101
# Of the largest logit, float32 on both sides. They sum the same products in another order, which is worth 7e-7 at most
# here; an attention scale that is off by 1 % is worth 1e-2, a window that is off by one 3e-1.
TOLERANCE = 1e-5

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA: dict[str, Any] = {**SMALL, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3}
GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
HALVES = {"n_group": 2, "topk_group": 1}  # fewer choices, of which rounding to bfloat16 takes others by chance
WITH_IMAGES = ("Llama4",)  # of whose configurations that of the language model is one
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "attention_chunk_size": 16,
    "no_rope_layer_interval": 2,
}
GRANITE4 = {
    "layer_types": ["full_attention"] * 3,
    "shared_intermediate_size": 40,
    "mamba_n_heads": 12,
    "logits_scaling": 2.0,
}
SINKS = {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
MSCALE = {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SMALL, **changes})
    return transformers.LlamaForCausalLM(config)


def mistral(**changes: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**SMALL, **changes}))


def ministral(**changes: Any) -> Any:
    return transformers.MinistralForCausalLM(transformers.MinistralConfig(**{**SMALL, **changes}))


def qwen2(**changes: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SMALL, **changes}))


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SMALL, "head_dim": 10, **changes}))


def gemma2(**changes: Any) -> Any:
    config = transformers.Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 6, **changes})
    return transformers.Gemma2ForCausalLM(config)


def gemma3(**changes: Any) -> Any:
    config = transformers.Gemma3TextConfig(**{**GEMMA, "query_pre_attn_scalar": 10, "sliding_window": 6, **changes})
    return transformers.Gemma3ForCausalLM(config)


def of(name: str, **changes: Any) -> Any:
    """A model of a family by its name in transformers."""
    config = getattr(transformers, f"{name}{'Text' if name in WITH_IMAGES else ''}Config")(
        **{**SMALL, "pad_token_id": 0, **changes}
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def corrected(model: Any) -> Any:
    """A model whose corrections of the routers' scores change who is chosen."""
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def internlm3() -> Any:
    """A Llama model under the name that the published files have."""
    kind = type("InternLM3ForCausalLM", (transformers.LlamaForCausalLM,), {})
    fields = {**SMALL, "head_dim": 10, "attention_bias": True, "mlp_bias": True, "pad_token_id": 0}
    return kind(transformers.InternLM3Config(**fields))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied_mha": lambda: llama(tie_word_embeddings=True, num_key_value_heads=6),
    "llama_head_dim": lambda: llama(head_dim=20, num_attention_heads=5, num_key_value_heads=1, hidden_size=45),
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama_llama3_rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama_dynamic_rope": lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "llama_yarn_rope": lambda: llama(rope_parameters=YARN_ROPE),
    "mistral_window": lambda: mistral(sliding_window=5),
    "mistral_no_window": lambda: mistral(sliding_window=None, head_dim=12),
    "ministral_alternates": lambda: ministral(
        layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=5, head_dim=8
    ),
    "ministral_slides": lambda: ministral(sliding_window=5, head_dim=12),
    "qwen2": qwen2,
    "qwen2_upper_layers_slide": lambda: qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2_tied_yarn": lambda: qwen2(tie_word_embeddings=True, rope_parameters=YARN_ROPE),
    "qwen3": qwen3,
    "qwen3_biases_slide": lambda: qwen3(
        attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
    "gemma2": gemma2,
    "gemma2_no_caps": lambda: gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    "gemma3": lambda: gemma3(layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3_global_linear_rope": lambda: gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 2e3, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=20.0,
    ),
    "gemma3_with_vision": WRAPPED["gemma3_with_vision"],
    "gemma": lambda: of("Gemma", head_dim=16, hidden_act="gelu", attention_bias=True),
    "cwm": lambda: of("Cwm", head_dim=8, sliding_window=5, rope_parameters=LLAMA3_ROPE),
    "seed_oss": lambda: of("SeedOss", head_dim=10, attention_dropout=0.0, attention_out_bias=True, mlp_bias=True),
    "arcee": lambda: of("Arcee", mlp_bias=True, attention_bias=True),
    "granite": lambda: of(
        "Granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=1.5,
        tie_word_embeddings=True,
    ),
    "smollm3": lambda: of("SmolLM3", no_rope_layers=[1, 0, 1], attention_bias=True),
    "smollm3_slides": lambda: of("SmolLM3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5),
    "olmo2": lambda: of("Olmo2", attention_bias=True),
    "olmo3": lambda: of("Olmo3", num_hidden_layers=4, sliding_window=5),
    "olmo3_yarn": lambda: of(
        "Olmo3",
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": YARN_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        },
    ),
    "exaone4": lambda: of("Exaone4", num_hidden_layers=4, sliding_window=5),
    "exaone4_full": lambda: of("Exaone4", sliding_window=None, layer_types=["full_attention"] * 3),
    "phi3": lambda: of("Phi3", sliding_window=7),
    "phi3_longrope": lambda: of(
        "Phi3",
        original_max_position_embeddings=64,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "short_factor": [1.0, 1.5, 2.0, 4.0],
            "long_factor": [2.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3_part": lambda: of("Phi3", rope_parameters={"partial_rotary_factor": 0.75}),
    "glm": lambda: of("Glm", head_dim=8, eos_token_id=1),
    "glm4": lambda: of("Glm4", head_dim=12, eos_token_id=1, attention_bias=False),
    "ernie": lambda: of("Ernie4_5", head_dim=10, use_bias=True),
    "helium": lambda: of("Helium", head_dim=8, mlp_bias=True),
    "mixtral": lambda: of("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral_slides": lambda: of("Mixtral", num_local_experts=4, num_experts_per_tok=4, sliding_window=5, head_dim=10),
    "qwen3_moe": lambda: of("Qwen3Moe", **EXPERTS, head_dim=10, norm_topk_prob=True),
    "qwen3_moe_some_dense": lambda: of(
        "Qwen3Moe", **EXPERTS, mlp_only_layers=[1], use_sliding_window=True, sliding_window=5, attention_bias=True
    ),
    "qwen2_moe": lambda: of("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=40),
    "qwen2_moe_slides": lambda: of(
        "Qwen2Moe",
        **EXPERTS,
        shared_expert_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=5,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "olmoe": lambda: of("Olmoe", num_experts=6, num_experts_per_tok=4, norm_topk_prob=True),
    "granite_moe": lambda: of("GraniteMoe", num_local_experts=5, residual_multiplier=0.3, logits_scaling=2.0),
    "granite_moe_shared": lambda: of(
        "GraniteMoeShared", num_local_experts=5, shared_intermediate_size=32, embedding_multiplier=2.0
    ),
    "glm4_moe": lambda: corrected(of("Glm4Moe", **GROUPS, head_dim=8, use_qk_norm=True, attention_bias=True)),
    "glm4_moe_one_group": lambda: corrected(of("Glm4Moe", **{**GROUPS, "n_group": 1, "topk_group": 1}, head_dim=8)),
    "dots1": lambda: corrected(
        of(
            "Dots1",
            **GROUPS,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            norm_topk_prob=True,
        )
    ),
    "ernie_moe": lambda: of(
        "Ernie4_5_Moe", moe_num_experts=6, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1
    ),
    "starcoder2": lambda: of("Starcoder2", sliding_window=5),
    "starcoder2_no_bias": lambda: of("Starcoder2", use_bias=False, tie_word_embeddings=False),
    "nemotron": lambda: of("Nemotron", head_dim=12, attention_bias=True, mlp_bias=True),
    "stablelm": lambda: of("StableLm", use_qkv_bias=True, rope_parameters={"partial_rotary_factor": 0.5}),
    "stablelm_parallel": lambda: of(
        "StableLm", qk_layernorm=True, use_parallel_residual=True, rope_parameters={"partial_rotary_factor": 0.25}
    ),
    "phi": lambda: of("Phi"),
    "cohere": lambda: of("Cohere", logit_scale=0.5),
    "cohere_norms": lambda: of("Cohere", use_qk_norm=True, attention_bias=True, tie_word_embeddings=False),
    "cohere2": lambda: of("Cohere2", num_hidden_layers=4, sliding_window=5),
    "hunyuan": lambda: of("HunYuanDenseV1", head_dim=10, attention_bias=True),
    "hunyuan_alpha": lambda: of(
        "HunYuanDenseV1",
        head_dim=8,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    ),
    "ministral3": lambda: of(
        "Ministral3", head_dim=8, sliding_window=7, rope_parameters={**YARN_ROPE, "llama_4_scaling_beta": 0.7}
    ),
    "internlm3": internlm3,
    "apertus": lambda: of("Apertus", attention_bias=True, rope_parameters=LLAMA3_ROPE),
    "gpt_oss": lambda: of("GptOss", **SINKS, num_hidden_layers=4, swiglu_limit=1.5),
    "gpt_oss_yarn": lambda: of("GptOss", **{**SINKS, "rope_parameters": YARN_ROPE}, layer_types=["full_attention"] * 3),
    "minimax_m2": lambda: corrected(
        of("MiniMaxM2", head_dim=8, num_local_experts=5, num_experts_per_tok=2, rotary_dim=4)
    ),
    "phimoe": lambda: of(
        "Phimoe", num_local_experts=5, router_jitter_noise=0.3, attention_bias=True, lm_head_bias=True, sliding_window=5
    ),
    "phimoe_longrope": lambda: of(
        "Phimoe",
        num_local_experts=4,
        original_max_position_embeddings=64,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "short_factor": [1.0, 1.5, 2.0, 4.0],
            "long_factor": [2.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 64,
            "short_mscale": 1.2,
            "long_mscale": 1.4,
        },
    ),
    "deepseek_v2": lambda: of("DeepseekV2", **LATENT, **GROUPS, topk_method="group_limited_greedy"),
    "deepseek_v2_lite": lambda: of("DeepseekV2", **{**LATENT, "q_lora_rank": None}, **GROUPS, rope_parameters=MSCALE),
    "deepseek_v3": lambda: corrected(
        of("DeepseekV3", **LATENT, **{**GROUPS, **HALVES}, attention_bias=True, rope_parameters=MSCALE)
    ),
    "minicpm3": lambda: of("MiniCPM3", **LATENT, rms_norm_eps=1e-5),
    "llama4": lambda: of("Llama4", **LLAMA4, num_experts_per_tok=2, floor_scale=4, attention_bias=True),
    "llama4_some_dense": lambda: of("Llama4", **LLAMA4, interleave_moe_layer_step=2, use_qk_norm=False),
    "granite4": lambda: of("GraniteMoeHybrid", **GRANITE4, num_local_experts=0, position_embedding_type="rope"),
    "granite4_moe": lambda: of("GraniteMoeHybrid", **GRANITE4, num_local_experts=5, residual_multiplier=0.3),
    "phi3_tied": lambda: of("Phi3", tie_word_embeddings=True, num_key_value_heads=6),
}


@dataclass
class Pair:
    """The same files, loaded twice."""

    ours: LanguageModel
    theirs: Any
    path: Path


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp(request.param)
    theirs = randomised(MODELS[request.param]())
    theirs.save_pretrained(path)
    return Pair(load(path), theirs, path)


def randomised(model: Any) -> Any:
    """Weights far from the usual small initial ones, so that each of them is felt in the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    model.config._attn_implementation = "eager"
    return model.eval()


def load(path: Path, dtype: str = "float32") -> LanguageModel:
    ops = select_ops(torch.device("cpu"), "reference")
    # Dynamic scaling turns by the longest sequence that may come: here none is beyond the original length.
    config = EngineConfig(model=str(path), dtype=dtype, max_resident_adapters=4, max_model_len=64)
    return load_model(config, path, ops)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def expected_logits(theirs: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [theirs(input_ids=torch.tensor([tokens])).logits[0].float() for tokens in sequences]


class Stepper:
    """Feeds chosen numbers of tokens of each sequence to a model, over a cache whose blocks are shuffled."""

    def __init__(
        self, model: Model, sequences: Sequence[Sequence[int]], ops: Ops | None = None, has_head: bool = True
    ) -> None:
        self.model = model
        self.has_head = has_head  # else it is a later stage
        self.sequences = sequences
        self.done = [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]
        ops = ops or select_ops(torch.device("cpu"), "reference")
        self.kv = create_kv_cache(model, ops, NUM_BLOCKS, BLOCK_SIZE, model.dtype)
        shuffled = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5)).tolist()
        per_sequence = NUM_BLOCKS // len(sequences)
        self.blocks = [shuffled[i * per_sequence : (i + 1) * per_sequence] for i in range(len(sequences))]

    @torch.inference_mode()
    def step(self, *work: tuple[int, int], lora: Sequence[tuple[int, int]] = ()) -> None:
        """work: (sequence, new tokens), in the order of the rows; lora: (sequence, slot)"""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, count in work:
            first = self.done[sequence]
            for position in range(first, first + count):
                token_ids.append(self.sequences[sequence][position])
                positions.append(position)
                block = self.blocks[sequence][position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            self.done[sequence] = first + count
            starts.append(len(token_ids))
        ends = [self.done[sequence] for sequence, _ in work]
        width = -(-max(ends) // BLOCK_SIZE)
        tables = torch.zeros((len(work), width), dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            used = -(-ends[row] // BLOCK_SIZE)
            tables[row, :used] = torch.tensor(self.blocks[sequence][:used])
        attention = AttentionMetadata(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.tensor(slots),
            max_query_len=max(count for _, count in work),
            max_seq_len=max(ends),
        )
        rows = {sequence: (starts[i], starts[i + 1]) for i, (sequence, _) in enumerate(work)}
        batch = StepBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            attention=attention,
            lora=segments([(slot, *rows[sequence]) for sequence, slot in lora]),
            logits_rows=torch.arange(len(token_ids)),
        )
        hidden = self.model.forward(batch, self.kv)
        if not self.has_head:
            return
        logits = self.model.logits(hidden)
        for sequence, (start, end) in rows.items():
            self.logits[sequence].append(logits[start:end])

    def results(self) -> list[Tensor]:
        assert self.done == [len(tokens) for tokens in self.sequences]
        return [torch.cat(parts) for parts in self.logits]


SITES = (".qkv", ".o", ".gate_up", ".up", ".down", ".shared_gate")


def segments(ranges: list[tuple[int, int, int]]) -> LoraSegments | None:
    if not ranges:
        return None
    columns = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
    return LoraSegments(tuple(ranges), columns[0], columns[1], columns[2])


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        error = ((mine - yours).abs().max() / yours.abs().max()).item()
        assert error < TOLERANCE, f"logits differ by {error:.2e} of the largest"


def test_whole_prompts_in_one_step(pair: Pair) -> None:
    stepper = Stepper(pair.ours, prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(pair.theirs, prompts()))


def test_prompts_in_chunks_that_cross_blocks_and_windows(pair: Pair) -> None:
    stepper = Stepper(pair.ours, prompts())
    stepper.step((0, 3), (1, 9), (2, 6))
    stepper.step((2, 7), (0, 11))
    stepper.step((0, 9), (2, 1))
    assert_same(stepper.results(), expected_logits(pair.theirs, prompts()))


def test_decoding_beside_prefill(pair: Pair) -> None:
    stepper = Stepper(pair.ours, prompts())
    stepper.step((1, 4))
    stepper.step((1, 1), (0, 13))
    for _ in range(4):
        stepper.step((0, 1), (2, 2), (1, 1))
    for _ in range(6):
        stepper.step((2, 1), (0, 1))
    assert_same(stepper.results(), expected_logits(pair.theirs, prompts()))


def test_bfloat16_is_as_close_to_float32_as_transformers(pair: Pair) -> None:
    exact = torch.cat(expected_logits(pair.theirs, prompts()))
    stepper = Stepper(load(pair.path, "bfloat16"), prompts())
    stepper.step(*enumerate(LENGTHS))
    ours = torch.cat(stepper.results())
    model = type(pair.theirs).from_pretrained(pair.path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    theirs = torch.cat(expected_logits(model, prompts()))
    # Averages: single logits of either side are off by chance. We keep more in float32 and are usually nearer.
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_rows_that_need_no_logits_are_left_out(pair: Pair) -> None:
    stepper = Stepper(pair.ours, prompts((6,)))
    full = expected_logits(pair.theirs, prompts((6,)))[0]
    attention = AttentionMetadata(
        query_starts=torch.tensor([0, 6], dtype=torch.int32),
        seq_lens=torch.tensor([6], dtype=torch.int32),
        block_tables=torch.tensor([[5, 2]], dtype=torch.int32),
        slot_mapping=torch.tensor([20, 21, 22, 23, 8, 9]),
        max_query_len=6,
        max_seq_len=6,
    )
    for rows in ([5, 1], []):
        tokens = torch.tensor(stepper.sequences[0])
        batch = StepBatch(tokens, torch.arange(6), attention, None, torch.tensor(rows, dtype=torch.int64))
        with torch.inference_mode():
            hidden = pair.ours.forward(batch, stepper.kv)
            assert hidden.shape == (len(rows), pair.ours.config.hidden_size)
            if rows:
                assert_same([pair.ours.logits(hidden)], [full[rows]])


def test_an_adapter_on_every_target_equals_merged_weights(pair: Pair, tmp_path: Path) -> None:
    generator, ops = torch.Generator().manual_seed(11), select_ops(torch.device("cpu"), "reference")
    ours, merged = load(pair.path), pair.theirs.from_pretrained(pair.path, attn_implementation="eager").eval()
    modules = {plain_name(name): module for name, module in merged.named_modules()}
    sites = ours.lora_sites()
    linears = {
        path for path in modules if isinstance(modules[path], torch.nn.Linear) and path.startswith("model.layers.")
    }
    targets = ours.lora_targets().items()
    layers = {path: target for path, target in targets if target.site.endswith(SITES) or path in linears}
    bound = {path: target for path, target in layers.items() if path in modules}
    assert bound.keys() == linears
    by_site: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    for rank, (path, target) in enumerate(bound.items(), start=1):
        a = torch.randn((rank % 5 + 1, target.in_features), generator=generator)
        b = torch.randn((target.out_features, rank % 5 + 1), generator=generator) * 0.02
        with torch.no_grad():
            modules[path].weight += b @ a
        by_site.setdefault(target.site, []).append((a, b, target.out_start))
    for site, parts in by_site.items():
        ranks = [len(a) for a, _, _ in parts]
        slices = tuple(LoraSlice(sum(ranks[:i]), start, b) for i, (_, b, start) in enumerate(parts))
        weights = LoraWeights(torch.cat([a for a, _, _ in parts]), slices)
        sites[site].table.put(2, ops.pack_lora(weights))

    base = Stepper(load(pair.path), prompts())
    base.step(*enumerate(LENGTHS))
    mixed = Stepper(ours, prompts())
    mixed.step(*enumerate(LENGTHS), lora=[(1, 2)])
    results = mixed.results()
    assert_same([results[1]], [expected_logits(merged, prompts())[1]])
    for row in (0, 2):
        if any(isinstance(layout, MixtureLayout) for layout in ours.config.feed_forwards):
            # How many rows an expert has follows from the adapter, and this backend's last bits from their number.
            assert_same([results[row]], [base.results()[row]])
        else:
            assert torch.equal(results[row], base.results()[row])


@pytest.mark.parametrize("fused", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_fused_targets_span_their_parts(pair: Pair, fused: str) -> None:
    targets = pair.ours.lora_targets()
    if f"model.layers.1.{fused}" not in targets:
        pytest.skip("without a gate")
    whole = targets[f"model.layers.1.{fused}"]
    parts = [part for part in targets.values() if part.site == whole.site and part != whole]
    assert whole.out_start == 0
    assert whole.out_features == linear_at(pair.ours, whole.site).out_features
    if any(name.endswith(fused) for name, _ in pair.theirs.named_modules()):
        assert not parts  # an adapter has it whole, as the checkpoint does
        return
    assert whole.out_features == sum(part.out_features for part in parts)
    ends = [part.out_start + part.out_features for part in parts]
    assert [part.out_start for part in parts] == [0, *ends[:-1]]


DEMO = Path(__file__).resolve().parents[2] / "demo/loraplex_demo/models"


def demo_models() -> list[Path]:
    return sorted(path.parent for path in DEMO.glob("*/config.json"))


@pytest.mark.skipif(not demo_models(), reason="no demo models: make demo trains them")
@pytest.mark.parametrize("path", demo_models(), ids=lambda path: path.name)
def test_demo_models(path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(0, vocab_size, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    stepper = Stepper(load(path), [tokens])
    stepper.step((0, 37))
    for _ in range(23):
        stepper.step((0, 1))
    assert_same(stepper.results(), expected_logits(theirs.eval(), [tokens]))
