"""Decoding without the cost of launching: the forward pass of a step, captured once per batch size and replayed.

A step of decoding launches some dozen kernels a layer, each of which takes the CPU longer than a small model's kernel
takes the GPU. A captured graph launches them all at once. It reads its inputs from buffers at fixed addresses, so a
batch is copied into them and padded to the next captured size; a padded row stores nothing and attends to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.model import Model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LayerKV, LoraSegments, Ops

logger = logging.getLogger(__name__)


def batch_sizes(largest: int) -> list[int]:
    """The sizes to capture: few, and padding to the next never computes more than half again as many rows."""
    sizes = [1, 2, 3, 4, 6, 8]
    while sizes[-1] < largest:
        sizes += [sizes[-2] * 2, sizes[-1] * 2]
    return [size for size in sizes if size < largest] + [largest]


class DecodeInputs:
    """The tensors of a decoding step, at fixed addresses."""

    def __init__(self, most_rows: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_model_len = max_model_len
        self.token_ids = zeros(most_rows, dtype=torch.int64)
        self.positions = zeros(most_rows, dtype=torch.int64)
        self.slot_mapping = zeros(most_rows, dtype=torch.int64).fill_(-1)
        self.rows = torch.arange(most_rows, dtype=torch.int64, device=device)
        self.query_starts = torch.arange(most_rows + 1, dtype=torch.int32, device=device)
        self.seq_lens = zeros(most_rows, dtype=torch.int32)
        self.block_tables = zeros(most_rows, -(-max_model_len // block_size), dtype=torch.int32)
        self.segments = zeros(3, most_rows, dtype=torch.int32)  # slots, starts, ends

    def fill(self, batch: StepBatch, size: int) -> None:
        """Copy a batch of one token per sequence in, and pad it to `size` rows."""
        attention, rows = batch.attention, len(batch.token_ids)
        self.token_ids[:rows].copy_(batch.token_ids)
        self.positions[:rows].copy_(batch.positions)
        self.slot_mapping[:rows].copy_(attention.slot_mapping)
        self.slot_mapping[rows:size].fill_(-1)  # nowhere
        self.seq_lens[:rows].copy_(attention.seq_lens)
        self.seq_lens[rows:size].zero_()
        self.block_tables[:rows, : attention.block_tables.shape[1]].copy_(attention.block_tables)
        if batch.lora is not None:
            count = len(batch.lora.slots)
            for mine, theirs in zip(self.segments, (batch.lora.slots, batch.lora.starts, batch.lora.ends), strict=True):
                mine[:count].copy_(theirs)
            self.segments[1:, count:size].fill_(size)  # empty, and after all the others

    def batch(self, size: int, with_adapters: bool) -> StepBatch:
        """The first `size` rows. Each may be a segment of its own: the grids of a graph hold for the worst case."""
        slots, starts, ends = self.segments[:, :size]
        rows = tuple((-1, row, row + 1) for row in range(size))  # no slot: which it is, only the device says
        return StepBatch(
            token_ids=self.token_ids[:size],
            positions=self.positions[:size],
            attention=AttentionMetadata(
                query_starts=self.query_starts[: size + 1],
                seq_lens=self.seq_lens[:size],
                block_tables=self.block_tables[:size],
                slot_mapping=self.slot_mapping[:size],
                max_query_len=1,
                max_seq_len=self.max_model_len,
            ),
            lora=LoraSegments(rows, slots, starts, ends) if with_adapters else None,
            logits_rows=self.rows[:size],
        )


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [size, C]: where a replay leaves the hidden states
    lora_growth: int  # of the operations when it was captured


class DecodeGraphs:
    """The forward pass of every step in which each sequence has one new token.

    Steps with and without adapters have graphs of their own, so that steps without them do no work for adapters. A
    graph with adapters holds for all adapters that its tables have room for: their slots and ranks are read on the
    device.
    """

    def __init__(
        self,
        model: Model,
        ops: Ops,
        kv: Sequence[LayerKV],
        inputs: DecodeInputs,
        max_adapter_rank: int,
    ) -> None:
        """Capture nothing yet. The graphs will hold for adapters of up to `max_adapter_rank`."""
        self.device = ops.device
        self._model = model
        self._ops = ops
        self._kv = kv
        self._inputs = inputs
        self._sizes = batch_sizes(len(inputs.token_ids))
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, bool], _Captured] = {}
        reserve_adapters(model, max_adapter_rank)

    def capture_all(self) -> None:
        """Capture the largest size first: the smaller ones then find all their memory in the pool."""
        for size in reversed(self._sizes):
            self.capture(size)
        logger.info("captured CUDA graphs of decoding steps of %s sequences", self._sizes)

    def capture(self, size: int) -> None:
        """Capture the graphs of one batch size, with adapters and without."""
        for with_adapters in (True, False):
            self._captured[size, with_adapters] = self._capture(size, with_adapters)

    def forward(self, batch: StepBatch) -> Tensor:
        """The hidden states of every row → [T, C], valid until the next call. Each sequence has one token in `batch`,
        and the logits of all are needed, in order."""
        rows, with_adapters = len(batch.token_ids), batch.lora is not None
        size = next(size for size in self._sizes if size >= rows)
        self._inputs.fill(batch, size)
        captured = self._captured[size, with_adapters]
        if with_adapters and captured.lora_growth != self._ops.lora_growth:  # a table had to widen after all
            captured = self._captured[size, with_adapters] = self._capture(size, with_adapters)
        captured.graph.replay()
        return captured.hidden[:rows]

    @torch.inference_mode()
    def _capture(self, size: int, with_adapters: bool) -> _Captured:
        batch = self._inputs.batch(size, with_adapters)
        # Once before, on another stream: kernels get compiled and libraries get their workspaces, neither of which may
        # happen while capturing. What it stores in the cache, the replay stores again.
        stream = torch.cuda.Stream(self._ops.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(self._ops.device))
        with torch.cuda.stream(stream):
            self._model.forward(batch, self._kv)
        torch.cuda.current_stream(self._ops.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only of this thread: the adapters' loaders may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._model.forward(batch, self._kv)
        return _Captured(graph, hidden, self._ops.lora_growth)


def reserve_adapters(model: Model, max_rank: int) -> None:
    """Make the table of every linear wide enough for any adapter of up to that rank."""
    for linear, num_slices in model.adapted_linears():
        linear.table.reserve(num_slices, max_rank)


def decode_graphs(
    model: Model, ops: Ops, kv: Sequence[LayerKV], config: EngineConfig, max_model_len: int
) -> DecodeGraphs | None:
    """Graphs to be captured; None: the model or the operations cannot be captured, or no graphs are wanted."""
    if not (config.cuda_graphs and ops.capturable and model.capturable):
        return None
    inputs = DecodeInputs(config.most_drawn, max_model_len, kv[0].block_size, ops.device)
    return DecodeGraphs(model, ops, kv, inputs, config.max_adapter_rank)
