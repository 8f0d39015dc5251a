"""What PEFT can put into a LoRA adapter beyond A and B, against PEFT itself: all kinds in one batch of the engine."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from loraplex_adapters.errors import COLD
from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import AdaptersChanged, AddRequest, RequestOutput, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.peft_oracle import (
    FAMILIES,
    KINDS,
    Engine,
    Oracle,
    oracle_of,
    random_prompt,
    randomised,
)
from tests.reference.stepping import step

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def make_engine(oracle: Oracle) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**fields: Any) -> Engine:
        made.append(Engine(oracle, **fields))
        return made[-1]

    yield make
    for engine in made:
        engine.core.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"kernels": "reference"},
        {"kernels": "cpu"},
        {"kernels": "cpu", "max_num_batched_tokens": 6},
        {"kernels": "cpu", "kv_cache_bytes": 26 * 4 * 2 * 2 * 2 * 16 * 4, "max_num_seqs": 8},
        {"kernels": "cpu", "max_resident_adapters": 3},
    ],
    ids=["reference", "cpu", "chunked", "preempted", "evicted"],
)
def test_all_kinds_in_one_batch_equal_each_alone(make_engine: Callable[..., Engine], fields: dict[str, Any]) -> None:
    engine = make_engine(**fields)
    for index, adapter in enumerate([None, *KINDS, None, *reversed(KINDS)]):
        length = 3 + index * 7 % 23
        activated = adapter is not None and adapter.startswith("activated")
        engine.add(random_prompt(length, index, length // 2 if activated else None), adapter, 3 + index % 4)
        if index % 3 == 0:
            engine.step()
    engine.finish()
    engine.check()
    if fields.get("max_num_seqs"):
        assert engine.core.scheduler.num_preemptions > 0


COMPOSITIONS: dict[str, dict[str, float]] = {
    "halved": {"plain": 0.5},
    "two": {"plain": 0.7, "one-layer": 0.3},
    "with-biases": {"lora-bias": -1.25, "plain": 0.5, "one-layer": 2.0},
    "fused-and-parts": {"fused": 0.75, "plain": -0.5},
    "vocabulary": {"embedding": 0.5, "head": 0.75, "embedding-and-head": -0.5},
}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A base model whose every oracle is merged: the base's parameters plus the weighted changes of each adapter."""
    folder = tmp_path_factory.mktemp("composed")
    base = randomised(FAMILIES["llama"](), 0)
    base.save_pretrained(folder / "base")
    keys: dict[str | None, AdapterKey | None] = {None: None}
    merged: dict[str, dict[str, Tensor]] = {}
    with warnings.catch_warnings(action="ignore"):
        for seed, name in enumerate(["plain", "one-layer", "lora-bias", "embedding", "head", "embedding-and-head"]):
            config = peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 3 + seed, "lora_alpha": 6} | KINDS[name]))
            model = randomised(peft.get_peft_model(copy.deepcopy(base), config), seed + 1)
            model.save_pretrained(folder / name)
            merged[name] = model.merge_and_unload().state_dict()
            keys[name] = AdapterKey(f"shared/{name}", digest(folder / name))
    merged["fused"] = fused_adapter(folder / "fused", base.state_dict())
    keys["fused"] = AdapterKey("shared/fused", digest(folder / "fused"))
    oracle = Oracle(folder, keys, {None: base})
    for name, weights in COMPOSITIONS.items():
        oracle.add_sum(name, weights, merged)
    return oracle


def fused_adapter(directory: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of the fused q/k/v and gate/up of layer 0, and the base with it merged."""
    generator = torch.Generator().manual_seed(77)
    tensors: dict[str, Tensor] = {}
    merged = dict(base)
    for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        block = fused.partition(".")[0]
        names = [f"model.layers.0.{block}.{part}_proj.weight" for part in parts]
        widths = [len(base[name]) for name in names]
        a = torch.randn(4, 48, generator=generator) * 0.15
        b = torch.randn(sum(widths), 4, generator=generator) * 0.15
        prefix = f"base_model.model.model.layers.0.{fused}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        for name, rows in zip(names, b.split(widths), strict=True):
            merged[name] = base[name] + 2 * rows @ a
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "gate_up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return merged


@pytest.mark.parametrize("fields", [{"kernels": "reference"}, {"kernels": "cpu", "max_resident_adapters": 2}])
def test_a_composition_is_the_weighted_sum_of_its_adapters(composed: Oracle, fields: dict[str, Any]) -> None:
    """With two slots, compositions of overlapping adapters take turns and none waits for another."""
    engine = Engine(composed, **fields)
    for index, name in enumerate([None, *COMPOSITIONS, None, *reversed(COMPOSITIONS)]):
        engine.add(random_prompt(5 + index * 3 % 17, index), name)
    engine.finish()
    engine.check()
    engine.core.close()


def test_the_same_weights_share_cached_prefixes_and_others_do_not(composed: Oracle) -> None:
    engine = Engine(composed, kernels="reference")
    plain, layer = composed.key("plain"), composed.key("one-layer")
    prompt = random_prompt(21, 5)
    orders = [[(plain, 0.7), (layer, 0.3)], [(layer, 0.3), (plain, 0.7)], [(plain, 0.7), (layer, 0.31)]]
    cached = []
    for number, parts in enumerate(orders):
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=2)
        engine.core.add(AddRequest(number, prompt, sampling, compose(parts)))
        engine.finish()
        cached.append(engine.cached[number])
    engine.core.close()
    assert cached == [0, 20, 0]


def test_a_wait_for_the_only_slot_ends_and_who_holds_it_goes_on(composed: Oracle) -> None:
    engine = Engine(composed, kernels="reference", max_resident_adapters=1)
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=40)
    engine.core.add(AddRequest(0, [5, 6], sampling, composed.key("plain")))
    engine.core.add(AddRequest(1, [5, 6], sampling, composed.key("one-layer"), adapter_wait_seconds=0.0))
    ended = []
    while engine.core.has_work():
        messages = [message for message in step(engine.core) if isinstance(message, StepOutput)]
        ended += [output for message in messages for output in message.outputs if output.finish_reason is not None]
    engine.core.close()
    assert [(output.request_id, output.finish_reason) for output in ended] == [
        (1, FinishReason.ERROR),
        (0, FinishReason.MAX_TOKENS),
    ]
    assert ended[0].error_reason == COLD


def test_a_composition_can_be_brought_to_the_device_ahead_of_its_requests(composed: Oracle) -> None:
    engine = Engine(composed, kernels="reference")
    key = compose([(composed.key("plain"), 0.5), (composed.key("one-layer"), 0.5)])
    engine.core.want_adapter(WantAdapter(key, 1, least=Residency.DEVICE))
    tiers = []
    while engine.core.has_work():
        changes = [message for message in step(engine.core) if isinstance(message, AdaptersChanged)]
        tiers += [status.tier for message in changes for status in message.statuses if status.key == key]
    engine.core.close()
    assert tiers[-1] is Residency.DEVICE


@pytest.mark.parametrize("kind", ["dora", "activated", "bias-all", "saved-head", "tokens"])
def test_a_composition_with_an_adapter_that_is_no_sum_is_refused_by_name(oracle: Oracle, kind: str) -> None:
    engine = Engine(oracle, kernels="reference")
    key = compose([(oracle.key("plain"), 0.5), (oracle.key(kind), 0.5)])
    engine.core.add(AddRequest(0, [5, 6], SamplingParams(seed=0, max_tokens=2), key))
    outputs: list[RequestOutput] = []
    while engine.core.has_work():
        outputs.extend(
            out for message in step(engine.core) if isinstance(message, StepOutput) for out in message.outputs
        )
    engine.core.close()
    assert f"shared/{kind}@" in outputs[-1].error
    assert "cannot be composed" in outputs[-1].error


def test_activated_lora_shares_the_base_s_cached_prefix_before_its_invocation(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(kernels="cpu")
    prompt = random_prompt(30, 3, invoked_at=21)
    for adapter in (None, "activated", "activated", "plain"):
        engine.add(prompt, adapter)
        engine.finish()
    engine.check()
    assert [engine.cached[number] for number in range(4)] == [0, 20, 28, 0]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_mixtures_equal_each_alone(oracle: Oracle, data: st.DataObject) -> None:
    """Any kinds, lengths, invocations and budgets."""
    engine = Engine(
        oracle,
        kernels="cpu",
        max_num_batched_tokens=data.draw(st.sampled_from([5, 16, 64])),
        max_resident_adapters=data.draw(st.sampled_from([2, 5, 30])),
        enable_prefix_caching=data.draw(st.booleans()),
    )
    try:
        prompts = [random_prompt(24, seed, invoked_at=9) for seed in range(2)]  # shared by requests, up to a length
        for _ in range(data.draw(st.integers(2, 8))):
            prompt = data.draw(st.sampled_from(prompts))[: data.draw(st.integers(1, 24))]
            engine.add(prompt, data.draw(st.sampled_from([None, *KINDS])), data.draw(st.integers(1, 5)))
            if data.draw(st.booleans()):
                engine.step()
        engine.finish()
        engine.check()
    finally:
        engine.core.close()


def test_every_kind_changes_the_logits(oracle: Oracle) -> None:
    """Else the tests above could not fail. Trained tokens count where they are; activated LoRA once it is invoked."""
    tokens = [*random_prompt(12, 99, invoked_at=6), 3, 5, 7]
    base = oracle.logits(None, tokens, 12)
    for adapter in KINDS:
        assert (oracle.logits(adapter, tokens, 12) - base).abs().max() > 1e-3, adapter
