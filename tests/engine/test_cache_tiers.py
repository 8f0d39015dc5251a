"""An engine whose prefix cache goes beyond the device, with a true model: the same tokens, without computing them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.peft_oracle import make_base
from tests.reference.stepping import step

BLOCKS = 24
PROMPT_TOKENS = 61


class Engine:
    def __init__(self, model: Path, **fields: Any) -> None:
        # float32: 2 layers of 2 heads of 16, keys and values, in blocks of 4
        options: dict[str, Any] = {"dtype": "float32", "block_size": 4, "threads": 1, "max_model_len": 96}
        options |= {"kv_cache_bytes": BLOCKS * 2048, "host_cache_bytes": 1 << 20, "kernels": "cpu"}
        self.core = EngineCore.load(EngineConfig(model=str(model), **(options | fields)))
        self.num_requests = 0

    def run(self, seed: int, salt: str = "") -> tuple[list[int], int, int]:
        """A prompt's tokens, how many were found in the cache, and how many were computed."""
        self.num_requests += 1
        prompt = torch.randint(3, 150, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=6)
        before = self.core.stats().prompt_tokens
        self.core.add(AddRequest(self.num_requests, prompt, sampling, None, cache_salt=salt))
        outputs: list[RequestOutput] = []
        while self.core.has_work():
            for event in step(self.core):
                outputs += event.outputs if isinstance(event, StepOutput) else []
        assert not outputs[-1].error
        tokens = [token for output in outputs for token in output.token_ids]
        return tokens, outputs[0].num_cached_tokens, self.core.stats().prompt_tokens - before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers")
    make_base("llama", folder)
    return folder / "base"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kv_cache_dtype": "int8", "kv_cache_bytes": BLOCKS * 1024},
        {"kv_cache_dtype": "fp8", "kv_cache_bytes": BLOCKS * 1024},
        {"kernels": "reference"},
        {"run_ahead": True},
        {"max_num_batched_tokens": 7},
    ],
)
def test_an_evicted_prefix_gives_the_same_tokens_without_being_computed(model: Path, fields: dict[str, Any]) -> None:
    engine = Engine(model, **fields)
    first = engine.run(1)
    for other in range(2, 6):
        engine.run(other)
    again = engine.run(1)
    assert again == (first[0], 60, 1)
    assert engine.core.stats().num_restored_blocks > 0
    assert engine.run(1, salt="another")[1:] == (0, PROMPT_TOKENS)
    engine.core.close()


def test_a_prefix_outlives_the_engine(model: Path, tmp_path: Path) -> None:
    disk = {"disk_cache_bytes": 1 << 20, "disk_cache_directory": str(tmp_path / "cache")}
    engine = Engine(model, **disk)
    first = engine.run(1)  # nothing evicts it before the engine stops
    engine.core.close()
    successor = Engine(model, **disk)
    found = successor.run(1)
    assert found == (first[0], 60, 1)
    assert successor.core.stats().num_blocks_read == 15
    successor.core.close()


@pytest.mark.parametrize("change", [{"kernels": "reference"}, {"kv_cache_dtype": "int8"}, {"batch_invariant": True}])
def test_an_engine_that_computes_otherwise_finds_nothing(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    disk = {"disk_cache_bytes": 1 << 20, "disk_cache_directory": str(tmp_path / "cache")}
    engine = Engine(model, **disk)
    for number in (1, 2, 3):
        engine.run(number)
    engine.core.close()
    successor = Engine(model, **(disk | change))
    assert successor.run(1)[1:] == (0, PROMPT_TOKENS)
    assert successor.core.stats().num_bad_files == 0
    successor.core.close()


def test_nothing_is_written_of_a_cache_whose_state_is_unknown(model: Path, tmp_path: Path) -> None:
    disk = {"disk_cache_bytes": 1 << 20, "disk_cache_directory": str(tmp_path / "cache")}
    engine = Engine(model, **disk)
    engine.run(1)
    del engine.core.scheduler.drafter  # whatever a step stumbles over
    with pytest.raises(AttributeError):
        engine.core.step()
    engine.core.close()
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"key", "lock"}


def test_an_engine_of_another_version_finds_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = {"disk_cache_bytes": 1 << 20, "disk_cache_directory": str(tmp_path / "cache")}
    engine = Engine(model, **disk)
    engine.run(1)
    engine.core.close()
    monkeypatch.setattr("loraplex_engine.execution.cache_identity.version", lambda name: "0.0.1")
    successor = Engine(model, **disk)
    assert successor.run(1)[1:] == (0, PROMPT_TOKENS)
    successor.core.close()


def test_without_the_keys_there_is_nothing_of_it(model: Path) -> None:
    engine = Engine(model, host_cache_bytes=0)
    assert engine.core.tiers is engine.core.blocks.host is engine.core.runner.host_cache is None
    engine.core.close()


def test_without_the_keys_nothing_of_it_is_called(model: Path) -> None:
    engine = Engine(model, host_cache_bytes=0)
    rooms = {"cache_tiers.py", "host_blocks.py", "prefixes.py", "host_cache.py", "disk_cache.py"}
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).name in rooms:
            called.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        for number in (1, 2, 3, 1):  # more than the device has room for
            engine.run(number)
    finally:
        sys.setprofile(None)
        engine.core.close()
    assert called == []
