"""Finds transformers' class for a config.json, and builds it without weights. Code of a checkpoint is never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_engine.checkpoint.model_config import NotBorrowedError

# Rotary embeddings that the classes compute anew from the longest sequence of a batch.
CHANGING_ROPES = ("dynamic", "longrope")
# Layers that attend to keys and values of every token, or of a window.
ATTENTION_LAYERS = frozenset(("attention", "full_attention", "sliding_attention"))
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Fields that say how transformers is to run a model, or who else is.
NOT_FOR_CLASSES = frozenset(
    (
        *("quantization_config", "compression_config", "auto_map", "_attn_implementation", "attn_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_labels"),
    )
)
# Fields from which configurations and classes make lists of layers, in the spellings of all families.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "attention_types")
TRANSPOSED = "Conv1D"  # a linear whose weight lies transposed
# Linears by their class's name: others may compute more than x Wᵀ + b.
LINEARS = ("Linear", "FalconLinear", TRANSPOSED)


def check_layers(raw: Mapping[str, object], num_tensors: int, where: str) -> None:
    """Raise NotBorrowedError for more layers than there are tensors, before lists are made of them."""
    for name in LAYER_COUNTS:
        for count in _integers(raw.get(name)):
            if count > num_tensors:
                raise NotBorrowedError(f"{where}: {name} is {count}, and the weights are {num_tensors} tensors")


def _integers(value: object) -> Iterator[int]:
    """Those in a value, and in its lists however deep."""
    values = [value]
    while values:
        each = values.pop()
        if isinstance(each, list):
            values.extend(each)
        elif isinstance(each, int):
            yield each


def class_of(raw: Mapping[str, object], where: str) -> tuple[type[Any], Any]:
    """The class for the contents of a config.json, and its configuration. Raises NotBorrowedError if there is none."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise NotBorrowedError(f"{where}: architectures is {architectures!r}; it must be a list of strings")
    if kind is None:
        kind = next((one for one, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in architectures), None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        stated = f"model_type {kind!r}" if kind is not None else f"{', '.join(architectures) or 'no architecture'}"
        raise NotBorrowedError(f"{where}: transformers {transformers.__version__} knows no {stated}")
    with errors_named(f"{where}: {kind} configuration"):
        config = CONFIG_MAPPING[kind].from_dict({name: raw[name] for name in raw if name not in NOT_FOR_CLASSES})
    _check_config(config, where)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if not isinstance(name, str):
        raise NotBorrowedError(f"{where}: transformers has no causal language model of model_type {kind!r}")
    if architectures and name not in architectures:
        raise NotBorrowedError(
            f"{where}: {', '.join(architectures)} is not {name}, the causal language model of {kind!r}"
        )
    return getattr(transformers, name), config


def _check_config(config: Any, where: str) -> None:
    if config.is_encoder_decoder:
        raise NotBorrowedError(f"{where}: {config.model_type} is an encoder-decoder, of which none is served")
    if config.get_text_config(decoder=True) is not config:
        raise NotBorrowedError(f"{where}: {config.model_type} wraps a text model among others: save that one by itself")
    if experts := next((name for name in EXPERTS if getattr(config, name, None)), None):
        raise NotBorrowedError(
            f"{where}: {experts} is {getattr(config, experts)}: experts are not linears of the class"
        )
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    if other := sorted(set(kinds) - ATTENTION_LAYERS):
        raise NotBorrowedError(f"{where}: some layers are {', '.join(other)}, which the paged cache does not serve")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind in CHANGING_ROPES:
            raise NotBorrowedError(
                f"{where}: rope_type {kind!r} makes one sequence's rows depend on the others' lengths"
            )


def build(cls: type[Any], config: Any, where: str) -> Any:
    """The class's module, its parameters without memory and its buffers as they are computed. For inference."""
    config._attn_implementation = "eager"  # what every class has; changed where it is called
    config.use_cache = False
    with errors_named(f"{where}: {cls.__name__} cannot be made of it"):
        return cls(config).eval().requires_grad_(False)


@contextmanager
def errors_named(what: str) -> Iterator[None]:
    """Raise NotBorrowedError, of what was tried, for errors of transformers' code: each class has its own."""
    try:
        yield
    except NotBorrowedError:
        raise
    except Exception as error:
        raise NotBorrowedError(f"{what}: {error}") from error


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Have modules made meanwhile keep their parameters on the meta device, and nothing initialise them."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        handle.remove()


def skeleton(cls: type[Any], config: Any, where: str) -> Any:
    """The class's module without any memory: its names and shapes, and what it calls."""
    with torch.device("meta"):
        return build(cls, config, where)
