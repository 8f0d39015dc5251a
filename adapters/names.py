"""How the tensors of an adapter are named: which module, which part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PEFT_PREFIX = "base_model.model."

# Where a training script's model kept the decoder, and where the text-only model that serves keeps it. All rules are
# tried: a name that reaches two projections is ambiguous and refused.
_WRAPPERS = (
    ("", ""),
    ("", "model."),  # trained on the bare decoder
    ("model.language_model.", "model."),  # multi-modal, since transformers 4.52
    ("language_model.model.", "model."),  # multi-modal, before
    ("model.language_model.model.", "model."),
    ("language_model.", "model."),
)

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

# What a tensor that is no LoRA pair is for, and why it cannot be served.
_FOREIGN = (
    (re.compile(r"\.lora_embedding_[AB](\.|$)"), "LoRA on an embedding is not supported"),
    (re.compile(r"\.lora_magnitude_vector(\.|$)"), "DoRA magnitudes are not supported"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), "a bias of lora_B (lora_bias) is not supported"),
    (re.compile(r"\.lora_(diag|velora_embed)(\.|$)"), "this LoRA variant is not supported"),
    (re.compile(r"\.bias$"), "a trained bias of the base model is not supported"),
    (re.compile(r"\.(modules_to_save|base_layer)\."), "a full copy of a base weight is not supported"),
    (re.compile(r"(^|\.)(lm_head|embed_tokens|score|classifier)\."), "a full copy of a base weight is not supported"),
)


@dataclass(frozen=True, slots=True)
class LoraTensorName:
    """One tensor's name, taken apart."""

    key: str  # as in the file
    module: str  # the module's path in the model that the adapter was trained on, as PEFT's patterns see it
    part: Literal["A", "B"]
    adapter: str | None  # an adapter name left in the key, such as "default"


def parse_tensor_name(key: str) -> LoraTensorName | None:
    """Take a tensor's name apart; None if it is not the A or B of a linear layer."""
    found = _TENSOR.fullmatch(key)
    if found is None:
        return None
    part: Literal["A", "B"] = "A" if found["part"] == "A" else "B"
    return LoraTensorName(key, found["module"].removeprefix(PEFT_PREFIX), part, found["adapter"])


def why_foreign(key: str) -> str:
    """What to say about a tensor that is not the A or B of a linear layer."""
    for pattern, reason in _FOREIGN:
        if pattern.search(key):
            return f"{key}: {reason}"
    return f"{key}: not a LoRA tensor of a linear layer (…lora_A.weight or …lora_B.weight)"


def base_module_candidates(module: str) -> set[str]:
    """The names under which the serving model may know a module of the trained model.

    A prefix of PEFT that is left over (wrapped twice in training) is dropped first.
    """
    inner = module.removeprefix(PEFT_PREFIX)
    return {new + inner.removeprefix(old) for old, new in _WRAPPERS if inner.startswith(old)}


def split_tensor_names(keys: Iterable[str]) -> tuple[list[LoraTensorName], list[str]]:
    """Every key taken apart, and the problems of those that cannot be, or that name more than one adapter."""
    names, problems = [], []
    for key in sorted(keys):
        name = parse_tensor_name(key)
        if name is None:
            problems.append(why_foreign(key))
        else:
            names.append(name)
    adapters = {name.adapter for name in names}
    if len(adapters) > 1:
        listed = ", ".join(sorted(repr(adapter) if adapter else "none" for adapter in adapters))
        problems.append(f"the tensors carry different adapter names ({listed}): export one adapter per directory")
    return names, problems
