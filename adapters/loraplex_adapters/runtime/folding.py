"""Turns an adapter's tensors into the kernels' weights: folds scales in, and works out magnitudes and biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.files.names import Part, base_module_candidates
from loraplex_adapters.pace import Rest
from loraplex_adapters.runtime.mirror import Total, own_total
from loraplex_adapters.runtime.replaced import NORM_BIAS, NORM_WEIGHT, ReplacedRows
from loraplex_adapters.runtime.targets import LoraTarget, Module, TargetKind, named_by
from loraplex_kernels.finite import all_finite
from loraplex_kernels.ops import LoraSlice, LoraWeights

WEIGHT_ELEMENTS = 1 << 22  # of a base weight that are looked at at once, in float32: 16 MiB


class Values:
    """The file's tensors, converted. Tensors whose values do not survive the conversion go to `problems`."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        held: Mapping[str, Tensor],  # that come instead of those of the same names
        dtype: torch.dtype,
        problems: list[str],
        rest: Rest,
        total: Total = own_total,
    ) -> None:
        self.problems = problems
        self.rest = rest
        self.total = total
        self._tensors = tensors
        self._held = held
        self._dtype = dtype

    def float32(self, key: str) -> Tensor:
        return self.converted(key, dtype=torch.float32)

    def empty(self, target: LoraTarget) -> Tensor:
        return torch.empty((0, target.in_features), dtype=target.dtype or self._dtype)

    def converted(self, key: str, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """tensor · scale, multiplied in float32, contiguous."""
        dtype, tensor = dtype or self._dtype, self._held[key] if key in self._held else self._tensors[key]
        scaled = tensor.to(torch.float32) * scale if scale != 1.0 else tensor
        result = scaled.to(dtype).contiguous()
        if not all_finite(result):
            survived = torch.isfinite(tensor.to(torch.float64)).all()
            overflow = f"its values times the scale {scale:g} overflow {dtype}"
            self.problems.append(f"{key}: {overflow if survived else 'it holds NaN or infinite values'}")
        self.rest()
        return result


def stacked(
    modules: list[Module], config: LoRAConfig, targets: Mapping[str, LoraTarget], values: Values
) -> LoraWeights:
    """The weights of one linear: A [sum of R, C], each projection's B [N, R] times its scale, gain and offset."""
    modules = sorted(modules, key=lambda module: module.target.out_start)
    parts, slices, rank_start = [], [], 0
    for module in modules:
        if not module.is_adapted:
            continue
        a = values.converted(module.key("A"), dtype=module.target.dtype)
        b = values.converted(module.key("B"), config.scale_of(module.trained_name), module.target.dtype)
        parts.append(a)
        slices.append(LoraSlice(rank_start, module.target.out_start, b))
        rank_start += len(a)
    a = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else values.empty(modules[0].target)
    return LoraWeights(a, tuple(slices), _affine(modules, config, targets, values))


def _affine(
    modules: list[Module], config: LoRAConfig, targets: Mapping[str, LoraTarget], values: Values
) -> Tensor | None:
    """Gain and offset of one linear, float32 [2, N]; None if all of its modules are plain LoRA.

    With g = m / ‖W + s B A‖ (1 without DoRA), the base's bias b and the adapter's own b′:
    y = g ⊙ (W x + s B A x) + b′ + s·bias of B = g ⊙ (W x + b + s B A x) + (b′ − g ⊙ b) + s·bias of B.
    Source: DoRA (arXiv 2402.09353).
    """
    if not any(module.parts.keys() & {"magnitude", "bias", "lora_bias"} for module in modules):
        return None
    site = modules[0].target.site
    width = max(target.columns.stop for target in targets.values() if target.site == site)
    affine = torch.stack((torch.ones(width), torch.zeros(width)))
    for module in modules:
        columns, base = module.target.columns, module.target.base
        bias = torch.zeros(module.target.out_features)
        if base is not None and base.bias is not None:
            bias = base.bias[columns].float().cpu()
        gain = torch.ones_like(bias)
        if "magnitude" in module.parts:
            gain = values.float32(module.key("magnitude")) / _norms(module, config, values)
        own = values.float32(module.key("bias")) if "bias" in module.parts else bias
        offset = own - gain * bias
        if "lora_bias" in module.parts:
            offset += config.scale_of(module.trained_name) * values.float32(module.key("lora_bias"))
        affine[0, columns], affine[1, columns] = gain, offset
        if not torch.isfinite(affine[:, columns]).all():
            values.problems.append(f"{module.key(next(iter(module.parts)))}: its gain or offset is NaN or infinite")
    return affine


def _norms(module: Module, config: LoRAConfig, values: Values) -> Tensor:
    """‖W + s B A‖ of each output → float32 [N]. W is the base's, dequantised, or the adapter's own copy of it."""
    a, b = values.float32(module.key("A")), values.float32(module.key("B"))
    target, scale = module.target, config.scale_of(module.trained_name)
    norms = torch.empty(target.out_features)
    rows_at_once = max(1, WEIGHT_ELEMENTS // target.in_features)
    for start in range(0, target.out_features, rows_at_once):
        end = min(start + rows_at_once, target.out_features)
        weight = _rows(module, values, start, end)
        norms[start:end] = torch.linalg.vector_norm(weight + scale * (b[start:end] @ a), dim=1)
        values.rest()
    if target.share is not None and not target.share.has_whole_rows:
        return values.total(module.key("magnitude"), norms.square_()).sqrt_()
    return norms


def _rows(module: Module, values: Values, start: int, end: int) -> Tensor:
    if "weight" in module.parts:
        copy = values.float32(module.key("weight"))
        return copy[:, start:end].t() if module.target.kind is TargetKind.EMBEDDING else copy[start:end]
    return base_rows(module.target, start, end)


def base_rows(target: LoraTarget, start: int, end: int) -> Tensor:
    """Rows of the base's weight: float32 [end − start, C]"""
    assert target.base is not None, "checked before"
    return target.base.dequantize(target.out_start + start, target.out_start + end).cpu()


_ROWS_OF_NORMS: tuple[tuple[Part, slice], ...] = (("weight", NORM_WEIGHT), ("bias", NORM_BIAS))


def replaced_parameters(
    modules: list[Module], config: LoRAConfig, targets: Mapping[str, LoraTarget], values: Values
) -> dict[str, tuple[ReplacedRows, ...]]:
    """Full copies and trained rows, by site."""
    replaced: dict[str, tuple[ReplacedRows, ...]] = {}

    def add(site: str, rows: slice | Tensor, weight: Tensor) -> None:
        replaced[site] = (*replaced.get(site, ()), ReplacedRows(rows, weight))

    for module in modules:
        target = module.target
        if target.kind is TargetKind.NORM:
            for part, row in _ROWS_OF_NORMS:
                if part in module.parts:
                    add(target.site, row, values.float32(module.key(part)))
            continue
        if "weight" in module.parts:
            weight = values.converted(module.key("weight"), dtype=target.dtype)
            if target.share is not None and target.tied_to is not None:
                weight = target.share.cut("weight", weight)
            add(target.site, slice(0, len(weight)) if target.kind is not TargetKind.LINEAR else target.columns, weight)
        if "tokens" in module.parts:
            tokens = torch.tensor(trained_ids(module, config))
            add(target.site, *_held(target, tokens, values.converted(module.key("tokens"), dtype=target.dtype)))
    _share_tokens(replaced, modules, targets)
    return replaced


def _held(target: LoraTarget, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of tokens those that the rank has, by their places in its linear."""
    if target.share is None:
        return tokens, weight
    which, places = target.share.held(tokens.tolist())
    return torch.tensor(places, dtype=torch.int64), weight[which]


def trained_ids(module: Module, config: LoRAConfig) -> tuple[int, ...]:
    """The tokens whose rows were trained in a module; a tied head has the embedding's, unless it has its own."""
    named = module.is_one_of(config.trained_tokens)
    if named is None and (embedding := module.target.tied_to):
        ends = config.trained_tokens
        named = next(
            (end for end in ends if named_by(embedding, (end,)) or embedding in base_module_candidates(end)), None
        )
    return config.trained_tokens.get(named or "", ())


def _share_tokens(
    replaced: dict[str, tuple[ReplacedRows, ...]], modules: list[Module], targets: Mapping[str, LoraTarget]
) -> None:
    """A tied head takes the embedding's trained rows, unless it has some of its own."""
    with_tokens = {module.name: module.target for module in modules if "tokens" in module.parts}
    for name, head in targets.items():
        if head.tied_to in with_tokens and name not in with_tokens:
            rows = [
                ReplacedRows(*_held(head, part.rows, part.weight))
                for part in replaced[with_tokens[head.tied_to].site]
                if isinstance(part.rows, Tensor)
            ]
            replaced[head.site] = (*replaced.get(head.site, ()), *rows)
