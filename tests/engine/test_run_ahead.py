"""An engine that starts each step before it reads the tokens of the one before gives the outputs of one that waits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.grammar import regex_grammar
from loraplex_engine.link.messages import AddRequest, RequestOutput, WantAdapter
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.link.watermark import Watermark
from loraplex_engine.scheduling.step import PendingResult, StepPlan
from tests.engine.forms import EOS, Engine, save_tiny_model

BLOCK_BYTES = 4 * 2 * 16 * 4  # of the keys and values of four tokens

ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_p": 0.9, "num_logprobs": 2, "num_prompt_logprobs": 1},
    {"eos_token_ids": (EOS, *range(60)), "min_tokens": 2},  # every fourth token ends it
    {"stop_token_ids": tuple(range(100, 256)), "top_k": 50},
    {"max_tokens": 1},
    {"max_tokens": 0},
]
ALONE: list[dict[str, Any]] = [  # what reads tokens is not run ahead of
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"watermark": Watermark(key=bytes(16), gamma=0.5, delta=2.0, context_tokens=2)},
    {"grammar": regex_grammar("[a-f]{3,9}")},
    {"pooling": PoolingParams(method=PoolingMethod.MEAN), "max_tokens": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    save_tiny_model(folder / "base")
    (folder / "adapter").mkdir()
    generator, prefix = torch.Generator().manual_seed(1), "base_model.model.model.layers.0.mlp.up_proj"
    a, b = torch.randn(3, 32, generator=generator), torch.randn(48, 3, generator=generator)
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Bench:
    """An engine with an adapter, and requests that have it or not, in turns."""

    def __init__(self, folder: Path, run_ahead: bool, num_blocks: int = 400) -> None:
        settings: dict[str, Any] = {"kernels": "cpu", "dtype": "float32", "max_num_batched_tokens": 24}
        settings |= {"max_model_len": 64, "kv_cache_bytes": num_blocks * BLOCK_BYTES, "run_ahead": run_ahead}
        self.engine = Engine(folder / "base", **settings)
        self.core = self.engine.core
        self.adapter = AdapterKey("shared/a", digest(folder / "adapter"))
        self.core.want_adapter(WantAdapter(self.adapter, 1, str(folder / "adapter")))
        self.engine.finish()

    def add(self, number: int, grammar: str = "", pooling: PoolingParams | None = None, **fields: Any) -> None:
        sampling = SamplingParams(**({"seed": number, "max_tokens": 9 + number % 5} | fields))
        prompt = [(7 * number + place) % 200 for place in range(2 + number)]
        adapter = self.adapter if number % 2 else None
        self.core.add(AddRequest(number, prompt, sampling, adapter, pooling=pooling, grammar=grammar))

    def finish(self) -> dict[int, list[RequestOutput]]:
        self.engine.finish()
        self.core.blocks.check()
        stats = self.core.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
        return self.engine.outputs


@pytest.fixture
def benches(folder: Path) -> Iterator[list[Bench]]:
    """To be filled; their threads end with the test."""
    benches: list[Bench] = []
    yield benches
    for bench in benches:
        bench.core.close()


def told(outputs: list[RequestOutput]) -> tuple[Any, ...]:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    last = outputs[-1]
    return tokens, logprobs, outputs[0].prompt_logprobs, last.finish_reason, last.stop_token_id, last.pooled, last.error


@pytest.mark.parametrize("num_blocks", [400, 17], ids=["room for all", "preemption"])
@pytest.mark.parametrize("asked", [ASKED, ASKED + ALONE], ids=["foreseeable", "mixed"])
def test_outputs_are_those_of_an_engine_that_waits(
    folder: Path, benches: list[Bench], asked: list[dict[str, Any]], num_blocks: int
) -> None:
    found = []
    for run_ahead in (False, True):
        benches.append(bench := Bench(folder, run_ahead, num_blocks))
        for number, fields in enumerate(asked * 2):
            bench.add(number, **fields)
            if number % 3 == 0:  # the others arrive while it runs
                bench.engine.step()
        found.append({number: told(outputs) for number, outputs in bench.finish().items()})
        assert bool(bench.core.scheduler.num_preemptions) == (num_blocks == 17)
    assert found[0] == found[1]
    assert {each[3] for each in found[0].values()} >= {FinishReason.EOS, FinishReason.STOP, FinishReason.MAX_TOKENS}


def test_tokens_are_told_one_step_later(folder: Path, benches: list[Bench]) -> None:
    benches.append(bench := Bench(folder, run_ahead=True))
    bench.add(1, max_tokens=2)
    told_of = []
    while bench.core.has_work():
        bench.engine.step()
        told_of.append(len(bench.engine.tokens(1)) if bench.engine.outputs else 0)
    assert told_of == [0, 1, 2]  # and no third step is computed: that the second token is the last is known before


def test_a_request_that_is_aborted_has_told_what_it_had_and_the_others_go_on(
    folder: Path, benches: list[Bench]
) -> None:
    benches += [Bench(folder, run_ahead=run_ahead) for run_ahead in (False, True)]
    for bench in benches:
        bench.add(1)
        bench.add(2)
    whole = benches[0].finish()
    for _ in range(4):
        benches[1].engine.step()
    benches[1].core.abort([1])
    rest = benches[1].finish()
    assert told(rest[2]) == told(whole[2])
    assert benches[1].engine.tokens(1) == benches[0].engine.tokens(1)[:3]


def test_a_step_that_fails_loses_no_token_of_the_one_before(
    folder: Path, benches: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    benches.append(bench := Bench(folder, run_ahead=True))
    bench.add(1)
    for _ in range(3):
        bench.engine.step()

    def execute(plan: StepPlan) -> PendingResult:
        raise RuntimeError("boom")

    monkeypatch.setattr(bench.core.runner, "execute", execute)
    outputs = bench.finish()[1]
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1, 0]
    assert "boom" in outputs[-1].error


def test_a_time_limit_between_two_steps_tells_what_was_read(folder: Path, benches: list[Bench]) -> None:
    benches.append(bench := Bench(folder, run_ahead=True))
    bench.add(1, time_limit_seconds=1000.0)
    bench.engine.step()
    bench.core.scheduler.clock = lambda: float("inf")
    (output,) = bench.finish()[1]
    assert (output.finish_reason, output.token_ids) == (FinishReason.TIME_LIMIT, [])
    assert output.queue_seconds is not None  # it is the first


def test_what_was_computed_ahead_is_found_by_later_requests(folder: Path, benches: list[Bench]) -> None:
    benches.append(bench := Bench(folder, run_ahead=True))
    bench.add(2, max_tokens=20)
    bench.finish()
    known = [14, 15, 16, 17, *bench.engine.tokens(2)]
    bench.core.add(AddRequest(3, known, SamplingParams(seed=0, max_tokens=1)))
    assert bench.finish()[3][0].num_cached_tokens == len(known) // 4 * 4 - 4
