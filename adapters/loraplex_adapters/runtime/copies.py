"""Copies of weights that PEFT writes beside trained tensors, and the effect of a tied embedding and head on them.

PEFT loads a copy of a base weight into the parameter that it was taken from, which a tied head shares with the
embedding. A copy equal to the served base's weight changes nothing; any other copy replaces it, for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.files.names import Part
from loraplex_adapters.pace import resting
from loraplex_adapters.runtime.folding import WEIGHT_ELEMENTS, Values, base_rows, trained_ids
from loraplex_adapters.runtime.targets import HEAD_MODULE, LoraTarget, Module, TargetKind

Modules = dict[str, Module]  # by the model's own name
Targets = Mapping[str, LoraTarget]


def tell_copies(modules: Modules, config: LoRAConfig) -> tuple[frozenset[str], list[str]]:
    """Tell copies of base weights from trained weights. Returns the modules that were trained whole, and problems."""
    saved = {name for name, module in modules.items() if module.is_one_of(config.modules_to_save)}
    if config.ensure_weight_tying:
        saved |= {name for name, module in modules.items() if module.target.tied_to in saved}
    problems = []
    for name, module in modules.items():
        if name not in saved and "weight" in module.parts:
            if "base" in module.parts:
                problems.append(f"{module.key('weight')}: ambiguous, {module.key('base')} means the same tensor")
            module.parts["base"] = module.parts.pop("weight")
    return frozenset(saved), problems


def trained_twice(modules: Modules, saved: frozenset[str]) -> Iterator[str]:
    """Problems with modules that were trained whole and in another way, too."""
    for name in sorted(saved):
        module = modules[name]
        embedding = modules.get(module.target.tied_to or "")
        by_tokens = "tokens" in module.parts or (embedding is not None and "tokens" in embedding.parts)
        for way, also in (("target_modules", module.is_adapted), ("trainable_token_indices", by_tokens)):
            if also:
                yield f"{module.any_key}: modules_to_save and {way} both mean this module, which PEFT cannot compute"


def contradictions(
    modules: Modules, tensors: Mapping[str, Tensor], config: LoRAConfig, dtype: torch.dtype
) -> Iterator[str]:
    """Problems with tensors that PEFT shares on a base of this dtype, and that differ in the file.

    ensure_weight_tying shares LoRA tensors in float32 alone: on a 16-bit base PEFT casts them into separate tensors.
    """
    for module in modules.values():
        if "again" in module.parts:
            yield from _unequal(module, "again", module, "weight", tensors)
        embedding = modules.get(module.target.tied_to or "")
        if embedding is None:
            continue
        yield from _unequal(module, "base", embedding, "base", tensors)
        if _shares_tokens(module, embedding, config):
            yield from _unequal(module, "tokens", embedding, "tokens", tensors)
        if config.ensure_weight_tying:
            yield from _unequal(module, "weight", embedding, "weight", tensors)
        if config.ensure_weight_tying and dtype.itemsize > 2:
            yield from _unequal(module, "A", embedding, "B", tensors)
            yield from _unequal(module, "B", embedding, "A", tensors)


def half_tied(modules: Modules, targets: Targets, config: LoRAConfig) -> Iterator[str]:
    """Problems with tensors that ensure_weight_tying shares, and that the file holds for embedding or head alone."""
    tied = [(name, target.tied_to) for name, target in targets.items() if target.tied_to]
    for pair in tied if config.ensure_weight_tying else ():
        held = [modules[name] for name in pair if name in modules]
        for part in _TRAINED:
            having = [module for module in held if part in module.parts]
            if len(having) == 1:
                (lacking,) = {*pair} - {having[0].name}
                yield f"{having[0].key(part)}: ensure_weight_tying is true, but the same of {lacking} is missing"


def settle(modules: Modules, targets: Targets, config: LoRAConfig, values: Values) -> None:
    """Keep only the copies that replace a base weight, as the weights of their modules."""
    for module in modules.values():
        module.parts.pop("again", None)
        embedding = modules.get(module.target.tied_to or "")
        if embedding is not None and _shares_tokens(module, embedding, config):
            module.parts.pop("tokens", None)
    head = modules.get(HEAD_MODULE)
    if head is not None and "bias" in head.parts and _is_the_bias(head, values):
        del head.parts["bias"]  # a copy, as of the weight
    copied = {name: module.parts.pop("base") for name, module in modules.items() if "base" in module.parts}
    for name, copy in copied.items():
        readers = [reader for reader in _sharing(name, targets) if "weight" not in _parts(modules, reader)]
        if readers and not _is_the_base(copy.key, targets[name], targets, values):
            for reader in readers:
                modules.setdefault(reader, Module(reader, targets[reader])).parts["weight"] = copy
    for name in [name for name, module in modules.items() if not module.parts]:
        del modules[name]


_TRAINED: tuple[Part, ...] = ("weight", "A")


def _parts(modules: Modules, name: str) -> Mapping[Part, object]:
    return modules[name].parts if name in modules else {}


def _sharing(name: str, targets: Targets) -> list[str]:
    """The modules that read the same parameter as this module, including itself."""
    shared = targets[name].tied_to or name
    return [shared, *(head for head, target in targets.items() if target.tied_to == shared)]


def _shares_tokens(head: Module, embedding: Module, config: LoRAConfig) -> bool:
    """Whether a tied head uses the embedding's trained rows: it does unless it has rows of its own."""
    return "tokens" in embedding.parts and trained_ids(head, config) == trained_ids(embedding, config)


def _unequal(
    module: Module, part: Part, other: Module, other_part: Part, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """A problem if both parts exist and differ. A and B of a tied head are the embedding's B and A, transposed."""
    if part not in module.parts or other_part not in other.parts:
        return
    own, same = tensors[module.key(part)], tensors[other.key(other_part)]
    if part in ("A", "B"):
        same = same.t()
    if own.dtype != same.dtype or not torch.equal(own, same):
        tied = "; if each is to count, say ensure_weight_tying=false" if module is not other and part != "base" else ""
        yield f"{module.key(part)}: differs from {other.key(other_part)}, with which it is one and the same{tied}"


def _is_the_base(key: str, target: LoraTarget, targets: Targets, values: Values) -> bool:
    """Whether a copy equals the served base's weight, or the stored one: a head may be quantised while it is loaded."""
    target = targets[target.tied_to] if target.tied_to is not None else target
    copy = values.converted(key)
    copy = copy.t() if target.kind is TargetKind.EMBEDDING else copy
    rows_at_once = max(1, WEIGHT_ELEMENTS // target.in_features)
    starts = resting(range(0, len(copy), rows_at_once), values.rest)
    return all(_are_rows_of(target, copy[start : start + rows_at_once], start) for start in starts)


def _is_the_bias(module: Module, values: Values) -> bool:
    bias = None if module.target.base is None else module.target.base.bias
    assert bias is not None, "checked before"
    return torch.equal(values.converted(module.key("bias")), bias.cpu())


def _are_rows_of(target: LoraTarget, rows: Tensor, start: int) -> bool:
    base = base_rows(target, start, start + len(rows))
    return torch.equal(rows.float(), base) or (
        target.rounding is not None and torch.equal(target.rounding(rows).cpu(), base)
    )
