"""The GPU memory that is left for the cache, found by allocating everything else once and measuring it.

A model takes its weights, the temporaries of its steps, the adapters that are put on the device, and captured graphs.
The largest step that may come is run once; torch keeps what it took for the steps to come.
"""

from __future__ import annotations

import gc
import logging

import torch

from loraplex_engine.execution.cuda_graph import DecodeGraphs, batch_sizes, decode_graphs, reserve_adapters
from loraplex_engine.execution.device import free_bytes
from loraplex_engine.execution.host_cache import staging_bytes
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import USUAL_MEMORY_FRACTION, EngineConfig
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan

logger = logging.getLogger(__name__)


def cache_budget(runner: ModelRunner, config: EngineConfig) -> int:
    """Bytes for the keys and values of a model that is loaded and whose cache has one block so far.

    Raises ValueError where not even a step fits.
    """
    device = runner.ops.device
    graphs = _graph_bytes(runner, config)
    gc.collect()
    torch.cuda.empty_cache()  # what loading and capturing have left behind
    _run_largest_step(runner, config)
    taken = torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * (config.device_memory_fraction or USUAL_MEMORY_FRACTION))
    left = min(share - taken, free) - config.adapter_device_bytes - graphs - staging_bytes(config)
    logger.info(
        "%s has %s, of which %s are this model's: %s for weights and the largest step, %s for adapters, %s for "
        "captured graphs, %s for the cache",
        device,
        *map(_gib, (total, share, taken, config.adapter_device_bytes, graphs, max(left, 0))),
    )
    return max(left, 0)


def largest_step(config: EngineConfig, max_model_len: int, block_size: int, draws: bool = True) -> StepPlan:
    """The largest step: the most tokens, of the most sequences, with an adapter and all log-probabilities.

    draws: whether the model has the head of a language model; else all hidden states are pooled.
    """
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    share, rest = divmod(config.max_num_batched_tokens, count)
    lengths = [min(share + (index < rest), max_model_len - 1) for index in range(count)]
    if not draws:
        return StepPlan(tuple(_pooled_prompt(index, length, block_size) for index, length in enumerate(lengths)))
    drafts = [min(config.most_drawn - count, lengths[0] - 1), *[0] * (count - 1)]
    prompts = (_prompt(*each, block_size) for each in zip(range(count), lengths, drafts, strict=True))
    return StepPlan(tuple(prompts))


def _prompt(request_id: int, length: int, drafts: int, block_size: int) -> ScheduledRequest:
    """A request with a whole prompt, drafts at its end, and the costliest sampling."""
    sampling = SamplingParams(
        seed=0, max_tokens=1, top_k=1, repetition_penalty=2.0, num_logprobs=1, num_prompt_logprobs=1
    )
    message = AddRequest(request_id, [0] * (length - drafts), sampling, None)
    return ScheduledRequest(_placed(message, length, block_size), 0, length - drafts, (0,) * drafts)


def _pooled_prompt(request_id: int, length: int, block_size: int) -> ScheduledRequest:
    """A request of whose whole prompt the hidden states are read."""
    sampling, pooling = SamplingParams(seed=0, max_tokens=0), PoolingParams(method=PoolingMethod.MEAN)
    message = AddRequest(request_id, [0] * length, sampling, None, pooling=pooling)
    return ScheduledRequest(_placed(message, length, block_size), 0, length)


def _placed(message: AddRequest, length: int, block_size: int) -> Request:
    """The request with an adapter's slot, in which there is nothing, and with the first block for all of its tokens."""
    request = Request(message, message.request_id, now=0.0)
    request.adapter_slot = 0
    request.block_ids = [0] * -(-length // block_size)
    return request


def _run_largest_step(runner: ModelRunner, config: EngineConfig) -> None:
    reserve_adapters(runner.model, config.max_adapter_rank)
    try:
        draws = runner.model.config.classifier is None
        runner.execute(largest_step(config, runner.max_model_len, runner.block_size, draws)).result()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{runner.ops.device} has no room for a step of {config.max_num_batched_tokens} tokens beside the weights: "
            f"lower max_num_batched_tokens or max_num_seqs, or quantise the model ({error})"
        ) from error
    torch.cuda.synchronize(runner.ops.device)


def _graph_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    """The bytes of all graphs, estimated from the two largest: the first includes the memory that all share."""
    graphs = decode_graphs(runner.model, runner.ops, runner.kv_cache, config, runner.max_model_len)
    if graphs is None:
        return 0
    sizes = batch_sizes(config.most_drawn)
    first, *others = [_bytes_of_capturing(graphs, size) for size in sizes[:-3:-1]]
    return first + (len(sizes) - 1) * max(others, default=0)


def _bytes_of_capturing(graphs: DecodeGraphs, size: int) -> int:
    before = free_bytes(graphs.device)
    graphs.capture(size)
    return max(before - free_bytes(graphs.device), 0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
