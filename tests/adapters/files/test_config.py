import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import MAX_CONFIG_BYTES, LoRAConfig, parse_config

REAL_CONFIGS = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "peft-configs"


def parse(**fields: object) -> LoRAConfig:
    return parse_config(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields).encode())


def problems_of(raw: bytes) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        parse_config(raw)
    return caught.value.problems


def problems_with(**fields: object) -> list[str]:
    return problems_of(json.dumps({"peft_type": "LORA"} | fields).encode())


def test_scale_is_alpha_over_rank() -> None:
    assert parse().scale_of("model.layers.0.self_attn.q_proj") == 2.0


def test_rank_stabilised_scale_is_alpha_over_the_root_of_the_modules_own_rank() -> None:
    config = parse(use_rslora=True, rank_pattern={"q_proj": 9})
    assert config.scale_of("layers.0.q_proj") == 16 / 3
    assert config.scale_of("layers.0.k_proj") == 16 / math.sqrt(8)


def test_the_first_pattern_that_matches_counts() -> None:
    config = parse(rank_pattern={r".*layers\.0\..*": 2, "q_proj": 4}, alpha_pattern={"q_proj": 6, ".*": 1})
    assert config.rank_of("layers.0.q_proj") == 2
    assert config.rank_of("layers.1.q_proj") == 4
    assert config.alpha_of("layers.1.q_proj") == 6
    assert config.alpha_of("layers.1.k_proj") == 1


def test_absent_rank_and_alpha_are_those_of_peft() -> None:
    config = parse_config(b'{"peft_type": "LORA"}')
    assert (config.rank, config.alpha) == (8, 8.0)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_accepted(init: object) -> None:
    assert parse(init_lora_weights=init).rank == 8


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of", 7])
def test_initialisations_that_change_the_base_are_refused(init: object) -> None:
    (problem,) = problems_with(init_lora_weights=init)
    assert "init_lora_weights" in problem
    assert "base weights" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"num_groups": 2}),
        ("megatron_config", {"x": 1}),
        ("enable_lora", [True, False, True]),
        ("bias", "some"),
        ("alora_invocation_tokens", "<invoke>"),
        ("alora_invocation_tokens", [1, -1]),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", [True]),
        ("use_dora", 1),
        ("modules_to_save", [3]),
        ("a_field_of_next_year", {"x": 1}),
        ("a_number_of_next_year", 0),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(name: str, value: object) -> None:
    (problem,) = problems_with(**{name: value})
    assert problem.startswith(f"adapter_config.json: {name}=")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_not_used_is_tolerated(value: object) -> None:
    assert parse(a_field_of_next_year=value, use_qalora=value, layer_replication=value).rank == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 1},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"exclude_modules": ["lm_head"]},
        {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}},
        {"base_model_name_or_path": None, "task_type": None},
        {"peft_version": "0.99", "megatron_core": "megatron.core", "qalora_group_size": 16},
    ],
)
def test_book_keeping_and_advice_are_accepted(fields: dict[str, object]) -> None:
    assert parse(**fields).rank == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "not a positive integer"),
        ({"r": -4}, "not a positive integer"),
        ({"r": True}, "not a positive integer"),
        ({"r": 8.0}, "not a positive integer"),
        ({"r": None}, "not a positive integer"),
        ({"lora_alpha": "16"}, "not a number"),
        ({"lora_alpha": True}, "not a number"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"use_rslora": "yes"}, "true or false"),
        ({"rank_pattern": [1]}, "an object"),
        ({"rank_pattern": {"q_proj": 0}}, "not a positive integer"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"rank_pattern": {f"m{i}": 1 for i in range(5000)}}, "at most"),
        ({"target_modules": {"q": 1}}, "a list of strings"),
        ({"target_parameters": [1]}, "a list of strings"),
        ({"target_parameters": [f"m{i}" for i in range(5000)]}, "at most"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(fields: dict[str, object], message: str) -> None:
    (problem,) = problems_with(**fields)
    assert message in problem


def test_every_problem_is_named_at_once() -> None:
    problems = problems_with(use_qalora=True, layer_replication=[[0, 4]], r=0, bias="some")
    assert len(problems) == 4


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        (b'{"peft_type": "LORA", "r": 8, "r": 4}', "twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b" " * (MAX_CONFIG_BYTES + 1), "at most"),
        (b'{"r": 8}', "peft_type is missing"),
        (b'{"peft_type": "IA3"}', "only LORA"),
        (b'{"peft_type": ["LORA"]}', "only LORA"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}', "surrogates"),
    ],
)
def test_a_file_that_is_no_lora_config_is_refused(raw: bytes, message: str) -> None:
    (problem,) = problems_of(raw)
    assert message in problem


def test_windows_line_ends_and_a_byte_order_mark_are_read() -> None:
    assert parse_config(b'\xef\xbb\xbf{\r\n"peft_type": "LORA"\r\n}').rank == 8


def test_a_task_other_than_generation_is_a_warning() -> None:
    (warning,) = parse(task_type="SEQ_CLS").warnings
    assert "SEQ_CLS" in warning


TEXT = st.text("aq_.*+?|()[]{}\\^$1é\n", max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "target_modules",
    "base_model_name_or_path", "task_type", "modules_to_save", "use_dora", "peft_type", "lora_dropout", "new_field",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_the_values_a_config_is_read_or_refused(fields: dict[str, object]) -> None:
    try:
        config = parse_config(json.dumps({"peft_type": "LORA"} | fields).encode())
    except AdapterRejected as rejected:
        str(rejected).encode()
        return
    assert math.isfinite(config.scale_of("model.layers.0.self_attn.q_proj"))


def test_what_is_trained_beside_a_and_b_is_read() -> None:
    config = parse(
        lora_bias=True, bias="lora_only", modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [0, 7]}
    )
    assert (config.lora_bias, config.trains_bias, config.modules_to_save) == (True, True, ("lm_head",))
    assert config.trained_tokens == {"embed_tokens": (0, 7)}
    assert parse(trainable_token_indices=[4]).trained_tokens == {"embed_tokens": (4,)}
    assert parse(alora_invocation_tokens=[0, 5]).invocation_tokens == (0, 5)
    assert parse(use_dora=True).use_dora


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True, "lora_bias": True},
        {"alora_invocation_tokens": [1], "use_dora": True},
        {"alora_invocation_tokens": [1], "modules_to_save": ["lm_head"]},
        {"alora_invocation_tokens": [1], "bias": "all"},
        {"alora_invocation_tokens": [1], "trainable_token_indices": [3]},
    ],
)
def test_combinations_that_peft_does_not_define_are_refused_by_name(fields: dict[str, object]) -> None:
    (problem,) = problems_with(**fields)
    assert any(problem.startswith(f"adapter_config.json: {name}") for name in fields)


# What is refused of the real configs that are LoRA, and the field that is why.
REFUSED_LORA = {
    "MetaMathQA__lora__llama-3.2-3B-rank14-target-mlp-bdlora.json": "use_bdlora",
    "MetaMathQA__lora__llama-3.2-3B-rank32-kasa.json": "kasa_config",
    "wujindou__BLOOM-LORA__adapter_config.json": "enable_lora",
}
# Trained whole beside LoRA, and in no model that generates text: refused when the adapter meets its model, by the name
# of the module (test_binding.py).
HEADS_OF_OTHER_TASKS = {
    "Hareshjethani__BERT-GPT2-Multitask-Finetuning__adapter_config.json": ("classifier", "score"),
    "branbot6__sift-opf-zh__adapter-adapter_config.json": ("classifier", "score"),
    "hist__examples__monteclora_finetuning__monteclora-roberta-mrpc__checkpoint-230__a0738e3.json": (
        "classifier",
        "score",
    ),
    "hist__tests__regression__lora_mlp_modules_to_save__0.6.1__a405866.json": ("lin1",),
    "lockheed886__Vision-Transformers-for-Food-Classification__final_model-adapter_config.json": ("classifier",),
}


@pytest.mark.skipif(not REAL_CONFIGS.is_dir(), reason="real adapter configs are not here")
def test_real_configs_are_read_as_they_are_or_refused_by_name() -> None:
    num_accepted = 0
    for path in sorted(REAL_CONFIGS.iterdir()):
        raw = path.read_bytes()
        fields = json.loads(raw)
        if fields.get("peft_type") != "LORA":
            (problem,) = problems_of(raw)
            assert "peft_type" in problem, path.name
        elif path.name in REFUSED_LORA:
            assert any(f": {REFUSED_LORA[path.name]}=" in problem for problem in problems_of(raw)), path.name
        else:
            config = parse_config(raw)
            assert (config.rank, config.alpha) == (fields["r"], fields["lora_alpha"]), path.name
            assert config.modules_to_save == HEADS_OF_OTHER_TASKS.get(path.name, ()), path.name
            num_accepted += 1
    assert num_accepted >= 50


def test_an_adapter_of_mlx_is_called_so() -> None:
    with pytest.raises(AdapterRejected, match="MLX-LM"):
        parse_config(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 16}).encode())


@pytest.mark.parametrize("field", ["lora_plus_lr_ratio", "lorap_lr_ratio", "loraplus_lr_ratio", "lora_dtype"])
def test_fields_of_training_alone_change_nothing(field: str) -> None:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    assert parse_config(json.dumps(fields | {field: 16.0}).encode()) == parse_config(json.dumps(fields).encode())
