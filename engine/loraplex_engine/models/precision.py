"""In which numbers a model is held and computed, and what may not be asked of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelConfig, ModelError
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.layout import HEAD_MODULE
from loraplex_engine.quantization import QuantizedReader, QuantSpec, round_to_nearest
from loraplex_kernels.quantized import dequantize

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def check_classifier(config: EngineConfig, model: ModelConfig, path: Path) -> None:
    """Raise ModelError if a model without the head of a language model is given what only such a head can use."""
    asked = {"head_quantization": config.head_quantization, "drafts": config.drafts}
    for name in [name for name, value in asked.items() if value is not None and not model.generates]:
        raise ModelError(
            f"{path}: {name} is asked for, and {model.architecture} has a classification head in place of a language "
            "model's: leave it out"
        )


def check_quantization(config: EngineConfig, spec: QuantSpec | None, path: Path) -> None:
    """Raise ModelError if a quantised checkpoint is to be quantised while it is loaded."""
    if spec is not None and config.quantization is not None:
        raise ModelError(
            f"{path}: quantization {config.quantization!r} is asked for, and the checkpoint is quantised already "
            f"({spec.label}): leave it out, or use the unquantised checkpoint"
        )


def check_head_quantization(config: EngineConfig, quantised: QuantizedReader, head: str, path: Path) -> None:
    """Raise ModelError if a quantised head is to be quantised while it is loaded."""
    if config.head_quantization is not None and head in quantised:
        raise ModelError(
            f"{path}: head_quantization {config.head_quantization!r} is asked for, and {head} is quantised already "
            f"({quantised.label}): leave it out"
        )


def quantization_label(config: EngineConfig, spec: QuantSpec | None, head: str = HEAD_MODULE) -> str:
    """The quantisation, for people: "nf4", "gptq-4bit-g128, lm_head int8"."""
    linears = config.quantization or (spec.label if spec is not None else "")
    head = f"{head} {config.head_quantization}" if config.head_quantization else ""
    return ", ".join(filter(None, (linears, head)))


def compute_dtype(requested: str, stated: str | None, stored: torch.dtype) -> torch.dtype:
    """The configured dtype; for auto, bfloat16 if the checkpoint is 16-bit, else float32.

    stated: the dtype in config.json, which may differ from that of the stored tensors.
    """
    if requested != "auto":
        return DTYPES[requested]
    checkpoint_dtype = DTYPES[stated] if stated is not None else stored
    return torch.bfloat16 if checkpoint_dtype.itemsize == 2 else torch.float32


def rounded(method: str, rows: Tensor) -> Tensor:
    """Rows of a weight, as quantising them while they are loaded changes them."""
    return dequantize(round_to_nearest(rows, method))
