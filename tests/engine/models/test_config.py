"""config.json, in all its spellings, becomes a ModelConfig or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_engine.checkpoint.model_config import (
    NORMS_AROUND,
    DynamicScaling,
    LayerAttention,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    ModelError,
    QueryGrowth,
    Rope,
    YarnScaling,
)
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.layers.rotary import cos_sin_table, inverse_frequencies
from loraplex_engine.models import parse_model_config, read_model_config
from loraplex_engine.models.registry import ARCHITECTURES, FAMILIES
from loraplex_engine.models.wrappers import WRAPPERS

PUBLIC_CONFIGS = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "model-configs"
KNOWN = set(ARCHITECTURES)
KNOWN_TYPES = {*(name for family in FAMILIES for name in family.model_types), *(each.model_type for each in WRAPPERS)}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1000,
}


def parse(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_model_config({**raw, **changes}, "config.json")


def of(architecture: str, **changes: Any) -> ModelConfig:
    return parse(LLAMA, architectures=[architecture], **changes)


@pytest.mark.skipif(not PUBLIC_CONFIGS.is_dir(), reason="no public configs here")
@pytest.mark.parametrize(
    "path", sorted(PUBLIC_CONFIGS.glob("*.json")) if PUBLIC_CONFIGS.is_dir() else [], ids=lambda path: path.name
)
def test_public_configs_are_read_or_refused_by_name(path: Path) -> None:
    raw = json.loads(path.read_text())
    architectures = raw.get("architectures") or []
    known = KNOWN & set(architectures) or (not architectures and raw.get("model_type") in KNOWN_TYPES)
    if known:
        config = parse_model_config(raw, path.name)
        assert config.num_layers == raw["num_hidden_layers"]
        assert config.num_heads * config.head_dim % config.num_kv_heads == 0
    else:
        stated = (architectures or [raw.get("model_type") or "none stated"])[0]
        with pytest.raises(ModelError, match=f"not supported: .*{stated}.*LlamaForCausalLM"):
            parse_model_config(raw, path.name)


def test_absent_heads_follow_from_the_others() -> None:
    config = parse(LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.attention_scale == 0.25


def test_null_counts_as_absent() -> None:
    assert parse(LLAMA, head_dim=None, num_key_value_heads=None) == parse(LLAMA)


def test_head_dim_need_not_divide_the_hidden_size() -> None:
    config = parse(LLAMA, hidden_size=65, head_dim=10)
    assert config.head_dim == 10


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("vocab_size", "many", "vocab_size is 'many'; it must be an integer"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", 10**8, "num_hidden_layers is 100000000; it must be at most 1024"),
        ("rms_norm_eps", True, "rms_norm_eps is True; it must be a positive number"),
        ("num_key_value_heads", 3, r"num_key_value_heads is 3; it must be a divisor of num_attention_heads \(4\)"),
        ("head_dim", 15, "head_dim is 15; it must be even"),
        ("hidden_size", 66, "head_dim is missing; it must be given where 4 heads do not divide hidden_size 66"),
        ("hidden_act", "relu", "hidden_act is 'relu'; it must be one of silu"),
        ("eos_token_id", "</s>", "eos_token_id is '</s>'; it must be a token id or a list of them"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'; it must be true or false"),
        ("dtype", "int8", "dtype is 'int8'; it must be one of float32"),
        ("architectures", "LlamaForCausalLM", "architectures is 'LlamaForCausalLM'; it must be a list"),
        ("rope_scaling", "linear", "rope_scaling is 'linear'; it must be an object"),
        ("rope_scaling", {"type": "ntk"}, "type is 'ntk'; it must be one of default, linear"),
        ("rope_scaling", {"type": "longrope"}, "short_factor is missing; it must be a list of positive numbers"),
        (
            "rope_scaling",
            {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            "long_factor is 7; it must be 8 numbers, half of what turns",
        ),
        (
            "rope_scaling",
            {"type": "longrope", "short_factor": [1.0, "x"]},
            r"short_factor\[1\] is 'x'; it must be a positive number",
        ),
        ("rope_scaling", {"type": "linear"}, "rope_scaling: factor is missing"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; it must be 1"),
    ],
)
def test_nonsense_is_named(field: str, value: object, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        parse(LLAMA, **{field: value})


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"not supported: MambaForCausalLM; .*the known ones are .*Qwen3ForCausalLM"):
        of("MambaForCausalLM")


def test_an_unknown_architecture_is_told_the_known_one_that_is_spelled_most_like_it() -> None:
    with pytest.raises(ModelError, match=r"not supported: Qwen2ForCausaLM; the nearest .* is Qwen2ForCausalLM; the kn"):
        of("Qwen2ForCausaLM")


def test_an_unknown_wrapper_of_a_known_model_is_told_from_it() -> None:
    raw = {"architectures": ["ChameleonForConditionalGeneration"], "text_config": {**LLAMA, "model_type": "mistral"}}
    with pytest.raises(ModelError, match=r"ChameleonForConditionalGeneration, which wraps a text model \(mistral\)"):
        parse_model_config(raw, "config.json")


def test_model_type_stands_in_for_an_absent_architecture() -> None:
    config = parse(LLAMA, architectures=None, model_type="qwen3", num_key_value_heads=2)
    assert config.architecture == "Qwen3ForCausalLM"


def test_another_use_of_a_known_model_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaForQuestionAnswering"):
        parse(LLAMA, architectures=["LlamaForQuestionAnswering"], model_type="llama")


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (2, (2,)), ([5, 9], (5, 9)), (-1, ()), (0, (0,))], ids=str)
def test_ends_of_sequence(value: object, expected: tuple[int, ...]) -> None:
    assert parse(LLAMA, eos_token_id=value).eos_token_ids == expected


def test_generation_config_adds_ends_of_sequence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_model_config(tmp_path).eos_token_ids == (2, 7)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(("content", "complaint"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_damaged_config_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=complaint):
        read_model_config(tmp_path)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_both_spellings_of_dtype(field: str) -> None:
    assert parse(LLAMA, **{field: "bfloat16"}).dtype == "bfloat16"


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 500}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_all_spellings_of_a_scaled_rope(spelling: dict[str, Any]) -> None:
    assert parse(LLAMA, **spelling).layers[0].rope == Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 500))


def test_dynamic_scaling_extends_the_positions() -> None:
    config = parse(LLAMA, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert config.layers[0].rope == Rope(10_000.0, DynamicScaling(4.0, 1000))
    assert config.max_position_embeddings == 4000


def test_yarn_extends_the_positions() -> None:
    config = parse(LLAMA, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000})
    rope = config.layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnScaling)
    assert config.max_position_embeddings == 4000


def test_linear_scaling_extends_the_positions() -> None:
    config = parse(LLAMA, rope_scaling={"type": "linear", "factor": 4.0})
    assert config.layers[0].rope == Rope(10_000.0, LinearScaling(4.0))
    assert config.max_position_embeddings == 4000


def test_gemma3_states_its_positions_with_the_scaling_in_them() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert of("Gemma3ForCausalLM", rope_scaling=scaling, num_key_value_heads=2).max_position_embeddings == 1000


def test_more_positions_than_any_machine_holds_are_refused() -> None:
    with pytest.raises(ModelError, match="max_position_embeddings, with rope_scaling, is 1000000000000"):
        parse(LLAMA, rope_scaling={"type": "linear", "factor": 1e9})


@pytest.mark.parametrize("nested", [False, True])
def test_the_configuration_may_have_a_scaling_of_its_own(tmp_path: Path, nested: bool) -> None:
    raw = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}}
    outer = {"architectures": raw["architectures"], "text_config": raw} if nested else raw
    (tmp_path / "config.json").write_text(json.dumps(outer))
    config = read_model_config(tmp_path, {"rope_type": "linear", "factor": 2.0})
    assert config.layers[0].rope == Rope(5e5, LinearScaling(2.0))
    assert config.max_position_embeddings == 2000


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_mistral_slides_everywhere_unless_null() -> None:
    assert windows(of("MistralForCausalLM", num_key_value_heads=2)) == [4096] * 4
    assert windows(of("MistralForCausalLM", num_key_value_heads=2, sliding_window=None)) == [None] * 4


def test_mistral_slides_where_layer_types_says() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = of("MistralForCausalLM", num_key_value_heads=2, layer_types=kinds, sliding_window=64)
    assert windows(config) == [64, None, 64, None]


def test_qwen_slides_in_the_upper_layers_if_switched_on() -> None:
    fields = {"num_key_value_heads": 2, "sliding_window": 32, "max_window_layers": 3}
    assert windows(of("Qwen2ForCausalLM", **fields)) == [None] * 4
    assert windows(of("Qwen2ForCausalLM", **fields, use_sliding_window=True)) == [None, None, None, 32]
    assert windows(of("Qwen2ForCausalLM", **{**fields, "max_window_layers": 0}, use_sliding_window=True)) == [32] * 4


def test_layer_types_go_before_the_pattern() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = of("Gemma2ForCausalLM", layer_types=kinds, sliding_window=8)
    assert windows(config) == [None, 8, None, None]


@pytest.mark.parametrize(
    ("kinds", "complaint"),
    [(["full_attention"] * 3 + ["linear_attention"], "linear_attention"), (["full_attention"], "has layers \\(4\\)")],
)
def test_layer_types_that_do_not_fit_are_refused(kinds: list[str], complaint: str) -> None:
    with pytest.raises(ModelError, match=f"layer_types is .*{complaint}"):
        of("Qwen3ForCausalLM", layer_types=kinds, num_key_value_heads=2)


def test_gemma2_alternates_and_caps() -> None:
    config = of("Gemma2ForCausalLM", query_pre_attn_scalar=144, num_key_value_heads=2)
    assert windows(config) == [4096, None, 4096, None]
    assert (config.attention_soft_cap, config.logits_soft_cap) == (50.0, 30.0)
    assert config.attention_scale == 1 / 12
    assert config.embedding_scale == 8.0
    assert (config.norm_offset, config.norms) == (1.0, NORMS_AROUND)
    assert config.feed_forwards == (GatedLayout(96, "gelu_tanh"),) * 4


GLOBAL, LOCAL = Rope(1e6, LinearScaling(8.0)), Rope(1e4)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},  # the defaults say the rest
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
)
def test_gemma3_rotates_local_and_global_layers_apart(spelling: dict[str, Any]) -> None:
    config = of("Gemma3ForCausalLM", sliding_window=512, sliding_window_pattern=3, num_key_value_heads=2, **spelling)
    local = LayerAttention(LOCAL, 512)
    assert config.layers == (local, local, LayerAttention(GLOBAL), local)


def test_gemma3_with_one_rope_for_all_is_refused() -> None:
    with pytest.raises(ModelError, match="full_attention and sliding_attention"):
        of("Gemma3ForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def test_gemma3_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention is True"):
        of("Gemma3ForCausalLM", use_bidirectional_attention=True)


def test_multimodal_gemma3_keeps_its_text_model_apart() -> None:
    # Of the published 4B: all that is not said is the default of the text model.
    config = parse_model_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "hidden_size": 1,  # not the text model's
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152},
        },
        "config.json",
    )
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (2560, 8, 4, 256)
    assert config.eos_token_ids == (1, 106)
    assert config.dtype == "bfloat16"
    assert config.tie_word_embeddings
    assert config.layers[5] == LayerAttention(GLOBAL)
    assert config.layers[4] == LayerAttention(LOCAL, 1024)


@pytest.mark.parametrize(
    ("architecture", "field", "value", "complaint"),
    [
        (
            "SmolLM3ForCausalLM",
            "no_rope_layers",
            [1, 0, 2, 1],
            "no_rope_layers is .*; it must be a list of 4 times 0 or 1",
        ),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1], "it must be a list of 4 times 0 or 1"),
        ("ArceeForCausalLM", "hidden_act", "silu", "hidden_act is 'silu'; it must be one of .*, relu2"),
        (
            "GlmForCausalLM",
            "partial_rotary_factor",
            1.5,
            "partial_rotary_factor is 1.5; it must be above 0",
        ),
        ("GlmForCausalLM", "rope_parameters", {"partial_rotary_factor": 0.26}, "an even number of the 128 dimensions"),
        ("GemmaForCausalLM", "use_bidirectional_attention", True, "only causal models generate text"),
        ("GraniteForCausalLM", "logits_scaling", 0, "logits_scaling is 0; it must be a positive number"),
        ("Exaone4ForCausalLM", "sliding_window_pattern", "LLLG", "sliding_window_pattern is 'LLLG'"),
    ],
)
def test_nonsense_of_a_family_is_named(architecture: str, field: str, value: object, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        of(architecture, **{field: value, "num_key_value_heads": 2})


def test_gemmas_first_files_mean_another_activation_than_they_say() -> None:
    assert of("GemmaForCausalLM", hidden_act="gelu", num_key_value_heads=2).feed_forwards[0] == GatedLayout(
        96, "gelu_tanh"
    )


def test_exaones_first_files_say_each_layers_kind() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = of("Exaone4ForCausalLM", sliding_window_pattern="LLLG", layer_types=kinds, num_key_value_heads=2)
    assert [layer.window for layer in config.layers] == [4096, None] * 2
    assert [layer.rope is None for layer in config.layers] == [False, True] * 2


def test_cwm_has_a_scaling_where_its_file_states_none() -> None:
    config = of("CwmForCausalLM", num_key_value_heads=2)
    assert config.layers[0].rope == Rope(1e6, Llama3Scaling(16.0, 1.0, 4.0, 8192))


def test_long_contexts_take_the_long_factors() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = parse(LLAMA, rope_scaling=scaling, original_max_position_embeddings=100)
    rope = config.layers[0].rope
    assert rope is not None
    short, long = (inverse_frequencies(rope, 16, positions) for positions in (100, 101))
    assert torch.equal(short, 2 * long)
    assert config.max_position_embeddings == 1000


@pytest.mark.parametrize(
    ("architecture", "changes", "complaint"),
    [
        ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm is True; it must be false"),
        ("PhiForCausalLM", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be one of gelu_pytorch_tanh"),
        ("HunYuanDenseV1ForCausalLM", {"rope_scaling": {"type": "dynamic", "alpha": 1e30}}, "alpha .* at most 1e.06"),
        ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; it must be 'sigmoid'"),
        ("Llama4ForCausalLM", {"attn_temperature_tuning": -1}, "attn_temperature_tuning is -1; it must be an integer"),
        ("CohereForCausalLM", {"model_max_length": 1 << 40}, "model_max_length .* at most"),
        (
            "HunYuanDenseV1ForCausalLM",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling is 'yarn or longrope'; it must be one that keeps the length of ",
        ),
        (
            "Ministral3ForCausalLM",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
            "original_max_position_embeddings is missing",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_refused(architecture: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        of(architecture, num_key_value_heads=2, head_dim=16, **changes)


def test_the_first_command_r_states_its_length_apart() -> None:
    assert of("CohereForCausalLM", model_max_length=131_072).max_position_embeddings == 131_072


def test_layers_of_command_r7b_without_a_window_do_not_turn() -> None:
    layers = of("Cohere2ForCausalLM", sliding_window=9).layers
    assert [(layer.window, layer.rope is None) for layer in layers] == [*[(9, False)] * 3, (None, True)]


def test_ministral_3_without_a_rotation_has_that_of_its_class() -> None:
    config = of("Ministral3ForCausalLM", num_key_value_heads=2)
    assert isinstance(config.layers[0].rope, Rope)
    assert isinstance(config.layers[0].rope.scaling, YarnScaling)
    assert config.layers[0].growth == QueryGrowth(0.1, 16_384)


def test_layers_of_llama_4_that_turn_see_their_chunk_and_the_queries_of_others_grow() -> None:
    """As in Scout's file, whose rotation has no band between what is kept and what is slowed."""
    section = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    rope = {**section, "original_max_position_embeddings": 8192}
    config = of("Llama4ForCausalLM", rope_scaling=rope, no_rope_layers=[], num_key_value_heads=2)
    assert [(layer.chunk, layer.growth, layer.rope is None) for layer in config.layers] == [
        *[(8192, None, False)] * 3,
        (None, QueryGrowth(0.1, 8192, ahead=1, rounded=False), True),
    ]
    assert torch.isfinite(cos_sin_table(config.layers[0].rope, 128, 9000, torch.device("cpu"))).all()


@pytest.mark.parametrize(("stated", "grows"), [(4, True), (0, False), (True, True), (False, False), (None, False)])
def test_the_first_files_of_llama_4_have_a_number_for_whether_queries_grow(stated: object, grows: bool) -> None:
    config = of("Llama4ForCausalLM", attn_temperature_tuning=stated, num_key_value_heads=2)
    assert [layer.growth is not None for layer in config.layers] == [False, False, False, grows]


def test_minimax_m2_states_the_dimensions_that_turn() -> None:
    rope = of("MiniMaxM2ForCausalLM", rotary_dim=48, num_key_value_heads=2).layers[0].rope
    assert rope is not None
    assert (rope.theta, rope.dims(128)) == (5e6, 48)


def test_granite_4_with_layers_of_state_space_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layer_types is \['mamba'\]; it must be attention alone: some of its layers"):
        of("GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"] * 2)


def test_an_alpha_stretches_what_hunyuan_calls_dynamic_alone() -> None:
    def rope(**scaling: Any) -> Rope | None:
        return of("HunYuanDenseV1ForCausalLM", head_dim=16, rope_scaling=scaling).layers[0].rope

    assert rope(type="dynamic", alpha=50.0, factor=1.0) == Rope(10_000.0 * 50 ** (16 / 14))
    assert rope(rope_type="default", alpha=50.0) == Rope(10_000.0)
    assert rope(type="dynamic", alpha=0, factor=2.0) == Rope(10_000.0, DynamicScaling(2.0, 1000))


def test_granite_has_no_shared_expert_unless_the_file_says_so() -> None:
    experts = of("GraniteMoeSharedForCausalLM", num_local_experts=4).feed_forwards[0]
    assert isinstance(experts, MixtureLayout)
    assert experts.shared is None
