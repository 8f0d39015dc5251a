"""adapter_config.json, parsed strictly: a setting that cannot be served exactly is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, TypeVar

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.pattern import ModulePattern

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 4096  # enough for one pattern per module of a large model
MAX_TOKEN_IDS = 1 << 20  # of trained tokens
MAX_INVOCATION_TOKENS = 1024
MAX_REPORTED = 100  # characters of a value in a message

Number = TypeVar("Number", int, float)

# Fields that change nothing when the adapter runs: book-keeping, training, or advice about which modules were adapted
# (the tensors in the file say that, and must all bind).
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lora_plus_lr_ratio",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    )
)

# Fields that mean something when they are set, and what to do about it. Null, false and empty mean "not used".
_REFUSED = {
    "arrow_config": "Arrow routing between adapters is not supported",
    "enable_lora": "merged q/k/v layers of PEFT 0.2 are not supported: train or convert it with a current PEFT",
    "kasa_config": "KaSA changes the base weights and is not supported",
    "layer_replication": "replicated layers make another base model: register the expanded model",
    "megatron_config": "Megatron parallel layers are not supported: export the adapter with merged shards",
    "monteclora_config": "Monte Carlo LoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QA-LoRA pools the inputs of a layer and is not supported",
    "velora_config": "VeLoRA is not supported",
}

_UNDERSTOOD = frozenset(
    (
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    )
)

# Initialisations that leave the base model as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from
# its weights, so that A and B alone are not the adapter.
_INIT_KEEPS_BASE = frozenset(("gaussian", "eva", "orthogonal", "mica"))


class Matching(Protocol):
    """What some modules' paths match."""

    @property
    def pattern(self) -> str: ...  # for people

    def matches(self, module: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """The settings of an adapter that affect the arithmetic of an adapter."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[Matching, int], ...]  # in the file's order: the first that matches counts
    alpha_patterns: tuple[tuple[Matching, float], ...]
    base_model: str  # a hint for people: it is no identity. "" if absent
    target_modules: tuple[str, ...]  # advice, and so is the next
    warnings: tuple[str, ...]
    use_dora: bool = False
    lora_bias: bool = False  # lora_B has a bias
    trains_bias: bool = False  # of the base's linears
    modules_to_save: tuple[str, ...] = ()  # trained whole: the ends of module paths
    trained_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # ids by the end of a module path
    ensure_weight_tying: bool = False  # with a tied head, the tensors trained on head and embedding are tied too
    invocation_tokens: tuple[int, ...] = ()  # activated LoRA: it applies from their last occurrence in the prompt on
    rows_neighboured: bool = (
        False  # of B for queries and keys: partners of both halves of a head lie side by side (GGUF)
    )
    target_parameters: tuple[str, ...] = ()  # parameters of modules, such as those of all experts
    task_type: str = ""  # what it was trained for, as PEFT names it; "" if absent

    @property
    def highest_rank(self) -> int:
        """The largest that a module may have."""
        return max((self.rank, *(rank for _, rank in self.rank_patterns)))

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its path in the trained model ("model.layers.0.self_attn.q_proj")."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.matches(module)), self.rank)

    def alpha_of(self, module: str) -> float:
        return next((alpha for pattern, alpha in self.alpha_patterns if pattern.matches(module)), self.alpha)

    def trains_parameter(self, path: str) -> bool:
        """Whether a parameter ("model.layers.0.mlp.gate.weight") was trained by its own name."""
        return f".{path}".endswith(tuple(f".{end}" for end in self.target_parameters))

    def scale_of(self, module: str) -> float:
        """The factor of B: alpha / rank, or with rsLoRA alpha / √rank, both of the module itself.

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
        use_dora=reader.flag("use_dora"),
        lora_bias=reader.flag("lora_bias"),
        trains_bias=reader.trains_bias(),
        modules_to_save=reader.names("modules_to_save"),
        trained_tokens=reader.trained_tokens(),
        ensure_weight_tying=reader.flag("ensure_weight_tying"),
        invocation_tokens=reader.token_ids("alora_invocation_tokens", MAX_INVOCATION_TOKENS),
        target_parameters=reader.names("target_parameters", MAX_PATTERNS),
        task_type=str(fields.get("task_type") or ""),
    )
    reader.check_init()
    problems.extend(_undefined(config))
    if problems:
        raise AdapterRejected([f"adapter_config.json: {problem}" for problem in problems])
    return config


def _undefined(config: LoRAConfig) -> Iterator[str]:
    """Problems with combinations of settings that PEFT does not define either."""
    if config.use_dora and config.lora_bias:
        yield "lora_bias=true: DoRA has no bias of lora_B"
    beside = {
        "use_dora": config.use_dora,
        "modules_to_save": bool(config.modules_to_save),
        "bias": config.trains_bias,
        "trainable_token_indices": bool(config.trained_tokens),
    }
    for name, is_set in beside.items():
        if config.invocation_tokens and is_set:
            yield f"{name}: not defined beside alora_invocation_tokens, which leave the tokens before them to the base"


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
    """Raise AdapterRejected at once if this is no LoRA adapter of PEFT: single fields then mean nothing."""
    peft_type = fields.get("peft_type")
    if peft_type is None and fields.keys() & {"fine_tune_type", "lora_parameters"}:
        _reject("peft_type is missing: this is an adapter of MLX-LM, laid out in another way: convert it to PEFT")
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
    """Whether a field is set. Zero counts as set: it may be a layer or a token."""
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

    def names(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """A list of strings, or one string (a regex, "all-linear")."""
        value = self._fields.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and most is not None and len(value) > most:
            self._problems.append(f"{name}: {len(value)} names, at most {most} are allowed")
            return ()
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(sorted(value))
        self._problems.append(f"{name}={_show(value)}: a string or a list of strings is expected")
        return ()

    def token_ids(self, name: str, most: int) -> tuple[int, ...]:
        return self._token_ids(name, self._fields.get(name), most)

    def trained_tokens(self) -> dict[str, tuple[int, ...]]:
        """The trained token ids, by module; a plain list means the embedding."""
        name = "trainable_token_indices"
        value = self._fields.get(name) or {}
        if isinstance(value, dict) and len(value) <= MAX_PATTERNS:
            named = [(module, f"{name}[{_show(module)}]", ids) for module, ids in value.items()]
            return {module: self._token_ids(where, ids, MAX_TOKEN_IDS) for module, where, ids in named}
        return {"embed_tokens": self._token_ids(name, value, MAX_TOKEN_IDS)}

    def trains_bias(self) -> bool:
        bias = self._fields.get("bias", "none")
        if bias not in ("none", None, "all", "lora_only"):
            self._problems.append(f"bias={_show(bias)}: one of none, all and lora_only is expected")
        return bias in ("all", "lora_only")

    def _token_ids(self, name: str, value: object, most: int) -> tuple[int, ...]:
        if not _is_set(value):
            return ()
        if not isinstance(value, list) or not all(type(entry) is int and entry >= 0 for entry in value):
            self._problems.append(f"{name}={_show(value)}: a list of token ids is expected")
        elif len(value) > most:
            self._problems.append(f"{name}: {len(value)} token ids, at most {most} are allowed")
        else:
            return tuple(value)
        return ()

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
