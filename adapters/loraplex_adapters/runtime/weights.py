"""Reads an adapter's files and binds its weights to a model. Runs in the store's loader threads, never in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.files.growing import GrowingFile, Growth
from loraplex_adapters.files.names import PEFT_PREFIX, base_module_candidates
from loraplex_adapters.files.source import (
    begin_digest,
    open_weights,
    read_config_bytes,
    read_settings,
    text_digest,
    with_text,
)
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Rest, no_rest
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.classifier import CLASSIFIER_SITE
from loraplex_adapters.runtime.composition import combine
from loraplex_adapters.runtime.layer import EMBEDDING_SITE, EmbeddingLora
from loraplex_adapters.runtime.mirror import Total, own_total
from loraplex_adapters.runtime.replaced import REPLACED_SITE
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.tensors import FileTensors, unseen
from loraplex_adapters.runtime.untouched import leaves_cache
from loraplex_kernels.ops import LoraWeights, PackedLora

B_ENDING = ".lora_B.weight"
NEIGHBOURED = (f".q_proj{B_ENDING}", f".k_proj{B_ENDING}")


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter in host memory, bound to the model and laid out for the kernels."""

    key: AdapterKey
    packed: Mapping[str, PackedLora]  # by site
    ranks: Mapping[str, int]  # by the model's own name of the projection
    warnings: tuple[str, ...]
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: it applies from their last occurrence in the prompt on
    whole: str = ""  # why it cannot be one of several in a composition; "": it can
    num_labels: int = 0  # of its classification head; 0: it has none
    each_token: bool = False  # whether the head classifies tokens
    leaves_cache: bool = False  # whether all keys and values are the base model's
    number: int = 0  # of its load, as other ranks have it
    other_bytes: int = 0  # the most that another rank has of it

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values())

    @property
    def nbytes(self) -> int:
        """Of the rank that has most of it: budgets are of each."""
        return max(self.other_bytes, sum(packed.nbytes for packed in self.packed.values()))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Short names, sorted: "q_proj", …"""
        return tuple(sorted({name.rpartition(".")[2] for name in self.ranks}))


def load_adapter(
    key: AdapterKey,
    directory: Path,
    targets: Mapping[str, LoraTarget],
    dtype: torch.dtype,
    max_rank: int,
    pack: Callable[[LoraWeights], PackedLora],
    rest: Rest = no_rest,
    is_hashed: bool = False,
    total: Total = own_total,
    growth: Growth | None = None,
) -> LoadedAdapter:
    """Read an adapter, check that it is the version that `key` names, bind it and lay it out for the kernels.

    is_hashed: that was checked. growth: of weights that are still being written; None: they are whole. Raises
    AdapterRejected; OSError if the disk fails.
    """
    layout = _Layout(pack, rest)
    with _opened(key, directory, targets, rest, is_hashed, growth) as (tensors, config):
        bound = bind(tensors, config, targets, dtype, max_rank, rest, total, layout.add)
    packed = layout.whole(bound)
    warnings = (*config.warnings, *bound.warnings)
    labels = (0, False) if bound.head is None else (bound.head.num_labels, bound.head.each_token)
    untouched = leaves_cache(bound, targets)
    return LoadedAdapter(key, packed, bound.ranks, warnings, bound.invocation_tokens, bound.whole, *labels, untouched)


def load_composition(
    key: AdapterKey,
    directories: Sequence[Path],
    targets: Mapping[str, LoraTarget],
    dtype: torch.dtype,
    max_rank: int,
    pack: Callable[[LoraWeights], PackedLora],
    rest: Rest = no_rest,
) -> LoadedAdapter:
    """Read the parts of a composition and lay their weighted sum out for the kernels, as one adapter.

    directories: one for each of the key's parts. max_rank: the limit of each part. Raises AdapterRejected; OSError if
    the disk fails.
    """
    parts = []
    for (member, weight), directory in zip(key.parts, directories, strict=True):
        with _opened(member, directory, targets, rest) as (tensors, config):
            parts.append((str(member), bind(tensors, config, targets, dtype, max_rank, rest), weight))
    bound = combine(parts, rest)
    untouched = leaves_cache(bound, targets)
    return LoadedAdapter(key, pack_adapter(bound, pack, rest), bound.ranks, (), leaves_cache=untouched)


@contextmanager
def _opened(
    key: AdapterKey,
    directory: Path,
    targets: Mapping[str, LoraTarget],
    rest: Rest,
    is_hashed: bool = False,
    growth: Growth | None = None,
) -> Iterator[tuple[Mapping[str, Tensor], LoRAConfig]]:
    """The tensors, to be read within the block, and the config of the version that `key` names.

    The bytes that are checked are the bytes that are used: the file is read once.
    """
    config_bytes = read_config_bytes(directory)
    with open_weights(directory) as opened:
        file = opened if growth is None else GrowingFile(opened, growth)
        config, header = read_settings(config_bytes, file)
        hasher = begin_digest(config_bytes)
        tensors = FileTensors(file, header, str(key), rest, unseen if is_hashed else hasher.update)
        if not is_hashed:
            tensors.read_all()
            found = with_text(hasher.hexdigest(), text_digest(directory))
            if found != key.digest:
                problem = f"the files have the digest {found[:12]}…, not {key.digest[:12]}…: they were changed"
                raise AdapterRejected([problem])
        yield _in_halves(tensors, targets) if config.rows_neighboured else tensors, config


def _in_halves(tensors: Mapping[str, Tensor], targets: Mapping[str, LoraTarget]) -> dict[str, Tensor]:
    """The tensors with the rows of each B for queries and keys as the model has them: first one half of a head, then
    the other. Of a B that does not fit, the binding tells."""

    def ordered(name: str, tensor: Tensor) -> Tensor:
        module = name.removeprefix(PEFT_PREFIX).removesuffix(B_ENDING)
        reached = base_module_candidates(module) & targets.keys()
        if not name.endswith(NEIGHBOURED) or len(reached) != 1:
            return tensor
        size = _head_size(module, targets[reached.pop()])
        return tensor if len(tensor) % size else _halves(tensor, size)

    return {name: ordered(name, tensor) for name, tensor in tensors.items()}


def _head_size(module: str, target: LoraTarget) -> int:
    if target.share is None or target.share.unit == 1:
        raise AdapterRejected(
            [
                f"{module}: llama.cpp's form has its rows in another order in each head, and of this model the size of "
                "the heads is not known here: take PEFT's files"
            ]
        )
    return target.share.unit


def _halves(tensor: Tensor, size: int) -> Tensor:
    heads = tensor.view(-1, size // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def pack_adapter(
    bound: BoundAdapter, pack: Callable[[LoraWeights], PackedLora], rest: Rest = no_rest
) -> Mapping[str, PackedLora]:
    """The packed weights for each site's table."""
    layout = _Layout(pack, rest)
    for site, weights in bound.weights.items():
        layout.add(site, weights)
    return layout.whole(bound)


class _Layout:
    """An adapter's weights as the kernels read them, laid out site by site."""

    def __init__(self, pack: Callable[[LoraWeights], PackedLora], rest: Rest) -> None:
        self._pack = pack
        self._rest = rest
        self._packed: dict[str, PackedLora] = {}  # by site

    def add(self, site: str, weights: LoraWeights) -> None:
        self._packed[site] = EmbeddingLora(weights) if site == EMBEDDING_SITE else self._pack(weights)
        self._rest()

    def whole(self, bound: BoundAdapter) -> Mapping[str, PackedLora]:
        """The sites that were added, and what else the adapter has."""
        if bound.replaced is not None:
            self._packed[REPLACED_SITE] = bound.replaced
        if bound.head is not None:
            self._packed[CLASSIFIER_SITE] = bound.head
        return self._packed
