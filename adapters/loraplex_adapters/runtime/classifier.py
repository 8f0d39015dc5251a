"""Classification heads: linears over hidden states. Adapters bring them, by slot, and a base model may have its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.runtime.targets import Module
from loraplex_kernels.finite import all_finite

CLASSIFIER_SITE = "classifier"  # the one site that keeps all heads
CLASSIFIER_MODULES = ("score", "classifier")  # what transformers calls them
MAX_LABELS = 4096
TASKS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """A linear in float32, as PEFT keeps what it trains whole."""

    weight: Tensor  # float32 [N, C], N labels
    bias: Tensor | None  # float32 [N]
    each_token: bool  # whether it classifies tokens; else whole sequences, by their last token

    @property
    def num_labels(self) -> int:
        return len(self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def to(self, device: torch.device) -> ClassifierHead:
        bias = None if self.bias is None else self.bias.to(device)
        return ClassifierHead(self.weight.to(device), bias, self.each_token)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [R, C] → logits, float32 [R, N]"""
        return F.linear(hidden.float(), self.weight, self.bias)


class ClassifierTable:
    """The heads on the device: those of adapters by slot, and the base model's."""

    def __init__(self, device: torch.device, base: ClassifierHead | None = None) -> None:
        self._device = device
        self._base = base
        self._heads: dict[int, ClassifierHead] = {}

    def put(self, slot: int, packed: object) -> None:
        assert isinstance(packed, ClassifierHead)
        self._heads[slot] = packed.to(self._device)

    def remove(self, slot: int) -> None:
        self._heads.pop(slot, None)

    def of(self, slot: int | None) -> ClassifierHead:
        """The head of the adapter in a slot, or the base model's where it brings none. slot: None: no adapter."""
        own = None if slot is None else self._heads.get(slot)
        head = self._base if own is None else own
        assert head is not None, "checked when the request came"
        return head


class ClassifierSite:
    """The pool's interface for the heads of adapters."""

    def __init__(self, device: torch.device, base: ClassifierHead | None = None) -> None:
        self.table = ClassifierTable(device, base)


def bind_head(
    modules: Iterable[Module], tensors: Mapping[str, Tensor], config: LoRAConfig, problems: list[str]
) -> ClassifierHead | None:
    """The head among an adapter's modules; None: there is none, or what is wrong with it went to `problems`."""
    modules = list(modules)
    if not modules:
        return None
    found = list(_problems(modules, tensors, config))
    problems.extend(found)
    if found:
        return None
    [module] = modules
    weight = tensors[module.key("weight")].float().contiguous()
    bias = tensors[module.key("bias")].float().contiguous() if "bias" in module.parts else None
    return ClassifierHead(weight, bias, config.task_type == "TOKEN_CLS")


def _problems(modules: list[Module], tensors: Mapping[str, Tensor], config: LoRAConfig) -> Iterable[str]:
    module, *others = modules
    if others:
        yield f"{others[0].any_key}: a second classification head beside {module.any_key}"
    if config.task_type not in TASKS:
        said = f"adapter_config.json says task_type={config.task_type!r}"
        yield f"{module.any_key}: a classification head, and {said}, not {' or '.join(TASKS)}"
    if not module.is_one_of(config.modules_to_save):
        yield f"{module.any_key}: a classification head that modules_to_save does not name"
    if "weight" not in module.parts:
        yield f"{module.any_key}: its weight is missing"
        return
    weight, hidden = tensors[module.key("weight")], module.target.in_features
    if weight.dim() != 2 or weight.shape[1] != hidden or not 1 <= len(weight) <= MAX_LABELS:
        yield (
            f"{module.key('weight')}: shape {list(weight.shape)}, this model needs [labels, {hidden}] with 1 to "
            f"{MAX_LABELS} labels"
        )
    elif "bias" in module.parts and tensors[module.key("bias")].shape != weight.shape[:1]:
        shape = list(tensors[module.key("bias")].shape)
        yield f"{module.key('bias')}: shape {shape}, its weight has {len(weight)} rows"
    for name in module.parts.values():
        tensor = tensors[name.key]
        if not tensor.dtype.is_floating_point:
            yield f"{name.key}: dtype {tensor.dtype}, a float is expected"
        elif not all_finite(tensor.float()):
            yield f"{name.key}: it holds values that are NaN, infinite or too large for float32"
