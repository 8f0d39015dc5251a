"""Models that transformers' own classes cannot serve are refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.execution.loading import load_runner
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.load_report import UNREPORTED
from tests.reference.borrowed import BORROWED, GROUPED, VOCAB, of

transformers = pytest.importorskip("transformers")

SMALL_STATE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "state": (lambda: of("Mamba", SMALL_STATE), "some layers are linear_attention, which the paged cache"),
    "own attention": (lambda: of("XGLM", d_model=48, ffn_dim=64, num_layers=2, attention_heads=4), "0 of XGLMForCausa"),
    "experts": (lambda: of("FlexOlmo", GROUPED, num_experts=5), "num_local_experts is 5: experts are not linears"),
    "encoder": (
        lambda: of("Bart", suffix="ForConditionalGeneration", d_model=48, encoder_layers=1, decoder_layers=1),
        "bart is an encoder-decoder",
    ),
    "both directions": (lambda: of("Bert", suffix="LMHeadModel"), "has a mask of its own, which is not plainly causal"),
    "no sequence of tokens": (
        lambda: of("GPTNeoX", suffix="ForSequenceClassification", num_labels=2),
        "GPTNeoXForSequenceClassification is not GPTNeoXForCausalLM, the causal language model of 'gpt_neox'",
    ),
    "changing rotation": (
        lambda: of("GPTNeoX", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic' makes one sequence's rows depend on the others' lengths",
    ),
}


def load(path: Path, **fields: Any) -> None:
    config = {"model": str(path), "dtype": "float32", "max_model_len": 64, "kernels": "reference"}
    load_runner(EngineConfig(**{**config, "kv_cache_bytes": 1 << 20, **fields}), path, UNREPORTED)


def saved(name: str, path: Path) -> Path:
    BORROWED[name]().save_pretrained(path)
    return path


def change_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def change_tensors(path: Path, **tensors: Tensor | None) -> None:
    stored = load_file(path / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_class_does_is_named(what: str, tmp_path: Path) -> None:
    make, reason = REFUSED[what]
    make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"own modelling cannot serve it: .*config.json: .*{reason}"):
        load(tmp_path)


def test_an_architecture_that_nobody_knows_says_what_both_ways_know(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    change_config(tmp_path, architectures=["Qwen2ForCausaLM"], model_type="qwen2_remote", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(
        ModelError, match=r"nearest .* is Qwen2ForCausalLM; .*transformers .* knows no model_type 'qwen2"
    ):
        load(tmp_path)


def test_native_alone_is_kept_to(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="architecture not supported: GPT2LMHeadModel"):
        load(saved("gpt2", tmp_path), implementation="native")


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    saved("gpt_neox", tmp_path)
    lost, odd = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias", "gpt_neox.layers.0.gate"
    change_tensors(tmp_path, **{lost: None, odd: torch.zeros(3)})
    with pytest.raises(ModelError, match=f"1 tensors missing: {lost}; 1 tensors unexpected: {odd}"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    change_tensors(tmp_path, **{"transformer.wpe.weight": torch.zeros(65, 48)})
    with pytest.raises(ModelError, match=r"transformer.wpe.weight is \[65, 48\], config.json makes it \[64, 48\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"num_layers": 10**12}, {"attention_types": [[["global"], 10**12]]}, {"num_hidden_layers": 10**12}]
)
def test_more_layers_than_tensors_are_refused_before_they_are_made(fields: dict[str, Any], tmp_path: Path) -> None:
    saved("gpt_neo", tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ModelError, match=r" is 1000000000000, and the weights are \d+ tensors"):
        load(tmp_path)


def test_labels_without_end_are_not_made(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    change_config(tmp_path, num_labels=10**12)
    load(tmp_path)


def test_tables_beyond_reason_are_refused_before_they_are_made(tmp_path: Path) -> None:
    saved("gptj", tmp_path)
    change_config(tmp_path, n_positions=10**10)
    with pytest.raises(ModelError, match=r"would compute \d+ bytes of tables from it: is max_position_embeddings"):
        load(tmp_path)


def test_a_file_that_states_no_length_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="states no length of sequences: set max_model_len"):
        load(saved("bloom", tmp_path), max_model_len=None)


def test_positions_within_keys_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="kv_cache_dtype 'int8' is asked for, and the keys of BloomForCausalLM hold"):
        load(saved("bloom", tmp_path), kv_cache_dtype="int8")


def test_what_differs_from_the_class_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex_engine.borrowed import attention

    true = attention.with_alibi
    monkeypatch.setattr(attention, "with_alibi", lambda q, k, slopes, positions: true(q, k, 2 * slopes, positions))
    with pytest.raises(ModelError, match="BloomForCausalLM's states differ from those of its own attention by"):
        load(saved("bloom", tmp_path))


def test_a_configuration_without_sense_is_named(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    change_config(tmp_path, n_head=7)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot be made of it: .*divisible by num_heads"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "codegen", "bloom", "mpt", "falcon_alibi"])
def test_a_rotation_is_not_asked_of_a_class_that_turns_nothing_by_its_configuration(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rope_scaling is asked for, and \w+ turns nothing by one: leave it out"):
        load(saved(name, tmp_path), rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_positions_that_own_attention_would_have_a_table_of_are_bounded(tmp_path: Path) -> None:
    saved("mpt", tmp_path)
    change_config(tmp_path, max_seq_len=1 << 28)
    with pytest.raises(ModelError, match=r"would compute 6442450944 bytes of tables from it: is .*max_seq_len"):
        load(tmp_path)


def test_stretched_positions_beyond_reason_are_refused(tmp_path: Path) -> None:
    saved("olmo", tmp_path)
    with pytest.raises(ModelError, match="max_position_embeddings, with rope_scaling, is 64000000000; it must be at"):
        load(tmp_path, rope_scaling={"rope_type": "linear", "factor": 1e9})


def test_a_class_that_cannot_compute_with_other_linears_is_named(tmp_path: Path) -> None:
    saved("bloom", tmp_path)
    change_config(tmp_path, pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ModelError, match=r"BloomForCausalLM with its own attention cannot be computed: .*'weight'"):
        load(tmp_path)


def test_a_model_whose_pass_over_the_cache_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex_engine.borrowed.model import BorrowedModel

    def fail(*_: object) -> Tensor:
        raise ValueError("five dimensions")

    monkeypatch.setattr(BorrowedModel, "logits", fail)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel with the paged cache cannot be computed: five dimensions"):
        load(saved("gpt2", tmp_path))


def test_logits_that_differ_from_the_class_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex_engine.borrowed.model import BorrowedModel

    true = BorrowedModel.logits
    monkeypatch.setattr(BorrowedModel, "logits", lambda model, hidden: 2 * true(model, hidden))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel's logits differ from those of its own attention by 1\.0e"):
        load(saved("gpt2", tmp_path))
