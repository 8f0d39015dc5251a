import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_adapters.errors import BASE_MISMATCH, INVALID, AdapterRejected
from loraplex_adapters.files.config import parse_config
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.targets import LoraTarget
from tests.adapters.files.test_config import HEADS_OF_OTHER_TASKS, REAL_CONFIGS

TensorMaker = Callable[..., dict[str, torch.Tensor]]
Targets = dict[str, LoraTarget]

ATTENTION = "model.layers.0.self_attn"
Q, K, V, O = (f"{ATTENTION}.{name}_proj" for name in "qkvo")  # noqa: E741 - the field's own letters
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def bound(
    tensors: dict[str, torch.Tensor],
    targets: Targets,
    dtype: torch.dtype = torch.float32,
    max_rank: int = 64,
    **fields: object,
) -> BoundAdapter:
    config = parse_config(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields).encode())
    return bind(tensors, config, targets, dtype, max_rank)


def problems_with(tensors: dict[str, torch.Tensor], targets: Targets, **arguments: object) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        bound(tensors, targets, **arguments)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        pytest.param((4, 16), BASE_MISMATCH, id="wider"),
        pytest.param((4, 8, 1), INVALID, id="no matrix"),
        pytest.param((3, 8), INVALID, id="another rank than configured"),
    ],
)
def test_the_sizes_of_another_base_are_told_from_other_problems(
    shape: tuple[int, ...], reason: str, lora_tensors: TensorMaker, targets: Targets
) -> None:
    with pytest.raises(AdapterRejected) as caught:
        bound(lora_tensors([Q]) | {A: torch.ones(shape)}, targets)
    assert caught.value.reason == reason


def test_a_and_b_of_one_projection_lie_at_its_place(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = lora_tensors([K])
    adapter = bound(tensors, targets)
    (weights,) = adapter.weights.values()
    (part,) = weights.slices
    assert list(adapter.weights) == ["0.qkv"]
    assert (part.rank_start, part.out_start) == (0, 12)
    assert torch.equal(weights.a, tensors[f"base_model.model.{K}.lora_A.weight"])
    assert torch.equal(part.b, tensors[f"base_model.model.{K}.lora_B.weight"] * 2.0)


def test_projections_that_share_an_input_are_stacked_in_the_order_of_their_outputs(
    lora_tensors: TensorMaker, targets: Targets
) -> None:
    tensors = lora_tensors([V], rank=2) | lora_tensors([Q, O], rank=3)
    adapter = bound(tensors, targets, r=3, rank_pattern={"v_proj": 2})
    weights = adapter.weights["0.qkv"]
    assert [(part.rank_start, part.out_start, tuple(part.b.shape)) for part in weights.slices] == [
        (0, 0, (12, 3)),
        (3, 16, (4, 2)),
    ]
    assert torch.equal(weights.a[3:], tensors[f"base_model.model.{V}.lora_A.weight"])
    assert len(adapter.weights["0.o"].slices) == 1
    assert adapter.ranks == {O: 3, Q: 3, V: 2}


def test_an_adapter_of_the_fused_projection_takes_all_of_its_outputs(
    lora_tensors: TensorMaker, targets: Targets
) -> None:
    (weights,) = bound(lora_tensors([f"{ATTENTION}.qkv_proj"]), targets).weights.values()
    (part,) = weights.slices
    assert (part.rank_start, part.out_start, tuple(part.b.shape)) == (0, 0, (20, 4))


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "base_model.model.base_model.model.",
        "",
    ],
)
def test_every_spelling_of_peft_s_prefix_binds(lora_tensors: TensorMaker, targets: Targets, prefix: str) -> None:
    assert bound(lora_tensors([Q], prefix=prefix), targets).ranks == {Q: 4}


@pytest.mark.parametrize(
    "wrapped",
    [
        "layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
        "model.language_model.model.layers.0.self_attn.q_proj",
    ],
)
def test_every_place_of_the_decoder_in_the_trained_model_binds(
    lora_tensors: TensorMaker, targets: Targets, wrapped: str
) -> None:
    tensors = {key.replace(Q, wrapped): tensor for key, tensor in lora_tensors([Q]).items()}
    assert bound(tensors, targets).ranks == {Q: 4}


def test_an_adapter_name_in_the_keys_is_dropped(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in lora_tensors([Q]).items()}
    assert bound(tensors, targets).ranks == {Q: 4}


def test_two_adapter_names_in_the_keys_are_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    named = {key.replace(".weight", ".other.weight"): tensor for key, tensor in lora_tensors([K]).items()}
    (problem,) = problems_with(lora_tensors([Q]) | named, targets)
    assert "'other'" in problem


@pytest.mark.parametrize("wrapper", ["original_module", "modules_to_save", "modules_to_save.default"])
def test_a_wrapper_s_bias_is_passed_over_only_beside_the_module_s_own(
    lora_tensors: TensorMaker, targets: Targets, wrapper: str
) -> None:
    """PEFT writes both with bias="all": tests/reference compares what they compute."""
    spare = {f"base_model.model.{K}.{wrapper}.bias": torch.ones(6)}
    (problem,) = problems_with(lora_tensors([Q]) | spare, targets)
    assert "save it again" in problem
    problems = problems_with(lora_tensors([Q]) | spare | {f"base_model.model.{K}.bias": torch.ones(6)}, targets)
    assert problems
    assert not any(wrapper in problem for problem in problems)


def test_a_module_trained_whole_and_by_rows_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    twice = {"base_model.model.lm_head.token_adapter.base_layer.weight": torch.ones(4, 8)}
    (problem,) = problems_with(lora_tensors([Q]) | twice, targets)
    assert "modules_to_save and trainable_token_indices both" in problem


@pytest.mark.parametrize("wrapped", ["language_model.lm_head", "lm_head"])
def test_the_head_binds_beside_a_wrapped_decoder(lora_tensors: TensorMaker, targets: Targets, wrapped: str) -> None:
    head = {"lm_head": LoraTarget("lm_head", 8, 0, 9)}
    tensors = {key.replace("lm_head", wrapped): value for key, value in _lora_of_the_head().items()}
    assert bound(tensors, targets | head).ranks == {"lm_head": 4}


def _lora_of_the_head() -> dict[str, torch.Tensor]:
    prefix = "base_model.model.lm_head"
    return {f"{prefix}.lora_A.weight": torch.ones(4, 8), f"{prefix}.lora_B.weight": torch.ones(9, 4)}


@pytest.mark.parametrize(
    ("tower", "module"),
    [
        ("model.visual", "model.visual.blocks.0.attn.qkv"),
        ("visual", "visual.merger.mlp.0"),
        ("model.vision_tower", "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"),
        ("model.multi_modal_projector", "model.multi_modal_projector.linear_1"),
    ],
)
def test_lora_beside_the_decoder_is_left_out_with_one_warning(
    lora_tensors: TensorMaker, targets: Targets, tower: str, module: str
) -> None:
    beside = {f"base_model.model.{module}.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}
    adapter = bound(lora_tensors([Q]) | beside, targets)
    assert adapter.ranks == {Q: 4}
    assert adapter.warnings == (f"{tower}: left out, because text alone is served",)


def test_lora_beside_the_decoder_alone_is_no_adapter(targets: Targets) -> None:
    beside = {f"base_model.model.visual.blocks.0.attn.qkv.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}
    (problem,) = problems_with(beside, targets)
    assert "no LoRA tensors of the text model, which alone is served, but some of visual" in problem


def test_a_saved_part_beside_the_decoder_is_left_out_too(lora_tensors: TensorMaker, targets: Targets) -> None:
    beside = {"base_model.model.model.multi_modal_projector.linear_1.weight": torch.ones(3, 3)}
    adapter = bound(lora_tensors([Q]) | beside, targets, modules_to_save=["multi_modal_projector"])
    assert len(adapter.warnings) == 1


def test_every_module_of_a_container_is_trained_whole(lora_tensors: TensorMaker, targets: Targets) -> None:
    parts = {"gate_proj": (10, 8), "up_proj": (10, 8), "down_proj": (8, 10)}
    saved = {f"base_model.model.model.layers.0.mlp.{part}.weight": torch.ones(shape) for part, shape in parts.items()}
    adapter = bound(lora_tensors([Q]) | saved, targets, modules_to_save=["mlp"])
    assert adapter.replaced is not None
    assert set(adapter.replaced.sites) == {"0.gate_up", "0.down"}


@pytest.mark.parametrize(
    "spelling",
    [
        "_orig_mod.base_model.model.{}",
        "module.base_model.model.{}",
        "module._orig_mod.base_model.model.{}",
        "base_model.model._orig_mod.{}",
        "_fsdp_wrapped_module.base_model.model.{}",
    ],
)
def test_what_trainers_put_into_names_is_stripped(lora_tensors: TensorMaker, targets: Targets, spelling: str) -> None:
    tensors = {spelling.format(key): value for key, value in lora_tensors([Q], prefix="").items()}
    assert bound(tensors, targets, rank_pattern={"^model.layers.0.self_attn.q_proj": 4}, r=8).ranks == {Q: 4}


def test_wrappers_within_the_path_are_stripped(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = {
        key.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in lora_tensors([Q]).items()
    }
    assert bound(tensors, targets).ranks == {Q: 4}


def test_an_untrained_adapter_is_warned_of(lora_tensors: TensorMaker, targets: Targets) -> None:
    assert bound(lora_tensors([Q]), targets).warnings == ()
    (warning,) = bound(lora_tensors([Q]) | {B: torch.zeros(12, 4)}, targets).warnings
    assert "every lora_B is zero" in warning


def test_patterns_that_match_nothing_are_warned_of(lora_tensors: TensorMaker, targets: Targets) -> None:
    ranks, alphas = {"q_proj": 4, "query": 8}, {"o_proj": 2.0}
    warnings = bound(lora_tensors([Q]), targets, rank_pattern=ranks, alpha_pattern=alphas).warnings
    assert warnings == (
        "rank_pattern: no module with LoRA is matched by 'query'",
        "alpha_pattern: no module with LoRA is matched by 'o_proj'",
    )


def test_only_norms_over_heads_are_said_to_be_such(lora_tensors: TensorMaker, targets: Targets) -> None:
    stray = {f"base_model.model.model.layers.0.self_attn.{name}.weight": torch.ones(4) for name in ("q_norm", "rotary")}
    problems = problems_with(lora_tensors([Q]) | stray, targets, modules_to_save=["q_norm", "rotary"])
    assert [problem.partition(".weight: ")[0].rpartition(".")[2] for problem in problems if "heads" in problem] == [
        "q_norm"
    ]


def test_two_spellings_of_one_tensor_are_ambiguous(lora_tensors: TensorMaker, targets: Targets) -> None:
    problems = problems_with(lora_tensors([Q]) | lora_tensors([Q], prefix=""), targets)
    assert len(problems) == 2
    assert all("ambiguous" in problem for problem in problems)


def test_a_name_that_reaches_two_projections_is_ambiguous(lora_tensors: TensorMaker, targets: Targets) -> None:
    targets["layers.0.self_attn.q_proj"] = targets[Q]
    tensors = {key.replace(Q, "layers.0.self_attn.q_proj"): tensor for key, tensor in lora_tensors([Q]).items()}
    problems = problems_with(tensors, targets)
    assert all("it may mean layers.0.self_attn.q_proj or model.layers.0" in problem for problem in problems)


def test_every_tensor_that_binds_to_nothing_is_listed(lora_tensors: TensorMaker, targets: Targets) -> None:
    stray = {
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 8),
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 8),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 99),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": torch.ones(12),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(12),
        "base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(12),
        "base_model.model.score.weight": torch.ones(2, 8),
        "something.else": torch.ones(1),
    }
    problems = problems_with(lora_tensors([Q]) | stray, targets)
    assert {problem.partition(": ")[0] for problem in problems} == set(stray)


@pytest.mark.skipif(not REAL_CONFIGS.is_dir(), reason="real adapter configs are not here")
@pytest.mark.parametrize("name", HEADS_OF_OTHER_TASKS)
def test_a_head_of_another_task_is_refused_by_name_whether_the_file_holds_it_or_not(
    lora_tensors: TensorMaker, targets: Targets, name: str
) -> None:
    config = parse_config((REAL_CONFIGS / name).read_bytes())
    tensors = lora_tensors([Q], rank=config.rank)
    heads = {f"base_model.model.{head}.weight": torch.ones(2, 8) for head in HEADS_OF_OTHER_TASKS[name]}
    for held in ({}, heads):
        with pytest.raises(AdapterRejected) as caught:
            bind(tensors | held, config, targets, torch.float32, max_rank=config.rank)
        unmet = {f"modules_to_save names {head!r}" for head in HEADS_OF_OTHER_TASKS[name]}
        assert len(caught.value.problems) == len(unmet) + len(held)
        assert all(any(each in problem for problem in caught.value.problems) for each in (*unmet, *held))
    without = replace(config, modules_to_save=())  # that alone is why
    assert bind(tensors, without, targets, torch.float32, max_rank=config.rank).ranks == {Q: config.rank}


def test_a_flood_of_problems_is_cut_and_counted(lora_tensors: TensorMaker, targets: Targets) -> None:
    problems = problems_with({f"stray.{i}": torch.ones(1) for i in range(1234)}, targets)
    assert len(problems) == 1001
    assert problems[-1] == "and 234 more"


@pytest.mark.parametrize(("missing", "part"), [(A, "lora_A"), (B, "lora_B")])
def test_an_a_without_b_or_b_without_a_is_refused(
    lora_tensors: TensorMaker, targets: Targets, missing: str, part: str
) -> None:
    tensors = lora_tensors([Q])
    del tensors[missing]
    (problem,) = problems_with(tensors, targets)
    assert f"its {part} is missing" in problem


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (A, (4, 9), r"shape [4, 9], this model needs [rank, 8]"),
        (A, (4,), r"shape [4], this model needs [rank, 8]"),
        (A, (4, 8, 1), r"shape [4, 8, 1], this model needs [rank, 8]"),
        (B, (13, 4), r"shape [13, 4], this model needs [12, rank]"),
        (B, (12, 5), r"shape [12, 5] has rank 5, its lora_A [4, 8] has 4"),
        (A, (5, 8), r"shape [12, 4] has rank 4, its lora_A [5, 8] has 5"),
    ],
)
def test_a_wrong_shape_is_refused_with_both_shapes(
    lora_tensors: TensorMaker, targets: Targets, key: str, shape: tuple[int, ...], message: str
) -> None:
    (problem,) = problems_with(lora_tensors([Q]) | {key: torch.ones(shape)}, targets)
    assert message in problem


def test_a_rank_that_is_not_the_configured_one_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q], rank=3), targets)
    assert "rank 3 by its shape, but 4 by adapter_config.json" in problem


def test_a_rank_of_zero_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q], rank=0), targets)
    assert "rank 0" in problem


def test_a_rank_above_the_limit_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q]), targets, max_rank=3)
    assert "at most 3" in problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [A, B])
def test_values_that_are_no_numbers_are_refused(
    lora_tensors: TensorMaker, targets: Targets, key: str, value: float
) -> None:
    tensors = lora_tensors([Q])
    tensors[key][-1, -1] = value
    (problem,) = problems_with(tensors, targets)
    assert problem == f"{key}: it holds NaN or infinite values"


def test_values_that_overflow_the_compute_dtype_are_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = lora_tensors([Q])
    tensors[B][0, 0] = 40_000.0
    assert bound(tensors, targets, dtype=torch.bfloat16).ranks == {Q: 4}
    (problem,) = problems_with(tensors, targets, dtype=torch.float16)
    assert "times the scale 2 overflow torch.float16" in problem


def test_a_double_that_overflows_single_precision_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = {key: tensor.double() for key, tensor in lora_tensors([Q]).items()}
    tensors[A][0, 0] = 1e300
    (problem,) = problems_with(tensors, targets)
    assert A in problem


def test_large_values_are_taken_though_their_sum_overflows(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = lora_tensors([Q])
    tensors[A].fill_(3e38)
    assert bound(tensors, targets).ranks == {Q: 4}


def test_a_scale_beyond_all_numbers_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q]), targets, lora_alpha=1e300)
    assert "overflow" in problem


def test_integers_are_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([Q]) | {A: torch.ones(4, 8, dtype=torch.int8)}, targets)
    assert "a float is expected" in problem


def test_a_fused_projection_beside_its_part_is_refused(lora_tensors: TensorMaker, targets: Targets) -> None:
    (problem,) = problems_with(lora_tensors([f"{ATTENTION}.qkv_proj", Q]), targets)
    assert "changes the same outputs" in problem


def test_an_adapter_with_no_tensors_is_refused(targets: Targets) -> None:
    (problem,) = problems_with({}, targets)
    assert "no LoRA tensors" in problem


def test_the_trained_name_decides_about_patterns(lora_tensors: TensorMaker, targets: Targets) -> None:
    trained = "language_model.model.layers.0.self_attn.q_proj"
    tensors = {key.replace(Q, trained): tensor for key, tensor in lora_tensors([Q], rank=2).items()}
    patterns = {f"^{trained}": 2, "^model.layers.0.self_attn.q_proj": 3}
    adapter = bound(tensors, targets, rank_pattern=patterns, alpha_pattern={f"^{trained}": 10})
    expected = tensors[f"base_model.model.{trained}.lora_B.weight"] * 5.0
    assert torch.equal(adapter.weights["0.qkv"].slices[0].b, expected)


@pytest.mark.parametrize(
    ("parameters", "pattern"),
    [(["q_proj.weight"], "q_proj.weight"), ([f"{Q}.weight"], "q_proj.weight"), (["proj.weight"], "q_proj")],
)
def test_patterns_see_a_weight_that_was_trained_as_a_parameter(
    lora_tensors: TensorMaker, targets: Targets, parameters: list[str], pattern: str
) -> None:
    tensors = lora_tensors([Q], rank=2)
    patterns = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 10}}
    adapter = bound(tensors, targets, target_parameters=parameters, **patterns)  # type: ignore[arg-type]
    assert torch.equal(adapter.weights["0.qkv"].slices[0].b, tensors[B] * 5.0)


def test_patterns_that_name_the_module_miss_a_weight_that_was_trained_as_a_parameter(
    lora_tensors: TensorMaker, targets: Targets
) -> None:
    tensors = lora_tensors([Q])
    adapter = bound(tensors, targets, target_parameters=["q_proj.weight"], alpha_pattern={"q_proj": 10})
    assert torch.equal(adapter.weights["0.qkv"].slices[0].b, tensors[B] * 2.0)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_float_is_converted_with_one_rounding_after_the_scale(
    lora_tensors: TensorMaker, targets: Targets, stored: torch.dtype
) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in lora_tensors([Q]).items()}
    weights = bound(tensors, targets, dtype=torch.bfloat16, lora_alpha=3).weights["0.qkv"]
    assert torch.equal(weights.slices[0].b, (tensors[B].float() * 0.75).bfloat16())
    assert torch.equal(weights.a, tensors[A].float().bfloat16())


def test_results_are_contiguous(lora_tensors: TensorMaker, targets: Targets) -> None:
    tensors = lora_tensors([Q])
    tensors[A] = tensors[A].t().contiguous().t()
    weights = bound(tensors, targets).weights["0.qkv"]
    assert weights.a.is_contiguous()
    assert weights.slices[0].b.is_contiguous()


@settings(deadline=None)  # the first multiplication of a process is slow
@given(ranks=st.dictionaries(st.sampled_from(["q", "k", "v"]), st.integers(1, 5), min_size=1), seed=st.integers(0, 99))
def test_a_stacked_adapter_adds_what_its_projections_add(ranks: dict[str, int], seed: int) -> None:
    targets, start = {}, 0
    for name, width in (("q", 6), ("k", 2), ("v", 2)):
        targets[name] = LoraTarget("qkv", 5, start, width)
        start += width
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = torch.zeros(3, start)
    x = torch.randn(3, 5, generator=generator)
    for name, rank in ranks.items():
        a, b = (
            torch.randn(rank, 5, generator=generator),
            torch.randn(targets[name].out_features, rank, generator=generator),
        )
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        place = slice(targets[name].out_start, targets[name].out_start + len(b))
        expected[:, place] = (x @ a.T @ b.T) * (8 / rank)
    weights = bound(tensors, targets, rank_pattern=ranks).weights["qkv"]
    y, shrunk = torch.zeros(3, start), x @ weights.a.T
    for part in weights.slices:
        n, r = part.b.shape
        y[:, part.out_start : part.out_start + n] += shrunk[:, part.rank_start : part.rank_start + r] @ part.b.T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
