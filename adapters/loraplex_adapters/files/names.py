"""The tensor names of adapters: the module, and the part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loraplex_adapters.pace import Rest, no_rest, resting

PEFT_PREFIX = "base_model.model."

# What a tensor is to its module: A, B and the bias of B; the same of an embedding; DoRA's magnitudes; trained rows of
# an embedding; a weight or bias trained whole, and what PEFT may write beside it: the base's own weight ("base"), and
# the trained one once more ("again").
Part = Literal[
    "A", "B", "lora_bias", "embedding_A", "embedding_B", "magnitude", "tokens", "weight", "bias", "base", "again"
]

# Where a training script's model kept the decoder, and where the text-only model that serves keeps it. All rules are
# tried: a name that reaches two projections is ambiguous and refused.
_WRAPPERS = (
    ("", ""),
    ("", "model."),  # trained on the bare decoder
    ("model.language_model.", "model."),  # multi-modal, since transformers 4.52
    ("language_model.", ""),  # multi-modal, before
    ("model.language_model.model.", "model."),
    ("language_model.", "model."),
    ("model.text_model.", "model."),
)

# What multi-modal models have beside the decoder, at the root or below one of these. It computes nothing for text.
_TOWER_ROOTS = frozenset(("model", "thinker"))
TOWERS = frozenset(
    (
        *("aligner", "connector", "embed_audio", "embed_vision", "language_projection", "mlp1", "mm_projector"),
        *("multi_modal_projector", "patch_merger", "projector", "qformer", "resampler"),  # between tower and decoder
        *("audio_encoder", "audio_model", "audio_tower", "apm"),
        *("vision_adapter", "vision_embed_tokens", "vision_encoder", "vision_model", "vision_projection"),
        *("vision_tower", "visual", "vpm"),
    )
)

# What DistributedDataParallel puts in front of a path, and torch.compile, FSDP and activation checkpointing into it.
_TRAINERS = re.compile(
    r"^(?:module\.|_orig_mod\.)+|(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
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
    (r"\.(?:base_layer|original_module|token_adapter\.base_layer)\.weight", "base"),
    (r"\.modules_to_save{adapter}\.weight", "again"),
    (r"\.weight", "weight"),
    (r"(?:\.base_layer)?\.bias", "bias"),
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_ADAPTER = r"(?:\.(?P<adapter>(?!weight$)[^.]+))?"
_TENSORS = tuple((re.compile(r"(?P<module>.+?)" + ending.format(adapter=_ADAPTER)), part) for ending, part in _ENDINGS)

# Beside a tensor that was trained whole PEFT may write the base's own and, under the wrapper's name, the trained one
# once more: with bias="all" of everything called "bias", with save_embedding_layers of the weights.
_BESIDE = re.compile(r"(?P<module>.+)\.(?:original_module|modules_to_save(?:\.[^.]+)?)\.(?P<kind>weight|bias)")
# What cannot be within the path of a module.
_WRAPPED = re.compile(r"\.(?:lora_|(?:modules_to_save|original_module|token_adapter)(?:\.|$))")

# What another tensor is for, and why it cannot be served.
_FOREIGN = (
    (re.compile(r"\.lora_(diag|velora_embed)(\.|$)"), "this LoRA variant is not supported"),
    (
        re.compile(r"\.token_adapter\.base_layer\."),
        "modules_to_save and trainable_token_indices both mean this module, which PEFT cannot compute either",
    ),
    (
        re.compile(r"\.(modules_to_save|original_module)\."),
        "a copy that PEFT writes beside the trained tensor, which is missing: save it again",
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
    changes: str = ""  # the module that it changes, where a parameter was trained by its own path; "": `module`

    @property
    def base_module(self) -> str:
        """The path of the module that it changes."""
        return self.changes or self.module


@dataclass(frozen=True, slots=True)
class SplitNames:
    """All keys of a file."""

    names: list[LoraTensorName]
    problems: list[str]  # of those that cannot be taken apart, or that name more than one adapter
    towers: tuple[str, ...]  # modules beside the decoder, sorted

    @property
    def warnings(self) -> list[str]:
        return [f"{self._tower_paths}: left out, because text alone is served"] if self.towers else []

    @property
    def nothing_held(self) -> str:
        """What a file without a LoRA tensor of the decoder holds, for errors."""
        only = f" of the text model, which alone is served, but some of {self._tower_paths}"
        return f"no LoRA tensors{only if self.towers else ''}"

    @property
    def _tower_paths(self) -> str:
        return ", ".join(sorted({".".join(module.split(".")[: _tower_depth(module)]) for module in self.towers}))


def parse_tensor_name(key: str) -> LoraTensorName | None:
    """Take a tensor's name apart; None: PEFT saves no tensor of that name for LoRA."""
    for pattern, part in _TENSORS:
        found = pattern.fullmatch(key)
        if found is not None:
            if _WRAPPED.search(found["module"]):
                return None
            module = _TRAINERS.sub("", found["module"]).removeprefix(PEFT_PREFIX)
            return LoraTensorName(key, module, part, found.groupdict().get("adapter"))
    return None


def why_foreign(key: str) -> str:
    """The reason why a tensor has no place in a LoRA adapter."""
    for pattern, reason in _FOREIGN:
        if pattern.search(key):
            return f"{key}: {reason}"
    return f"{key}: not a tensor of a LoRA adapter (…lora_A.weight, …lora_B.weight)"


def base_module_candidates(module: str) -> set[str]:
    """The names under which the serving model may know a module of the trained model.

    A second prefix of PEFT (from wrapping twice in training) is dropped first.
    """
    inner = module.removeprefix(PEFT_PREFIX)
    return {new + inner.removeprefix(old) for old, new in _WRAPPERS if inner.startswith(old)}


def split_tensor_names(keys: Iterable[str], rest: Rest = no_rest) -> SplitNames:
    """Every key taken apart. Biases that PEFT has saved twice are left out."""
    names: list[LoraTensorName] = []
    problems, towers, keys = [], set(), frozenset(keys)
    with_tokens = {key.partition(_TOKENS)[0] for key in keys if _TOKENS in key}
    for key in resting(sorted(keys), rest):
        beside = _BESIDE.fullmatch(key)
        alone = beside is not None and f"{beside['module']}.{beside['kind']}" not in keys
        if beside is not None and beside["kind"] == "bias" and not alone:
            continue
        wrapped, _, _ = key.partition(".token_adapter.base_layer.")
        alone = alone or (wrapped != key and wrapped not in with_tokens)
        name = None if alone else parse_tensor_name(key)
        if name is None:
            problems.append(why_foreign(key))
        elif _tower_depth(name.module):
            towers.add(name.module)
        else:
            names.append(name)
    adapters = {name.adapter for name in names if name.part in ("A", "B")}
    if len(adapters) > 1:
        listed = ", ".join(sorted(repr(adapter) if adapter else "none" for adapter in adapters))
        problems.append(f"the tensors carry different adapter names ({listed}): export one adapter per directory")
    return SplitNames(names, problems, tuple(sorted(towers)))


def _tower_depth(module: str) -> int:
    """The number of path components of the tower that a module belongs to; 0: it belongs to no tower."""
    for depth, component in enumerate(module.removeprefix(PEFT_PREFIX).split("."), start=1):
        if component in TOWERS:
            return depth
        if component not in _TOWER_ROOTS:
            return 0
    return 0
