"""Every tensor of an adapter is bound to a parameter of the model, or the load fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from loraplex_adapters.errors import BASE_MISMATCH, INVALID, AdapterRejected
from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.files.names import LoraTensorName, Part, SplitNames, base_module_candidates, split_tensor_names
from loraplex_adapters.pace import Rest, no_rest, resting
from loraplex_adapters.runtime.classifier import CLASSIFIER_MODULES, ClassifierHead, bind_head
from loraplex_adapters.runtime.copies import contradictions, half_tied, settle, tell_copies, trained_twice
from loraplex_adapters.runtime.experts import split_experts
from loraplex_adapters.runtime.folding import Values, replaced_parameters, stacked, trained_ids
from loraplex_adapters.runtime.mirror import Total, own_total
from loraplex_adapters.runtime.replaced import ReplacedParameters
from loraplex_adapters.runtime.targets import HEAD_MODULE, LoraTarget, Module, TargetKind, named_by
from loraplex_adapters.runtime.tensors import outlines
from loraplex_kernels.ops import LoraWeights

MAX_LISTED = 10  # patterns in a warning

# Is told of a site and its weights.
Made = Callable[[str, LoraWeights], None]


def nothing_made(site: str, weights: LoraWeights) -> None:
    """Do nothing with the weights of a site yet."""


@dataclass(frozen=True, slots=True)
class BoundAdapter:
    """An adapter in the form in which a model applies it."""

    weights: Mapping[str, LoraWeights]  # by site
    ranks: Mapping[str, int]  # by the model's own name of the projection
    replaced: ReplacedParameters | None = None
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: it applies from their last occurrence in the prompt on
    whole: str = ""  # why it cannot be one of several in a composition; "": it can
    warnings: tuple[str, ...] = ()
    head: ClassifierHead | None = None


def bind(
    tensors: Mapping[str, Tensor],  # by the name in the file: A [R, C], B [N, R], any float dtype
    config: LoRAConfig,
    targets: Mapping[str, LoraTarget],
    dtype: torch.dtype,
    max_rank: int,
    rest: Rest = no_rest,
    total: Total = own_total,
    made: Made = nothing_made,
) -> BoundAdapter:
    """Bind an adapter to a model: find each tensor's place, check it, fold the scale into B, convert, stack.

    All names and shapes are checked before the values of the first tensor are asked for. `made` is told of each site's
    weights as soon as there are some, even if a later one has the adapter refused.

    The A matrices of projections that share a linear are stacked; absent projections are simply absent. Raises
    AdapterRejected naming every tensor that has no place, no partner, or the wrong shape, rank or values; its reason is
    BASE_MISMATCH if sizes are those of another base.
    """
    problems: list[str] = []
    mismatches: list[str] = []  # shapes of another base model
    split = split_tensor_names(tensors, rest)
    split, tensors = split_experts(split, tensors, targets, mismatches, rest)
    shapes = outlines(tensors)
    split = replace(split, names=[_as_trained(name, config) for name in resting(split.names, rest)])
    placed = _place(split, targets, problems, rest)
    heads = [placed.pop(name) for name in list(placed) if placed[name].target.kind is TargetKind.CLASSIFIER]
    head = bind_head(heads, tensors, config, problems)
    saved, ambiguous = tell_copies(placed, config)
    problems.extend([*ambiguous, *trained_twice(placed, saved)])
    for module in resting(placed.values(), rest):
        problems.extend(_part_problems(module, config, saved))
        embedding = placed.get(module.target.tied_to or "") if config.ensure_weight_tying else None
        shaped_as = embedding or module  # a tied head's LoRA is the embedding's, transposed
        problems.extend(_shape_problems(module, shaped_as, shapes, config, max_rank, mismatches))
    problems.extend(_overlaps(list(placed.values())))
    problems.extend(_unmet(placed, targets, split.towers, config, bool(heads)))
    problems.extend(half_tied(placed, targets, config))
    if not mismatches and not problems:
        problems.extend(contradictions(placed, tensors, config, dtype))
    if mismatches or problems:
        raise AdapterRejected([*mismatches, *problems], BASE_MISMATCH if mismatches else INVALID)
    own = {name: module for name, module in placed.items() if not module.target.is_elsewhere}
    held = dict(_held(resting(own.values(), rest), tensors))
    values = Values(tensors, held, dtype, problems, rest, total)
    settle(own, targets, config, values)
    modules = list(own.values())
    replaced = replaced_parameters(modules, config, targets, values)
    by_site: dict[str, list[Module]] = {}
    for module in modules:
        if module.parts.keys() & {"A", "bias"} and module.target.kind is not TargetKind.NORM:
            by_site.setdefault(module.target.site, []).append(module)
    weights: dict[str, LoraWeights] = {}
    for site, members in by_site.items():
        weights[site] = stacked(members, config, targets, values)
        made(site, weights[site])
    if problems:
        raise AdapterRejected(problems)
    adapted = [module for module in placed.values() if module.is_adapted]
    elsewhere = [module for module in placed.values() if module.target.is_elsewhere]
    replaces = bool(replaced) or any(each.parts.keys() & {"weight", "tokens"} for each in elsewhere)
    trains_bias = any("bias" in each.parts for each in (*modules, *elsewhere))
    changes = not _all_zero(weights) or any(tensors[each.key("B")].any() for each in elsewhere if each.is_adapted)
    return BoundAdapter(
        weights,
        {module.name: len(shapes[module.key("A")]) for module in adapted},
        ReplacedParameters(replaced) if replaced else None,
        config.invocation_tokens,
        _why_whole(config, replaces or trains_bias, head is not None),
        (*split.warnings, *_idle(adapted, changes, config, rest)),
        None if any(each.target.is_elsewhere for each in heads) else head,
    )


# ---- places ----------------------------------------------------------------------------------------------------------


def _as_trained(name: LoraTensorName, config: LoRAConfig) -> LoraTensorName:
    """The name under the path that PEFT's patterns see: that of the weight, where it was trained as a parameter."""
    weight = f"{name.module}.weight"
    if name.changes or not config.trains_parameter(weight):
        return name
    return replace(name, module=weight, changes=name.module)


def _place(split: SplitNames, targets: Mapping[str, LoraTarget], problems: list[str], rest: Rest) -> dict[str, Module]:
    """The modules that the adapter changes, by the model's names. Tensors without a place go to `problems`."""
    problems.extend(split.problems)
    modules: dict[str, Module] = {}
    for name in resting(split.names, rest):
        reached = sorted(base_module_candidates(name.base_module) & targets.keys())
        if not reached:
            head_norm = name.module.endswith(("q_norm", "k_norm"))
            more = " (norms over the heads of queries and keys cannot be replaced)" if head_norm else ""
            problems.append(f"{name.key}: binds to no projection of this model{more}")
            continue
        if len(reached) > 1:
            problems.append(f"{name.key}: ambiguous, it may mean {' or '.join(reached)}")
            continue
        target = targets[reached[0]]
        part = name.part
        if part in ("embedding_A", "embedding_B"):
            part = "A" if part == "embedding_A" else "B"
            fits = target.kind is TargetKind.EMBEDDING
        else:
            norm_without = target.kind is TargetKind.NORM and target.base is None and not target.is_elsewhere
            fits = part in _PARTS_OF[target.kind] and not (part == "bias" and norm_without)
        if not fits:
            problems.append(f"{name.key}: {reached[0]} is of kind {target.kind.value}, which takes no such tensor")
            continue
        parts = modules.setdefault(reached[0], Module(reached[0], target)).parts
        if part in parts:
            problems.append(f"{name.key}: ambiguous, {parts[part].key} means the same tensor")
            continue
        parts[part] = name
    if not any(name.part in _A_OR_B for name in split.names) and not problems:
        problems.append(f"the adapter holds {split.nothing_held}")
    return modules


_WHOLE: tuple[Part, ...] = ("weight", "base", "again")
_A_OR_B = ("A", "B", "embedding_A", "embedding_B")
_PARTS_OF: Mapping[TargetKind, frozenset[Part]] = {
    TargetKind.LINEAR: frozenset(("A", "B", "lora_bias", "magnitude", "weight", "bias", "tokens", "base", "again")),
    TargetKind.EXPERT: frozenset(("A", "B", "lora_bias", "magnitude")),
    TargetKind.EMBEDDING: frozenset(("magnitude", "weight", "tokens", "base", "again")),  # and A and B of its own kind
    TargetKind.NORM: frozenset(("weight", "bias", "base", "again")),  # a bias where the base has one
    TargetKind.CLASSIFIER: frozenset(("weight", "bias")),
}


def _held(modules: Iterable[Module], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as the linear has them: the rank's part of each for a module that is divided, weights upright."""
    for module in modules:
        if (share := module.target.share) is not None:
            for part, name in module.parts.items():
                if module.target.tied_to is None or part not in _WHOLE:  # the embedding's, which is not divided
                    yield name.key, share.cut(part, tensors[name.key])
        elif module.target.transposed:
            for key in {module.key(part) for part in _WHOLE if part in module.parts}:
                yield key, tensors[key].t()


# ---- checks ----------------------------------------------------------------------------------------------------------


def _part_problems(module: Module, config: LoRAConfig, saved: frozenset[str]) -> Iterator[str]:
    """Problems with missing counterparts of tensors, and contradictions between config and file."""
    parts = module.parts
    if module.is_adapted != ("B" in parts):
        present: Part = "A" if module.is_adapted else "B"
        yield f"{module.key(present)}: its lora_{'B' if present == 'A' else 'A'} is missing"
    declared: tuple[tuple[Part, bool, str], ...] = (
        ("magnitude", config.use_dora, "use_dora"),
        ("lora_bias", config.lora_bias, "lora_bias"),
    )
    for part, wanted, field_name in declared:
        if part in parts and not (wanted and module.is_adapted):
            yield f"{module.parts[part].key}: adapter_config.json says {field_name}=false, or there is no lora_A"
        elif wanted and module.is_adapted and "B" in parts and part not in parts:
            yield f"{module.any_key}: adapter_config.json says {field_name}=true, but its tensor is missing"
    trained_whole = module.name in saved
    whole_vocabulary = module.target.kind is TargetKind.EMBEDDING or module.name == HEAD_MODULE
    if "base" in parts and not trained_whole and not whole_vocabulary:
        yield f"{module.key('base')}: a full copy of a base weight that modules_to_save does not name"
    if "bias" in parts and not trained_whole and not config.trains_bias and not whole_vocabulary:
        yield f"{module.key('bias')}: a trained bias, but adapter_config.json says bias='none'"
    if "tokens" in parts and not trained_ids(module, config):
        yield f"{module.key('tokens')}: trained rows of tokens that trainable_token_indices does not name"
    if config.invocation_tokens and module.target.kind is TargetKind.EMBEDDING:
        yield f"{module.any_key}: activated LoRA is not defined on an embedding"
    if module.target.is_elsewhere:
        return
    base = module.target.base
    if base is None and parts.keys() & {"magnitude", "bias", "base"}:
        yield f"{module.any_key}: needs the base's own weights, which are not at hand"
    elif "bias" in parts and base is not None and base.bias is None:
        yield f"{module.key('bias')}: the base has no bias there"


def _shape_problems(
    module: Module,
    shaped_as: Module,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    max_rank: int,
    mismatches: list[str],
) -> list[str]:
    """Problems with a module's tensors, whatever the base. Sizes that differ from the base's go to `mismatches`.

    shaped_as: the module whose rank applies.
    """
    target, problems, num_mismatches = module.target, [], len(mismatches)
    out_features, in_features = target.whole_shape
    expected: dict[Part, tuple[object, ...]] = {
        "A": ("rank", in_features),
        "B": (out_features, "rank"),
        "magnitude": (out_features,),
        "lora_bias": (out_features,),
        "bias": (out_features,),
        **dict.fromkeys(("weight", "base", "again"), _weight_shape(target)),
    }
    for part, name in module.parts.items():
        tensor = tensors[name.key]
        if not tensor.dtype.is_floating_point:
            problems.append(f"{name.key}: dtype {tensor.dtype}, a float is expected")
        if tuple(tensor.shape) == (0,):
            problems.append(f"{name.key}: empty, {_SHARDED}")
            continue
        if part == "tokens":
            problems.extend(_token_problems(module, tensor, config))
            continue
        shape = expected[part]
        if tensor.dim() != len(shape) or any(
            size != given for size, given in zip(shape, tensor.shape, strict=True) if size != "rank"
        ):
            wanted = ", ".join(map(str, shape))
            problem = f"{name.key}: shape {list(tensor.shape)}, this model needs [{wanted}]"
            found = mismatches if tensor.dim() == len(shape) else problems
            found.append(problem + _resized(module, part))
    if problems or len(mismatches) > num_mismatches or not module.is_adapted or "B" not in module.parts:
        return problems
    a, b = tensors[module.key("A")], tensors[module.key("B")]
    rank, configured = a.shape[0], config.rank_of(shaped_as.trained_name)
    if b.shape[1] != rank:
        problems.append(
            f"{module.key('B')}: shape {list(b.shape)} has rank {b.shape[1]}, its lora_A {list(a.shape)} has {rank}"
        )
    elif rank != configured:
        problems.append(f"{module.key('A')}: rank {rank} by its shape, but {configured} by adapter_config.json")
    elif rank > max_rank:
        problems.append(f"{module.key('A')}: rank {rank}, this model takes at most {max_rank} (max_adapter_rank)")
    return problems


_SHARDED = (
    "as DeepSpeed ZeRO-3 and FSDP leave what is saved without being gathered: gather it, or save the adapter with "
    "save_embedding_layers=False if this was not trained"
)


def _weight_shape(target: LoraTarget) -> tuple[int, ...]:
    """The shape of the module's weight in a checkpoint."""
    out_features, in_features = target.whole_shape
    match target.kind:
        case TargetKind.NORM:
            return (out_features,)
        case TargetKind.EMBEDDING:
            return (in_features, out_features)
        case _:
            return (in_features, out_features) if target.transposed else (out_features, in_features)


def _resized(module: Module, part: Part) -> str:
    embedding = module.target.kind is TargetKind.EMBEDDING
    if part in ("base", "again"):
        return (
            "; if the vocabulary was resized, serve that base model, or save the adapter with "
            "save_embedding_layers=False if the new tokens were not trained"
        )
    if (embedding and part in ("A", "weight")) or (module.name == HEAD_MODULE and part in ("B", "weight")):
        return "; if it was trained with another vocabulary, serve the base model with that vocabulary"
    return ""


def _token_problems(module: Module, tensor: Tensor, config: LoRAConfig) -> Iterator[str]:
    key, target = module.key("tokens"), module.target
    vocabulary, width = _weight_shape(target)
    ids = trained_ids(module, config)
    if tensor.shape != (len(ids), width):
        yield f"{key}: shape {list(tensor.shape)}, adapter_config.json and this model need [{len(ids)}, {width}]"
    elif max(ids, default=0) >= vocabulary:
        yield (
            f"{key}: token {max(ids)} is not one of this model's {vocabulary}: added tokens, which its tokenizer does "
            "not have; serve the base model with the resized vocabulary"
        )


def _overlaps(modules: list[Module]) -> list[str]:
    """Problems with modules that change the same outputs: a fused projection beside one of its parts."""
    problems = []
    changing = [module for module in modules if module.parts.keys() & {"A", "weight"}]
    ordered = sorted(changing, key=lambda module: (module.target.site, module.target.out_start))
    for before, after in pairwise(ordered):
        if before.target.site == after.target.site and after.target.out_start < before.target.columns.stop:
            first, second = (next(iter(module.parts.values())).key for module in (before, after))
            problems.append(f"{second}: changes the same outputs as {first}")
    return problems


def _unmet(
    placed: Mapping[str, Module],
    targets: Mapping[str, LoraTarget],
    towers: Iterable[str],
    config: LoRAConfig,
    has_head: bool,
) -> Iterator[str]:
    """Problems with modules that adapter_config.json says were trained, and that the file does not hold."""
    modules = placed.values()
    for end in config.modules_to_save:
        if has_head and end in CLASSIFIER_MODULES:  # PEFT writes all of these names for a head of any name
            continue
        held = any("weight" in module.parts and module.is_one_of((end,)) for module in modules)
        if not held and not any(named_by(tower, (end,)) for tower in towers):
            yield f"adapter_config.json: modules_to_save names {end!r}, of which this model and the file hold no weight"
    head = targets.get(HEAD_MODULE)
    embedding = placed.get(head.tied_to or "") if head is not None else None
    for end, ids in config.trained_tokens.items():
        holds = any("tokens" in module.parts and module.is_one_of((end,)) for module in modules)
        # A tied head's rows are saved with the embedding.
        shares = named_by(HEAD_MODULE, (end,)) and embedding is not None and trained_ids(embedding, config) == ids
        if not holds and not shares:
            yield f"adapter_config.json: trainable_token_indices names {end!r}, of which the file holds no rows"


def _all_zero(weights: Mapping[str, LoraWeights]) -> bool:
    return all(not part.b.any() for site in weights.values() for part in site.slices)


def _idle(modules: Sequence[Module], changes: bool, config: LoRAConfig, rest: Rest) -> Iterator[str]:
    """Warnings about parts of the adapter that have no effect.  modules: those with LoRA. changes: whether any does"""
    if not changes:
        yield "every lora_B is zero, as before training: LoRA changes nothing"
    adapted = [module.trained_name for module in modules]
    for field_name, patterns in (("rank_pattern", config.rank_patterns), ("alpha_pattern", config.alpha_patterns)):
        idle = [
            repr(pattern.pattern)
            for pattern, _ in resting(patterns, rest)
            if not any(pattern.matches(name) for name in adapted)
        ]
        if idle:
            listed = ", ".join([*idle[:MAX_LISTED], "…"] if len(idle) > MAX_LISTED else idle)
            yield f"{field_name}: no module with LoRA is matched by {listed}"


def _why_whole(config: LoRAConfig, replaces: bool, has_head: bool) -> str:
    """The reason why a weighted sum with other adapters is not defined; "": it is."""
    reasons = {
        "it is a DoRA adapter": config.use_dora,
        "it is an activated LoRA adapter": bool(config.invocation_tokens),
        "it was trained with biases of the base": config.trains_bias,
        "it replaces whole parameters or tokens of the base": replaces,
        "it has a classification head": has_head,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
