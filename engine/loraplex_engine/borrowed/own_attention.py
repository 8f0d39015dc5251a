"""Attention of classes that do not call what is registered: the same queries, keys and values, handed to what is.

Each function makes what stands for the `forward` of one class's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon import modeling_falcon

from loraplex_engine.borrowed.attention import attend

Forward = Callable[..., tuple[Tensor, None]]


def alibi_slopes(num_heads: int, most: float, device: torch.device) -> Tensor:
    """The slope of each head's bias: powers of 2 ** (−most / heads) → float32 [H].  Source: ALiBi (arXiv 2108.12409)

    Where the heads are no power of two, those of the next one: every other first.
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = torch.pow(2.0, -torch.arange(1, power + 1, device=device) * (most / power))
    return slopes if power == num_heads else torch.cat((slopes[1::2], slopes[::2]))[:num_heads]


def _bloom(module: Any, device: torch.device) -> Forward:
    slopes = alibi_slopes(module.num_heads, 8, device)

    def forward(hidden_states: Tensor, residual: Tensor, **_: object) -> tuple[Tensor, None]:
        qkv = _grouped(module.query_key_value(hidden_states), module.num_heads, module)
        out, _weights = attend(module, *qkv, scaling=module.inv_norm_factor, slopes=slopes)
        return module.dense(out.flatten(2)) + residual, None

    return forward


def _falcon(module: Any, device: torch.device) -> Forward:
    groups = module.num_kv_heads  # 1 where all heads share keys and values
    slopes = alibi_slopes(module.num_heads, 8, device) * module.inv_norm_factor
    turned: Any = modeling_falcon.apply_rotary_pos_emb

    def forward(
        hidden_states: Tensor, alibi: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        q, k, v = _grouped(module.query_key_value(hidden_states), groups, module)
        settings: dict[str, Any] = {"scaling": module.inv_norm_factor}
        if alibi is None:
            q, k = turned(q, k, *position_embeddings)
        else:
            settings["slopes"] = slopes
        out, _weights = attend(module, q, k, v, **settings)
        return module.dense(out.flatten(2)), None

    return forward


def _mpt(module: Any, device: torch.device) -> Forward:
    slopes = alibi_slopes(module.n_heads, 8, device)

    def forward(hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
        heads = [_heads(part, module.head_dim) for part in qkv.chunk(3, dim=2)]
        out, _weights = attend(module, *heads, scaling=module.softmax_scale, slopes=slopes)
        return module.out_proj(out.flatten(2)), None

    return forward


def _gpt_neo(module: Any, device: torch.device) -> Forward:
    window = module.config.window_size if module.attention_type == "local" else None

    def forward(hidden_states: Tensor, *_args: object, **_: object) -> tuple[Tensor, None]:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        heads = [_heads(projection(hidden_states), module.head_dim) for projection in projections]
        out, _weights = attend(module, *heads, scaling=1.0, sliding_window=window)
        return module.out_proj(out.flatten(2)), None

    return forward


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[1, T, H·D] → [1, H, T, D]"""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def _grouped(qkv: Tensor, groups: int, module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection in which each group of heads has its own behind its queries."""
    heads = qkv.view(*qkv.shape[:2], groups, module.num_heads // groups + 2, module.head_dim)
    q, k, v = heads[:, :, :, :-2].flatten(2, 3), heads[:, :, :, -2], heads[:, :, :, -1]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


OWN_ATTENTION: Mapping[str, Callable[[Any, torch.device], Forward]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "MptAttention": _mpt,
    "GPTNeoSelfAttention": _gpt_neo,
}
# Its model converts a mask that it expects to have made, and makes a table of all positions for its attention.
WANTS_MASK = MAKES_TABLE = ("MptModel",)
TABLE = "build_mpt_alibi_tensor"


def replace_own_attention(model: nn.Module, device: torch.device) -> None:
    """Have every attention of a class in OWN_ATTENTION call what is registered, and no table made for it."""
    for module in model.modules():
        name = type(module).__name__
        if name in OWN_ATTENTION:
            module.forward = OWN_ATTENTION[name](module, device)
        if name in MAKES_TABLE:
            setattr(module, TABLE, _no_table)


def own_table_bytes(model: nn.Module) -> int:
    """What a class's own attention has made in every pass, for all positions that its configuration states."""
    makers: list[Any] = [each for each in model.modules() if type(each).__name__ in MAKES_TABLE]
    return sum(each.num_heads * each.config.max_seq_len * torch.float32.itemsize for each in makers)


def _no_table(*_: object, **__: object) -> Tensor:
    return torch.empty(0)


@contextmanager
def own_attention_again(model: nn.Module) -> Iterator[None]:
    """Have the classes attend as they do by themselves meanwhile."""
    changed = {**dict.fromkeys(OWN_ATTENTION, "forward"), **dict.fromkeys(MAKES_TABLE, TABLE)}
    modules = [(each, changed[name]) for each in model.modules() if (name := type(each).__name__) in changed]
    replaced = [(module, attribute, module.__dict__.pop(attribute)) for module, attribute in modules]
    try:
        yield
    finally:
        for module, attribute, ours in replaced:
            setattr(module, attribute, ours)
