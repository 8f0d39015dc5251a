"""A rank that follows: it loads its share of the model and does what the first one orders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.layer import Site
from loraplex_adapters.runtime.loader_threads import begin_loader
from loraplex_adapters.runtime.store import rejection
from loraplex_adapters.runtime.weights import LoadedAdapter, load_adapter, load_composition
from loraplex_engine.checkpoint.hub import resolve_model
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.execution.device import free_bytes
from loraplex_engine.execution.loading import rank_ops
from loraplex_engine.execution.orders import Allocate, Compute, Forget, Load, Put, Remove, Report, decode
from loraplex_engine.execution.rank_runners import FollowingRunner
from loraplex_engine.following.adapter_files import AdapterFiles, FetchedFiles, files_here
from loraplex_engine.following.notes import AdapterNotes
from loraplex_engine.following.ready import READ, RankReady, files_digest, loaded_note
from loraplex_engine.following.starting import Assignment
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.host_memory import resident_bytes
from loraplex_engine.models import load_model
from loraplex_engine.ranks.group import Group, Notes

logger = logging.getLogger(__name__)


def follow(assignment: Assignment) -> None:
    """Be a rank until the process is ended. Raises whatever goes wrong: no rank goes on without the others."""
    config, rank = assignment.config, assignment.rank
    notes = Notes(assignment.port, config.world, assignment.leader)
    shard = Shard.of_process(rank, config.tensor_parallel, config.pipeline_parallel)

    def progress(bytes_loaded: int, bytes_total: int) -> None:
        notes.add(READ, 1)

    try:
        ops = rank_ops(config, rank)
        path = resolve_model(config.model, config.revision)
        group = Group(shard, notes, ops.device, host=assignment.host)
        model = load_model(config, path, ops, progress, group)
        files = files_digest(path)
    except (ValueError, OSError) as error:
        notes.put(loaded_note(rank), msgspec.json.encode(RankReady(str(error))))
        raise
    runner = FollowingRunner(model, ops, config, group)
    fetched = files_here if assignment.meeting is None else FetchedFiles(assignment.meeting)
    adapters = FollowedAdapters(runner, config, AdapterNotes(notes, shard, lambda: None), fetched)
    ready = RankReady(weight_bytes=model.nbytes, free_bytes=free_bytes(ops.device), files=files)
    notes.put(loaded_note(rank), msgspec.json.encode(ready))
    while True:
        obey(decode(group.receive()), runner, adapters, group, config)


def obey(
    order: object, runner: FollowingRunner, adapters: FollowedAdapters, group: Group, config: EngineConfig
) -> None:
    """Carry one order out."""
    match order:
        case Compute():
            runner.follow(order)
        case Put(slot, number):
            adapters.put(slot, number)
        case Remove(slot):
            adapters.remove(slot)
        case Load(number, key, paths):
            adapters.load(number, key, [Path(path) for path in paths])
        case Forget(number):
            adapters.forget(number)
        case Report():
            group.figures(resident_bytes())
        case Allocate(num_blocks):
            runner.allocate(num_blocks, config)


class FollowedAdapters:
    """This rank's part of the adapters: in memory as long as the first rank has them there, and in the same slots."""

    def __init__(self, runner: FollowingRunner, config: EngineConfig, notes: AdapterNotes, files: AdapterFiles) -> None:
        model = runner.model
        self._sites = model.lora_sites()
        self._notes = notes
        self._files = files
        self._loaded: dict[int, LoadedAdapter] = {}  # by the number of the load
        self._slots: dict[int, list[Site]] = {}  # where each has something
        known: dict[str, Any] = {
            "targets": model.lora_targets(),
            "dtype": model.dtype,
            "max_rank": config.max_adapter_rank,
            "pack": runner.ops.pack_lora,
        }
        self._load: Callable[..., LoadedAdapter] = partial(load_adapter, **known)
        self._load_composition: Callable[..., LoadedAdapter] = partial(load_composition, **known)
        # As many as on the first rank, which wait for each other in turn: a load that waits there has begun here.
        self._executor = ThreadPoolExecutor(
            config.adapter_loader_threads,
            "adapter-loader",
            initializer=begin_loader,
            initargs=(torch.get_num_threads(),),
        )

    def load(self, number: int, key: AdapterKey, paths: list[Path]) -> None:
        """Begin to read an adapter, and say in a note how that ends."""
        self._executor.submit(self._read, number, key, paths)

    def forget(self, number: int) -> None:
        self._loaded.pop(number, None)

    def put(self, slot: int, number: int) -> None:
        """Put an adapter that was read into a slot."""
        packed = self._loaded[number].packed
        self._slots[slot] = [self._sites[site] for site in packed]
        for site, part in packed.items():
            self._sites[site].table.put(slot, part)

    def remove(self, slot: int) -> None:
        for site in self._slots.pop(slot, ()):
            site.table.remove(slot)

    def _read(self, number: int, key: AdapterKey, paths: list[Path]) -> None:
        try:
            with self._files(number, paths) as here:
                if key.parts:
                    loaded = self._load_composition(key, here)
                else:
                    loaded = self._load(key, *here, total=self._notes.total(number))
        except Exception as error:  # as on the first rank
            self._notes.tell(number, rejection(key, paths, error))
        else:
            self._loaded[number] = loaded
            self._notes.tell(number, None, loaded.nbytes)
