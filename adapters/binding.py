"""Every tensor of an adapter is bound to a projection of the model, or the load fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from adapters.config import LoRAConfig
from adapters.errors import AdapterRejected
from adapters.names import LoraTensorName, base_module_candidates, split_tensor_names
from kernels.ops import LoraSlice, LoraWeights


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A projection that an adapter may name, and where its output lies in the linear that computes it.

    A model describes itself by a dict of these, keyed by the projection's module path in the Hugging Face model
    ("model.layers.0.self_attn.q_proj"), with the fused names ("….self_attn.qkv_proj") beside the parts.
    """

    site: str  # the linear: a key of the pool's sites
    in_features: int  # C
    out_start: int  # first column of the linear's output that belongs to this projection
    out_features: int  # N of the projection


@dataclass(frozen=True, slots=True)
class BoundAdapter:
    """An adapter in the shape in which a model applies it."""

    weights: Mapping[str, LoraWeights]  # by site
    ranks: Mapping[str, int]  # by the model's own name of the projection


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of one projection, not yet converted."""

    name: str  # the model's name of the projection
    target: LoraTarget
    a_name: LoraTensorName
    b_name: LoraTensorName

    @property
    def trained_name(self) -> str:
        """As PEFT's patterns see it."""
        return self.a_name.module


def bind(
    tensors: Mapping[str, Tensor],  # by the name in the file: A [R, C], B [N, R], any float dtype
    config: LoRAConfig,
    targets: Mapping[str, LoraTarget],
    dtype: torch.dtype,
    max_rank: int,
) -> BoundAdapter:
    """Bind an adapter to a model: find each tensor's place, check it, fold the scale into B, convert, stack.

    The A matrices of projections that share a linear are stacked; absent projections are simply absent. Raises
    AdapterRejected naming every tensor that has no place, no partner, or the wrong shape, rank or values.
    """
    problems: list[str] = []
    pairs = _pair_up(tensors, targets, problems)
    for pair in pairs:
        problems.extend(_shape_problems(pair, tensors, config, max_rank))
    problems.extend(_overlaps(pairs))
    if problems:
        raise AdapterRejected(problems)
    by_site: dict[str, list[_Pair]] = {}
    for pair in pairs:
        by_site.setdefault(pair.target.site, []).append(pair)
    weights = {site: _stack(members, tensors, config, dtype, problems) for site, members in by_site.items()}
    if problems:
        raise AdapterRejected(problems)
    return BoundAdapter(weights, {pair.name: tensors[pair.a_name.key].shape[0] for pair in pairs})


def _pair_up(tensors: Mapping[str, Tensor], targets: Mapping[str, LoraTarget], problems: list[str]) -> list[_Pair]:
    """A and B of each projection that the adapter changes; what cannot be placed goes to `problems`."""
    names, unparsed = split_tensor_names(tensors)
    problems.extend(unparsed)
    placed: dict[str, dict[str, LoraTensorName]] = {}
    for name in names:
        reached = sorted(base_module_candidates(name.module) & targets.keys())
        if not reached:
            problems.append(f"{name.key}: binds to no projection of this model")
            continue
        if len(reached) > 1:
            problems.append(f"{name.key}: ambiguous, it may mean {' or '.join(reached)}")
            continue
        parts = placed.setdefault(reached[0], {})
        if name.part in parts:
            problems.append(f"{name.key}: ambiguous, {parts[name.part].key} means the same tensor")
            continue
        parts[name.part] = name
    pairs = []
    for module, parts in placed.items():
        if len(parts) < 2:
            (present,) = parts.values()
            problems.append(f"{present.key}: its lora_{'B' if present.part == 'A' else 'A'} is missing")
            continue
        pairs.append(_Pair(module, targets[module], parts["A"], parts["B"]))
    if not names and not problems:
        problems.append("the adapter holds no LoRA tensors")
    return pairs


def _shape_problems(pair: _Pair, tensors: Mapping[str, Tensor], config: LoRAConfig, max_rank: int) -> list[str]:
    a, b = tensors[pair.a_name.key], tensors[pair.b_name.key]
    target = pair.target
    problems = []
    for name, tensor in ((pair.a_name, a), (pair.b_name, b)):
        if not tensor.dtype.is_floating_point:
            problems.append(f"{name.key}: dtype {tensor.dtype}, a float is expected")
    if a.dim() != 2 or a.shape[1] != target.in_features:
        problems.append(f"{pair.a_name.key}: shape {list(a.shape)}, this model needs [rank, {target.in_features}]")
    if b.dim() != 2 or b.shape[0] != target.out_features:
        problems.append(f"{pair.b_name.key}: shape {list(b.shape)}, this model needs [{target.out_features}, rank]")
    if problems:
        return problems
    rank, configured = a.shape[0], config.rank_of(pair.trained_name)
    if b.shape[1] != rank:
        problems.append(
            f"{pair.b_name.key}: shape {list(b.shape)} has rank {b.shape[1]}, its lora_A {list(a.shape)} has {rank}"
        )
    elif rank != configured:
        problems.append(f"{pair.a_name.key}: rank {rank} by its shape, but {configured} by adapter_config.json")
    elif rank > max_rank:
        problems.append(f"{pair.a_name.key}: rank {rank}, this server allows at most {max_rank}")
    return problems


def _overlaps(pairs: list[_Pair]) -> list[str]:
    """Pairs that change the same outputs: a fused projection beside one of its parts."""
    problems = []
    ordered = sorted(pairs, key=lambda pair: (pair.target.site, pair.target.out_start))
    for before, after in pairwise(ordered):
        same_site = before.target.site == after.target.site
        if same_site and after.target.out_start < before.target.out_start + before.target.out_features:
            problems.append(f"{after.a_name.key}: changes the same outputs as {before.a_name.key}")
    return problems


def _stack(
    pairs: list[_Pair], tensors: Mapping[str, Tensor], config: LoRAConfig, dtype: torch.dtype, problems: list[str]
) -> LoraWeights:
    """The weights of one linear: A [sum of R, C], and each projection's B [N, R] times its scale."""
    pairs = sorted(pairs, key=lambda pair: pair.target.out_start)
    stacked, slices, rank_start = [], [], 0
    for pair in pairs:
        a, b = tensors[pair.a_name.key], tensors[pair.b_name.key]
        stacked.append(_converted(pair.a_name.key, a, 1.0, dtype, problems))
        scale = config.scale_of(pair.trained_name)
        slices.append(
            LoraSlice(rank_start, pair.target.out_start, _converted(pair.b_name.key, b, scale, dtype, problems))
        )
        rank_start += a.shape[0]
    return LoraWeights(torch.cat(stacked) if len(stacked) > 1 else stacked[0], tuple(slices))


def _converted(key: str, tensor: Tensor, scale: float, dtype: torch.dtype, problems: list[str]) -> Tensor:
    """tensor · scale in `dtype`, multiplied in float32, contiguous; values that do not survive go to `problems`."""
    scaled = tensor.to(torch.float32) * scale if scale != 1.0 else tensor
    result = scaled.to(dtype).contiguous()
    if not torch.isfinite(result).all():
        survived = torch.isfinite(tensor.to(torch.float64)).all()
        problem = (
            f"its values times the scale {scale:g} overflow {dtype}" if survived else "it holds NaN or infinite values"
        )
        problems.append(f"{key}: {problem}")
    return result
