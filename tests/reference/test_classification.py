"""Classification heads that adapters bring, against transformers and PEFT, beside embeddings and generation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.peft_oracle import TOLERANCE, Oracle, make_base, random_prompt, randomised
from tests.reference.stepping import step
from tests.reference.test_embeddings import Embedder, kv_bytes

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SEQUENCE = PoolingParams(classify=True)
TOKENS = PoolingParams(method=PoolingMethod.EACH, classify=True)
AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
# By name: the task, the labels, and PEFT's fields.
HEADS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sentiment": ("SEQ_CLS", 3, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "relevance": ("SEQ_CLS", 1, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("SEQ_CLS", 5, {"target_modules": ["up_proj"], "use_dora": True, "modules_to_save": ["model.norm"]}),
    "entities": ("TOKEN_CLS", 7, {"target_modules": ["k_proj", "o_proj"]}),
    "tags": ("TOKEN_CLS", 2, {"target_modules": ["gate_proj"], "modules_to_save": ["score"]}),
}
PARAMS = {name: TOKENS if task == "TOKEN_CLS" else SEQUENCE for name, (task, *_) in HEADS.items()}


@pytest.fixture(scope="module", params=["llama", "qwen3-tied"])  # transformers classifies no tokens with Gemma 3
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = Oracle(folder, {None: None}, {None: make_base(request.param, folder)})
    oracle.add("plain", {"target_modules": ["q_proj", "up_proj"]}, 1)
    for seed, name in enumerate(HEADS, start=2):
        add_head(oracle, name, seed)
    return oracle


def add_head(oracle: Oracle, name: str, seed: int) -> None:
    """A classifier trained on the oracle's base, saved by PEFT and read back by it."""
    task, num_labels, fields = HEADS[name]
    with warnings.catch_warnings(action="ignore"):
        base = AUTO[task].from_pretrained(
            oracle.folder / "base", num_labels=num_labels, attn_implementation="eager", dtype=torch.float32
        )
        fresh = copy.deepcopy(base)
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type=task, **fields)
        trained = randomised(peft.get_peft_model(base, config), seed)
        trained.create_or_update_model_card = lambda folder: None
        trained.save_pretrained(oracle.folder / name)
        oracle.models[name] = peft.PeftModel.from_pretrained(fresh, oracle.folder / name).eval()
    oracle.keys[name] = AdapterKey(f"shared/{name}", digest(oracle.folder / name))


class Classifier(Embedder):
    """An engine that classifies beside what it embeds and generates."""

    def __init__(self, oracle: Oracle, **fields: Any) -> None:
        super().__init__(oracle, **fields)
        self.classified: dict[int, tuple[str | None, list[int]]] = {}

    def classify(self, prompt: list[int], adapter: str | None, params: PoolingParams) -> None:
        number = 2000 + len(self.classified)
        self.classified[number] = adapter, prompt
        sampling = SamplingParams(seed=0, max_tokens=0)
        self.core.add(AddRequest(number, prompt, sampling, self.oracle.keys[adapter], pooling=params))

    def is_pooled(self, request_id: int) -> bool:
        return super().is_pooled(request_id) or request_id in self.classified

    def check(self) -> None:
        logits = {number: self.results.pop(number) for number in self.classified}
        super().check()
        for number, (adapter, prompt) in self.classified.items():
            with torch.inference_mode():
                expected = self.oracle.models[adapter](input_ids=torch.tensor([prompt])).logits[0].numpy()
            error = np.abs(logits[number].reshape(expected.shape) - expected).max() / np.abs(expected).max()
            assert error < TOLERANCE, f"{adapter}: logits are off by {error:.2e} of the largest"


def test_heads_of_many_adapters_equal_peft_beside_embeddings_and_generation(oracle: Oracle):
    engine = Classifier(oracle, max_num_batched_tokens=64)
    for index, name in enumerate([*HEADS] * 4):
        engine.classify(random_prompt(1 + 9 * index % 50, index), name, PARAMS[name])
        engine.embed(random_prompt(1 + index, 50 + index), [None, name][index % 2], PoolingParams())
        engine.add(random_prompt(1 + index, 100 + index), [None, "plain"][index % 2])
    engine.finish()
    engine.check()


def test_prompts_to_classify_are_computed_in_chunks_and_after_preemption(oracle: Oracle):
    engine = Classifier(oracle, max_num_batched_tokens=7, kv_cache_bytes=100 * kv_bytes(oracle))
    for index in range(3):
        engine.add(random_prompt(9, 50 + index), [None, "plain"][index % 2], max_tokens=40)
    for index, name in enumerate(["entities", "sentiment", "tags"]):
        engine.classify(random_prompt(60, index), name, PARAMS[name])
    engine.finish()
    assert engine.core.scheduler.num_preemptions
    engine.check()


def test_a_cached_prefix_serves_a_sequence_and_not_its_tokens(oracle: Oracle):
    engine = Classifier(oracle)
    for name in ("sentiment", "sentiment", "entities", "entities"):
        engine.classify(random_prompt(24, 1), name, PARAMS[name])
        engine.finish()
    engine.check()
    assert list(engine.cached.values()) == [0, 20, 0, 0]


@pytest.mark.parametrize(
    ("adapter", "pooling", "problem"),
    [
        ("sentiment", None, "has a classification head, and generates no text"),
        ("plain", SEQUENCE, "has no classification head"),
        (None, SEQUENCE, "no classification head without an adapter"),
    ],
)
def test_a_request_that_its_adapter_was_not_made_for_fails_alone(
    oracle: Oracle, adapter: str | None, pooling: PoolingParams | None, problem: str
):
    engine = Classifier(oracle)
    engine.classify(random_prompt(5, 1), "sentiment", SEQUENCE)
    sampling = SamplingParams(seed=0, max_tokens=0 if pooling else 3)
    engine.core.add(AddRequest(9, random_prompt(5, 1), sampling, oracle.keys[adapter], pooling=pooling))
    outputs: dict[int, RequestOutput] = {}
    while engine.core.has_work():
        for event in step(engine.core):
            if isinstance(event, StepOutput):
                outputs |= {output.request_id: output for output in event.outputs}
    assert outputs[9].finish_reason is FinishReason.ERROR
    assert problem in outputs[9].error
    assert len(outputs[2000].pooled) == 4 * 3
    assert engine.core.pool.in_use() == []


def test_a_head_counts_in_the_bytes_of_its_adapter(oracle: Oracle, tmp_path: Path):
    engine = Classifier(oracle)
    engine.classify([1], "dora", SEQUENCE)
    engine.finish()
    with_head = engine.core.store.get(oracle.key("dora"))
    assert with_head is not None
    head = with_head.packed["classifier"]
    assert head.nbytes == 5 * oracle.models[None].config.hidden_size * 4
    assert with_head.nbytes == sum(packed.nbytes for packed in with_head.packed.values())
