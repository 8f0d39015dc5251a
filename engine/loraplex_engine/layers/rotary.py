"""Rotary position embedding: from a model's parameters to the table of cosines and sines that the kernels read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraplex_engine.checkpoint.model_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelError,
    Rope,
    YarnScaling,
)
from loraplex_kernels.finite import all_finite


def cos_sin_table(rope: Rope | None, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of position · frequency → float32 [num_positions, 2, R/2]. None: nothing turns.

    float32 throughout, in the order of transformers' own arithmetic: an angle at position 100 000 amplifies a frequency
    that is one bit off.
    """
    if rope is None:
        still = torch.tensor([1.0, 0.0], device=device)
        return still[None, :, None].repeat(num_positions, 1, head_dim // 2)
    frequencies = inverse_frequencies(rope, rope.dims(head_dim), num_positions)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=1)
    match rope.scaling:
        case YarnScaling(attention_factor=factor):
            table *= factor
        case LongRopeScaling() as scaling:
            beyond = num_positions > scaling.original_max_positions
            table *= scaling.long_attention_factor if beyond else scaling.short_attention_factor
    if not all_finite(table):
        raise ModelError(f"{rope}: its angles are not finite numbers; correct rope_theta or rope_scaling")
    return table.to(device)


def inverse_frequencies(rope: Rope, head_dim: int, num_positions: int) -> Tensor:
    """θ^(−2i/D), scaled as the model asks → float32 [D/2], where D dimensions of a head are turned

    num_positions: the length of the longest sequence that is allowed.
    """
    if isinstance(rope.scaling, DynamicScaling):
        rope = Rope(_dynamic_theta(rope.theta, rope.scaling, head_dim, num_positions))
    powers: Tensor = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = 1.0 / powers
    match rope.scaling:
        case None | DynamicScaling():
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            return _yarn(powers, scaling, rope.theta, head_dim)
        case LongRopeScaling(short, long, original):
            # One of the two for all sequences, as in vLLM: a cached key is rotated once. transformers takes the other
            # factors when a sequence grows beyond the original length, and keeps the cached keys.
            factors = torch.tensor(long if num_positions > original else short, dtype=torch.float32)
            return 1.0 / (factors * powers)


def _dynamic_theta(theta: float, scaling: DynamicScaling, head_dim: int, num_positions: int) -> float:
    """The base θ for sequences of `num_positions`, used for shorter ones too, as in vLLM: a cached key is rotated once.

    transformers takes a new base whenever a sequence grows beyond the original length, and keeps the cached keys.
    """
    growth = scaling.factor * max(num_positions / scaling.original_max_positions, 1.0) - (scaling.factor - 1.0)
    return float(theta * growth ** (head_dim / max(head_dim - 2, 1)))


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths beyond original/low are slowed by the factor; below original/high kept; between, interpolated."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slowed = torch.where(wavelengths > scaling.original_max_positions / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < scaling.original_max_positions / high, frequencies, slowed)


def _yarn(powers: Tensor, scaling: YarnScaling, theta: float, head_dim: int) -> Tensor:
    """Dimensions that turn more than beta_fast times over the original length are kept, those that turn less than
    beta_slow times are slowed by the factor, with a linear ramp between.  Source: YaRN (arXiv 2309.00071)."""

    def dimension_turning(times: float) -> float:
        return head_dim * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - slowed
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
