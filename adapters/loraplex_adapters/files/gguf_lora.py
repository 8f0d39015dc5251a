"""llama.cpp's LoRA files, read as what PEFT would have saved: one file with the tensors and alpha.

B is scaled by alpha over the rank of each module, and not at all where alpha is 0, as llama.cpp does. A converted
rsLoRA adapter has no other mark: it is what its file says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import MAX_INVOCATION_TOKENS, LoRAConfig
from loraplex_adapters.files.gguf import GGUFError, GGUFHeader, read_gguf
from loraplex_adapters.files.gguf_names import ARCHITECTURES, LINEARS, NEIGHBOURED, module_name
from loraplex_adapters.files.names import PEFT_PREFIX
from loraplex_adapters.files.safetensors import Header, TensorEntry

GGUF_FILE = "adapter_model.gguf"
_TENSOR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<part>[ab])")
_EXPECTED = {"general.type": "adapter", "adapter.type": "lora"}


@dataclass(frozen=True, slots=True)
class _Modules:
    """Matches modules by their whole paths."""

    names: frozenset[str]

    @property
    def pattern(self) -> str:
        return "|".join(sorted(self.names))

    def matches(self, module: str) -> bool:
        return module in self.names


def read_lora(file: BufferedIOBase) -> tuple[LoRAConfig, Header]:
    """The settings and the tensors, by PEFT's names and from the file's beginning on.

    Raises AdapterRejected naming what is wrong, or is no linear of a decoder.
    """
    try:
        header = read_gguf(file)
    except GGUFError as error:
        raise AdapterRejected([f"{GGUF_FILE}: {error}"]) from error
    tensors, problems = {}, list(_wrong_kind(header.metadata))
    architecture = str(header.metadata.get("general.architecture"))
    for stored, tensor in header.tensors.items():
        name = _peft_name(architecture, stored)
        if name is None:
            problems.append(f"{stored}: no A or B of a linear that is known in architecture {architecture!r}")
        else:
            tensors[name] = TensorEntry(tensor.type.name, tensor.shape, (tensor.start, tensor.start + tensor.nbytes))
    if problems:
        raise AdapterRejected([f"{GGUF_FILE}: {problem}" for problem in problems])
    return _config(header, tensors, architecture), Header(tensors, 0, file.seek(0, 2))


def _wrong_kind(metadata: Mapping[str, object]) -> Iterator[str]:
    for key, expected in _EXPECTED.items():
        if metadata.get(key) != expected:
            yield f"{key} is {str(metadata.get(key))[:80]!r}, not {expected!r}: it is no LoRA adapter"
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        yield f"general.architecture is {str(architecture)[:80]!r}; the known ones are {known}: take PEFT's files"


def _peft_name(architecture: str, stored: str) -> str | None:
    found = _TENSOR.fullmatch(stored)
    module = None if found is None else module_name(architecture, found["module"], {})
    if found is None or module is None:
        return None
    is_linear = module == "lm_head" or module.endswith((*LINEARS.values(), "mlp.gate_up_proj"))
    return f"{PEFT_PREFIX}{module}.lora_{found['part'].upper()}.weight" if is_linear else None


def _config(header: GGUFHeader, tensors: Mapping[str, TensorEntry], architecture: str) -> LoRAConfig:
    modules: dict[int, set[str]] = defaultdict(set)  # by rank
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            modules[tensor.shape[0]].add(name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight"))
    by_rank = [(_Modules(frozenset(names)), rank) for rank, names in modules.items()]
    alpha, tokens = (
        header.metadata.get("adapter.lora.alpha", 0.0),
        header.metadata.get("adapter.alora.invocation_tokens", []),
    )
    if not isinstance(alpha, float) or not 0 <= alpha < float("inf"):
        raise AdapterRejected([f"{GGUF_FILE}: adapter.lora.alpha is {alpha!r}; it must be a number of at least 0"])
    if not isinstance(tokens, list) or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise AdapterRejected([f"{GGUF_FILE}: adapter.alora.invocation_tokens must be a list of token ids"])
    if len(tokens) > MAX_INVOCATION_TOKENS:
        raise AdapterRejected([f"{GGUF_FILE}: more than {MAX_INVOCATION_TOKENS} adapter.alora.invocation_tokens"])
    return LoRAConfig(
        rank=max(modules, default=1),
        alpha=alpha,
        use_rslora=False,
        rank_patterns=tuple(by_rank),
        alpha_patterns=() if alpha else tuple((names, float(rank)) for names, rank in by_rank),
        base_model=str(header.metadata.get("general.base_model.0.repo_url") or ""),
        target_modules=(),
        warnings=(),
        invocation_tokens=tuple(tokens),
        rows_neighboured=architecture in NEIGHBOURED,
    )
