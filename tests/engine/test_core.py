"""EngineCore between its rooms: what it refuses, what a failed step costs, when an adapter may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.errors import INVALID
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Pace
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.store import FinishedLoad
from loraplex_engine.core import EngineCore
from loraplex_engine.link.beams import Beams
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import (
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    Device,
    Embedded,
    EngineLimits,
    Parts,
    RequestOutput,
    StepOutput,
    WantAdapter,
)
from loraplex_engine.link.pooling import PoolingParams
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.step import PendingResult, SampledToken, StepPlan, StepResult

KEY = AdapterKey("shared/pirate", "a" * 64)
VOCAB = 100


class FakeRunner:
    """Every next token is 7; fails when told to, as a whole or for some requests."""

    num_blocks = 32
    max_model_len = 64
    host_cache = None

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.not_finite: frozenset[int] = frozenset()  # of these no token is drawn
        self.not_finite_prompts: frozenset[int] = frozenset()  # of these one is: only their prompts have such rows
        self.drawn: list[int] = []  # the requests of which a token was drawn, each as often

    def limits(self, config: EngineConfig) -> EngineLimits:
        return EngineLimits(
            "Fake", "float32", "", VOCAB, 64, 16, 8, 32, config.block_size, 0, 0, "fake", Device("cpu", "fake", 1)
        )

    def execute(self, plan: StepPlan) -> PendingResult:
        self.drawn += [item.request.request_id for item in plan.scheduled if item.samples]
        error, result = self.error, self.computed(plan)

        def told() -> StepResult:
            if error is not None:
                raise error
            return result

        return PendingResult(told)

    def computed(self, plan: StepPlan) -> StepResult:
        tokens = tuple(
            (SampledToken(7, None),) if item.samples and item.request.request_id not in self.not_finite else ()
            for item in plan.scheduled
        )
        return StepResult(tokens, {}, self.not_finite | self.not_finite_prompts)


class FakeAdapters:
    """Store and pool in one: what is registered is resident at once."""

    def __init__(self) -> None:
        self.changes = 0
        self.known: set[AdapterKey] = set()
        self.with_heads: set[AdapterKey] = set()
        self.finished: list[FinishedLoad] = []
        self.unloaded: list[AdapterKey] = []
        self.moved: set[AdapterKey] = set()
        self.used_bytes = 0
        self.pace = Pace(1.0)

    def register(
        self, key: AdapterKey, path: Path, is_hashed: bool = False, ahead: bool = False, upload: int = 0
    ) -> None:
        self.known.add(key)

    def hurry(self, key: AdapterKey) -> None:
        pass

    def unregister(self, key: AdapterKey) -> None:
        self.known.discard(key)

    def is_registered(self, key: AdapterKey) -> bool:
        return key in self.known

    def is_pinned(self, key: AdapterKey) -> bool:
        return False

    def keep(self, key: AdapterKey) -> None:
        pass

    def is_loading(self) -> bool:
        return False

    def poll(self) -> list[FinishedLoad]:
        finished, self.finished = self.finished, []
        return finished

    def invocation_tokens(self, key: AdapterKey) -> tuple[int, ...]:
        return ()

    def leaves_cache(self, key: AdapterKey) -> bool:
        return False

    def has_head(self, key: AdapterKey) -> bool:
        return key in self.with_heads

    def acquire(self, key: AdapterKey) -> int | None:
        return 0

    def release(self, key: AdapterKey) -> None:
        pass

    def make_room(self, key: AdapterKey) -> None:
        pass

    def unload(self, key: AdapterKey) -> None:
        self.unloaded.append(key)

    def holds(self, key: AdapterKey) -> bool:
        return key in self.known

    def in_use(self) -> list[tuple[AdapterKey, int]]:
        return []


class Bench:
    run_ahead = False

    def __init__(self, num_blocks: int = 32) -> None:
        self.runner = FakeRunner()
        self.runner.num_blocks = num_blocks
        self.adapters = FakeAdapters()
        parts: tuple[Any, Any, Any] = (self.runner, self.adapters, self.adapters)
        config = EngineConfig(model="fake", block_size=4, max_num_batched_tokens=16)
        self.core = EngineCore(*parts, config, run_ahead=self.run_ahead)

    def add(
        self,
        request_id: int = 1,
        prompt: list[int] | None = None,
        adapter: AdapterKey | None = None,
        output: list[int] | None = None,
        pooling: PoolingParams | None = None,
        beams: Beams | None = None,
        **fields: Any,
    ):
        sampling = SamplingParams(**({"seed": 0, "max_tokens": 3} | fields))
        prompt = [1, 2, 3] if prompt is None else prompt
        self.core.add(
            AddRequest(
                request_id, prompt, sampling, adapter, output_token_ids=output or [], pooling=pooling, beams=beams
            )
        )

    def step(self) -> list[RequestOutput]:
        return [o for message in self.core.step() if isinstance(message, StepOutput) for o in message.outputs]

    def finish(self) -> list[RequestOutput]:
        outputs = []
        while self.core.has_work():
            outputs += self.step()
        return outputs


@pytest.fixture(autouse=True, params=[False, True], ids=["waiting", "ahead"])
def _run_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds of an engine that waits for each step holds of one that starts the next one before."""
    monkeypatch.setattr(Bench, "run_ahead", request.param)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": []}, "prompt of 0 tokens"),
        ({"prompt": [1] * 64}, "prompt of 64 tokens"),
        ({"prompt": [1, VOCAB]}, "token ids must lie in 0 to 99"),
        ({"prompt": [-1]}, "token ids must lie in"),
        ({"prompt": Parts([[1], Embedded("d" * 64, 1 << 60)])}, "the prompt has several parts"),
        ({"logit_bias": {VOCAB: 1.0}}, "token ids must lie in"),
        ({"stop_token_ids": (10**9,)}, "token ids must lie in"),
        ({"allowed_token_ids": ()}, "no token could be drawn"),
        ({"allowed_token_ids": (5,), "eos_token_ids": (5,), "min_tokens": 2}, "no token could be drawn"),
        ({"allowed_token_ids": (98, 99), "num_token_ids": 98}, "no token could be drawn"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": [1] * 65, "max_tokens": 0}, "prompt of 65 tokens"),
        ({"pooling": PoolingParams()}, "max_tokens is 3: it must be 0 where hidden states are pooled"),
        ({"adapter": KEY}, "not registered"),
        ({"beams": Beams(2, [1])}, "a beam search has no tokens to look for"),
        ({"beams": Beams(2, [1]), "num_candidates": 4, "max_tokens": 0}, "a beam search has no tokens to look for"),
        ({"stop": ("x",)}, "stop strings"),
        ({"beams": Beams(99, [1]), "num_candidates": 198}, "99 beams"),
        ({"output": [1, VOCAB]}, "token ids must lie in"),
        ({"output": [1, 2, 3]}, "3 output tokens to go on from"),
        ({"prompt": [1] * 62, "output": [1, 2]}, "2 output tokens to go on from"),
    ],
)
def test_a_bad_request_fails_alone(fields, problem):
    bench = Bench()
    bench.add(1, **fields)
    bench.add(2)
    outputs = bench.finish()
    (bad,) = [output for output in outputs if output.request_id == 1]
    assert bad.finish_reason is FinishReason.ERROR
    assert problem in bad.error
    assert [output.token_ids for output in outputs if output.request_id == 2] == [[7], [7], [7]]


def test_a_request_goes_on_from_what_another_engine_generated():
    bench = Bench()
    bench.add(output=[5, 6], max_tokens=4)
    outputs = bench.finish()
    assert [output.token_ids for output in outputs] == [[7], [7]]
    assert outputs[-1].finish_reason is FinishReason.MAX_TOKENS


def test_a_request_for_no_tokens_ends_once_its_prompt_is_computed():
    bench = Bench()
    bench.add(prompt=[1] * 64, max_tokens=0)
    outputs = [bench.step() for _ in range(4 + bench.run_ahead)]
    assert not any(outputs[:-1])
    (output,) = outputs[-1]
    assert (output.token_ids, output.finish_reason) == ([], FinishReason.MAX_TOKENS)
    assert not bench.core.has_work()
    assert bench.core.stats().prompt_tokens == 64


def test_an_id_in_use_is_refused_and_its_owner_goes_on():
    bench = Bench()
    bench.add(1)
    bench.add(1)
    outputs = bench.finish()
    assert [output.finish_reason for output in outputs].count(FinishReason.ERROR) == 1
    assert [output.token_ids for output in outputs if not output.error] == [[7], [7], [7]]


def test_a_failed_step_ends_its_requests_and_nobody_else():
    bench = Bench()
    bench.add(1)
    bench.runner.error = RuntimeError("boom")
    (output,) = bench.finish()
    assert output.finish_reason is FinishReason.ERROR
    assert "boom" in output.error
    bench.runner.error = None
    bench.add(2)
    assert bench.finish()[-1].finish_reason is FinishReason.MAX_TOKENS
    stats = bench.core.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


def test_a_request_without_finite_logits_fails_alone_and_counts():
    bench = Bench()
    bench.add(1)
    bench.add(2)
    bench.runner.not_finite = frozenset({1})
    outputs = bench.step()
    bench.runner.not_finite = frozenset()
    outputs += bench.finish()
    assert [(o.finish_reason, o.token_ids) for o in outputs if o.request_id == 1] == [(FinishReason.ERROR, [])]
    assert [o.token_ids for o in outputs if o.request_id == 2] == [[7], [7], [7]]
    assert bench.core.stats().num_not_finite == 1


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_request_that_drew_a_token_behind_a_prompt_that_is_not_finite_fails_alone(max_tokens: int) -> None:
    bench = Bench()
    bench.add(1, max_tokens=max_tokens, num_prompt_logprobs=0)
    bench.add(2)
    bench.runner.not_finite_prompts = frozenset({1})
    outputs = bench.finish()
    assert [(o.finish_reason, o.token_ids) for o in outputs if o.request_id == 1] == [(FinishReason.ERROR, [])]
    assert [o.token_ids for o in outputs if o.request_id == 2] == [[7], [7], [7]]


def test_an_error_of_the_device_is_not_survived():
    bench = Bench()
    bench.add(1)
    bench.runner.error = torch.AcceleratorError("the device is gone")
    with pytest.raises(torch.AcceleratorError):
        bench.finish()


@pytest.mark.parametrize("num_blocks", [5, 6, 7])
def test_a_preempted_request_loses_no_token_that_was_drawn(num_blocks: int) -> None:
    bench = Bench(num_blocks)
    bench.add(1, max_tokens=12)
    bench.add(2, max_tokens=12)
    outputs = bench.finish()
    told = [output.request_id for output in outputs for _ in output.token_ids]
    assert bench.core.stats().num_preemptions
    assert (told.count(1), told.count(2)) == (12, 12)
    assert sorted(told) == sorted(bench.runner.drawn)
    bench.core.blocks.check()


def test_a_preempted_request_whose_logits_are_not_finite_fails_when_it_is_computed_again() -> None:
    benches = [Bench(num_blocks=6) for _ in range(2)]
    for bench in benches:
        bench.add(1, max_tokens=12)
        bench.add(2, max_tokens=12)
    num_steps = 0
    while not benches[0].core.scheduler.num_preemptions:
        benches[0].step()
        num_steps += 1
    outputs = [output for _ in range(num_steps - 2) for output in benches[1].step()]
    num_drawn = benches[1].runner.drawn.count(2)
    benches[1].runner.not_finite_prompts = frozenset({2})  # when it is preempted, that is not read yet
    outputs = [output for output in outputs + benches[1].finish() if output.request_id == 2]
    assert [len(output.token_ids) for output in outputs] == [1] * num_drawn + [0]
    assert outputs[-1].finish_reason is FinishReason.ERROR


@pytest.mark.parametrize("num_tokens", [6, 7])
def test_the_block_that_the_last_computed_token_fills_is_found_by_later_requests(num_tokens: int) -> None:
    bench = Bench()
    bench.add(1, max_tokens=num_tokens - 1)
    bench.finish()
    bench.add(2, prompt=[1, 2, 3, *[7] * (num_tokens - 1)])
    assert bench.finish()[0].num_cached_tokens == (num_tokens + 1) // 4 * 4


def test_a_step_that_cannot_be_read_leaves_nothing_findable() -> None:
    bench = Bench()
    bench.add(1, prompt=[1] * 15)
    bench.runner.error = RuntimeError("boom")
    bench.finish()
    assert bench.core.stats().cached_blocks == 0


def test_an_unloaded_adapter_goes_when_its_last_request_has_gone():
    bench = Bench()
    bench.core.want_adapter(WantAdapter(KEY, 1, "somewhere"))
    bench.add(1, adapter=KEY)
    bench.core.want_adapter(WantAdapter(KEY, 2, least=Residency.DISK, most=Residency.DISK))
    bench.core.step()
    assert bench.adapters.unloaded == []
    bench.core.abort([1])
    assert bench.core.step() == [AdaptersChanged([AdapterStatus(KEY, 2, Residency.DISK)])]
    assert bench.adapters.unloaded == [KEY]
    assert not bench.core.has_work()
    bench.add(2, adapter=KEY)
    (output,) = bench.step()
    assert "not registered" in output.error


def test_a_load_after_an_unload_keeps_the_adapter():
    bench = Bench()
    bench.core.want_adapter(WantAdapter(KEY, 1, "somewhere"))
    bench.add(1, adapter=KEY)
    bench.core.want_adapter(WantAdapter(KEY, 2, least=Residency.DISK, most=Residency.DISK))
    bench.core.want_adapter(WantAdapter(KEY, 3, "somewhere"))
    bench.finish()
    assert bench.adapters.unloaded == []


def test_a_load_that_fails_is_reported():
    bench = Bench()
    bench.adapters.finished = [FinishedLoad(KEY, None, ["a tensor is missing"])]
    failed = AdapterStatus(KEY, 0, Residency.DISK, problems=["a tensor is missing"], reason=INVALID)
    assert bench.core.step() == [AdaptersChanged([failed])]


def test_loads_are_held_back_exactly_while_requests_run(monkeypatch):
    bench, told = Bench(), list[bool]()
    monkeypatch.setattr(bench.core.store.pace, "steps", lambda running: told.append(running))
    bench.add(1)
    bench.finish()
    assert told[0]
    assert not told[-1]
