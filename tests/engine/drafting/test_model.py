"""Drafts of a smaller model: it reads what the request has, and draws what may follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_engine.core import EngineCore
from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.drafting.model import ModelDrafts
from loraplex_engine.drafting.source import NEVER
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import Request

pytest.importorskip("transformers")

import transformers

from tests.engine.forms import save_tiny_model

P = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base")
    save_tiny_model(folder / "small")
    return folder


@pytest.fixture
def load(folder: Path) -> Iterator[Callable[..., EngineCore]]:
    cores: list[EngineCore] = []

    def load(small: str = "small", blocks: int = 64, **fields: Any) -> EngineCore:
        drafts = DraftConfig(kind=DraftKind.MODEL, model=str(folder / small), tokens=4)
        limits: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 16, "block_size": P}
        cache: dict[str, Any] = {"kv_cache_bytes": blocks * 2 * P * 2 * 16 * 4}
        config = EngineConfig(model=str(folder / "base"), drafts=drafts, **limits, **cache, **fields)
        cores.append(EngineCore.load(config))
        return cores[-1]

    yield load
    for core in cores:
        core.close()


def drafter_of(core: EngineCore) -> ModelDrafts:
    source = core.scheduler.drafter._sources[DraftKind.MODEL]  # type: ignore[attr-defined]
    assert isinstance(source, ModelDrafts)
    return source


def a_request(prompt: list[int], number: int = 1, **fields: Any) -> Request:
    sampling = SamplingParams(**({"seed": 3, "max_tokens": 40, "temperature": 0.8} | fields))
    return Request(AddRequest(number, prompt, sampling, drafts=Drafts(DraftKind.MODEL, 4)), number, 0.0)


def continued(core: EngineCore, request: Request) -> list[int]:
    """The output of the request in the engine itself."""
    core.add(AddRequest(99, list(request.token_ids), request.sampling))
    tokens: list[int] = []
    while core.has_work():
        for event in core.step():
            tokens += [token for output in event.outputs for token in output.token_ids]  # type: ignore[union-attr]
    return tokens


def test_a_small_model_that_is_the_large_one_draws_the_same_tokens(load: Callable[..., EngineCore]) -> None:
    core = load()
    request = a_request([65, 66, 67, 68])
    expected = continued(core, request)
    source = drafter_of(core)
    assert source.propose({1: (request, 4)}) == {1: expected[:4]}
    request.token_ids += expected[:5]
    assert source.propose({1: (request, 3)}) == {1: expected[5:8]}


def test_drafts_that_were_wrong_are_forgotten(load: Callable[..., EngineCore]) -> None:
    core = load()
    request = a_request([65, 66, 67, 68])
    source = drafter_of(core)
    [first, *_] = source.propose({1: (request, 4)})[1]
    request.token_ids.append(first + 1)  # another than was drafted
    other = a_request(list(request.token_ids), 2)
    assert source.propose({1: (request, 4)})[1] == source.propose({2: (other, 4)})[2]


def test_a_long_prompt_is_read_over_several_steps(load: Callable[..., EngineCore]) -> None:
    source = drafter_of(load())
    request = a_request([65 + place % 9 for place in range(40)])
    assert [len(source.propose({1: (request, 2)})[1]) for _ in range(3)] == [0, 0, 2]


def test_a_request_for_which_blocks_are_missing_has_no_drafts(load: Callable[..., EngineCore]) -> None:
    source = drafter_of(load(blocks=16))
    one, other = a_request([65] * 40), a_request([66] * 40, 2)
    source.propose({1: (one, 4)})
    assert 2 not in source.propose({2: (other, 4)})
    source.forget(one)
    assert 2 in source.propose({2: (other, 4)})
    source.forget(other)
    assert source._blocks.num_used == 0


def test_a_prompt_is_read_only_where_that_is_cheap_beside_the_output(load: Callable[..., EngineCore]) -> None:
    source = drafter_of(load())
    source._costs = StepCosts({1: 1.0, 2: 1.0, 12: 2.0})
    request = a_request([65] * 12)
    assert source.costs(request, 1, token_seconds=5.0).first == 0.0  # 40 tokens of 5 s, and 2 s to read the prompt
    assert source.costs(request, 1, token_seconds=4.0) == NEVER


def test_what_a_small_model_takes_is_memory_of_the_model(load: Callable[..., EngineCore]) -> None:
    core = load()
    assert core.limits.weight_bytes == 2 * core.runner.model.nbytes


def test_a_small_model_with_another_vocabulary_is_refused(
    load: Callable[..., EngineCore], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1} | heads
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=99)).save_pretrained(other)
    with pytest.raises(ValueError, match=r"has 99 token ids.*must have the same tokenizer"):
        load(small=str(other))


def test_a_small_model_whose_tokenizer_names_other_ids_is_refused(
    load: Callable[..., EngineCore], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    save_tiny_model(other)
    (folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1, "b": 0}}}')
    try:
        with pytest.raises(ValueError, match=r"another vocabulary.*must have the same tokenizer"):
            load(small=str(other))
    finally:
        (folder / "base" / "tokenizer.json").unlink()


class Told:
    """A `LoadReport` that keeps how much was read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        self.read.append((bytes_loaded, bytes_total))

    def waits(self, what: str) -> None:
        raise AssertionError("nothing is waited for")


def test_the_small_model_is_told_of_while_it_loads(folder: Path) -> None:
    drafts, told = DraftConfig(kind=DraftKind.MODEL, model=str(folder / "small"), tokens=4), Told()
    config = EngineConfig(model=str(folder / "base"), drafts=drafts, max_model_len=64, kv_cache_bytes=1 << 20)
    EngineCore.load(config, told).close()
    whole = [total for read, total in told.read if read == total]
    assert len(whole) == 2
    assert len(told.read) > 4  # tensor by tensor
