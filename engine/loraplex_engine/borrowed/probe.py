"""Finds out what a class does by calling it once without memory: its layers' attention, and that no more is in it
than the paged cache computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loraplex_engine.borrowed.attention import LAYER, AttentionShape, attend
from loraplex_engine.borrowed.classes import LINEARS, errors_named
from loraplex_engine.borrowed.own_attention import replace_own_attention
from loraplex_engine.checkpoint.model_config import NotBorrowedError

PROBE = "loraplex_probe"  # what a configuration calls the attention of a probe
TOKENS = 37  # no number of heads: which dimension counts tokens is told by it
# Settings of a call that change no result, or that say again what is known.
HARMLESS = frozenset(
    (
        *("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"),
        *("cache", "past_key_values", "past_key_value", "position_embeddings", "layer_idx", "return_dict"),
        *("output_router_logits", "num_items_in_batch", "s_aux"),
    )
)
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class BorrowedLayer:
    """The attention of one layer."""

    module: str  # its path in the model
    shape: AttentionShape
    window: int | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a class was seen to do."""

    layers: tuple[BorrowedLayer, ...]  # in order
    norms: tuple[str, ...]  # paths of norms of the rows or of their heads, which have a weight


class _Mask:
    """What a class asks of a mask that it has made: which window, or why it is no plain causal one."""

    def __init__(self, window: int | None, plain: bool) -> None:
        self.window = window
        self.plain = plain


def probe(model: Any, where: str) -> Found:
    """See what a model without memory does.

    Raises NotBorrowedError if it does what we do not.
    """
    layers: list[BorrowedLayer] = []
    norms: list[str] = []
    calls = _Calls(layers, where)
    for name, module in model.named_modules():
        setattr(module, LAYER, calls.of(name))
        if type(module).__name__ in LINEARS:
            module.register_forward_hook(partial(_check_rows, f"{where}: {name}"))
        if _is_norm(module):
            module.register_forward_hook(partial(_note_norm, norms, name))
    replace_own_attention(model, META)
    model.config._attn_implementation = PROBE
    ids = torch.zeros((1, TOKENS), dtype=torch.int64, device=META)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if takes_positions(model):
        inputs["position_ids"] = ids
    # Whatever the class does may have no meaning without memory.
    with errors_named(f"{where}: {type(model).__name__} cannot be followed"), torch.inference_mode(), META:
        logits = model(**inputs, use_cache=False).logits
    _check(model, layers, logits, where)
    return Found(tuple(layers), tuple(dict.fromkeys(norms)))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has what norms have: a weight by columns, perhaps a bias, and nothing else."""
    weight, own = module._parameters.get("weight"), {name for name, _ in module.named_parameters()}
    return weight is not None and weight.dim() == 1 and own <= {"weight", "bias"} and not list(module.buffers())


def _check_rows(which: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Raise NotBorrowedError unless a linear is given each token once: adapters go by rows."""
    rows = output.numel() // output.shape[-1]
    if rows != TOKENS:
        raise NotBorrowedError(f"{which} is given {rows} rows for {TOKENS} tokens: adapters could not tell them apart")


def _note_norm(norms: list[str], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    shape, width = output.shape, len(module.get_parameter("weight"))
    if len(inputs) == 1 and inputs[0].shape == shape and shape[:2] == (1, TOKENS) and shape[-1] == width:
        norms.append(name)


def takes_positions(model: Any) -> bool:
    """Whether a class is told positions. One whose attention is by distance alone need not be."""
    return "position_ids" in inspect.signature(model.get_decoder().forward).parameters


def _check(model: Any, layers: list[BorrowedLayer], logits: Tensor, where: str) -> None:
    name, wanted = type(model).__name__, model.config.num_hidden_layers
    if len(layers) != wanted:
        raise NotBorrowedError(
            f"{where}: {len(layers)} of {name}'s {wanted} layers have an attention that can be replaced: the others "
            "keep a state of their own, or attend in their own way"
        )
    if not takes_positions(model) and not all(layer.shape.alibi for layer in layers):
        raise NotBorrowedError(f"{where}: {name} takes no position_ids: it counts positions in its own way")
    if len({layer.module for layer in layers}) != len(layers):
        raise NotBorrowedError(f"{where}: {name} calls one attention several times in a pass")
    if len({layer.shape for layer in layers}) > 1:
        raise NotBorrowedError(
            f"{where}: {name} has layers with different heads: {sorted({str(o.shape) for o in layers})}"
        )
    if tuple(logits.shape[:2]) != (1, TOKENS):
        raise NotBorrowedError(f"{where}: {name} gives logits {list(logits.shape)} for {TOKENS} tokens")
    if model.get_decoder() is model or model.get_output_embeddings() is None:
        raise NotBorrowedError(f"{where}: {name} has no decoder or no head that can be told apart")


class _Calls:
    """Attention that only notes how it was called."""

    def __init__(self, layers: list[BorrowedLayer], where: str) -> None:
        self._layers = layers
        self._where = where

    def of(self, module: str) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None, **settings: Any) -> Tensor:
            for name in ("scaling", "softcap"):
                if not isinstance(settings.pop(name, None), int | float | None):
                    raise self._error(module, f"{name} is no number")
            window = settings.pop("sliding_window", None)
            alibi = settings.pop("slopes", None) is not None
            if settings.pop("is_causal", True) is False:
                raise self._error(module, "is not causal")
            unknown = sorted(name for name in settings.keys() - HARMLESS if settings[name] is not None)
            if unknown:
                raise self._error(module, f"is given {', '.join(unknown)}")
            if attention_mask is not None:
                window = self._window(module, attention_mask)
            (_, heads, tokens, width), (_, kv_heads, _, _) = query.shape, key.shape
            if key.shape[1:] != (kv_heads, tokens, width) or value.shape[1:3] != (kv_heads, tokens) or heads % kv_heads:
                raise self._error(module, f"has queries {list(query.shape)} and keys {list(key.shape)}")
            shape = AttentionShape(heads, kv_heads, width, value.shape[3], alibi)
            self._layers.append(BorrowedLayer(module, shape, window))
            return query.new_empty((1, tokens, heads, value.shape[3]))

        return call

    def _window(self, module: str, mask: object) -> int | None:
        asked = getattr(mask, LAYER, None)
        if not isinstance(asked, _Mask) or not asked.plain:
            raise self._error(module, "has a mask of its own, which is not plainly causal")
        return asked.window

    def _error(self, module: str, problem: str) -> NotBorrowedError:
        return NotBorrowedError(f"{self._where}: the attention of {module} {problem}: the paged cache has no such")


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **_: object) -> Tensor:
    """What stands for a mask: it says which one was asked for."""
    mask = torch.ones((1, 1, TOKENS, TOKENS), dtype=torch.bool, device=META)
    setattr(mask, LAYER, _Mask(local_size, _is_plain(mask_function, local_size)))
    return mask


def _is_plain(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether the function is causal, with a window: tried where others would differ."""
    edges = {0, 1, *(window + near for near in (-1, 0, 1) if window is not None)}
    with torch.device("cpu"):
        places = torch.tensor(sorted({2**power + near for power in range(18) for near in (-1, 0)} | edges))
        q, k = places[:, None], places[None, :]
        wanted = (k <= q) if window is None else (k <= q) & (k > q - window)
        try:
            return bool((mask_function(0, 0, q, k) == wanted).all())
        except Exception:  # one that reads other tensors
            return False


AttentionInterface.register(PROBE, attend)
AttentionMaskInterface.register(PROBE, _mask)
