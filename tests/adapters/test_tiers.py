"""Store, pool and layers together: whatever comes and goes, a request gets the adapter that it asked for."""

import json
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import save_file

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.store import AdapterStore
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_kernels.ops import LoraSegments
from loraplex_kernels.selection import select_ops
from tests.adapters.dense import Dense

IN, OUT, NUM_SLOTS = 4, 6, 3
TARGETS = {"q": LoraTarget("qk", IN, 0, 4), "k": LoraTarget("qk", IN, 4, 2)}
NAMES = "abcdef"


class ByHand(Executor):
    def __init__(self) -> None:
        self.submitted: deque[Callable[[], Any]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append(lambda: fn(*args, **kwargs))
        return Future()


class Tiers(RuleBasedStateMachine):
    names = st.sampled_from(NAMES)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.paths: dict[str, Path] = {}
        self.keys: dict[str, AdapterKey] = {}
        self.expected: dict[str, torch.Tensor] = {}  # [1, OUT], what each adds to the base
        self.x = torch.randn(1, IN, generator=torch.Generator().manual_seed(99))
        for seed, name in enumerate(NAMES):
            self.write(name, seed)
        self.executor, self.now = ByHand(), 0.0
        largest = 4 * 5 * (IN + OUT)
        ops = select_ops(torch.device("cpu"), "reference")
        self.store = AdapterStore(
            TARGETS, torch.float32, 8, 3 * largest, 1, ops.pack_lora, clock=lambda: self.now, executor=self.executor
        )
        self.layer = LoRALinear(ops, Dense(torch.zeros(OUT, IN)), NUM_SLOTS)  # what comes out is what the adapter added
        self.pool = AdapterPool({"qk": self.layer}, self.store, NUM_SLOTS, 2 * largest)
        self.held: list[tuple[str, int]] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    def write(self, name: str, seed: int) -> None:
        """An adapter with ranks and projections of its own; the last one is broken."""
        generator, rank = torch.Generator().manual_seed(seed), 1 + seed % 5
        path = self.paths[name] = Path(self.folder.name) / name
        path.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        delta = torch.zeros(1, OUT)
        for module in ("q", "k")[: 1 + seed % 2]:
            target = TARGETS[module]
            a = tensors[f"{module}.lora_A.weight"] = torch.randn(rank, IN, generator=generator)
            b = tensors[f"{module}.lora_B.weight"] = torch.randn(target.out_features, rank, generator=generator)
            delta[:, target.out_start : target.out_start + target.out_features] = self.x @ a.T @ b.T
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        save_file({"stray": torch.ones(1)} if name == NAMES[-1] else tensors, path / "adapter_model.safetensors")
        self.keys[name], self.expected[name] = AdapterKey(f"shared/{name}", digest(path)), delta

    @rule(name=names)
    def register(self, name: str) -> None:
        self.store.register(self.keys[name], self.paths[name])

    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        if self.executor.submitted:
            self.executor.submitted.rotate(data.draw(st.integers(0, len(self.executor.submitted) - 1)))
            self.executor.submitted.popleft()()

    @rule()
    def poll(self) -> None:
        self.store.poll()

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names)
    def acquire(self, name: str) -> None:
        known = self.store.is_registered(self.keys[name])
        try:
            slot = self.pool.acquire(self.keys[name])
        except AdapterRejected:
            assert not known or name == NAMES[-1], "a good adapter is never refused"
            return
        if slot is not None:
            self.held.append((name, slot))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            name, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(self.keys[name])

    @rule(name=names)
    def drop(self, name: str) -> None:
        """As the engine does: only once no request uses it."""
        if all(name != other for other, _ in self.held):
            self.pool.unload(self.keys[name])
            self.store.unregister(self.keys[name])

    @rule(name=names)
    def make_room(self, name: str) -> None:
        self.pool.make_room(self.keys[name])

    @rule(names=st.lists(names, min_size=1, max_size=3))
    def every_request_is_served_in_the_end(self, names: list[str]) -> None:
        """Once the others have finished, whoever waits gets its turn within a few rounds of reading."""
        for name, _ in self.held:
            self.pool.release(self.keys[name])
        self.held.clear()
        waiting = set(names) - {NAMES[-1]}
        for name in waiting:
            self.store.register(self.keys[name], self.paths[name])
        for _ in range(2 * len(NAMES) + 2):
            for name in sorted(waiting):
                if self.pool.acquire(self.keys[name]) is not None:
                    self.pool.release(self.keys[name])
                    waiting.remove(name)
            while self.executor.submitted:
                self.executor.submitted.popleft()()
            self.store.poll()
        assert not waiting

    @invariant()
    def a_request_gets_the_adapter_that_it_asked_for(self) -> None:
        if not self.held:
            return
        ranges = tuple((slot, row, row + 1) for row, (_, slot) in enumerate(self.held, start=1))
        columns = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
        y = self.layer(self.x.expand(len(self.held) + 1, IN), LoraSegments(ranges, columns[0], columns[1], columns[2]))
        assert not y[0].any(), "the base got an adapter"
        for row, (name, _) in enumerate(self.held, start=1):
            torch.testing.assert_close(y[row : row + 1], self.expected[name], rtol=1e-5, atol=1e-5)


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
