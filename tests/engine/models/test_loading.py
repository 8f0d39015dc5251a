"""Loading a model directory: types, memory, tied heads, and what is refused before a byte of weights is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_adapters.runtime.targets import TargetKind
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.execution.kv_cache import block_bytes, create_kv_cache
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model, parse_model_config, read_model_config
from loraplex_engine.models.layout import EMBEDDING, HEAD, tensor_shapes
from loraplex_kernels.selection import select_ops
from tests.engine.linears import linear_at

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


def checkpoint(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    raw = {**CONFIG, **changes}
    (directory / "config.json").write_text(json.dumps(raw))
    shapes = tensor_shapes(parse_model_config(raw, "config.json"))
    generator = torch.Generator().manual_seed(1)
    save_file(
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    return directory


def change(directory: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the checkpoint, or remove them."""
    stored = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name not in tensors}
    added = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept | added, directory / "model.safetensors")


def load(directory: Path, kernels: str = "reference", **fields: Any) -> LanguageModel:
    config = EngineConfig(model=str(directory), max_resident_adapters=2, **fields)
    return load_model(config, directory, select_ops(torch.device("cpu"), kernels))


@pytest.mark.parametrize(
    ("stored", "requested", "computed"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.bfloat16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float64, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
    ids=str,
)
def test_dtype_follows_the_request_or_the_tensors(
    tmp_path: Path, stored: torch.dtype, requested: str, computed: torch.dtype
) -> None:
    assert load(checkpoint(tmp_path, stored), dtype=requested).dtype == computed


def test_dtype_follows_the_config_where_it_states_one(tmp_path: Path) -> None:
    assert load(checkpoint(tmp_path, torch.float32, torch_dtype="float16")).dtype == torch.bfloat16


def test_progress_reaches_the_size_of_the_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    directory = checkpoint(tmp_path)
    config = EngineConfig(model=str(directory))
    load_model(config, directory, select_ops(torch.device("cpu"), "reference"), lambda *bytes_: seen.append(bytes_))
    total = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    directory = checkpoint(tmp_path)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match=rf"{name}: is a Git LFS pointer, not the file: run `git lfs pull`"):
        load(directory)


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 100, b"{" * 100_000, b"[" * 100_000, b"[" * 8 + b"\0" * 8])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    directory = checkpoint(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load(directory)


def test_weights_that_do_not_fit_are_refused_before_any_is_read(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    change(directory, **{"model.norm.weight": None, "model.extra": torch.zeros(1)})
    seen: list[int] = []
    with pytest.raises(ModelError, match=r"missing: model\.norm\.weight; 1 tensors unexpected: model\.extra"):
        load_model(
            EngineConfig(model="x"), directory, select_ops(torch.device("cpu"), "reference"), lambda *_: seen.append(1)
        )
    assert not seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize(
    "name",
    [EMBEDDING, HEAD, "model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight"],
)
def test_a_weight_that_is_no_finite_number_is_refused_by_name(
    tmp_path: Path, name: str, kernels: str, value: float
) -> None:
    directory = checkpoint(tmp_path)
    tensor = load_file(directory / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    change(directory, **{name: tensor})
    with pytest.raises(ModelError, match=rf"{name} holds NaN or infinite values: it is damaged"):
        load(directory, kernels=kernels)


def test_a_weight_that_overflows_the_chosen_dtype_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, torch.bfloat16)
    change(directory, **{HEAD: torch.full((11, 16), 1e5, dtype=torch.bfloat16)})
    assert load(directory).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"lm_head\.weight holds values that are too large for torch\.float16"):
        load(directory, dtype="float16")


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_gemma_is_refused_in_float16(tmp_path: Path, architecture: str) -> None:
    directory = checkpoint(tmp_path, torch.float16, architectures=[architecture], head_dim=4)
    assert load(directory).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=f"activations of {architecture} exceed its range: choose bfloat16"):
        load(directory, dtype="float16")


def test_a_tied_model_needs_no_head(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, tie_word_embeddings=True))
    hidden = torch.randn(3, 16)
    embedding = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    assert torch.equal(model.logits(hidden), hidden @ embedding.T)


def test_a_tied_head_may_be_stored_once_more(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, tie_word_embeddings=True)
    change(directory, **{HEAD: load_file(directory / "model.safetensors")[EMBEDDING]})
    assert load(directory).config.tie_word_embeddings


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, tie_word_embeddings=True)
    change(directory, **{HEAD: torch.zeros(11, 16)})
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        load(directory)


def test_size_counts_every_parameter(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    cos_sin = 32 * 4 * 4  # positions x head_dim x float32
    assert load(directory).nbytes == stored + cos_sin


def test_the_engine_may_be_given_a_scaling_of_its_own(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    assert load(directory).config.max_position_embeddings == 32
    scaled = load(directory, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert scaled.config.max_position_embeddings == 128
    assert scaled.nbytes - load(directory).nbytes == (128 - 32) * 4 * 4


@pytest.mark.parametrize(("stated", "window"), [(8, 8), (31, 31), (32, None), (10**12, None), (10**30, None)])
def test_a_window_wider_than_any_sequence_is_none(tmp_path: Path, stated: int, window: int | None) -> None:
    directory = checkpoint(tmp_path, architectures=["MistralForCausalLM"], sliding_window=stated)
    assert [layer.window for layer in load(directory)._layers.values()] == [window] * 2


def test_tables_reach_only_as_far_as_requests_may(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    assert load(directory).nbytes - load(directory, max_model_len=8).nbytes == (32 - 8) * 4 * 4


def test_every_site_has_room_for_adapters(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path))
    sites, targets = model.lora_sites(), model.lora_targets()
    linears = {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("qkv", "o", "gate_up", "down")} | {"lm_head"}
    assert set(sites) == linears | {"embed_tokens", "replaced", "classifier"}
    norms = {target.site for target in targets.values() if target.kind is TargetKind.NORM}
    assert {target.site for target in targets.values()} - norms == set(sites) - {"replaced"}
    key = targets["model.layers.1.self_attn.k_proj"]
    assert (key.site, key.in_features, key.out_start, key.out_features) == ("layers.1.qkv", 16, 16, 8)
    for target in (target for target in targets.values() if target.kind is TargetKind.LINEAR):
        assert target.in_features == linear_at(model, target.site).in_features
        assert target.out_start + target.out_features <= linear_at(model, target.site).out_features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_block_takes_what_its_storage_takes(tmp_path: Path, dtype: torch.dtype) -> None:
    config = read_model_config(checkpoint(tmp_path))
    ops = select_ops(torch.device("cpu"), "reference")
    cache = create_kv_cache(config, ops, 5, 8, dtype)
    assert len(cache) == config.num_layers
    assert sum(layer.nbytes for layer in cache) == 5 * block_bytes(config, ops, 8, dtype)
