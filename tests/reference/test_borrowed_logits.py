"""Models that transformers' own classes compute, over our cache: the logits that the classes have by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_engine.borrowed.loading import load_borrowed
from loraplex_engine.borrowed.model import BorrowedModel
from loraplex_engine.link.config import EngineConfig
from loraplex_kernels.selection import select_ops
from tests.reference.borrowed import BORROWED, GROUPED, LENGTH, of
from tests.reference.test_model_logits import LENGTHS, Stepper, assert_same, expected_logits, prompts, randomised

NATIVE_TOO = {
    "llama": lambda: of("Llama", GROUPED),
    "gemma2": lambda: of("Gemma2", GROUPED, head_dim=16, sliding_window=6, query_pre_attn_scalar=24),
}


def load(path: Path, kernels: str = "reference", **fields: Any) -> BorrowedModel:
    config = EngineConfig(
        **{"model": str(path), "dtype": "float32", "max_resident_adapters": 4, "max_model_len": 64, **fields}
    )
    return load_borrowed(config, path, select_ops(torch.device("cpu"), kernels))


def saved(model: Any, path: Path) -> Any:
    """The model with weights that are felt, in `path`, and as transformers runs it."""
    theirs = randomised(model)
    theirs.save_pretrained(path)
    if theirs.config.model_type == "falcon":  # whose eager attention adds ALiBi twice
        theirs.config._attn_implementation = "sdpa"
    return theirs


@pytest.mark.parametrize("name", [*BORROWED, *NATIVE_TOO])
def test_prompts_in_chunks_and_decoding_side_by_side_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = saved({**BORROWED, **NATIVE_TOO}[name](), tmp_path)
    stepper = Stepper(load(tmp_path), prompts())
    stepper.step((0, 3), (1, 8), (2, 6))
    stepper.step((2, 7), (0, 17), (1, 1))
    for _ in range(3):
        stepper.step(*((each, 1) for each in range(3) if stepper.done[each] < LENGTHS[each]))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon"])
def test_the_kernels_of_the_cpu_equal_transformers_too(name: str, tmp_path: Path) -> None:
    theirs = saved(BORROWED[name](), tmp_path)
    ours = load(tmp_path, "cpu")
    stepper = Stepper(ours, prompts(), select_ops(torch.device("cpu"), "cpu"))
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon_alibi", "mpt"])
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str, tmp_path: Path) -> None:
    theirs = saved(BORROWED[name](), tmp_path)
    exact = torch.cat(expected_logits(theirs, prompts()))
    stepper = Stepper(load(tmp_path, dtype="bfloat16"), prompts())
    stepper.step(*enumerate(LENGTHS))
    ours = torch.cat(stepper.results())
    implementation = theirs.config._attn_implementation
    model = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=implementation).eval()
    rounded = torch.cat(expected_logits(model, prompts()))
    assert (ours - exact).abs().mean() < 1.2 * (rounded - exact).abs().mean()


def test_tables_and_lengths_are_read_from_the_module(tmp_path: Path) -> None:
    saved(BORROWED["opt_projected"](), tmp_path)
    config = load(tmp_path).config
    assert (config.num_layers, config.head_shape.num_kv_heads, config.hidden_size) == (2, 4, 32)
    assert config.max_position_embeddings == LENGTH


def test_names_of_old_files_are_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = saved(BORROWED["gpt2"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask that old files hold
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    stepper = Stepper(load(tmp_path), prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))


@pytest.mark.parametrize("name", ["GPTNeoX", "Persimmon"])
def test_a_scaled_rotation_turns_the_same_part_of_each_head(name: str, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 30_000.0, "partial_rotary_factor": 1.0}
    scaling = {"rope_type": "linear", "factor": 2.0}
    saved(of(name, rope_parameters=rope), tmp_path)
    theirs = type(of(name)).from_pretrained(tmp_path, rope_parameters={**rope, **scaling})
    stepper = Stepper(load(tmp_path, rope_scaling=scaling), prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs.eval(), prompts()))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 2 * LENGTH),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 4 * LENGTH),
    ],
)
def test_a_scaled_rotation_lengthens_a_model(scaling: dict[str, Any], longest: int, tmp_path: Path) -> None:
    saved(BORROWED["gpt_neox"](), tmp_path)
    assert load(tmp_path, rope_scaling=scaling).config.max_position_embeddings == longest


def test_a_step_makes_no_table_of_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mpt import modeling_mpt

    saved(BORROWED["mpt"](), tmp_path)
    stepper, made = Stepper(load(tmp_path), prompts()), []
    monkeypatch.setattr(modeling_mpt, "build_mpt_alibi_tensor", lambda *sizes: made.append(sizes))
    stepper.step((0, 3))
    assert not made
