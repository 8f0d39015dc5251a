"""Adapter directories under allow-listed roots, checked before a single tensor is read.

An adapter directory holds adapter_config.json and adapter_model.safetensors, or adapter_model.gguf alone, and maybe
tokenizer files; no other file is read. Files from outside count as hostile: every size is capped before anything is
parsed.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path

from loraplex_adapters.errors import AdapterRejected, SourceNotAllowed
from loraplex_adapters.files.config import MAX_CONFIG_BYTES, LoRAConfig, parse_config
from loraplex_adapters.files.gguf_lora import GGUF_FILE, read_lora
from loraplex_adapters.files.names import LoraTensorName, split_tensor_names
from loraplex_adapters.files.safetensors import Header, TensorEntry, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# How its text is tokenised, and its bytes at most. What it needs of them is for the service to say.
TEXT_FILES: Mapping[str, int] = {
    "added_tokens.json": 8 << 20,
    "chat_template.jinja": 4 << 20,
    "special_tokens_map.json": 8 << 20,
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 8 << 20,
}
MAX_WEIGHT_BYTES = 16 << 30
MAX_REFERENCE_LENGTH = 1024
FILES = (CONFIG_FILE, WEIGHTS_FILE, GGUF_FILE, *TEXT_FILES)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HASH_CHUNK = 1 << 20


class AdapterSource:
    """Turns a reference from a request into a directory, if the operator allows it."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """`roots`: the allowed directories. Raises OSError for one that does not exist."""
        self.roots = tuple(root.resolve(strict=True) for root in roots)

    def resolve(self, reference: str) -> Path:
        """The adapter directory that `reference` names: a path relative to a root ("team/legal-v2"), first root first.

        An absolute path or file:// URI is accepted if it lies under a root. It may be written in any way, and links are
        followed, but it must end under a root. Raises SourceNotAllowed; which files exist outside the roots cannot be
        told from it.
        """
        if len(reference) > MAX_REFERENCE_LENGTH:
            raise SourceNotAllowed(f"source of {len(reference)} characters: at most {MAX_REFERENCE_LENGTH} are allowed")
        path = reference.removeprefix("file://")
        candidates = [_under(root, path) for root in self.roots]
        for directory in candidates:
            if directory is not None and directory.is_dir():
                return directory
        raise SourceNotAllowed(
            f"source {reference[:200]!r}: no such directory under the allowed roots; give a path relative to one of "
            "adapter_roots or an absolute one, or upload the adapter"
        )


def _under(root: Path, path: str) -> Path | None:
    """`path`, absolute or below `root`, with links followed; None: it, or a file in it, leads out of the root."""
    try:
        directory = root.joinpath(path).resolve()
        files = [(directory / name).resolve() for name in FILES]
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that cannot be
        return None
    # The files of a snapshot in the hub's cache are links to what lies beside all snapshots.
    allowed = (root, root.parent / "blobs") if root.name == "snapshots" else (root,)
    inside = directory != root and directory.is_relative_to(root)
    return directory if inside and all(any(file.is_relative_to(place) for place in allowed) for file in files) else None


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """The facts about an adapter that need no loading."""

    digest: str  # hex SHA-256 over config, weights and the files of its text
    text_digest: str  # over the last alone; "": there are none
    config: LoRAConfig
    module_ranks: Mapping[str, int]  # by module path in the trained model
    target_modules: tuple[str, ...]  # short names, sorted: "q_proj", …
    size_bytes: int  # of the tensors in the file

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.module_ranks.values())


class ReceivedDigest:
    """The digest of files that come one after the other, made while they come: nothing has to be read again for it."""

    def __init__(self) -> None:
        self._config = bytearray()
        self._weights: hashlib._Hash | None = None
        self._texts: dict[str, hashlib._Hash] = {}
        self._is_late = False  # the config came behind the weights, which are hashed behind it

    def add(self, name: str, chunk: bytes) -> None:
        """Note the next bytes of a file. Files come whole, and each once."""
        if name == CONFIG_FILE:
            self._is_late |= self._weights is not None
            self._config += chunk
        elif name == WEIGHTS_FILE:
            self._weights = self._weights or begin_digest(bytes(self._config))
            self._weights.update(chunk)
        elif name in TEXT_FILES:
            self._texts.setdefault(name, hashlib.sha256()).update(chunk)

    def digests(self) -> tuple[str, str] | None:
        """That of all files and that of the text's; None: the files have to be read for it."""
        if self._weights is None or not self._config or self._is_late:
            return None
        text = _digest_of_texts({name: hasher.hexdigest() for name, hasher in self._texts.items()})
        return with_text(self._weights.hexdigest(), text), text


def describe(directory: Path, received: ReceivedDigest | None = None) -> AdapterDescription:
    """Check an adapter's files as far as possible without its base model.

    Reads every byte once, for the digest, unless `received` knows it: call it in a thread that may block. Raises
    AdapterRejected, OSError.
    """
    config_bytes = read_config_bytes(directory)
    known = None if received is None else received.digests()
    with open_weights(directory) as file:
        config, header = read_settings(config_bytes, file)
        if known is None:
            file.seek(0)
            text = text_digest(directory)
            known = digest_of(config_bytes, iter(lambda: file.read(_HASH_CHUNK), b""), text), text
    digest, text = known
    ranks, problems = module_ranks(header.tensors, config)
    if problems:
        raise AdapterRejected(problems)
    short = {module.rpartition(".")[2] for module in ranks}
    return AdapterDescription(digest, text, config, ranks, tuple(sorted(short)), header.data_bytes)


def required_files(directory: Path) -> tuple[str, ...]:
    """The names of the files that an adapter's directory must hold: those that PEFT writes, or llama.cpp's one."""
    is_gguf = os.path.lexists(directory / GGUF_FILE) and not os.path.lexists(directory / CONFIG_FILE)
    return (GGUF_FILE,) if is_gguf else (CONFIG_FILE, WEIGHTS_FILE)


def weights_file(directory: Path) -> Path:
    """The file that has the tensors."""
    return directory / required_files(directory)[-1]


def read_settings(config: bytes | None, file: BufferedIOBase) -> tuple[LoRAConfig, Header]:
    """What the config's bytes, if there is one, and the header of the weights say. Raises AdapterRejected."""
    return read_lora(file) if config is None else (parse_config(config), read_header(file))


def check_there(directory: Path) -> None:
    """Raise AdapterRejected if the directory lacks an adapter's files; the message says what is there instead."""
    read_config_bytes(directory)
    open_weights(directory).close()


def digest(directory: Path) -> str:
    """Hex SHA-256 over the content of an adapter: the bytes of its config, of its weights and of its text's files."""
    with open_weights(directory) as file:
        weights = iter(lambda: file.read(_HASH_CHUNK), b"")
        return digest_of(read_config_bytes(directory), weights, text_digest(directory))


def text_digest(directory: Path) -> str:
    """Hex SHA-256 over the names and the content of the files of its text; "" if there are none.

    Raises AdapterRejected for one that is too large or no plain file, OSError.
    """
    found: dict[str, str] = {}
    for name, max_bytes in TEXT_FILES.items():
        if os.path.lexists(directory / name):
            with _open(directory, name, max_bytes) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digest_of_texts(found)


def _digest_of_texts(digests: Mapping[str, str]) -> str:
    lines = [f"{name} {digests[name]}\n" for name in TEXT_FILES if name in digests]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def fingerprint(directory: Path) -> str | None:
    """Sizes and times of an adapter's files; None: they are missing. A changed fingerprint means changed files."""
    try:
        found = [(directory / name).stat() for name in required_files(directory)]
        found += [(directory / name).stat() for name in TEXT_FILES if (directory / name).exists()]
    except OSError:
        return None
    return " ".join(f"{status.st_size}:{status.st_mtime_ns}" for status in found)


def digest_of(config: bytes | None, weights: Iterable[bytes | memoryview], text: str = "") -> str:
    """The digest from the config's bytes, the weights' bytes in pieces of any length, and the text digest."""
    hasher = begin_digest(config)
    for chunk in weights:
        hasher.update(chunk)
    return with_text(hasher.hexdigest(), text)


def begin_digest(config: bytes | None) -> hashlib._Hash:
    """The hasher of a digest, to be updated with the weights' bytes; see `digest_of`."""
    config = b"" if config is None else config
    hasher = hashlib.sha256(len(config).to_bytes(8, "little"))  # so that no byte can move from one file to the other
    hasher.update(config)
    return hasher


def with_text(digest: str, text: str) -> str:
    """The digest of all of an adapter's files, from that of config and weights and the text digest."""
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest() if text else digest


def module_ranks(tensors: Mapping[str, TensorEntry], config: LoRAConfig) -> tuple[dict[str, int], list[str]]:
    """The rank of each adapted module by the shapes of its A, and what is wrong with the names or shapes.

    Of a parameter of all experts A has that rank for each: how many there are only the model says, and the largest rank
    that the config states is taken.
    """
    split = split_tensor_names(tensors)
    problems = split.problems
    most = config.highest_rank if config.target_parameters else math.inf
    ranks = {
        name.module: int(min(_rank(name, tensors[name.key], problems), most))
        for name in split.names
        if name.part in ("A", "embedding_A")
    }
    if not ranks and not problems:
        problems.append(f"{WEIGHTS_FILE}: it holds {split.nothing_held}")
    return ranks, problems


def _rank(name: LoraTensorName, entry: TensorEntry, problems: list[str]) -> int:
    if len(entry.shape) != 2 or entry.shape[0] == 0:
        sharded = "; DeepSpeed ZeRO-3 and FSDP leave this when the adapter is saved without being gathered"
        problems.append(
            f"{name.key}: shape {list(entry.shape)}, expected [rank, inputs] with rank > 0"
            f"{sharded if entry.shape == (0,) else ''}"
        )
        return 0
    return entry.shape[0]


def read_config_bytes(directory: Path) -> bytes | None:
    """The bytes of adapter_config.json; None: a GGUF file is there instead.

    Raises AdapterRejected if it is missing or too large.
    """
    if CONFIG_FILE not in required_files(directory):
        return None
    with _open(directory, CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def open_weights(directory: Path) -> BufferedReader:
    """Open the file of the tensors for reading. Raises AdapterRejected if it is missing or no plain file."""
    path = weights_file(directory)
    if not path.exists():
        _explain_missing_weights(directory)
    return _open(directory, path.name, MAX_WEIGHT_BYTES)


def _explain_missing_weights(directory: Path) -> None:
    try:
        others = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise AdapterRejected([f"{directory.name}: cannot be read: {error.strerror}"]) from error
    pickled = [name for name in others if name.endswith(_PICKLED)]
    if pickled:
        raise AdapterRejected(
            [f"{pickled[0]}: pickled weights can run code when they are read: safetensors only; convert it first"]
        )
    if any(name.endswith(".safetensors") or name.endswith(".safetensors.index.json") for name in others):
        raise AdapterRejected([f"{WEIGHTS_FILE} is missing: weights under another name or in shards are not read"])


def _open(directory: Path, name: str, max_bytes: int) -> BufferedReader:
    """Open a plain file of the directory.

    Opened without waiting and checked afterwards on the open file, so that a pipe cannot hang the reader and nothing
    can be swapped in between.
    """
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterRejected([f"{name} is missing"]) from error
    status = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = f"{name} is not a plain file"
    elif status.st_size > max_bytes:
        problem = f"{name}: {status.st_size} bytes, at most {max_bytes} are allowed"
    if problem:
        os.close(descriptor)
        raise AdapterRejected([problem])
    return os.fdopen(descriptor, "rb")
