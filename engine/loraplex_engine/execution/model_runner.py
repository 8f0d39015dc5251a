"""The arithmetic of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from loraplex_engine.checkpoint.memory import populate
from loraplex_engine.execution.batch import narrowed, num_prompt_logprob_rows, step_batch
from loraplex_engine.execution.cuda_graph import DecodeGraphs, decode_graphs
from loraplex_engine.execution.device import described
from loraplex_engine.execution.kv_cache import create_kv_cache, stored_dtype
from loraplex_engine.execution.sampler import Sampler, describe
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import ModelLimits, TokenLogprobs
from loraplex_engine.models import LanguageModel
from loraplex_engine.scheduling.step import SampledToken, StepPlan, StepResult
from loraplex_kernels.ops import LoraSegments, Ops

PROMPT_LOGPROB_ROWS = 128  # rows of the vocabulary held at once: 128 x 128k floats are 64 MiB


class ModelRunner:
    """Owns the model and its cache on one device. Knows no policy: it executes the plan that it is given."""

    def __init__(self, model: LanguageModel, ops: Ops, config: EngineConfig) -> None:
        """The cache has one block until `allocate`: enough to measure what a step takes.

        Raises ValueError if `config` asks for longer sequences than the model was made for.
        """
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
        self.kv_dtype = stored_dtype(config.kv_cache_dtype, model.dtype)
        self.decode_graphs: DecodeGraphs | None = None
        self.num_blocks = 1
        self.kv_cache = create_kv_cache(model.config, ops, 1, config.block_size, self.kv_dtype)

    def allocate(self, num_blocks: int, config: EngineConfig) -> None:
        """Give the cache `num_blocks` blocks, and capture the graphs that read it."""
        self.num_blocks = num_blocks
        self.kv_cache = create_kv_cache(self.model.config, self.ops, num_blocks, self.block_size, self.kv_dtype)
        if config.kv_cache_bytes is not None and self.ops.device.type == "cpu":
            populate([tensor for layer in self.kv_cache for tensor in (layer.k, layer.v)])
        self.decode_graphs = decode_graphs(self.model, self.ops, self.kv_cache, config, self.max_model_len)
        if self.decode_graphs is not None:
            self.decode_graphs.capture_all()

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
        batch = step_batch(plan, self.block_size, self.ops.device)
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
