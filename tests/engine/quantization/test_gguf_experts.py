"""Experts of GGUF files: read one by one from the tensors of all, in the types of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_engine.checkpoint import gguf_model
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model, read_model_config
from loraplex_kernels.selection import select_ops
from tests.gguf_files import gguf, unpack, write_gguf
from tests.reference.test_model_logits import LENGTHS, Stepper, of, prompts, randomised

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def qwen3_moe() -> Any:
    return of("Qwen3Moe", **SIZES, moe_intermediate_size=64, num_experts=3, num_experts_per_tok=2, norm_topk_prob=True)


def gpt_oss() -> Any:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 64}
    return of("GptOss", **SIZES, **experts, sliding_window=5, rope_parameters=rope)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {"qwen3moe": (qwen3_moe, "Q8_0"), "gpt-oss": (gpt_oss, "MXFP4")}


def load(path: Path, kernels: str) -> LanguageModel:
    ops = select_ops(torch.device("cpu"), kernels, threads=1)
    config = EngineConfig(model=str(path), dtype="float32", max_model_len=64, max_resident_adapters=2)
    return load_model(config, path, ops)


def logits(model: LanguageModel) -> Tensor:
    stepper = Stepper(model, prompts())
    stepper.step(*enumerate(LENGTHS))
    return torch.cat(stepper.results())


@pytest.mark.parametrize("architecture", MODELS)
def test_experts_in_blocks_answer_as_dense_ones_of_their_values(architecture: str, tmp_path: Path) -> None:
    make, kind = MODELS[architecture]
    packed, dense = tmp_path / "packed.gguf", tmp_path / "dense.gguf"
    write_gguf(packed, randomised(make()), architecture, kind)
    unpack(packed, dense, architecture)
    wanted, model = logits(load(dense, "reference")), load(packed, "reference")
    assert model.config.quantization == f"gguf-{kind}"
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_name_experts_as_beside_other_files(tmp_path: Path) -> None:
    theirs = gpt_oss()
    write_gguf(tmp_path / "model.gguf", theirs, "gpt-oss", "MXFP4")
    theirs.save_pretrained(tmp_path)
    found, wanted = (load(path, "reference").lora_targets() for path in (tmp_path / "model.gguf", tmp_path))
    assert {path: target.site for path, target in found.items()} == {path: t.site for path, t in wanted.items()}
    assert {path: target.stacks for path, target in found.items()} == {path: t.stacks for path, t in wanted.items()}


def rewritten(folder: Path, change: Callable[[str, Any], Any], **entries: tuple[Any, str]) -> Path:
    """gpt-oss with some tensors changed, or left out, and further entries."""
    write_gguf(folder / "whole.gguf", gpt_oss(), "gpt-oss")
    reader, writer = gguf.GGUFReader(folder / "whole.gguf"), gguf.GGUFWriter(folder / "model.gguf", "gpt-oss")
    for key, field in reader.fields.items():
        if key.startswith("gpt-oss.") and key.removeprefix("gpt-oss.") not in entries:
            writer.add_key_value(key, field.contents(), field.types[0])
    for key, (value, kind) in entries.items():
        getattr(writer, f"add_{kind}")(f"gpt-oss.{key}", value)
    for tensor in reader.tensors:
        changed = change(tensor.name, tensor.data)
        if changed is not None:
            writer.add_tensor(tensor.name, changed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


UP = "blk.1.ffn_up_exps.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, data: None if name == UP else data,
            r"ffn_gate_exps\.weight: gate and up of an expert are not alike",
        ),
        (lambda name, data: data[:, :-1].copy() if name == UP else data, "gate and up of an expert are not alike"),
        (lambda name, data: data[:2].copy() if name == UP else data, r"ffn_gate_exps\.weight: gate and up of an exp"),
        (lambda name, data: data[0].copy() if name == UP else data, r"ffn_up_exps\.weight has 2 dimensions"),
    ],
    ids=["missing", "narrow", "few", "flat"],
)
def test_tensors_that_are_not_of_the_same_experts(
    change: Callable[[str, Any], Any], message: str, tmp_path: Path
) -> None:
    path = rewritten(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        read_model_config(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"expert_gating_func": (2, "uint32")}, "expert_gating_func is 2; it must be 1"),
        ({"expert_weights_scale": (2.5, "float32")}, r"expert_weights_scale is 2\.5; it must be 1"),
        ({"expert_weights_norm": (False, "bool")}, "expert_weights_norm is False; it must be true"),
        ({"expert_count": (1 << 20, "uint32")}, "num_local_experts is 1048576; it must be at most"),
        ({"expert_count": (4, "uint32")}, r"missing: model\.layers\.0\.mlp\.experts\.3"),
        ({"expert_used_count": (9, "uint32")}, "num_experts_per_tok is 9; it must be at most the number of experts"),
    ],
    ids=lambda entries: next(iter(entries)) if isinstance(entries, dict) else "",
)
def test_fields_that_are_not_computed(entries: dict[str, tuple[Any, str]], message: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda name, data: data, **entries)
    with pytest.raises(ModelError, match=message):
        load(path, "reference")


def test_more_experts_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "MAX_MATRICES", 20)
    path = rewritten(tmp_path, lambda name, data: data)
    with pytest.raises(ModelError, match="more than 20 matrices of experts"):
        read_model_config(path)


def test_experts_of_an_architecture_that_has_none_are_refused(tmp_path: Path) -> None:
    def experts(writer: Any) -> None:
        writer.add_expert_count(4)

    write_gguf(tmp_path / "model.gguf", of("Qwen3", **SIZES), "qwen3", vocabulary=experts)
    with pytest.raises(ModelError, match="architecture not supported: qwen3 with experts"):
        read_model_config(tmp_path / "model.gguf")
