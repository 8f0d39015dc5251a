"""The arithmetic of a step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from loraplex_engine.checkpoint.memory import populate
from loraplex_engine.execution.arrays import PROMPT_LOGPROB_ROWS, History, PromptTargets, StepArrays, step_arrays
from loraplex_engine.execution.batch import narrowed, step_batch
from loraplex_engine.execution.cuda_graph import DecodeGraphs, decode_graphs
from loraplex_engine.execution.device import described
from loraplex_engine.execution.form_masks import FormMasks, TokenMask
from loraplex_engine.execution.host_cache import HostCache, host_cache
from loraplex_engine.execution.kv_cache import block_bytes, create_kv_cache, stored_dtype
from loraplex_engine.execution.pooler import NOTHING_POOLED, Pooled, pool
from loraplex_engine.execution.sampler import Drawn, Sampler, describe
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import NO_DRAFTS
from loraplex_engine.link.messages import EngineLimits, TokenLogprobs
from loraplex_engine.models.model import Model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_engine.scheduling.form import Form
from loraplex_engine.scheduling.step import PendingResult, SampledToken, StepPlan, StepResult
from loraplex_kernels.ops import LoraSegments, Ops
from loraplex_kernels.transfers import Reading, to_device, to_host

NO_FORMS: Mapping[int, Form] = {}
NOTHING_DRAWN: Reading[list[SampledToken | None]] = Reading((), lambda here: [])


class ModelRunner:
    """Owns the model and its cache on one device. Knows no policy: it executes the plan that it is given."""

    most_cache_bytes = sys.maxsize  # that other devices have room for, if there are any

    def __init__(self, model: Model, ops: Ops, config: EngineConfig) -> None:
        """The cache has one block until `allocate`: enough to measure what a step takes.

        Raises ValueError if `config` asks for longer sequences than the model was made for.
        """
        self.model = model
        self.ops = ops
        self.block_size = config.block_size
        self.sampler = Sampler(ops)
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        if self.max_model_len > model.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len {self.max_model_len} is more than the {model.config.max_position_embeddings} positions "
                "that the model was made for: lower it, or leave it out, or stretch them by rope_scaling"
            )
        self._last_drawn: tuple[torch.Tensor, Sequence[History]] = torch.empty(0, dtype=torch.int64), ()
        self.form_masks = FormMasks(model.config.vocab_size)
        self.kv_dtype = stored_dtype(config.kv_cache_dtype, model.dtype)
        self.decode_graphs: DecodeGraphs | None = None
        self.num_blocks = 1
        self.host_cache: HostCache | None = None
        self.kv_cache = create_kv_cache(model, ops, 1, config.block_size, self.kv_dtype)

    @property
    def block_bytes(self) -> int:
        """Of one block of the cache; of several stages, in the one that has most layers."""
        return block_bytes(self.model, self.ops, self.block_size, self.kv_dtype)

    def allocate(self, num_blocks: int, config: EngineConfig) -> None:
        """Give the cache `num_blocks` blocks, and capture the graphs that read it."""
        self.num_blocks = num_blocks
        self.kv_cache = create_kv_cache(self.model, self.ops, num_blocks, self.block_size, self.kv_dtype)
        if config.kv_cache_bytes is not None and self.ops.device.type == "cpu":
            populate([tensor for layer in self.kv_cache for tensor in (layer.k, layer.v)])
        if config.host_cache_bytes:
            self.host_cache = host_cache(self.kv_cache, config.host_cache_bytes, self.ops.device)
        self.decode_graphs = decode_graphs(self.model, self.ops, self.kv_cache, config, self.max_model_len)
        if self.decode_graphs is not None:
            self.decode_graphs.capture_all()

    def limits(self, config: EngineConfig) -> EngineLimits:
        """The limits of the loaded model, for the service that sends it requests."""
        model = self.model
        return EngineLimits(
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
            compiled_for=self.ops.compiled_for,
            device=described(self.ops.device),
            hidden_size=model.config.hidden_size,
            pooling=model.config.pooling,
            labels=list(model.config.labels),
            classifier=model.config.classifier,
            implementation=model.implementation,
            drafts=NO_DRAFTS if config.drafts is None else config.drafts.offered,
        )

    def execute(self, plan: StepPlan) -> PendingResult:
        """Start to compute every token of the plan. Its result has the next one of each request that has caught up."""
        arrays = step_arrays(plan, self.block_size, drafts_apart=self.decode_graphs is not None)
        return self.start(arrays, _forms(plan))

    @torch.inference_mode()
    def start(self, step: StepArrays, forms: Mapping[int, Form] = NO_FORMS) -> PendingResult:
        """Start a step that is laid out as arrays, whoever made them. What waits for the device is in its result.

        forms: of the outputs that have one, by their place among `step.histories`.
        """
        batch, count = step_batch(step, self.ops.device), len(step.histories)
        hidden, lora = self._hidden(step, batch), batch.logits_lora
        mask = self.form_masks.fill(step.histories, forms) if forms else None  # while a device computes what is before
        drawn = self._draw(hidden, lora, step.histories, mask).reading if count else NOTHING_DRAWN
        prompt_logprobs = self._prompt_logprobs(step.prompt_targets, hidden, count, lora)
        num_before = len(step.logits_rows) - sum(rows.num_rows for rows in step.pooled)
        pooled = pool(hidden[num_before:], step.pooled, self.model.classifiers) if step.pooled else NOTHING_POOLED
        problems = {} if mask is None else mask.problems
        tensors = [*drawn.tensors, *prompt_logprobs.tensors, *pooled.tensors]
        arrived = to_host(tensors, self.ops.device)

        def result() -> StepResult:
            here = iter(arrived())
            return _result(step, drawn.finish(here), prompt_logprobs.finish(here), pooled.finish(here), problems)

        return PendingResult(result)

    def _hidden(self, step: StepArrays, batch: StepBatch) -> torch.Tensor:
        """The hidden states of `step.logits_rows`."""
        for source, copy in step.copied_blocks:
            for layer in self.kv_cache:
                layer.copy_block(source, copy)
        if step.unread:
            self._fill_unread(batch.token_ids, step)
        # Each row is a sequence's, and drawn from.
        decoding = len(step.histories) == len(step.token_ids) == len(step.seq_lens)
        if self.decode_graphs is not None and decoding and self.model.can_be_captured(batch.lora):
            return self.decode_graphs.forward(batch)
        return self.model.forward(batch, self.kv_cache)

    def _draw(
        self, hidden: torch.Tensor, lora: LoraSegments | None, histories: Sequence[History], mask: TokenMask | None
    ) -> Drawn:
        """Draw from the first rows of `hidden`, one for each history. lora: of all rows that logits are needed of."""
        count = len(histories)
        own = lora if count == len(hidden) else narrowed(lora, 0, count, self.ops.device)
        drawn = self.sampler.sample(self.model.logits(hidden[:count], own), histories, mask)
        self._last_drawn = drawn.token_ids, histories
        return drawn

    def _fill_unread(self, token_ids: torch.Tensor, step: StepArrays) -> None:
        """Take the tokens that the step before draws where they are. That one had no drafts.

        A row that has none gets any: its request ends once that is read.
        """
        drawn, histories = self._last_drawn
        place_of = {history.request_id: place for place, history in enumerate(histories)}
        pairs = [(row, place_of[request_id]) for row, request_id in step.unread]
        rows, places = to_device(list(np.array(pairs, dtype=np.int64).T), self.ops.device)
        token_ids[rows] = drawn[places].clamp(min=0)

    def _prompt_logprobs(
        self, targets: Sequence[PromptTargets], hidden: torch.Tensor, row: int, lora: LoraSegments | None
    ) -> Reading[dict[int, list[TokenLogprobs]]]:
        """By request id. hidden: the rows that predict the targets begin at `row`, in order."""
        readings: list[tuple[int, Reading[list[TokenLogprobs]]]] = []
        for request_id, token_ids, beside in targets:
            for first in range(0, len(token_ids), PROMPT_LOGPROB_ROWS):
                wanted = token_ids[first : first + PROMPT_LOGPROB_ROWS]
                end = row + len(wanted)
                logits = self.model.logits(hidden[row:end], narrowed(lora, row, end, self.ops.device))
                (chosen,) = to_device([np.array(wanted, dtype=np.int64)], self.ops.device)
                readings.append((request_id, describe(self.ops, logits, chosen, [beside] * len(wanted))))
                row = end

        def finish(here: Iterator[torch.Tensor]) -> dict[int, list[TokenLogprobs]]:
            found: dict[int, list[TokenLogprobs]] = {target.request_id: [] for target in targets}
            for request_id, reading in readings:
                found[request_id] += reading.finish(here)
            return found

        return Reading([tensor for _, reading in readings for tensor in reading.tensors], finish)


def _forms(plan: StepPlan) -> Mapping[int, Form]:
    """The forms of what is drawn in a step, by their place among its histories.

    There is none behind a draft that is not of the form: it is not drawn, so nothing after it is kept.
    """
    if all(item.request.form is None for item in plan.scheduled):
        return NO_FORMS
    forms: dict[int, Form] = {}
    place = 0
    for item in plan.scheduled:
        form = item.request.form
        for known in range(1 + len(item.draft_token_ids) if item.samples else 0):
            if form is not None and known:
                form = form.after(item.draft_token_ids[known - 1])
            if form is not None:
                forms[place] = form
            place += 1
    return forms


def _result(
    step: StepArrays,
    drawn: Sequence[SampledToken | None],
    prompt_logprobs: dict[int, list[TokenLogprobs]],
    pooled: Pooled,
    problems: Mapping[int, str],
) -> StepResult:
    sampled = _by_sequence(drawn, step)
    not_finite = _not_finite(step, sampled, prompt_logprobs) | pooled.not_finite
    met = {one: why for one, why in problems.items() if one in not_finite}
    return StepResult(sampled, prompt_logprobs, not_finite - met.keys(), pooled.parts, met)


def _by_sequence(drawn: Sequence[SampledToken | None], step: StepArrays) -> tuple[tuple[SampledToken, ...], ...]:
    """The tokens that follow each request: up to the first that could not be drawn, or is not the draft in its place.

    The draft in a token's place is in the request's next row.
    """
    if step.num_drawn.count(1) == len(step.num_drawn):  # as in nearly all steps
        return tuple(() if token is None else (token,) for token in drawn)
    sampled, start = [], 0
    for count in step.num_drawn:
        kept: list[SampledToken] = []
        for place in range(start, start + count):
            token = drawn[place]
            if token is None:
                break
            kept.append(token)
            if place + 1 < start + count and token.token_id != step.token_ids[step.logits_rows[place] + 1]:
                break
        sampled.append(tuple(kept))
        start += count
    return tuple(sampled)


def _not_finite(
    step: StepArrays, sampled: Sequence[Sequence[SampledToken]], prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]]
) -> frozenset[int]:
    """The ids of requests for which no token could be drawn, or whose prompt has a log-probability that is not
    finite.
    """
    firsts = [end - count for count, end in zip(step.num_drawn, accumulate(step.num_drawn), strict=True)]
    undrawn = {
        step.histories[first].request_id
        for first, count, tokens in zip(firsts, step.num_drawn, sampled, strict=True)
        if count and not tokens
    }
    return frozenset(undrawn).union(
        request_id for request_id, found in prompt_logprobs.items() if any(math.isnan(one.logprob) for one in found)
    )
