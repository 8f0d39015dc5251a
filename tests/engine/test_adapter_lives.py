"""Whatever happens to adapters, a request's tokens are those of the version that it started with, run alone.

A Hypothesis state machine over registering, loading, pinning, swapping, unloading, deleting, generating and cancelling,
on the true engine with a demo model in float32, with room for two adapters, and so few blocks that requests are
preempted.
"""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapters.errors import AdapterConflict, AdapterNotFound, AdapterNotReady
from adapters.key import AdapterKey
from adapters.registry import AdapterInfo, AdapterRegistry, AdapterSpec, AdapterState, AdapterVersion, full_name
from adapters.residency import Residency
from adapters.source import digest
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import (
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    AddRequest,
    LoadAdapter,
    PinAdapter,
    StepOutput,
    UnloadAdapter,
)
from engine.sampling_params import FinishReason, SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "demo"
CONTENTS = {name: DEMO / "adapters" / name for name in ("pirate", "shouting", "formal", "poet")}
DIGESTS = {name: digest(path) for name, path in CONTENTS.items()}
NAMES = ("a", "b")
PROMPTS = ([260, 261, 262, 263, 264], list(range(300, 323)))
OUTPUT_TOKENS = 6
MAX_STEPS = 2000  # of the engine until everything has ended


def load_core(**fields: object) -> EngineCore:
    return EngineCore.load(
        EngineConfig(
            model=str(DEMO / "models" / "storyteller"),
            dtype="float32",
            threads=1,
            block_size=4,
            max_model_len=32,
            max_num_batched_tokens=16,
            **fields,  # type: ignore[arg-type]
        )
    )


def request(request_id: int, prompt: int, key: AdapterKey | None) -> AddRequest:
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=OUTPUT_TOKENS)
    return AddRequest(request_id, PROMPTS[prompt], sampling, key)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str | None, int], list[int]]:
    """By content and prompt: the tokens of a request that runs alone, in an engine with room for everything."""
    core = load_core(kv_cache_bytes=16 << 20, enable_prefix_caching=False)
    found: dict[tuple[str | None, int], list[int]] = {}
    number = 0
    for content in (None, *CONTENTS):
        key = None if content is None else AdapterKey(f"alone/{content}", DIGESTS[content])
        if key is not None and content is not None:
            core.load_adapter(LoadAdapter(key, str(CONTENTS[content])))
        for prompt in range(len(PROMPTS)):
            number += 1
            core.add(request(number, prompt, key))
            tokens = found[content, prompt] = []
            while core.scheduler.requests:
                for message in core.step():
                    for output in message.outputs if isinstance(message, StepOutput) else ():
                        tokens += output.token_ids
    core.close()
    assert len({tuple(tokens) for (_, prompt), tokens in found.items() if prompt == 0}) > 2
    return found


def lives_of(core: EngineCore, expected: dict[tuple[str | None, int], list[int]]) -> type[RuleBasedStateMachine]:
    """The machine, on one engine that every example leaves as it found it."""
    ids = iter(range(1, 1 << 60))

    class Lives(RuleBasedStateMachine):
        names, contents = st.sampled_from(NAMES), st.sampled_from(sorted(CONTENTS))

        def __init__(self) -> None:
            super().__init__()
            self.registry = AdapterRegistry()
            self.running: dict[int, tuple[AdapterKey | None, str | None, int, list[int]]] = {}
            self.residency: dict[AdapterKey, Residency] = {}

        # ---- what the service does -----------------------------------------------------------------------------

        @rule(name=names, content=contents)
        def register_or_swap(self, name: str, content: str) -> None:
            try:
                version = self.registry.register("shared", name, DIGESTS[content], AdapterSpec("demo", content))
            except AdapterConflict:  # it is being deleted
                return
            core.load_adapter(LoadAdapter(version.key, str(CONTENTS[content])))

        @rule(name=names, device=st.booleans())
        def load(self, name: str, device: bool) -> None:
            version = self._version(name)
            if version is not None:
                residency = Residency.DEVICE if device else Residency.HOST
                core.load_adapter(LoadAdapter(version.key, self._path(version), residency))

        @rule(name=names, pinned=st.booleans())
        def pin(self, name: str, pinned: bool) -> None:
            version = self._version(name)
            if version is not None:
                core.pin_adapter(PinAdapter(version.key, pinned))

        @rule(name=names, residency=st.sampled_from([Residency.DISK, Residency.HOST]))
        def unload(self, name: str, residency: Residency) -> None:
            version = self._version(name)
            if version is not None:
                core.unload_adapter(UnloadAdapter(version.key, residency))

        @rule(name=names, content=contents)
        def roll_back(self, name: str, content: str) -> None:
            try:
                self.registry.set_current(full_name(AdapterKey(f"shared/{name}", DIGESTS[content])))
            except (AdapterConflict, AdapterNotFound):
                return

        @rule(name=names, content=contents, whole=st.booleans())
        def delete(self, name: str, content: str, whole: bool) -> None:
            key = AdapterKey(f"shared/{name}", DIGESTS[content])
            try:
                deleted = self.registry.delete(f"tenants/shared/adapters/{name}" if whole else full_name(key))
            except (AdapterConflict, AdapterNotFound):
                return
            for version in deleted:
                core.unload_adapter(UnloadAdapter(version.key))

        @rule(name=st.sampled_from([*NAMES, None]), prompt=st.integers(0, len(PROMPTS) - 1))
        def generate(self, name: str | None, prompt: int) -> None:
            key = None
            if name is not None:
                try:
                    key = self.registry.resolve("shared", name)
                except (AdapterNotFound, AdapterNotReady):
                    return
                self.registry.begin_request(key)
                version = self.registry.get(full_name(key))
                core.load_adapter(LoadAdapter(key, self._path(version)))  # as for any that is not known to be there
            number = next(ids)
            content = None if key is None else self.registry.get(full_name(key)).spec.source
            self.running[number] = (key, content, prompt, [])
            core.add(request(number, prompt, key))

        @rule(index=st.integers(0, 20))
        def cancel(self, index: int) -> None:
            if self.running:
                number = sorted(self.running)[index % len(self.running)]
                core.abort([number])
                self._end(number)

        @rule(count=st.integers(1, 4))
        def step(self, count: int) -> None:
            for _ in range(count):
                self._step()

        # ---- what comes of it ----------------------------------------------------------------------------------

        def _step(self) -> None:
            for message in core.step():
                match message:
                    case StepOutput(outputs=outputs):
                        for output in outputs:
                            assert output.finish_reason is not FinishReason.ERROR, output.error
                            key, content, prompt, tokens = self.running[output.request_id]
                            tokens += output.token_ids
                            if output.finish_reason is not None:
                                assert tokens == expected[content, prompt], (key, content, prompt)
                                self._end(output.request_id)
                    case AdapterLoaded(key=key):
                        version = self._of(key)
                        if version is not None and version.state is AdapterState.LOADING:
                            self.registry.activate(key, AdapterInfo(message.rank, message.size_bytes, ()))
                    case AdapterUnloaded(key=key):
                        self.residency.pop(key, None)
                        version = self._of(key)
                        if version is not None and version.state is AdapterState.DELETING and not version.num_requests:
                            self.registry.remove(key)
                    case AdaptersMoved(moves=moves):
                        self.residency.update(moves)
                    case AdapterPinned():
                        pass

        @invariant()
        def memory_is_within_its_budgets(self) -> None:
            assert core.pool.used_bytes <= core.pool._budget_bytes
            blocks = core.blocks
            assert blocks.num_free + blocks.num_cached <= blocks.num_blocks

        def teardown(self) -> None:
            """Everything ends, and the engine is as it was."""
            for _ in range(MAX_STEPS):
                if not self.running:
                    break
                self._step()
                time.sleep(0.0002)  # loader threads need the interpreter too
            assert not self.running
            for version in self.registry.list_versions(include_versions=True):
                core.unload_adapter(UnloadAdapter(version.key))
            for _ in range(MAX_STEPS):
                if not core.has_work():
                    break
                self._step()
                time.sleep(0.0002)
            assert core.pool.residents() == []
            assert core.store.residents() == []
            assert core.blocks.num_free + core.blocks.num_cached == core.blocks.num_blocks

        # ---- names ---------------------------------------------------------------------------------------------

        def _version(self, name: str) -> AdapterVersion | None:
            """The current one, if it may still be used."""
            try:
                version = self.registry.get(f"tenants/shared/adapters/{name}")
            except AdapterNotFound:
                return None
            return version if version.state is not AdapterState.DELETING else None

        def _of(self, key: AdapterKey) -> AdapterVersion | None:
            try:
                return self.registry.get(full_name(key))
            except AdapterNotFound:
                return None

        def _path(self, version: AdapterVersion) -> str:
            return str(CONTENTS[version.spec.source])

        def _end(self, number: int) -> None:
            key, *_ = self.running.pop(number)
            if key is None:
                return
            self.registry.end_request(key)
            version = self.registry.get(full_name(key))
            if version.state is AdapterState.DELETING and not version.num_requests:
                core.unload_adapter(UnloadAdapter(key))

    return Lives


def test_every_output_is_that_of_its_version_alone(expected: dict[tuple[str | None, int], list[int]]) -> None:
    core = load_core(
        kv_cache_bytes=14 * 16384,  # blocks; a sequence may need 8
        max_resident_adapters=2,
        adapter_device_bytes=1_600_000,  # with the largest pin, 0.5 MB, there is room for the largest adapter, 1.1 MB
        adapter_host_bytes=1_600_000,
    )
    try:
        run_state_machine_as_test(
            lives_of(core, expected),
            settings=settings(
                max_examples=25, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        core.close()
