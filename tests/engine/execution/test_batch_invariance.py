"""With `batch_invariant`, a request's bits never depend on what else happens: bfloat16, adapters, any way to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, TokenLogprobs, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams

transformers = pytest.importorskip("transformers")

VOCAB = 151
HIDDEN = 64
ADAPTERS = {"shared/small": 3, "shared/large": 24}  # by rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16, and adapters on its value projection."""
    folder = tmp_path_factory.mktemp("invariance")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for name, rank in ADAPTERS.items():
        path = folder / name
        path.mkdir(parents=True)
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["v_proj", "down_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(fields))
        tensors = {}
        for layer in range(3):
            for module, (n, c) in {"self_attn.v_proj": (32, HIDDEN), "mlp.down_proj": (HIDDEN, 96)}.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, c) / c**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(n, rank) / rank**0.5
        save_file(tensors, path / "adapter_model.safetensors")
    return folder


REQUESTS: list[tuple[list[int], str | None]] = [
    (
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist(),
        [None, *ADAPTERS][seed % 3],
    )
    for seed, length in enumerate([1, 5, 16, 17, 30, 33, 48, 64, 9])
]
REQUESTS += [([*REQUESTS[7][0][:40], 7, 8, 9], REQUESTS[7][1])]  # shares a prefix

Output = list[tuple[int, list[TokenLogprobs]]]


def run(folder: Path, chosen: list[int], arrive_together: bool, **settings: Any) -> dict[int, Output]:
    """Tokens and log-probabilities of the chosen requests, which share one engine."""
    defaults: dict[str, Any] = {"kernels": "cpu", "threads": 2, "block_size": 8, "batch_invariant": True}
    room = {"kv_cache_bytes": 1 << 20, "max_model_len": 128}
    config = EngineConfig(model=str(folder / "base"), **(defaults | room | settings))
    core = EngineCore.load(config)
    keys = {name: AdapterKey(name, digest(folder / name)) for name in ADAPTERS}
    for name, key in keys.items():
        core.want_adapter(WantAdapter(key, 1, str(folder / name)))
    while core.has_work():
        core.step()
    outputs: dict[int, Output] = {index: [] for index in chosen}

    def step() -> None:
        for message in core.step():
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    assert not output.error
                    outputs[output.request_id].append((output.token_ids[0], output.logprobs or []))

    for index in chosen:
        prompt, adapter = REQUESTS[index]
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=20, num_logprobs=3)
        core.add(AddRequest(index, prompt, sampling, None if adapter is None else keys[adapter]))
        if not arrive_together:
            step()
    while core.has_work():
        step()
    core.close()
    return outputs


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, Output]:
    """Each request by itself, in an engine of its own."""
    return {index: run(folder, [index], True)[index] for index in range(len(REQUESTS))}


@pytest.mark.parametrize(
    ("settings", "arrive_together"),
    [
        ({}, True),
        ({}, False),
        ({"max_num_batched_tokens": 5}, False),
        ({"max_num_batched_tokens": 23}, True),
        ({"enable_prefix_caching": False}, True),
        ({"kv_cache_bytes": 20 * 8 * 3 * 2 * 2 * 16 * 2, "max_model_len": 100}, True),  # 20 blocks: preemptions
        ({"threads": 1}, True),
    ],
    ids=["together", "one-by-one", "tiny-chunks", "chunks", "uncached", "preempted", "one-thread"],
)
def test_the_bits_of_a_request_are_its_own(
    folder: Path, alone: dict[int, Output], settings: dict[str, Any], arrive_together: bool
) -> None:
    assert run(folder, list(range(len(REQUESTS))), arrive_together, **settings) == alone


def test_a_backend_that_cannot_promise_it_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_invariant"):
        EngineCore.load(EngineConfig(model=str(folder / "base"), kernels="reference", batch_invariant=True))
