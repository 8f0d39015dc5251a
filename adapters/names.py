"""How the tensors of an adapter are named: which module, which part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from adapters.pace import Rest, no_rest, resting

PEFT_PREFIX = "base_model.model."

# What a tensor is to its module: A, B and the bias of B; the same of an embedding; DoRA's magnitudes; trained rows of
# an embedding; a full copy of the base's weight or bias.
Part = Literal["A", "B", "lora_bias", "embedding_A", "embedding_B", "magnitude", "tokens", "weight", "bias"]

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

# What PEFT saves of a module, by how the tensor's name ends. The first that matches counts.
_ENDINGS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_A{adapter}\.weight", "A"),
    (r"\.lora_B{adapter}\.weight", "B"),
    (r"\.lora_B{adapter}\.bias", "lora_bias"),
    (r"\.lora_embedding_A{adapter}", "embedding_A"),
    (r"\.lora_embedding_B{adapter}", "embedding_B"),
    (r"\.lora_magnitude_vector{adapter}(?:\.weight)?", "magnitude"),
    (r"\.token_adapter\.trainable_tokens_delta{adapter}", "tokens"),
    (r"(?:\.base_layer)?\.weight", "weight"),
    (r"(?:\.base_layer)?\.bias", "bias"),
)
_ADAPTER = r"(?:\.(?P<adapter>(?!weight$)[^.]+))?"
_TENSORS = tuple((re.compile(r"(?P<module>.+?)" + ending.format(adapter=_ADAPTER)), part) for ending, part in _ENDINGS)

# With bias="all" PEFT saves everything called "bias": of a module that was trained whole also the base's own and, under
# the wrapper's name, the trained one once more.
_SPARE_BIAS = re.compile(r"(?P<module>.+)\.(?:original_module|modules_to_save(?:\.[^.]+)?)\.bias")

# What another tensor is for, and why it cannot be served.
_FOREIGN = (
    (re.compile(r"\.lora_(diag|velora_embed)(\.|$)"), "this LoRA variant is not supported"),
    (re.compile(r"\.(modules_to_save|original_module)\."), "a wrapper of PEFT that it does not save: save it again"),
    (
        re.compile(r"\.token_adapter\.base_layer\."),
        "modules_to_save and trainable_token_indices both mean this module, which PEFT cannot compute either",
    ),
    (re.compile(r"\.lora_"), "not a LoRA tensor of a known kind"),
)


@dataclass(frozen=True, slots=True)
class LoraTensorName:
    """One tensor's name, taken apart."""

    key: str  # as in the file
    module: str  # the module's path in the model that the adapter was trained on, as PEFT's patterns see it
    part: Part
    adapter: str | None  # an adapter name left in the key, such as "default"


def parse_tensor_name(key: str) -> LoraTensorName | None:
    """Take a tensor's name apart; None if it is none of those that PEFT saves for LoRA."""
    if any(pattern.search(key) for pattern, _ in _FOREIGN[:-1]):
        return None
    for pattern, part in _TENSORS:
        found = pattern.fullmatch(key)
        if found is not None:
            if ".lora_" in found["module"]:
                return None
            adapter = found.groupdict().get("adapter")
            return LoraTensorName(key, found["module"].removeprefix(PEFT_PREFIX), part, adapter)
    return None


def why_foreign(key: str) -> str:
    """What to say about a tensor that has no place in a LoRA adapter."""
    for pattern, reason in _FOREIGN:
        if pattern.search(key):
            return f"{key}: {reason}"
    return f"{key}: not a tensor of a LoRA adapter (…lora_A.weight, …lora_B.weight)"


def base_module_candidates(module: str) -> set[str]:
    """The names under which the serving model may know a module of the trained model.

    A prefix of PEFT that is left over (wrapped twice in training) is dropped first.
    """
    inner = module.removeprefix(PEFT_PREFIX)
    return {new + inner.removeprefix(old) for old, new in _WRAPPERS if inner.startswith(old)}


def split_tensor_names(keys: Iterable[str], rest: Rest = no_rest) -> tuple[list[LoraTensorName], list[str]]:
    """Every key taken apart, and the problems of those that cannot be, or that name more than one adapter.

    Biases that PEFT has saved twice are left out.
    """
    names, problems, keys = [], [], frozenset(keys)
    for key in resting(sorted(keys), rest):
        spare = _SPARE_BIAS.fullmatch(key)
        if spare is not None and f"{spare['module']}.bias" in keys:
            continue
        name = parse_tensor_name(key)
        if name is None:
            problems.append(why_foreign(key))
        else:
            names.append(name)
    adapters = {name.adapter for name in names if name.part in ("A", "B")}
    if len(adapters) > 1:
        listed = ", ".join(sorted(repr(adapter) if adapter else "none" for adapter in adapters))
        problems.append(f"the tensors carry different adapter names ({listed}): export one adapter per directory")
    return names, problems
