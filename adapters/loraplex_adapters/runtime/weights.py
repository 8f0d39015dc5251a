"""Reads an adapter's files and binds its weights to a model. Runs in the store's loader threads, never in a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import LoRAConfig
from loraplex_adapters.files.names import PEFT_PREFIX, base_module_candidates
from loraplex_adapters.files.safetensors import TensorEntry
from loraplex_adapters.files.source import digest_of, open_weights, read_config_bytes, read_settings, text_digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Rest, no_rest, resting
from loraplex_adapters.runtime.binding import BoundAdapter, bind
from loraplex_adapters.runtime.classifier import CLASSIFIER_SITE
from loraplex_adapters.runtime.composition import combine
from loraplex_adapters.runtime.layer import EMBEDDING_SITE, EmbeddingLora
from loraplex_adapters.runtime.mirror import Total, own_total
from loraplex_adapters.runtime.replaced import REPLACED_SITE
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.untouched import leaves_cache
from loraplex_kernels.ops import LoraWeights, PackedLora

PIECE_BYTES = 1 << 18  # read and hashed at once

B_ENDING = ".lora_B.weight"
NEIGHBOURED = (f".q_proj{B_ENDING}", f".k_proj{B_ENDING}")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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
) -> LoadedAdapter:
    """Read an adapter, check that it is the version that `key` names, bind it and lay it out for the kernels.

    is_hashed: that was checked. Raises AdapterRejected; OSError if the disk fails.
    """
    tensors, config = _read(key, directory, targets, rest, is_hashed)
    bound = bind(tensors, config, targets, dtype, max_rank, rest, total)
    packed = pack_adapter(bound, pack, rest)
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
        tensors, config = _read(member, directory, targets, rest)
        parts.append((str(member), bind(tensors, config, targets, dtype, max_rank, rest), weight))
    bound = combine(parts, rest)
    untouched = leaves_cache(bound, targets)
    return LoadedAdapter(key, pack_adapter(bound, pack, rest), bound.ranks, (), leaves_cache=untouched)


def _read(
    key: AdapterKey, directory: Path, targets: Mapping[str, LoraTarget], rest: Rest, is_hashed: bool = False
) -> tuple[dict[str, Tensor], LoRAConfig]:
    """The tensors and the config of the version that `key` names.

    The bytes that are checked are the bytes that are used: the file is read once.
    """
    config_bytes = read_config_bytes(directory)
    with open_weights(directory) as file:
        config, header = read_settings(config_bytes, file)
        unsupported = [
            f"{name}: dtype {entry.dtype}, a float is expected"
            for name, entry in header.tensors.items()
            if entry.dtype not in _DTYPES
        ]
        if unsupported:
            raise AdapterRejected(unsupported)
        file.seek(0)
        # Not a bytearray: Python would fill it with zeros first, and hold up all other threads meanwhile.
        content = torch.empty(header.data_start + header.data_bytes, dtype=torch.uint8)
        pieces = [content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES)]
        weights = resting((_filled(piece, file, directory) for piece in pieces), rest)
        if is_hashed:
            deque(weights, maxlen=0)
        elif (found := digest_of(config_bytes, weights, text_digest(directory))) != key.digest:
            problem = f"the files have the digest {found[:12]}…, not {key.digest[:12]}…: they were changed"
            raise AdapterRejected([problem])
    data = content[header.data_start :]
    tensors = {name: _tensor(data, entry) for name, entry in resting(header.tensors.items(), rest)}
    return _in_halves(tensors, targets) if config.rows_neighboured else tensors, config


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


def _filled(piece: Tensor, file: BufferedReader, directory: Path) -> memoryview:
    """The next bytes of the file. Hashed piece by piece, while they are in the core's cache."""
    view: memoryview = piece.numpy().data
    if file.readinto(view) != len(piece):
        raise AdapterRejected([f"{directory.name}: the weights became shorter while they were read"])
    return view


def pack_adapter(
    bound: BoundAdapter, pack: Callable[[LoraWeights], PackedLora], rest: Rest = no_rest
) -> dict[str, PackedLora]:
    """The packed weights for each site's table."""
    packed: dict[str, PackedLora] = {}
    for site, weights in resting(bound.weights.items(), rest):
        packed[site] = EmbeddingLora(weights) if site == EMBEDDING_SITE else pack(weights)
    if bound.replaced is not None:
        packed[REPLACED_SITE] = bound.replaced
    if bound.head is not None:
        packed[CLASSIFIER_SITE] = bound.head
    return packed


def _tensor(data: Tensor, entry: TensorEntry) -> Tensor:
    """A copy of one tensor: aligned, whatever its offset in the file, and independent of the file's buffer."""
    begin, end = entry.data_offsets
    return data[begin:end].clone().view(_DTYPES[entry.dtype]).view(entry.shape)
