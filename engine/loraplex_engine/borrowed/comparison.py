"""Holds a loaded model against its class's own attention: the same states and logits, or it is not served.

A class may do what no probe sees, such as counting positions itself. Two short sequences, side by side and in chunks,
would then differ from one that the class computes by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraplex_engine.borrowed.attention import IMPLEMENTATION
from loraplex_engine.borrowed.classes import errors_named
from loraplex_engine.borrowed.model import BorrowedModel
from loraplex_engine.borrowed.own_attention import own_attention_again
from loraplex_engine.checkpoint.model_config import NotBorrowedError
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, Ops

TOKENS = 23
STRIDE = 7919  # between token ids: a prime
BLOCK_SIZE = 16
# Of the length of all states, and of all logits. In 16 bits each layer rounds in another order; what is computed
# wrongly is worth 0.3 on.
TOLERANCES = {torch.float32: 1e-3}
TOLERANCE_16_BITS = 0.1


@torch.inference_mode()
def compare(model: BorrowedModel, ops: Ops, where: str) -> None:
    """Raise NotBorrowedError if the model's states and logits are not those of its class."""
    count = min(TOKENS, model.config.max_position_embeddings)
    tokens = torch.arange(count, device=ops.device) * STRIDE % model.config.vocab_size
    name = model.config.architecture
    with errors_named(f"{where}: {name} with its own attention cannot be computed"):
        states, logits = _own_results(model.module, tokens)
    with errors_named(f"{where}: {name} with the paged cache cannot be computed"):
        found = [(each, model.logits(each)) for each in _our_states(model, ops, tokens)]
    for what, error in (
        ("states", max(_distance(each, states) for each, _ in found)),
        ("logits", max(_distance(each, logits) for _, each in found)),
    ):
        if not error <= TOLERANCES.get(model.dtype, TOLERANCE_16_BITS):
            raise NotBorrowedError(
                f"{where}: {name}'s {what} differ from those of its own attention by {error:.1e} of their length: it "
                "does something that the paged cache does not know"
            )


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Of the length of what is wanted. Two that are zero are equal."""
    return float((found.float() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _own_results(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the class computes with its own attention and masks → float32 states [T, C], float32 logits [T, V]"""
    states: list[Tensor] = []
    noting = module.get_decoder().register_forward_hook(lambda _, __, found: states.append(found.last_hidden_state[0]))
    module.config._attn_implementation = "sdpa" if module._supports_sdpa else "eager"
    try:
        with own_attention_again(module):
            logits: Tensor = module(input_ids=tokens[None], use_cache=False).logits[0]
        return states[0].float(), logits.float()
    finally:
        module.config._attn_implementation = IMPLEMENTATION
        noting.remove()


def _our_states(model: BorrowedModel, ops: Ops, tokens: Tensor) -> list[Tensor]:
    """Two sequences of these tokens, one of them in two chunks → [T, C] of each"""
    blocks = -(-len(tokens) // BLOCK_SIZE)
    facts = model.config
    kv = [ops.allocate_kv(2 * blocks, BLOCK_SIZE, facts.head_shape, model.dtype) for _ in range(facts.num_layers)]
    half = (len(tokens) + 1) // 2
    first = model.forward(_batch(tokens, ((0, 0, half),), blocks), kv)
    second = model.forward(_batch(tokens, ((0, half, len(tokens)), (1, 0, len(tokens))), blocks), kv)
    rest = len(tokens) - half
    return [torch.cat((first, second[:rest])), second[rest:]]


def _batch(tokens: Tensor, parts: tuple[tuple[int, int, int], ...], blocks: int) -> StepBatch:
    """A step of (sequence, first position, end) each, whose blocks lie one after another."""
    device = tokens.device
    positions = torch.cat([torch.arange(first, end, device=device) for _, first, end in parts])
    slots = [torch.arange(first, end, device=device) + number * blocks * BLOCK_SIZE for number, first, end in parts]
    starts = [0]
    for _, first, end in parts:
        starts.append(starts[-1] + end - first)
    tables = [[number * blocks + block for block in range(blocks)] for number, _, _ in parts]
    return StepBatch(
        token_ids=tokens[positions],
        positions=positions,
        attention=AttentionMetadata(
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([end for _, _, end in parts], dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            slot_mapping=torch.cat(slots),
            max_query_len=max(end - first for _, first, end in parts),
            max_seq_len=max(end for _, _, end in parts),
        ),
        lora=None,
        logits_rows=torch.arange(len(positions), device=device),
    )
