"""Whatever happens to adapters, a request's tokens are those of the version that it started with, run alone.

A Hypothesis state machine over registering, loading, pinning, swapping, unloading, deleting, generating and cancelling,
on the true engine in float32, with adapters of every kind and weighted sums of two. There is room for three adapters on
the device, prompts are computed in chunks, prefixes are cached, and blocks are so few that requests are preempted.
Loads end when a rule says so and time passes with the steps, so that an example that fails can be run again.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loraplex_adapters.errors import AdapterConflict, AdapterNotFound
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.store import AdapterStore
from loraplex_adapters.versions import AdapterInfo, AdapterSpec, AdapterState, AdapterVersion, full_name
from loraplex_engine.core import EngineCore
from loraplex_engine.execution.disk_cache import DiskCache
from loraplex_engine.execution.loading import load_runner
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.load_report import UNREPORTED
from loraplex_engine.link.messages import (
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    RequestOutput,
    StepOutput,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.peft_oracle import KINDS, Oracle, oracle_of, random_prompt

NUM_EXAMPLES = int(os.environ.get("LORAPLEX_ADAPTER_LIVES", "100"))
STEPS_OF_EXAMPLE = 50
NAMES = ("a", "b", "c")
ADDABLE = ("plain", "one-layer", "lora-bias", "embedding", "head", "embedding-and-head")
SUMS = ((0.7, 0.3), (-1.25, 0.5))
LONGEST = random_prompt(23, 1, invoked_at=9)
PROMPTS = (LONGEST[:6], LONGEST[:17], LONGEST, random_prompt(9, 2))
OUTPUT_TOKENS = 6
STEP_SECONDS = 0.25  # some steps are longer than patience with adapters, and than the pause after a failed load
MAX_STEPS = 300  # of the engine until everything has ended
LARGEST = 72_000  # bytes of an adapter, or of two that can be summed
BLOCK_BYTES = 2048  # 4 tokens, in 2 layers


class Loader(Executor):
    """Runs what it is given when it is told to, in the thread that tells it."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._waiting.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            self._waiting.popleft()()


class SteppedEngine:
    """An engine whose loads and whose clock go on when they are told to."""

    def __init__(self, model: Path, **fields: Any) -> None:
        self.loader, self.now = Loader(), 0.0
        self.files: TemporaryDirectory[str] | None = None  # of the disk cache
        options: dict[str, Any] = {"dtype": "float32", "kernels": "cpu", "threads": 1, "block_size": 4}
        room = {"max_model_len": 32, "max_num_batched_tokens": 16}
        config = EngineConfig(model=str(model), **(options | room | fields))
        runner = load_runner(config, model, UNREPORTED)
        store = AdapterStore(
            runner.model.lora_targets(),
            runner.model.dtype,
            config.max_adapter_rank,
            config.adapter_host_bytes,
            num_threads=1,
            pack=runner.ops.pack_lora,
            clock=self.clock,
            executor=self.loader,
        )
        sites = runner.model.lora_sites()
        pool = AdapterPool(sites, store, config.max_resident_adapters, config.adapter_device_bytes)
        self.core = EngineCore(runner, store, pool, config, disk=self._disk(runner))
        self.core.scheduler.clock = self.clock

    def _disk(self, runner: ModelRunner) -> DiskCache | None:
        """Of an engine with a host cache; its files go when it does."""
        if runner.host_cache is None:
            return None
        self.files, slots = TemporaryDirectory(), runner.host_cache.slots.numpy()
        return DiskCache(Path(self.files.name), 40 * BLOCK_BYTES, b"", slots, executor=lambda name: self.loader)

    def close(self) -> None:
        self.core.close()
        if self.files is not None:
            self.files.cleanup()

    def clock(self) -> float:
        return self.now

    def step(self) -> list[Any]:
        self.now += STEP_SECONDS
        return self.core.step()


def request(request_id: int, prompt: int, key: AdapterKey | None, num_tokens: int = OUTPUT_TOKENS) -> AddRequest:
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=num_tokens)
    return AddRequest(request_id, PROMPTS[prompt], sampling, key)


class Alone:
    """What requests get that run alone, in an engine with room for everything. Each is run once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._engine = SteppedEngine(oracle.folder / "base", kv_cache_bytes=1 << 20, enable_prefix_caching=False)
        self._found: dict[tuple[str | None, int], tuple[list[int], str]] = {}
        for name, key in oracle.keys.items():
            if key is not None and name is not None:
                self._engine.core.want_adapter(WantAdapter(key, 1, str(oracle.folder / name)))

    def tokens(self, key: AdapterKey | None, prompt: int) -> tuple[list[int], str]:
        """Those of an adapter by its content, and the error with which it ended."""
        case = (key.digest if key else None, prompt)
        if case not in self._found:
            engine, tokens, error = self._engine, [], ""
            engine.core.add(request(len(self._found), prompt, key))
            while engine.core.scheduler.requests:
                engine.loader.run(1)
                for output in outputs_of(engine.step()):
                    tokens += output.token_ids
                    error = output.error
            self._found[case] = tokens, error
        return self._found[case]

    def close(self) -> None:
        self._engine.close()


def outputs_of(messages: list[Any]) -> Iterator[RequestOutput]:
    for message in messages:
        if isinstance(message, StepOutput):
            yield from message.outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    alone = Alone(oracle_of("llama", tmp_path_factory.mktemp("lives")))
    yield alone
    alone.close()


def test_alone_is_what_peft_generates(alone: Alone) -> None:
    found = set()
    for name, key in alone.oracle.keys.items():
        for number, prompt in enumerate(PROMPTS):
            tokens, error = alone.tokens(key, number)
            assert not error
            logits = alone.oracle.logits(name, prompt + tokens, len(prompt))
            assert logits.argmax(dim=-1).tolist() == tokens, name
            found.add((number, *tokens))
    assert len(found) > 2 * len(KINDS), "adapters that change nothing could be taken for each other"


class Lives(RuleBasedStateMachine):
    """The service, as far as it decides about adapters, before an engine with little room."""

    names, indices = st.sampled_from(NAMES), st.integers(0, 20)
    contents = st.sampled_from(sorted(KINDS)) | st.sampled_from(ADDABLE)
    prompts, lengths = st.integers(0, len(PROMPTS) - 1), st.integers(1, OUTPUT_TOKENS)
    settings: ClassVar[dict[str, Any]] = {}  # of the engine

    def __init__(self, alone: Alone) -> None:
        super().__init__()
        self.alone = alone
        self.engine = SteppedEngine(
            alone.oracle.folder / "base",
            kv_cache_bytes=12 * BLOCK_BYTES,  # a sequence may need 8
            max_resident_adapters=3,
            adapter_device_bytes=2 * LARGEST,  # beside pins, which take half at most, there is room for any
            adapter_host_bytes=2 * LARGEST,
            **self.settings,
        )
        self.core = self.engine.core
        self.ids = itertools.count()
        self.registry = AdapterRegistry()
        self.running: dict[int, Running] = {}
        self.pinned: set[AdapterKey] = set()  # as the engine has said
        self.to_be_pinned: set[AdapterKey] = set()
        self.orders = itertools.count(1)

    # ---- what the service does -------------------------------------------------------------------------------------

    @rule(name=names, content=contents)
    def register_or_swap(self, name: str, content: str) -> None:
        key = self.alone.oracle.keys[content]
        assert key is not None
        try:
            version = self.registry.register("shared", name, key.digest, AdapterSpec("tiny", content))
        except AdapterConflict:  # it is being deleted
            return
        self._ask_for(version)

    @precondition(lambda self: self._staying())
    @rule(index=indices, residency=st.sampled_from([Residency.HOST, Residency.DEVICE]))
    def load(self, index: int, residency: Residency) -> None:
        version = self._current(index)
        self._ask_for(version, residency)

    @precondition(lambda self: self._staying())
    @rule(index=indices, pinned=st.booleans())
    def pin(self, index: int, pinned: bool) -> None:
        version = self._current(index)
        if pinned:
            self._ask_for(version)
            self.to_be_pinned.add(version.key)
        else:
            self._unpin(version.key)
        self._want(version.key, least=Residency.DISK)

    @precondition(lambda self: self._staying())
    @rule(index=indices, residency=st.sampled_from([Residency.DISK, Residency.HOST]))
    def unload(self, index: int, residency: Residency) -> None:
        version = self._current(index)
        self._unload(version.key, residency)

    @precondition(lambda self: self._staying())
    @rule(index=indices)
    def roll_back(self, index: int) -> None:
        version = self._any(index)
        if version.state is AdapterState.ACTIVE:
            self.registry.set_current(version.full_name)

    @precondition(lambda self: self._staying())
    @rule(index=indices, whole=st.booleans())
    def delete(self, index: int, whole: bool) -> None:
        version = self._any(index)
        try:
            deleted = self.registry.delete(version.name if whole else version.full_name)
        except AdapterConflict:  # it is the current one
            return
        for version in deleted:
            self._unload(version.key)

    @rule(prompt=prompts, num_tokens=lengths)
    def generate_with_the_base(self, prompt: int, num_tokens: int) -> None:
        self._generate((), None, prompt, num_tokens)

    @precondition(lambda self: self._staying())
    @rule(index=indices, prompt=prompts, num_tokens=lengths)
    def generate(self, index: int, prompt: int, num_tokens: int) -> None:
        version = self._current(index)
        self._generate((version,), None, prompt, num_tokens)

    @precondition(lambda self: self._staying())
    @rule(indices=st.tuples(indices, indices), weights=st.sampled_from(SUMS), prompt=prompts, num_tokens=lengths)
    def generate_with_a_sum(
        self, indices: tuple[int, int], weights: tuple[float, ...], prompt: int, num_tokens: int
    ) -> None:
        versions = tuple(self._any(index) for index in indices)
        if versions[0] != versions[1]:
            self._generate(versions, weights, prompt, num_tokens)

    @precondition(lambda self: len(self.running) > 1)
    @rule(index=indices)
    def cancel(self, index: int) -> None:
        number = sorted(self.running)[index % len(self.running)]
        self.core.abort([number])
        self._end(number)

    @rule(num_loads=st.integers(0, 5), num_steps=st.integers(1, 5))
    def go_on(self, num_loads: int, num_steps: int) -> None:
        self.engine.loader.run(num_loads)
        for _ in range(num_steps):
            self._step()

    @precondition(lambda self: len(self.running) > 4)
    @rule(num_steps=st.integers(8, 16))
    def go_on_for_long(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.loader.run(1)
            self._step()

    # ---- what comes of it ------------------------------------------------------------------------------------------

    @invariant()
    def memory_is_within_its_budgets(self) -> None:
        pool, blocks = self.core.pool, self.core.blocks
        assert pool.used_bytes <= pool._budget_bytes
        assert blocks.num_free + blocks.num_cached <= blocks.num_blocks
        if blocks.host is not None:
            blocks.host.check()

    @invariant()
    def what_is_pinned_is_on_the_device(self) -> None:
        assert all(self.core.pool.holds(key) for key in self.pinned)

    def teardown(self) -> None:
        """Everything ends, and nothing is left."""
        self._finish(lambda: not self.running)
        for version in self.registry.list_versions(include_versions=True):
            self._unload(version.key)
        self._finish(lambda: not self.core.has_work())
        assert self.core.pool.residents() == []
        assert self.core.store.residents() == []
        assert self.core.blocks.num_free + self.core.blocks.num_cached == self.core.blocks.num_blocks
        self.engine.close()

    def _finish(self, is_over: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if is_over():
                return
            self.engine.loader.run(1)
            self._step()
        raise AssertionError(f"no end after {MAX_STEPS} steps: {self.running}")

    def _step(self) -> None:
        messages = self.engine.step()
        for output in outputs_of(messages):
            self._take(output)
        for message in messages:
            match message:
                case AdaptersChanged(statuses=statuses):
                    for status in statuses:
                        self._hear(status)
                case StepOutput():
                    pass

    def _hear(self, status: AdapterStatus) -> None:
        key, facts = status.key, status.facts
        assert not status.reason, status
        (self.pinned.add if status.pinned else self.pinned.discard)(key)
        if status.problems:
            self.to_be_pinned.discard(key)
        version = self._of(key)
        if version is None:
            return
        if facts is not None and version.state is AdapterState.LOADING:
            self.registry.activate(key, AdapterInfo(facts.rank, facts.size_bytes, ()))
        is_gone = facts is None and status.tier is Residency.DISK
        if is_gone and version.state is AdapterState.DELETING and not version.num_requests:
            self.registry.remove(key)

    def _take(self, output: RequestOutput) -> None:
        running = self.running[output.request_id]
        running.tokens += output.token_ids
        if output.finish_reason is None:
            return
        expected, error = self.alone.tokens(running.content, running.prompt)
        if error:
            assert output.error.count("cannot be composed") == error.count("cannot be composed") > 0
        else:
            assert not output.error
            assert output.finish_reason is FinishReason.MAX_TOKENS
            assert running.tokens == expected[: running.num_tokens], running
        self._end(output.request_id)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _generate(
        self, versions: tuple[AdapterVersion, ...], weights: tuple[float, ...] | None, prompt: int, num_tokens: int
    ) -> None:
        for version in versions:
            self.registry.begin_request(version.key)
            self._ask_for(version)  # as for any that is not known to be there
        keys = [version.key for version in versions]
        contents = [self.alone.oracle.keys[version.spec.source] for version in versions]
        number = next(self.ids)
        self.running[number] = Running(keys, _target(contents, weights), prompt, num_tokens)
        self.core.add(request(number, prompt, _target(keys, weights), num_tokens))

    def _end(self, number: int) -> None:
        for key in self.running.pop(number).keys:
            self.registry.end_request(key)
            version = self.registry.get(full_name(key))
            if version.state is AdapterState.DELETING and not version.num_requests:
                self._unload(key)

    def _unload(self, key: AdapterKey, residency: Residency = Residency.DISK) -> None:
        self._unpin(key)
        self._want(key, least=Residency.DISK, most=residency)

    def _unpin(self, key: AdapterKey) -> None:
        self.pinned.discard(key)
        self.to_be_pinned.discard(key)

    def _ask_for(self, version: AdapterVersion, residency: Residency = Residency.HOST) -> None:
        path = self.alone.oracle.folder / version.spec.source
        self._want(version.key, path=str(path), least=residency)

    def _want(self, key: AdapterKey, **wish: Any) -> None:
        self.core.want_adapter(WantAdapter(key, next(self.orders), pinned=key in self.to_be_pinned, **wish))

    def _staying(self) -> list[AdapterVersion]:
        versions = self.registry.list_versions(include_versions=True)
        return [version for version in versions if version.state is not AdapterState.DELETING]

    def _any(self, index: int) -> AdapterVersion:
        staying = self._staying()
        return staying[index % len(staying)]

    def _current(self, index: int) -> AdapterVersion:
        """What the name of any of them means now: the current one, or the newest."""
        return self.registry.get(self._any(index).name)

    def _of(self, key: AdapterKey) -> AdapterVersion | None:
        return self._find(full_name(key))

    def _find(self, name: str) -> AdapterVersion | None:
        try:
            return self.registry.get(name)
        except AdapterNotFound:
            return None


@dataclass
class Running:
    """A request that has not ended."""

    keys: list[AdapterKey]  # that it uses
    content: AdapterKey | None  # the same, as who runs alone knows it
    prompt: int
    num_tokens: int
    tokens: list[int] = field(default_factory=list)


def _target(keys: list[Any], weights: tuple[float, ...] | None) -> AdapterKey | None:
    if weights is not None:
        return compose(zip(keys, weights, strict=True))
    return keys[0] if keys else None


class LivesInThreeTiers(Lives):
    """Blocks that the device evicts come back from the host, which has room for some, and from files."""

    settings: ClassVar[dict[str, Any]] = {"host_cache_bytes": 16 * BLOCK_BYTES}


@pytest.mark.parametrize("lives", [Lives, LivesInThreeTiers])
def test_every_output_is_that_of_its_version_alone(alone: Alone, lives: Callable[[Alone], Lives]) -> None:
    run_state_machine_as_test(
        lambda: lives(alone),  # type: ignore[arg-type]  # whatever makes one will do; its types ask for a class
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=STEPS_OF_EXAMPLE,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
