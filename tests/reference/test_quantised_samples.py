"""Checkpoints that the real packages made, and the logits that a plain Llama gives on their exact weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.batch import StepBatch
from engine.config import EngineConfig
from engine.kv_cache import create_kv_cache
from engine.model_config import ModelError
from engine.models import LanguageModel, load_model
from kernels.ops import AttentionMetadata, select_ops

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "quantised"
if not SAMPLES.is_dir():
    pytest.skip("the sample checkpoints are not here", allow_module_level=True)

GOOD = sorted(path.parent.name for path in SAMPLES.glob("*/expected.safetensors"))
BLOCK_SIZE = 16
# Of the largest logit, float32 on both sides: the same products, summed in another order.
TOLERANCE = 1e-5


def load(name: str, dtype: str) -> LanguageModel:
    config = EngineConfig(model=name, dtype=dtype, max_resident_adapters=1)
    return load_model(config, SAMPLES / name, select_ops(torch.device("cpu"), "reference"))


def logits(model: LanguageModel, token_ids: Tensor) -> Tensor:
    """token_ids: [T] → float32 [T, V], in one step."""
    length = len(token_ids)
    num_blocks = -(-length // BLOCK_SIZE)
    ops = select_ops(torch.device("cpu"), "reference")
    positions = torch.arange(length)
    attention = AttentionMetadata(
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        positions,
        length,
        length,
    )
    batch = StepBatch(token_ids, positions, attention, None, positions)
    with torch.inference_mode():
        return model.logits(
            model.forward(batch, create_kv_cache(model.config, ops, num_blocks, BLOCK_SIZE, model.dtype))
        )


@pytest.mark.parametrize("name", GOOD)
def test_sample_gives_the_expected_logits(name: str) -> None:
    expected = load_file(SAMPLES / name / "expected.safetensors")
    model = load(name, "float32")
    wanted = expected["logits_fp32"]
    found = logits(model, expected["input_ids"].flatten().long()).view_as(wanted)
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


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
        load(name, "float32")
