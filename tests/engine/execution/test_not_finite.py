"""Logits that are no numbers end their request alone: nobody gets a token from them, and nobody else notices."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput, WantAdapter
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams

transformers = pytest.importorskip("transformers")

HIDDEN = 64
PROMPT = list(range(3, 23))
BROKEN = "shared/broken"  # each of its weights is a number; what it computes is none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("not-finite")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    path = folder / BROKEN
    path.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    module = "base_model.model.model.layers.0.self_attn.v_proj"
    tensors = {"lora_A": torch.full((4, HIDDEN), 1e30), "lora_B": torch.full((32, 4), 1e30)}
    save_file({f"{module}.{name}.weight": one for name, one in tensors.items()}, path / "adapter_model.safetensors")
    return folder


@pytest.fixture(params=["reference", "cpu"])
def core(folder: Path, request: pytest.FixtureRequest) -> Any:
    config = EngineConfig(
        model=str(folder / "base"),
        kernels=request.param,
        threads=1,
        block_size=8,
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_bytes=8 * 8 * 2 * 2 * 2 * 16 * 4,  # 8 blocks: what one request leaves, the next one gets
    )
    core = EngineCore.load(config)
    core.want_adapter(WantAdapter(broken_key(folder), 1, str(folder / BROKEN)))
    while core.has_work():
        core.step()
    yield core
    core.close()


def broken_key(folder: Path) -> AdapterKey:
    return AdapterKey(BROKEN, digest(folder / BROKEN))


def finish(core: EngineCore, *requests: AddRequest) -> dict[int, list[RequestOutput]]:
    for request in requests:
        core.add(request)
    outputs: dict[int, list[RequestOutput]] = {request.request_id: [] for request in requests}
    while core.has_work():
        for event in core.step():
            for output in event.outputs if isinstance(event, StepOutput) else ():
                outputs[output.request_id].append(output)
    return outputs


def ask(request_id: int, adapter: AdapterKey | None = None, **fields: Any) -> AddRequest:
    sampling = SamplingParams(**({"seed": 1, "max_tokens": 6, "temperature": 0.0} | fields))
    return AddRequest(request_id, PROMPT, sampling, adapter)


def tokens(outputs: list[RequestOutput]) -> list[int]:
    assert outputs[-1].finish_reason is FinishReason.MAX_TOKENS
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "typical_p": 0.5},
        {"num_logprobs": 2},
        {"num_prompt_logprobs": 1},
        {"allowed_token_ids": (3, 4, 5)},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "logit_bias": {3: 100.0}},
    ],
    ids=str,
)
def test_a_broken_adapter_ends_its_request_alone(core: EngineCore, folder: Path, fields: dict[str, Any]) -> None:
    alone = tokens(finish(core, ask(1))[1])
    outputs = finish(core, ask(2), ask(3, broken_key(folder), **fields))
    (failed,) = outputs[3]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "its logits are not finite numbers (NaN or infinite)"
    assert failed.token_ids == []
    assert tokens(outputs[2]) == alone
    assert core.stats().num_not_finite == 1


@pytest.mark.parametrize("method", [PoolingMethod.LAST, PoolingMethod.MEAN])
def test_an_embedding_that_is_no_number_ends_its_request_alone(
    core: EngineCore, folder: Path, method: PoolingMethod
) -> None:
    params = PoolingParams(method=method)
    wanted, broken = (
        msgspec.structs.replace(ask(number, adapter, max_tokens=0), pooling=params)
        for number, adapter in ((1, None), (2, broken_key(folder)))
    )
    outputs = finish(core, wanted, broken, ask(3))
    assert [output.finish_reason for output in outputs[2]] == [FinishReason.ERROR]
    assert outputs[2][0].pooled == b""
    assert len(outputs[1][0].pooled) == 4 * HIDDEN
    assert len(tokens(outputs[3])) == 6


def test_what_it_leaves_in_the_cache_spoils_nobody(core: EngineCore, folder: Path) -> None:
    alone = tokens(finish(core, ask(1))[1])
    for number in range(2, 20, 2):
        finish(core, ask(number, broken_key(folder)))
        again = msgspec.structs.replace(ask(number + 1), bypass_prefix_cache=True)  # computed afresh, in those blocks
        assert tokens(finish(core, again)[number + 1]) == alone
    core.blocks.check()


def test_nobody_finds_the_blocks_of_a_request_that_ended_so(core: EngineCore, folder: Path) -> None:
    finish(core, ask(1, broken_key(folder)))
    assert core.blocks.num_cached == 0
    assert core.stats().free_blocks == core.stats().total_blocks


def test_the_log_names_the_adapter_once_until_it_is_unloaded(
    core: EngineCore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = broken_key(folder)
    with caplog.at_level(logging.ERROR):
        finish(core, ask(1, key), ask(2, key))
        finish(core, ask(3, key))
        assert [str(key) in record.getMessage() for record in caplog.records] == [True]
        core.want_adapter(WantAdapter(key, 2, least=Residency.DISK, most=Residency.DISK))
        core.want_adapter(WantAdapter(key, 3, str(folder / BROKEN)))
        finish(core, ask(4, key))
    assert len(caplog.records) == 2
