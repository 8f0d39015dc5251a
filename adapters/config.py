"""adapter_config.json: parsed strictly, so that what cannot be served exactly is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from adapters.errors import AdapterRejected
from adapters.pattern import ModulePattern

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 4096  # a rank or alpha of its own for every module of a large model
MAX_REPORTED = 100  # characters of a value in a message

Number = TypeVar("Number", int, float)

# Fields that change nothing when the adapter runs: book-keeping, training, or advice about which modules were adapted
# (the tensors in the file say that, and must all bind).
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    )
)

# Fields that mean something when they are set, and what to do about it. Null, false and empty mean "not used".
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA is not supported",
    "arrow_config": "Arrow routing between adapters is not supported",
    "enable_lora": "merged q/k/v layers of PEFT 0.2 are not supported: train or convert it with a current PEFT",
    "kasa_config": "KaSA changes the base weights and is not supported",
    "layer_replication": "replicated layers make another base model: register the expanded model",
    "lora_bias": "a bias of lora_B is not supported",
    "megatron_config": "Megatron parallel layers are not supported: export the adapter with merged shards",
    "modules_to_save": "full copies of base modules are not supported: train with modules_to_save=None",
    "monteclora_config": "Monte Carlo LoRA is not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_dora": "DoRA is not supported: merge it, or train with use_dora=False",
    "use_qalora": "QA-LoRA pools the inputs of a layer and is not supported",
    "velora_config": "VeLoRA is not supported",
}

_UNDERSTOOD = frozenset(
    ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights")
)

# Initialisations that leave the base model as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from
# its weights, so that A and B alone are not the adapter.
_INIT_KEEPS_BASE = frozenset(("gaussian", "eva", "orthogonal", "mica"))


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """What adapter_config.json says about the arithmetic of an adapter."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[ModulePattern, int], ...]  # in the file's order: the first that matches counts
    alpha_patterns: tuple[tuple[ModulePattern, float], ...]
    base_model: str  # a hint for people: it is no identity. "" if absent
    target_modules: tuple[str, ...]  # advice
    warnings: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its path in the trained model ("model.layers.0.self_attn.q_proj")."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.matches(module)), self.rank)

    def alpha_of(self, module: str) -> float:
        return next((alpha for pattern, alpha in self.alpha_patterns if pattern.matches(module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """What B is multiplied by: alpha / rank, or with rsLoRA alpha / √rank; both are the module's own.

        Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
        """
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(raw: bytes) -> LoRAConfig:
    """Read adapter_config.json. Raises AdapterRejected naming every field that is wrong or cannot be served."""
    fields = _load_json(raw)
    _require_lora(fields)
    problems: list[str] = []
    for name in sorted(fields.keys() - _HARMLESS - _UNDERSTOOD):
        if _is_set(fields[name]):
            reason = _REFUSED.get(name, "unknown field: it may change what the adapter computes")
            problems.append(f"{name}={_show(fields[name])}: {reason}")
    reader = _Reader(fields, problems)
    config = LoRAConfig(
        rank=reader.number("r", 8, _rank),
        alpha=reader.number("lora_alpha", 8.0, _alpha),
        use_rslora=reader.flag("use_rslora"),
        rank_patterns=reader.patterns("rank_pattern", _rank),
        alpha_patterns=reader.patterns("alpha_pattern", _alpha),
        base_model=str(fields.get("base_model_name_or_path") or ""),
        target_modules=reader.names("target_modules"),
        warnings=tuple(reader.warnings()),
    )
    reader.check_bias()
    reader.check_init()
    if problems:
        raise AdapterRejected([f"adapter_config.json: {problem}" for problem in problems])
    return config


def _load_json(raw: bytes) -> dict[str, object]:
    if len(raw) > MAX_CONFIG_BYTES:
        _reject(f"{len(raw)} bytes: at most {MAX_CONFIG_BYTES} are allowed")
    if raw.startswith(b"version https://git-lfs"):
        _reject("this is a Git LFS pointer, not the file: fetch it with `git lfs pull`")
    try:
        fields = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text that could be sent on
    except (ValueError, RecursionError) as error:
        raise AdapterRejected([f"adapter_config.json: not valid JSON: {error}"]) from error
    if not isinstance(fields, dict):
        _reject(f"a JSON object is expected, not {type(fields).__name__}")
    return fields


def _require_lora(fields: dict[str, object]) -> None:
    """Say nothing about single fields of something that is no LoRA adapter of PEFT at all."""
    peft_type = fields.get("peft_type")
    if peft_type is None:
        _reject("peft_type is missing: this is not the config of a PEFT adapter")
    if peft_type != "LORA":
        _reject(f"peft_type={_show(peft_type)}: only LORA is supported")


def _reject(problem: str) -> NoReturn:
    raise AdapterRejected([f"adapter_config.json: {problem}"])


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return fields


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_set(value: object) -> bool:
    """Zero counts as set: it may well be a layer or a token."""
    return not (value is None or value is False or value in ("", [], {}))


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_REPORTED else text[:MAX_REPORTED] + "…"


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{_show(value)} is not a positive integer")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_show(value)} is not a number")
    try:
        alpha = float(value)
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise ValueError(f"{_show(value)} is not a finite number")
    return alpha


class _Reader:
    """Typed access to the fields; every problem is collected, none is raised."""

    def __init__(self, fields: dict[str, object], problems: list[str]) -> None:
        self._fields = fields
        self._problems = problems

    def number(self, name: str, default: Number, convert: Callable[[object], Number]) -> Number:
        if name not in self._fields:
            return default
        return self._converted(name, self._fields[name], convert, default)

    def flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            self._problems.append(f"{name}={_show(value)}: true or false is expected")
        return value is True

    def patterns(self, name: str, convert: Callable[[object], Number]) -> tuple[tuple[ModulePattern, Number], ...]:
        value = self._fields.get(name) or {}
        if not isinstance(value, dict):
            self._problems.append(f"{name}={_show(value)}: an object from pattern to number is expected")
            return ()
        if len(value) > MAX_PATTERNS:
            self._problems.append(f"{name}: {len(value)} patterns, at most {MAX_PATTERNS} are allowed")
            return ()
        found = []
        for text, entry in value.items():
            try:
                found.append((ModulePattern(text), convert(entry)))
            except ValueError as error:
                self._problems.append(f"{name}[{_show(text)}]: {error}")
        return tuple(found)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string (a regex, "all-linear")."""
        value = self._fields.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(sorted(value))
        self._problems.append(f"{name}={_show(value)}: a string or a list of strings is expected")
        return ()

    def check_bias(self) -> None:
        bias = self._fields.get("bias", "none")
        if bias not in ("none", None):
            self._problems.append(
                f"bias={_show(bias)}: trained biases of the base model are not supported: train with bias='none'"
            )

    def check_init(self) -> None:
        init = self._fields.get("init_lora_weights")
        if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INIT_KEEPS_BASE):
            return
        self._problems.append(
            f"init_lora_weights={_show(init)}: this initialisation changes the base weights, so that the saved A and B "
            "are not the whole adapter; save it with path_initial_model_for_weight_conversion to get plain LoRA"
        )

    def warnings(self) -> list[str]:
        task_type = self._fields.get("task_type")
        if task_type in (None, "CAUSAL_LM"):
            return []
        return [f"task_type={_show(task_type)}: the adapter was not trained to generate text"]

    def _converted(self, name: str, value: object, convert: Callable[[object], Number], default: Number) -> Number:
        try:
            return convert(value)
        except ValueError as error:
            self._problems.append(f"{name}: {error}")
            return default
