"""Checkpoints that the real packages made, and the logits that a plain Llama gives on their exact weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.models import LanguageModel
from loraplex_engine.models.layout import layer_linears
from loraplex_kernels.ops import Ops
from loraplex_kernels.selection import select_ops
from tests.engine.linears import linear_at
from tests.engine.quantization.checkpoints import load, logits

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "quantised"
if not SAMPLES.is_dir():
    pytest.skip("the sample checkpoints are not here", allow_module_level=True)

GOOD = sorted(path.parent.name for path in SAMPLES.glob("*/expected.safetensors"))
# Of the largest logit, float32 on both sides: the same products, summed in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select_ops(torch.device("cpu"), request.param, threads=1)


def load_on(ops: Ops, name: str, dtype: str) -> LanguageModel:
    try:
        return load(SAMPLES / name, ops, dtype=dtype)
    except NotImplementedError as error:
        pytest.skip(str(error))


def expectation(name: str) -> tuple[Tensor, Tensor]:
    """Token ids [T] and logits [T, V]."""
    expected = load_file(SAMPLES / name / "expected.safetensors")
    wanted = expected["logits_fp32"]
    return expected["input_ids"].flatten().long(), wanted.view(-1, wanted.shape[-1])


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", GOOD)
def test_sample_gives_the_expected_logits(ops: Ops, name: str) -> None:
    token_ids, wanted = expectation(name)
    assert distance(logits(load_on(ops, name, "float32"), token_ids, ops), wanted) <= TOLERANCE


@pytest.mark.parametrize("name", GOOD)
def test_sample_in_bfloat16_is_no_worse_than_its_dense_twin(ops: Ops, tmp_path: Path, name: str) -> None:
    """The twin: the same weights, rounded to bfloat16 and multiplied as a dense model's are."""
    token_ids, wanted = expectation(name)
    model = load_on(ops, name, "bfloat16")
    dense = load(write_dense_twin(name, tmp_path), ops, dtype="bfloat16")
    # Both round every activation to 8 bits, and differently: either may be luckier in a single logit.
    found, of_dense = (mean_distance(logits(m, token_ids, ops), wanted) for m in (model, dense))
    assert found <= 1.1 * of_dense


def mean_distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def write_dense_twin(name: str, folder: Path) -> Path:
    model = load(SAMPLES / name, dtype="float32")
    source = load_file(SAMPLES / name / "model.safetensors")
    tensors = {key: tensor for key, tensor in source.items() if "_proj." not in key}
    for layer in range(model.config.num_layers):
        for fused in layer_linears(model.config, layer):
            linear, start = linear_at(model, f"layers.{layer}.{fused.name}").linear, 0
            for part, rows in fused.parts:
                tensors[f"model.layers.{layer}.{part}.weight"] = linear.dequantize(start, start + rows)
                start += rows
    raw = json.loads((SAMPLES / name / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("awq_marlin_g128", "version is 'marlin'; it must be one of gemm, gemv, gemv_fast"),
        (
            "bnb_nf4_afterfwd",
            r"q_proj\.weight\.absmax is BF16 \[4, 256\], not F32 .* which loses the weights",
        ),
    ],
)
def test_sample_that_cannot_be_read_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        load(SAMPLES / name)
