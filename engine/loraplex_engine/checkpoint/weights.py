"""Reads a model's parameters from its files: finds them, opens its safetensors or GGUF, reads one tensor at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraplex_adapters.files.gguf import SUFFIX
from loraplex_engine.checkpoint.gguf_blocks import FLOAT_TYPES, READERS
from loraplex_engine.checkpoint.gguf_model import GGUFModel
from loraplex_engine.checkpoint.memory import empty_matrix
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.tensor_files import Part, SafetensorsFile, TensorFile, check_fetched, shape_of
from loraplex_kernels.finite import all_finite

Progress = Callable[[int, int], None]  # (bytes loaded, bytes in all)
Names = Callable[[str], str | None]  # from a tensor's name in the files to the model's; None: it is not read

BASE_NAME = "model"  # what a model's files are called, unless a quantiser named them otherwise

# Wrappers of the language model inside a checkpoint → its own names; the first that fits is taken.
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
    ("embed_tokens.", "model.embed_tokens."),  # saved from the base model, without its head
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)
# Buffers that some old checkpoints hold and that follow from config.json, and scales for a quantised cache of keys and
# values, whose own scales are better: they are of each token.
BUFFERS = re.compile(
    r".*\.rotary_emb\.inv_freq|.*\.self_attn\.masked_bias"
    r"|.*\.self_attn\.([kv]_proj\.)?(q|k|v|kv|prob|output)_(scale|zero_point)"
)

STORED_DTYPES = {
    **FLOAT_TYPES,
    **dict.fromkeys(READERS, torch.bfloat16),  # stored in blocks: the width of what they were made from
}
FLOATS = tuple(FLOAT_TYPES)
MAX_JSON_BYTES = 256 << 20  # the index of a trillion weights, by experts and in several tensors each, takes 20 MiB
MAX_LISTED = 8  # tensors named in one error; the rest are counted


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError if there is none."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def read_json_value(path: Path) -> Any:
    """What a JSON file holds. Raises ModelError if it is none."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: has {size} bytes; at most {MAX_JSON_BYTES} of JSON are read: fetch it again")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model directory needs one") from None
    check_fetched(path, data)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place, dtype and shape of a tensor, before any of it is read."""

    file: TensorFile
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # the format's code
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """The dtypes and shape of an expected tensor, where it is not just a float tensor of one shape."""

    shape: tuple[int | None, ...] | None  # None: any, or any length of that dimension
    dtypes: tuple[str, ...]  # the format's codes
    optional: bool = False
    hint: str = ""  # what it means if the tensor is of another shape or type

    def fits(self, stored: StoredTensor) -> bool:
        return self._shape_fits(stored.shape) and stored.dtype in self.dtypes

    def misfit(self, stored: StoredTensor) -> str:
        shape = "" if self._shape_fits(stored.shape) else f" {_dims(self.shape)}"
        return f"{stored.name} is {stored.dtype} {_dims(stored.shape)}, not {' or '.join(self.dtypes)}{shape}"

    def _shape_fits(self, shape: tuple[int, ...]) -> bool:
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            wanted in (None, length) for wanted, length in zip(self.shape, shape, strict=True)
        )


class Checkpoint:
    """The tensors of a model directory by their names in the Hugging Face model. Files are mapped, not read ahead.

    A context manager: the files are closed at its end.
    """

    def __init__(
        self,
        directory: Path,
        unused_prefixes: tuple[str, ...] = (),
        progress: Progress | None = None,
        base_names: Sequence[str] = (BASE_NAME,),
        names: Names | None = None,
    ) -> None:
        """base_names: as in `shard_paths`; names: in place of `canonical_name`.

        Raises ModelError if there are no safetensors, or one of them is damaged or missing.
        """
        self.directory = directory
        self.passed_over: Counter[str] = Counter()  # tensors, by the prefix that they are unused for
        self._progress = progress
        self._names = names or canonical_name
        self._tensors: dict[str, StoredTensor] = {}
        self._loaded_bytes = 0
        self._closing = ExitStack()
        try:
            for file in self._open(base_names):
                self._add(file, unused_prefixes)
        except BaseException:
            self._closing.close()
            raise
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())  # of those that are used, as stored

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dtype(self, name: str) -> torch.dtype:
        return STORED_DTYPES[self._tensors[name].dtype]

    def stored_dtype(self, name: str) -> str:
        """The format's code: "F32", "I8"."""
        return self._tensors[name].dtype

    def check(
        self, expected: Mapping[str, tuple[int, ...]], packed: Mapping[str, ExpectedTensor] | None = None
    ) -> None:
        """Raise ModelError unless the checkpoint holds exactly these tensors: `expected` as floats in these shapes."""
        stored, packed = self._tensors, packed or {}
        required = expected.keys() | {name for name, tensor in packed.items() if not tensor.optional}
        misfits = {name: t for name, t in packed.items() if name in stored and not t.fits(stored[name])}
        found = {
            "missing": sorted(required - stored.keys()),
            "unexpected": sorted(stored.keys() - expected.keys() - packed.keys()),
            "of another shape": [
                f"{name} is {list(stored[name].shape)}, config.json makes it {list(shape)}"
                for name, shape in expected.items()
                if name in stored and stored[name].shape != shape
            ],
            "not floating point": [
                f"{name} is {stored[name].dtype}"
                for name in expected
                if name in stored and stored[name].dtype not in STORED_DTYPES
            ],
            "not as the quantisation lays them out": [tensor.misfit(stored[name]) for name, tensor in misfits.items()],
        }
        problems = [f"{len(names)} tensors {what}: {_listed(names)}" for what, names in found.items() if names]
        problems += sorted({tensor.hint for tensor in misfits.values() if tensor.hint})
        if problems:
            raise ModelError(
                f"{self.directory}: the weights do not fit config.json: {'; '.join(problems)}. "
                "Check that both are of the same model, and that the download is complete"
            )

    def stacked(self, parts: Sequence[tuple[str, Part]], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of parts of float tensors one after another, converted on the way: [N₁ + N₂ + …, C].

        Raises ModelError, here and in `dense`, naming a tensor with a value that is no finite number.
        """
        stored = [(self._tensors[name], part) for name, part in parts]
        shapes = [shape_of(tensor.shape, part) or (1,) for tensor, part in stored]
        result = empty_matrix((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype, device)
        start = 0
        for tensor, part in stored:
            first = start
            for piece in self._pieces(tensor, part):
                result[start : start + len(piece)].copy_(piece)
                start += len(piece)
            _check_finite(tensor, result[first:start])
        return result

    def dense(self, name: str, dtype: torch.dtype, device: torch.device, part: Part) -> Tensor:
        """Part of one float tensor, converted. On the CPU it may lie in the mapped file: not to be written to."""
        stored = self._tensors[name]
        pieces = [piece.to(device).to(dtype) for piece in self._pieces(stored, part)]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        _check_finite(stored, tensor)
        return tensor

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One tensor as it is stored. On the CPU it may lie in the mapped file: not to be written to."""
        stored = self._tensors[name]
        tensor = stored.file.raw(stored.name).to(device)
        self._count(stored.nbytes)
        return tensor

    def entry(self, name: str, index: int, device: torch.device) -> Tensor:
        """One entry of a tensor's first dimension, as it is stored."""
        (entry,) = self._pieces(self._tensors[name], (slice(index, index + 1),))
        return entry[0].to(device)

    def _pieces(self, stored: StoredTensor, part: Part) -> Iterator[Tensor]:
        num_read = 0
        for piece in map(torch.atleast_1d, stored.file.pieces(stored.name, part)):  # a number is a vector of one
            num_read += len(piece)
            yield piece
        experts = len(stored.shape) > 2 and bool(part)  # of which each is read by itself
        self._count(stored.nbytes // stored.shape[0] * num_read if experts else stored.nbytes)

    def _count(self, nbytes: int) -> None:
        self._loaded_bytes += nbytes
        if self._progress is not None:
            self._progress(self._loaded_bytes, self.nbytes)

    def _open(self, base_names: Sequence[str]) -> Iterator[TensorFile]:
        if self.directory.is_file():
            yield GGUFModel(self.directory)
            return
        for path in shard_paths(self.directory, base_names):
            yield SafetensorsFile(path, self._closing)

    def _add(self, file: TensorFile, unused_prefixes: tuple[str, ...]) -> None:
        for stored_name, shape, dtype, nbytes in file.entries():
            unused = next((prefix for prefix in unused_prefixes if stored_name.startswith(prefix)), None)
            if unused is not None:
                self.passed_over[unused] += 1
            if unused is not None or BUFFERS.fullmatch(stored_name):
                continue
            name = self._names(stored_name)
            if name is None:
                continue
            if name in self._tensors:
                other = self._tensors[name]
                raise ModelError(
                    f"{self.directory}: {name} is there twice: as {other.name} in {other.file.path.name} "
                    f"and as {stored_name} in {file.path.name}"
                )
            self._tensors[name] = StoredTensor(file, stored_name, shape, dtype, nbytes)


def _check_finite(stored: StoredTensor, converted: Tensor) -> None:
    """Raise ModelError if a value is not finite: it would make every answer of the model so."""
    if all_finite(converted):
        return
    path = stored.file.path
    if all(all_finite(piece) for piece in stored.file.pieces(stored.name, ())):
        raise ModelError(
            f"{path}: {stored.name} holds values that are too large for {converted.dtype}: choose bfloat16 or float32 "
            "as dtype"
        )
    raise ModelError(f"{path}: {stored.name} holds NaN or infinite values: it is damaged, fetch it again")


def shard_paths(directory: Path, base_names: Sequence[str] = (BASE_NAME,)) -> list[Path]:
    """The safetensors files that make up the model in `directory`. Raises ModelError if there are none.

    base_names: possible names without the suffix; the first that exists counts.
    """
    for name in base_names:
        if (directory / single_file(name)).exists():
            return [directory / single_file(name)]
        if (directory / index_file(name)).exists():
            return _indexed(directory / index_file(name))
    wanted = " nor ".join(file for name in base_names for file in (single_file(name), index_file(name)))
    hint = ""
    if others := _names(directory, "*.safetensors"):
        hint = f"; it has {_listed(others)}: if that is the whole model, rename it to {single_file(BASE_NAME)}"
    elif others := _names(directory, "*.bin", "*.pt", "*.pth"):
        hint = f"; it has {_listed(others)}, which may run code or hold another layout: convert it"
    elif others := _names(directory, f"*{SUFFIX}"):
        hint = f"; it has {_listed(others)}: name the file itself as the model"
    raise ModelError(f"{directory}: neither {wanted}{hint}")


def single_file(base_name: str) -> str:
    return f"{base_name}.safetensors"


def index_file(base_name: str) -> str:
    return f"{base_name}.safetensors.index.json"


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = [str(name) for name in weight_map.values()] if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{index}: weight_map must map each tensor to a file in the same directory")
    return [index.parent / name for name in sorted(set(names))]


def _names(directory: Path, *patterns: str) -> list[str]:
    return sorted(path.name for pattern in patterns for path in directory.glob(pattern))


def canonical_name(stored_name: str) -> str:
    """A tensor's name in the plain language model: "model.layers.0.…", "lm_head.weight"."""
    for prefix, replacement in PREFIXES:
        if stored_name.startswith(prefix):
            return replacement + stored_name.removeprefix(prefix)
    return stored_name


def aliased_name(aliases: Sequence[tuple[str, str]], stored_name: str) -> str:
    """`canonical_name`, with some parts of it replaced by what stands for them."""
    name = canonical_name(stored_name)
    for alias, ours in aliases:
        name = name.replace(alias, ours)
    return name


def _dims(shape: tuple[int | None, ...] | None) -> str:
    return f"[{', '.join('any' if length is None else str(length) for length in shape or ())}]"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
