"""The tensors of a GGUF model, by their names in the Hugging Face model and with their rows as it has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapters.files.gguf import GGUFError, GGUFHeader, GGUFTensor, parts_of, read_gguf
from loraplex_adapters.files.gguf_names import LAYER, NEIGHBOURED, NEIGHBOURED_PARTS, module_name
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.gguf_blocks import FLOAT_TYPES, dequantize_rows
from loraplex_engine.checkpoint.gguf_experts import (
    EXPERTS,
    MAX_MATRICES,
    PARTS,
    ExpertNames,
    beside_experts,
    expert_path,
)
from loraplex_engine.checkpoint.model_config import ModelError

SINKS = "self_attn.sinks"  # a vector without a suffix
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
AROUND = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BEHIND_ATTENTION = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
NORMS: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "exaone4"), AROUND),
    "glm4": {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    # Their converter takes the norm before the feed-forward for one behind attention.
    "seed_oss": BEHIND_ATTENTION,
    "gpt-oss": BEHIND_ATTENTION,
}
NORMS_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
NORMS_WITH_ONE = ("gemma", "gemma2", "gemma3")  # stored as they are multiplied, where Hugging Face's have 1 less
CHUNK_ELEMENTS = 1 << 22  # dequantised at once


@dataclass(frozen=True, slots=True)
class _Stored:
    tensor: GGUFTensor
    name: str  # in the file
    parts: tuple[Tensor, ...]  # uint8 [rows, bytes of a row], in the mapped file; of several, rows lie in turn

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, which: slice | Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][which]
        return torch.stack(self.parts, dim=1).flatten(0, 1)[which]

    def vector(self) -> Tensor:
        numbers = [dequantize_rows(self.tensor.type.name, part)[0] for part in self.parts]
        return numbers[0] if len(numbers) == 1 else torch.stack(numbers, dim=1).flatten()


class GGUFModel:
    """The tensors of a file, or of all parts of a split one. They are mapped, not read ahead."""

    def __init__(self, path: Path) -> None:
        """path: the file, or the first of its parts. Raises ModelError if one of them is missing or damaged."""
        self.path = path
        headers = [(part, _read_header(part)) for part in _parts(path)]
        self.metadata = headers[0][1].metadata
        self.architecture = ConfigFields(self.metadata, str(path)).text("general.architecture")
        self._stored: dict[str, _Stored] = {}
        self._factors: dict[str, _Stored] = {}
        self._halves: dict[str, dict[str, _Stored]] = {}  # of matrices that take their rows from two tensors
        for part, header in headers:
            mapped = torch.from_file(str(part), shared=False, size=part.stat().st_size, dtype=torch.uint8)
            for name, tensor in header.tensors.items():
                self._add(name, tensor, mapped)
        for canonical, halves in self._halves.items():
            self._keep(canonical, self._joined(halves))

    def _add(self, name: str, tensor: GGUFTensor, mapped: Tensor) -> None:
        rows = mapped[tensor.start : tensor.start + tensor.nbytes].view(-1, tensor.row_bytes)
        if name in ROPE_FACTORS:
            self._factors[name] = _Stored(tensor, name, (rows,))
            return
        module, _, suffix = name.rpartition(".")
        experts = EXPERTS.get(self.architecture)
        layer = LAYER.fullmatch(module)
        if experts is not None and layer is not None and layer[2] in PARTS:
            self._add_experts(experts, layer, _Stored(tensor, name, (rows,)))
            return
        known = module_name(self.architecture, module, self._names())
        canonical = name if known is None else known if known.endswith(SINKS) else f"{known}.{suffix}"
        if layer is not None and layer[2] == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
            tensor = replace(tensor, shape=(1, *tensor.shape))  # its one row, which converters write as a vector
        self._keep(canonical, _Stored(tensor, name, (rows,)))

    def _names(self) -> dict[str, str]:
        """Of the parts of a layer that not all architectures call alike."""
        norms = NORMS.get(self.architecture, NORMS_BEFORE)
        return {**norms, **beside_experts(self.architecture), "attn_sinks": SINKS}

    def _keep(self, canonical: str, stored: _Stored) -> None:
        if canonical in self._stored:
            raise ModelError(f"{self.path}: tensor {stored.name} is there twice")
        self._stored[canonical] = stored

    def _add_experts(self, names: ExpertNames, layer: re.Match[str], stored: _Stored) -> None:
        """Add each expert's part of a tensor of all."""
        (rows,), suffix, tensor = stored.parts, stored.name.rpartition(".")[2], stored.tensor
        if len(tensor.shape) != (2 if suffix == "bias" else 3):
            raise ModelError(f"{self.path}: tensor {stored.name} has {len(tensor.shape)} dimensions: no experts' one")
        count = tensor.shape[0]
        if count + len(self._stored) + len(self._halves) > MAX_MATRICES:
            raise ModelError(f"{self.path}: tensor {stored.name}: more than {MAX_MATRICES} matrices of experts")
        own = replace(tensor, shape=tensor.shape[1:])
        for index, part in enumerate(rows.view(count, -1, tensor.row_bytes)):
            path = expert_path(names, layer[2], index)
            canonical, expert = f"model.layers.{layer[1]}.{path}.{suffix}", _Stored(own, stored.name, (part,))
            if path.endswith(names.gate_up or "\0"):
                self._halves.setdefault(canonical, {})[layer[2]] = expert
            else:
                self._keep(canonical, expert)

    def _joined(self, halves: Mapping[str, _Stored]) -> _Stored:
        """The matrix that has the rows of gate and up in turn."""
        gate, up = (halves.get(part) for part in PARTS[:2])
        if gate is None or up is None or (gate.tensor.type, gate.tensor.shape) != (up.tensor.type, up.tensor.shape):
            (known, *_) = halves.values()
            raise ModelError(f"{self.path}: tensor {known.name}: gate and up of an expert are not alike")
        rows, *columns = gate.tensor.shape
        return _Stored(replace(gate.tensor, shape=(2 * rows, *columns)), gate.name, (*gate.parts, *up.parts))

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """By their names in the Hugging Face model."""
        return {name: stored.tensor for name, stored in self._stored.items()}

    def factors(self, name: str) -> list[float] | None:
        """What the frequencies of the rotary embedding are divided by; None: there is no such tensor."""
        if name not in self._factors:
            return None
        numbers: list[float] = self._factors[name].vector().tolist()
        return numbers

    def entries(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.shape, tensor.type.name, tensor.nbytes

    def raw(self, name: str) -> Tensor:
        """A matrix as it is stored: uint8 [N, bytes of a row]."""
        stored = self._stored[name]
        everything = slice(0, len(stored))
        order = self._order(stored, everything)
        return stored.rows(everything if order is None else order)

    def pieces(self, name: str, part: tuple[slice, ...]) -> Iterator[Tensor]:
        """The numbers of a tensor or of a part of it, some rows at a time. A vector is one piece."""
        stored = self._stored[name]
        if len(stored.tensor.shape) == 1:
            yield self._vector(stored)[part[0] if part else slice(None)]
            return
        rows = part[0] if part else slice(0, len(stored))
        columns = part[1] if len(part) > 1 else slice(None)
        at_once = len(stored)
        if stored.tensor.type.name not in FLOAT_TYPES:
            at_once = max(1, CHUNK_ELEMENTS // stored.tensor.shape[-1])
        for start in range(rows.start, rows.stop, at_once):
            some = slice(start, min(start + at_once, rows.stop))
            order = self._order(stored, some)
            packed = stored.rows(some if order is None else order)
            yield dequantize_rows(stored.tensor.type.name, packed)[:, columns]

    def _vector(self, stored: _Stored) -> Tensor:
        numbers = stored.vector()
        order = self._order(stored, slice(0, len(numbers)))
        if order is not None:
            return numbers[order]
        # Not of a norm's weight alone that is 1 as Hugging Face counts: this is exact for all from 1/2 to 2 and beyond.
        return numbers - 1 if self.architecture in NORMS_WITH_ONE and stored.name.endswith("norm.weight") else numbers

    def _order(self, stored: _Stored, rows: slice) -> Tensor | None:
        """Where the file has these rows; None: in their places."""
        part = stored.name.split(".")[-2]
        if self.architecture not in NEIGHBOURED or part not in NEIGHBOURED_PARTS:
            return None
        count = stored.tensor.shape[0]
        size = self.head_dim
        if count % size:
            raise ModelError(f"{self.path}: tensor {stored.name} has {count} rows, no whole heads of {size}")
        return torch.arange(count).view(-1, size // 2, 2).transpose(1, 2).flatten()[rows]

    @property
    def fields(self) -> ConfigFields:
        """The metadata below the architecture's name."""
        prefix = f"{self.architecture}."
        own = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        return ConfigFields(own, f"{self.path}: {self.architecture}.*")

    @property
    def head_dim(self) -> int:
        """Raises ModelError where keys and values differ in it."""
        fields = self.fields
        hidden, heads = fields.integer("embedding_length"), same_in_all_layers(fields, "attention.head_count")
        size = fields.integer("attention.key_length", max(1, hidden // heads))
        values = fields.integer("attention.value_length", size)
        if values != size:
            raise fields.error("attention.value_length", values, f"{size}, as for keys")
        return size


def same_in_all_layers(fields: ConfigFields, name: str, default: int | None = None) -> int:
    """A number that a file may state for each layer. Raises ModelError where they differ."""
    stated = fields.raw().get(name)
    if isinstance(stated, list) and stated and all(each == stated[0] for each in stated):
        fields = fields.changed_by(ConfigFields({name: stated[0]}, fields.where))
    return fields.integer(name, default)


def _parts(path: Path) -> list[Path]:
    try:
        return parts_of(path)
    except GGUFError as error:
        raise ModelError(f"{path}: {error}") from None


def _read_header(path: Path) -> GGUFHeader:
    try:
        with path.open("rb") as file:
            return read_gguf(file)
    except FileNotFoundError:
        raise ModelError(f"{path}: a part of the model, but not there: complete the download") from None
    except GGUFError as error:
        raise ModelError(f"{path}: {error}") from None
