"""Loads a model onto its device, with a cache of the size that the memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from loraplex_engine.checkpoint.model_config import ModelError, NotBorrowedError, UnknownArchitectureError
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.checkpoint.weights import Progress, read_json
from loraplex_engine.execution.device import free_bytes, loading_turn, select_device
from loraplex_engine.execution.memory_profile import cache_budget
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.execution.rank_runners import LeadingRunner
from loraplex_engine.link.config import USUAL_CACHE_FRACTION, EngineConfig
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.models import load_model, read_model_config
from loraplex_engine.models.layout import held_heads, lora_targets
from loraplex_engine.models.model import Model
from loraplex_engine.ranks.group import Group
from loraplex_kernels.ops import Ops
from loraplex_kernels.selection import select_ops

SAME_TOKENIZER = "the model that drafts must have the same tokenizer"


class OtherRanks(Protocol):
    """The other ranks of a model, to the first one."""

    def join(self, device: torch.device) -> Group:
        """Wait until all are there."""

    def wait_loaded(self) -> int:
        """Wait until the others have loaded their shares → the least memory that is free on the device of one."""


def load_runner(config: EngineConfig, path: Path, report: LoadReport, others: OtherRanks | None = None) -> ModelRunner:
    """The model in `path`, ready for steps. Raises ValueError if its cache would hold not even one sequence."""
    ops = rank_ops(config, 0)
    with _loading_turns(config, ops.device, report):
        runner = _first_runner(config, path, ops, report, others)
        runner.allocate(_num_blocks([runner], config), config)
        return runner


def _first_runner(
    config: EngineConfig, path: Path, ops: Ops, report: LoadReport, others: OtherRanks | None
) -> ModelRunner:
    if others is None:
        return ModelRunner(_load(config, path, ops, report), ops, config)
    group = others.join(ops.device)
    model = load_model(config, path, ops, report, group)
    return LeadingRunner(model, ops, config, group, others.wait_loaded())


def load_runners(
    config: EngineConfig,
    path: Path,
    small: EngineConfig,
    small_path: Path,
    report: LoadReport,
    others: OtherRanks | None = None,
) -> tuple[ModelRunner, ModelRunner]:
    """The models in both paths on one device, with caches of as many blocks. `small`: the config of the second.

    Raises ValueError as `load_runner` does, and if the small one has another vocabulary.
    """
    _check_tokenizers(path, small_path)
    ops = rank_ops(config, 0)
    with _loading_turns(config, ops.device, report):
        runner = _first_runner(config, path, ops, report, others)
        small = msgspec.structs.replace(small, max_model_len=runner.max_model_len)
        model = _load(small, small_path, ops, report)
        if model.config.classifier is not None:
            raise ValueError(
                f"{small_path}: {model.config.architecture} generates no text: choose another model to draft"
            )
        longest = min(runner.max_model_len, model.config.max_position_embeddings)
        small = msgspec.structs.replace(small, max_model_len=longest)
        beside = ModelRunner(model, ops, small)
        sizes = [each.model.config.vocab_size for each in (runner, beside)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{small_path}: has {sizes[1]} token ids, and {path} has {sizes[0]}: {SAME_TOKENIZER}")
        num_blocks = _num_blocks([runner, beside], config)
        runner.allocate(num_blocks, config)
        beside.allocate(num_blocks, small)
        return runner, beside


@contextmanager
def _loading_turns(config: EngineConfig, device: torch.device, report: LoadReport) -> Iterator[None]:
    """The turns to load onto the devices of all ranks, in an order that all engines have in common."""
    devices = [torch.device(name) for name in config.rank_devices] if config.world > 1 else [device]
    with ExitStack() as turns:
        for each in sorted(devices, key=lambda each: each.index or 0):
            turns.enter_context(loading_turn(each, report))
        yield


def check_divisible(config: EngineConfig, path: Path) -> None:
    """Raise ModelError if the model in `path` cannot be divided among the ranks of `config`, by its config.json."""
    undivided = f"transformers' class cannot be divided among {config.world} ranks"
    if config.implementation == "transformers":
        raise ModelError(f"{path}: {undivided}")
    try:
        model = read_model_config(path, config.rope_scaling)
    except UnknownArchitectureError as error:
        raise ModelError(f"{error}; {undivided}") from error
    shard = Shard.of_process(0, config.tensor_parallel, config.pipeline_parallel)
    held_heads(model, shard)
    lora_targets(model, shard)


def _load(config: EngineConfig, path: Path, ops: Ops, progress: Progress | None = None) -> Model:
    """The model in `path`, by a native family, or else by transformers' class; or by what `config` says."""
    unknown: UnknownArchitectureError | None = None
    if config.implementation != "transformers":
        try:
            return load_model(config, path, ops, progress)
        except UnknownArchitectureError as error:
            if config.implementation == "native":
                raise
            unknown = error
    from loraplex_engine.borrowed.loading import load_borrowed  # only where it is needed: it takes seconds to import

    try:
        return load_borrowed(config, path, ops, progress)
    except NotBorrowedError as error:
        if unknown is None:
            raise
        raise ModelError(f"{unknown}; and transformers' own modelling cannot serve it: {error}") from error


def _check_tokenizers(path: Path, small_path: Path) -> None:
    """Raise ValueError if the models call their tokens by different ids."""
    files = [each / "tokenizer.json" for each in (path, small_path)]
    if all(file.exists() for file in files):
        one, other = (read_json(file).get("model") for file in files)
        if isinstance(one, dict) and isinstance(other, dict) and one.get("vocab") != other.get("vocab"):
            raise ValueError(f"{files[1]}: has another vocabulary than {files[0]}: {SAME_TOKENIZER}")


def rank_ops(config: EngineConfig, rank: int) -> Ops:
    """The operations of a rank on its device."""
    device = select_device(config.rank_devices[rank % config.machine_ranks])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device
    return _select_ops(device, config)


def _select_ops(device: torch.device, config: EngineConfig) -> Ops:
    ops = select_ops(device, config.kernels, threads=config.rank_threads)
    if ops.own_threads:
        torch.set_num_threads(1)
    if config.batch_invariant and not ops.batch_invariant:
        raise ValueError(
            f"batch_invariant is set, and the {ops.name} kernels cannot promise it: use kernels: cpu, or unset it"
        )
    return ops


def _num_blocks(runners: Sequence[ModelRunner], config: EngineConfig) -> int:
    """The number of blocks of each runner that fit into the memory for their caches. The first takes the requests."""
    runner = runners[0]
    size = sum(each.block_bytes for each in runners)
    per_sequence = -(-runner.max_model_len // runner.block_size)
    budget = _cache_bytes(runner, config)
    useful = per_sequence * config.max_num_seqs  # more could never be in use
    num_blocks = min(budget // size, useful)
    if num_blocks < per_sequence:
        remedy = f"raise kv_cache_bytes to {per_sequence * size} or lower max_model_len"
        if config.kv_cache_bytes is None and runner.ops.device.type == "cuda":
            remedy = "raise device_memory_fraction, or lower max_model_len, adapter_device_bytes or max_num_seqs"
        raise ValueError(
            f"kv cache of {budget} bytes holds {budget // size * runner.block_size} tokens, fewer than "
            f"max_model_len = {runner.max_model_len}: {remedy}"
        )
    return num_blocks


def _cache_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if runner.ops.device.type == "cuda":
        return min(cache_budget(runner, config), runner.most_cache_bytes)
    share = (config.kv_cache_fraction or USUAL_CACHE_FRACTION) / config.machine_ranks
    return int(free_bytes(runner.ops.device) * share)
