"""Adapters on the parameter of all experts, cut into one for each expert.

PEFT's `target_parameters` train A [E·R, C] and B [N, R·E] of a parameter [E, N, C]: expert e has rows e·R … of A, and
every E-th column of B, from e on. The file names the module that has the parameter, once for each of its parameters
("experts.lora_A", "experts.base_layer.lora_A"); which is which, only the shapes tell. Of a parameter [E, C, N] PEFT
knows from its class that it lies so, or else (Llama 4) takes N for C: then its A is B transposed, and its B is A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from loraplex_adapters.files.names import LoraTensorName, Part, SplitNames, base_module_candidates
from loraplex_adapters.pace import Rest, no_rest, resting
from loraplex_adapters.runtime.targets import LoraTarget

WRAPPER = ".base_layer"  # PEFT's, around a module that has several trained parameters

Experts = dict[str, LoraTarget]  # of one parameter, by the path of each expert's module, in order
Parameters = dict[str, dict[str, Experts]]  # by the module that has them, then by their own name


def split_experts(
    split: SplitNames,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, LoraTarget],
    mismatches: list[str],
    rest: Rest = no_rest,
) -> tuple[SplitNames, Mapping[str, Tensor]]:
    """The names and tensors, with those of each expert in place of those of all.

    Tensors that fit none of their module's parameters go to `mismatches`.
    """
    parameters = _parameters(targets)
    if not parameters:
        return split, tensors
    shapes: dict[str, dict[Part, Tensor]] = {}
    for name in split.names:
        if name.part in ("A", "B"):
            shapes.setdefault(name.module, {})[name.part] = tensors[name.key]
    names: list[LoraTensorName] = []
    cut: dict[str, Tensor] = dict(tensors)
    for name in resting(split.names, rest):
        known = _of_module(name.module, parameters) if name.part in ("A", "B") else {}
        if not known:
            names.append(name)
            continue
        fitting = [each for each in known.items() if _all_fit(shapes[name.module], each[1])]
        if len(fitting) != 1:
            mismatches.append(_misfit(name, tensors[name.key], known))
            continue
        parameter, experts = fitting[0]
        trained = f"{_unwrapped(name.module)}.{parameter}"
        tensor = cut.pop(name.key)
        for index, path in enumerate(experts):
            own = replace(name, key=f"{name.key}[{index}]", module=trained, changes=path)
            part = _of_expert(tensor, name.part, index, len(experts))
            if experts[path].stacked_transposed:
                own, part = replace(own, part="B" if name.part == "A" else "A"), part.t()
            cut[own.key] = part
            names.append(own)
    return replace(split, names=names), cut


def _parameters(targets: Mapping[str, LoraTarget]) -> Parameters:
    found: Parameters = {}
    for path, target in targets.items():
        for stack in target.stacks:
            module, _, parameter = stack.rpartition(".")
            found.setdefault(module, {}).setdefault(parameter, {})[path] = target
    return found


def _of_module(module: str, parameters: Parameters) -> dict[str, Experts]:
    """The parameters of a module of the trained model, by their names."""
    candidates = base_module_candidates(_unwrapped(module)) & parameters.keys()
    return {name: experts for path in sorted(candidates) for name, experts in parameters[path].items()}


def _misfit(name: LoraTensorName, tensor: Tensor, known: Mapping[str, Experts]) -> str:
    shapes = ((parameter, _shape(experts)) for parameter, experts in known.items())
    listed = ", ".join(f"{parameter} [{rows}, {columns}]" for parameter, (rows, columns) in shapes)
    count = len(next(iter(known.values())))
    return (
        f"{name.key}: shape {list(tensor.shape)}, with its partner it fits none of this model's parameters of {count} "
        f"experts: {listed}"
    )


def _all_fit(shapes: Mapping[Part, Tensor], experts: Experts) -> bool:
    return all(_fits(tensor, part, experts) for part, tensor in shapes.items())


def _fits(tensor: Tensor, part: Part, experts: Experts) -> bool:
    if tensor.dim() != 2:
        return False
    out_features, in_features = _shape(experts)
    size, ranks = (tensor.shape[1], tensor.shape[0]) if part == "A" else tensor.shape
    return size == (in_features if part == "A" else out_features) and ranks % len(experts) == 0


def _shape(experts: Experts) -> tuple[int, int]:
    """The rows and columns that PEFT has of one expert's part of the parameter."""
    expert = next(iter(experts.values()))
    rows, columns = expert.whole_shape
    return (columns, rows) if expert.stacked_transposed else (rows, columns)


def _of_expert(tensor: Tensor, part: Part, index: int, count: int) -> Tensor:
    if part == "A":
        rank = len(tensor) // count
        return tensor[index * rank : (index + 1) * rank]
    return tensor[:, index::count]


def _unwrapped(module: str) -> str:
    while module.endswith(WRAPPER):
        module = module.removesuffix(WRAPPER)
    return module
