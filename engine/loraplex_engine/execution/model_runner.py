"""The arithmetic of a step: load the model, size the cache, execute plans."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from loraplex_engine.checkpoint.memory import populate
from loraplex_engine.execution.batch import StepBatch, narrowed, num_prompt_logprob_rows
from loraplex_engine.execution.cuda_graph import DecodeGraphs, decode_graphs
from loraplex_engine.execution.device import described, free_bytes, loading_turn, select_device
from loraplex_engine.execution.kv_cache import block_bytes, create_kv_cache, stored_dtype
from loraplex_engine.execution.memory_profile import cache_budget
from loraplex_engine.execution.sampler import Sampler, describe
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import ModelLimits, TokenLogprobs
from loraplex_engine.models import LanguageModel, load_model
from loraplex_engine.scheduling.step import SampledToken, StepPlan, StepResult
from loraplex_kernels.ops import LoraSegments, Ops
from loraplex_kernels.selection import select_ops

logger = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 128  # rows of the vocabulary held at once: 128 x 128k floats are 64 MiB


class ModelRunner:
    """Owns the model and its cache on one device. Knows no policy: it executes the plan that it is given."""

    def __init__(self, model: LanguageModel, ops: Ops, config: EngineConfig) -> None:
        """Profile memory and allocate the cache. Raises ValueError if the budget holds not even one sequence."""
        self.model = model
        self.ops = ops
        self.block_size = config.block_size
        self.sampler = Sampler()
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        if self.max_model_len > model.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len {self.max_model_len} is more than the {model.config.max_position_embeddings} positions "
                "that the model was made for: lower it, or leave it out, or stretch them by rope_scaling"
            )
        dtype = stored_dtype(config.kv_cache_dtype, model.dtype)
        self.decode_graphs: DecodeGraphs | None = None
        self.kv_cache = create_kv_cache(model.config, ops, 1, config.block_size, dtype)
        self.num_blocks = self._num_blocks(config, block_bytes(model.config, ops, config.block_size, dtype))
        self.kv_cache = create_kv_cache(model.config, ops, self.num_blocks, config.block_size, dtype)
        if config.kv_cache_bytes is not None and ops.device.type == "cpu":
            populate([tensor for layer in self.kv_cache for tensor in (layer.k, layer.v)])
        self.decode_graphs = decode_graphs(model, ops, self.kv_cache, config, self.max_model_len)
        if self.decode_graphs is not None:
            self.decode_graphs.capture_all()

    @classmethod
    def load(cls, config: EngineConfig, path: Path, progress: Callable[[int, int], None]) -> ModelRunner:
        device = select_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched on the current device
        ops = select_ops(device, config.kernels, threads=config.threads)
        if ops.own_threads:
            torch.set_num_threads(1)
        if config.batch_invariant and not ops.batch_invariant:
            raise ValueError(
                f"batch_invariant is set, and the {ops.name} kernels cannot promise it: use kernels: cpu, or unset it"
            )
        with loading_turn(device):
            return cls(load_model(config, path, ops, progress), ops, config)

    def limits(self, config: EngineConfig) -> ModelLimits:
        """The limits of the loaded model, for the service that sends it requests."""
        model = self.model
        return ModelLimits(
            architecture=model.config.architecture,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=model.config.quantization,
            vocab_size=model.config.vocab_size,
            max_model_len=self.max_model_len,
            max_adapter_rank=config.max_adapter_rank,
            max_num_seqs=config.max_num_seqs,
            total_blocks=self.num_blocks,
            block_size=self.block_size,
            weight_bytes=model.nbytes,
            kv_cache_bytes=sum(layer.nbytes for layer in self.kv_cache),
            kernel_backend=self.ops.name,
            device=described(self.ops.device),
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every token of the plan and draw the next one of each request that has caught up."""
        batch = StepBatch.from_plan(plan, self.block_size, self.ops.device)
        decoding = all(item.samples and item.num_new_tokens == 1 for item in plan.scheduled)
        if self.decode_graphs is not None and decoding and self.model.can_be_captured(batch.lora):
            hidden = self.decode_graphs.forward(batch)
        else:
            hidden = self.model.forward(batch, self.kv_cache)
        sampling = [item.request for item in plan.scheduled if item.samples]
        count = len(sampling)
        lora = batch.logits_lora if count == len(hidden) else narrowed(batch.logits_lora, 0, count)
        drawn = iter(self.sampler.sample(self.model.logits(hidden[:count], lora), sampling) if sampling else ())
        sampled = tuple(next(drawn) if item.samples else None for item in plan.scheduled)
        prompt_logprobs = self._prompt_logprobs(plan, hidden, count, batch.logits_lora)
        return StepResult(sampled, prompt_logprobs, _not_finite(plan, sampled, prompt_logprobs))

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: torch.Tensor, row: int, lora: LoraSegments | None
    ) -> dict[int, list[TokenLogprobs]]:
        """hidden: the rows that predict prompt tokens begin at `row`, in plan order."""
        found: dict[int, list[TokenLogprobs]] = {}
        for item in plan.scheduled:
            request, end = item.request, row + num_prompt_logprob_rows(item)
            if request.sampling.num_prompt_logprobs is None:
                continue
            details = found[request.request_id] = []
            position = item.num_computed_tokens + 1  # of the token that the first row predicts
            for first in range(row, end, PROMPT_LOGPROB_ROWS):
                part = hidden[first : min(first + PROMPT_LOGPROB_ROWS, end)]
                targets = request.token_ids[position : position + len(part)]
                logits = self.model.logits(part, narrowed(lora, first, first + len(part)))
                logprobs = torch.log_softmax(logits, dim=-1)
                details.extend(describe(logprobs, targets, request.sampling.num_prompt_logprobs))
                position += len(part)
            row = end
        return found

    def _num_blocks(self, config: EngineConfig, size: int) -> int:
        """The number of blocks that fit. size: bytes of a block."""
        per_sequence = -(-self.max_model_len // self.block_size)
        budget = self._cache_bytes(config)
        useful = per_sequence * config.max_num_seqs  # more could never be in use
        num_blocks = min(budget // size, useful)
        if num_blocks < per_sequence:
            remedy = f"raise kv_cache_bytes to {per_sequence * size} or lower max_model_len"
            if config.kv_cache_bytes is None and self.ops.device.type == "cuda":
                remedy = "raise device_memory_fraction, or lower max_model_len, adapter_device_bytes or max_num_seqs"
            raise ValueError(
                f"kv cache of {budget} bytes holds {budget // size * self.block_size} tokens, fewer than "
                f"max_model_len = {self.max_model_len}: {remedy}"
            )
        return num_blocks

    def _cache_bytes(self, config: EngineConfig) -> int:
        if config.kv_cache_bytes is not None:
            return config.kv_cache_bytes
        if self.ops.device.type == "cuda":
            return cache_budget(self, config)
        return int(free_bytes(self.ops.device) * config.kv_cache_fraction)


def _not_finite(
    plan: StepPlan, sampled: Sequence[SampledToken | None], prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]]
) -> frozenset[int]:
    """The ids of requests for which no token could be drawn, or whose prompt has a log-probability that is not
    finite.
    """
    undrawn = {
        item.request.request_id
        for item, token in zip(plan.scheduled, sampled, strict=True)
        if token is None and item.samples
    }
    return frozenset(undrawn).union(
        request_id for request_id, found in prompt_logprobs.items() if any(math.isnan(one.logprob) for one in found)
    )
