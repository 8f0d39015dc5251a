"""Embeddings in the engine's steps, against the hidden states of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput
from loraplex_engine.link.pooling import ModelPooling, PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.peft_oracle import FAMILIES, SHAPE, TOLERANCE, Engine, Oracle, make_base, random_prompt
from tests.reference.stepping import step

transformers = pytest.importorskip("transformers")

LAST, MEAN = PoolingParams(), PoolingParams(method=PoolingMethod.MEAN)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear", "use_rslora": True, "task_type": "CAUSAL_LM"},
    "features": {"target_modules": ["q_proj", "down_proj"], "task_type": "FEATURE_EXTRACTION"},
    "norms": {"target_modules": ["up_proj"], "modules_to_save": ["model.norm"]},
    "dora": {"target_modules": ["v_proj", "up_proj"], "use_dora": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = Oracle(folder, {None: None}, {None: make_base(request.param, folder)})
    for seed, (name, fields) in enumerate(ADAPTERS.items(), start=1):
        oracle.add(name, fields, seed)
    return oracle


class Embedder(Engine):
    """An engine that embeds beside what it generates, and the check that it computes what transformers and PEFT do."""

    def __init__(self, oracle: Oracle, **fields: Any) -> None:
        super().__init__(oracle, **fields)
        self.embedded: dict[int, tuple[str | None, list[int], PoolingParams]] = {}
        self.results: dict[int, np.ndarray] = {}

    def embed(self, prompt: list[int], adapter: str | None, params: PoolingParams) -> int:
        number = 1000 + len(self.embedded)
        self.embedded[number] = adapter, prompt, params
        sampling = SamplingParams(seed=0, max_tokens=0)
        self.core.add(AddRequest(number, prompt, sampling, self.oracle.keys[adapter], pooling=params))
        return number

    def is_pooled(self, request_id: int) -> bool:
        return request_id in self.embedded

    def step(self) -> None:
        for message in step(self.core):
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    assert not output.error
                    self.cached.setdefault(output.request_id, output.num_cached_tokens)
                    if self.is_pooled(output.request_id):
                        self.results[output.request_id] = np.frombuffer(output.pooled, dtype="<f4")
                    else:
                        self.tokens.setdefault(output.request_id, []).extend(output.token_ids)

    def check(self) -> None:
        super().check()
        assert self.results.keys() == self.embedded.keys()
        for number, (adapter, prompt, params) in self.embedded.items():
            expected = embedding(self.oracle, adapter, prompt, params)
            assert self.results[number].shape == expected.shape
            error = np.abs(self.results[number] - expected).max() / np.abs(expected).max()
            assert error < TOLERANCE, f"{adapter} {params}: the embedding is off by {error:.2e} of the largest"


def embedding(oracle: Oracle, adapter: str | None, prompt: list[int], params: PoolingParams) -> np.ndarray:
    """As sentence-transformers makes it of the model's last hidden states."""
    with torch.inference_mode():
        answer = oracle.models[adapter](input_ids=torch.tensor([prompt]), output_hidden_states=True)
    hidden = answer.hidden_states[-1][0]
    pooled = hidden[-1] if params.method is PoolingMethod.LAST else hidden.mean(dim=0)
    pooled = pooled[: params.dimensions]
    if params.normalize:
        pooled = torch.nn.functional.normalize(pooled, dim=0)
    found: np.ndarray = pooled.numpy()
    return found


def kv_bytes(oracle: Oracle) -> int:
    """Of one token, in float32. The kernels take heads of 16 numbers at least."""
    config = oracle.models[None].config
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * max(config.head_dim, 16) * 4)


def test_embeddings_of_many_adapters_equal_peft_beside_generation(oracle: Oracle):
    engine = Embedder(oracle, max_num_batched_tokens=64)
    wanted = [
        LAST,
        MEAN,
        PoolingParams(normalize=True),
        PoolingParams(method=PoolingMethod.MEAN, normalize=True, dimensions=5),
        PoolingParams(dimensions=16),
    ]
    adapters = [None, *ADAPTERS]
    for index, params in enumerate(wanted * len(adapters)):
        adapter = adapters[index % len(adapters)]
        engine.embed(random_prompt(1 + 7 * index % 40, index), adapter, params)
        if index % 3 == 0:
            engine.add(random_prompt(1 + index, 100 + index), adapter)
    engine.finish()
    engine.check()


@pytest.mark.parametrize("params", [LAST, MEAN], ids=["last", "mean"])
def test_prompts_are_computed_in_chunks_and_after_preemption(oracle: Oracle, params: PoolingParams):
    engine = Embedder(oracle, max_num_batched_tokens=7, kv_cache_bytes=100 * kv_bytes(oracle))
    for index in range(3):
        engine.add(random_prompt(9, 50 + index), [None, "norms"][index % 2], max_tokens=40)
    for index in range(3):
        engine.embed(random_prompt(60, index), [None, "plain"][index % 2], params)
    engine.finish()
    assert engine.core.scheduler.num_preemptions
    engine.check()


def test_the_last_token_is_computed_behind_a_cached_prefix(oracle: Oracle):
    engine = Embedder(oracle)
    prompt = random_prompt(24, 1)
    for end in (24, 24, 23, 21):
        engine.embed(prompt[:end], "plain", LAST)
        engine.finish()
    engine.check()
    assert [engine.cached[number] for number in engine.embedded] == [0, 20, 20, 20]


def test_a_mean_computes_the_whole_prompt_whatever_is_cached(oracle: Oracle):
    engine = Embedder(oracle)
    prompt = random_prompt(24, 1)
    for params in (LAST, MEAN):
        engine.embed(prompt, "plain", params)
        engine.finish()
    engine.check()
    assert list(engine.cached.values()) == [0, 0]


def test_a_prompt_may_fill_the_context(oracle: Oracle):
    engine = Embedder(oracle)
    engine.embed(random_prompt(96, 1), None, MEAN)
    engine.finish()
    engine.check()


def test_chunks_do_not_show_in_the_bits_of_an_embedding(oracle: Oracle):
    results = []
    for budget in (128, 9):
        engine = Embedder(oracle, max_num_batched_tokens=budget)
        for params in (LAST, MEAN):
            engine.embed(random_prompt(60, 1), "plain", params)
        engine.finish()
        results.append([engine.results[number].tobytes() for number in engine.embedded])
    assert results[0] == results[1]


def test_a_checkpoint_in_the_layout_of_sentence_transformers_embeds_as_it_says(tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)
    model = transformers.Qwen3Model(config).eval()
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(stated))  # as Qwen3-Embedding has it, without a head in its file
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    core = EngineCore.load(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_bytes=1 << 22, threads=1))
    said = core.limits.pooling
    assert said == ModelPooling(PoolingMethod.LAST, normalize=True)
    prompt = random_prompt(20, 1)
    params = PoolingParams(method=said.method, normalize=said.normalize)
    core.add(AddRequest(1, prompt, SamplingParams(seed=0, max_tokens=0), pooling=params))
    [output] = [one for event in core.step() if isinstance(event, StepOutput) for one in event.outputs]
    with torch.inference_mode():
        last = model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(last, dim=0).numpy()
    assert np.abs(np.frombuffer(output.pooled, dtype="<f4") - expected).max() < TOLERANCE
    core.close()
