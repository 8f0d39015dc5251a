"""vLLM's definitions on the data port."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex_service.dialect_stubs import vllm_engine_pb2 as engine
from loraplex_service.dialect_stubs import vllm_pb2 as vllm
from loraplex_service.dialect_stubs.vllm_engine_pb2_grpc import VllmEngineStub
from loraplex_service.dialect_stubs.vllm_pb2_grpc import ControlStub, InferenceStub
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import failure
from tests.service.http.clients.environments import until_idle
from tests.waits import MOST_SECONDS

GREEDY: dict[str, Any] = {"model": "tiny", "text": "abc", "temperature": 0, "stopping": {"max_new_tokens": 4}}


@pytest.fixture
def inference(channel: Any) -> Any:
    return InferenceStub(channel)


@pytest.fixture
def vllm_control(channel: Any) -> Any:
    return ControlStub(channel)


def asked(**changes: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(**(GREEDY | changes))


async def test_a_text_comes_in_one_answer(inference: Any) -> None:
    found = await inference.Generate(asked(response={"output_token_ids": True}))
    assert (found.outputs.text, found.outputs.num_tokens) == ("abca", 4)
    assert (len(found.outputs.token_ids), found.prompt_info.num_prompt_tokens) == (4, 3)
    assert found.outputs.finish_info.finish_reason == vllm.FinishInfo.LENGTH


async def test_a_stream_adds_up_to_the_answer(inference: Any) -> None:
    parts = [part async for part in inference.GenerateStream(asked())]
    assert "".join(part.outputs.text for part in parts) == "abca"
    assert [part.HasField("prompt_info") for part in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[-1].outputs.finish_info.num_output_tokens == 4


async def test_tokens_go_in_and_come_out_alone(inference: Any) -> None:
    request = asked(token_ids={"ids": [97, 98]}, response={"output_text": False, "output_token_ids": True})
    found = (await inference.Generate(request)).outputs
    assert (found.text, list(found.token_ids)) == ("", [97, 98, 97, 98])


async def test_an_output_is_as_long_as_vllm_makes_it_by_default(inference: Any) -> None:
    request = asked()
    request.ClearField("stopping")
    assert (await inference.Generate(request)).outputs.num_tokens == 20


async def test_an_adapter_is_a_model_or_belongs_to_one(inference: Any) -> None:
    for names in ({"model": "pirate"}, {"model": "tiny", "lora_name": "pirate"}):
        call = inference.Generate(asked(**names))
        await call
        assert "pirate@" in dict(await call.trailing_metadata())["loraplex-adapter-version"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"sampling": {"top_p": 2}}, "sampling.top_p"),
        ({"sampling": {"seed": -1}}, "sampling.seed"),
        ({"stopping": {"max_new_tokens": 1 << 31}}, "stopping.max_new_tokens"),
        ({"decoding": {"structural_tag": "x"}}, "decoding.structural_tag"),
        ({"media": [b"x"]}, "media"),
        ({"kv": {"kv_transfer_params": b"x"}}, "kv.kv_transfer_params"),
        ({"response": {"output_candidates": {"all": True}}}, "response.output_candidates.all"),
        ({"response": {"output_candidates": {"top_n": 1 << 31}}}, "response.output_candidates"),
        ({"text": ""}, "text"),
        ({"model": ""}, "model"),
        ({"lora_name": "nobody"}, ""),
    ],
)
async def test_what_is_wrong_is_refused_by_name(inference: Any, change: dict[str, Any], field: str) -> None:
    found = await failure(inference.Generate(asked(**change)))
    assert found.fields == [field] if field else found.code is grpc.StatusCode.NOT_FOUND


async def test_a_generation_is_aborted_by_the_id_that_its_caller_gave(
    inference: Any, vllm_control: Any, control: ControlPlane
) -> None:
    endless = asked(request_id="a", stopping={"max_new_tokens": 100000, "ignore_eos": True})
    call = asyncio.ensure_future(failure(inference.Generate(endless)))
    async with asyncio.timeout(MOST_SECONDS):
        while not control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
            await asyncio.sleep(0.01)
        await vllm_control.Abort(vllm.AbortRequest(request_ids=["a", "b"]))
        assert (await call).code is grpc.StatusCode.CANCELLED
    await until_idle(control)


async def test_adapters_are_loaded_listed_and_unloaded(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    plane = control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",), dialects=("vllm",))
    async with plane as control, grpc.aio.insecure_channel(control.addresses.data) as channel:
        stub: Any = ControlStub(channel)
        source = str(write_adapter(tmp_path / "poet"))
        loaded = await stub.LoadLora(vllm.LoadLoraRequest(lora_name="poet", source_path=source))
        assert loaded.adapter.lora_name == "tenants/shared/adapters/poet"
        assert [each.lora_name for each in (await stub.ListLoras(vllm.ListLorasRequest())).adapters] == [
            loaded.adapter.lora_name
        ]
        await stub.UnloadLora(vllm.UnloadLoraRequest(lora_name="poet"))
        assert not (await stub.ListLoras(vllm.ListLorasRequest())).adapters
        wrong = await failure(stub.LoadLora(vllm.LoadLoraRequest(lora_name="Poet!", source_path=source)))
        assert wrong.fields == ["lora_name"]
        assert (await stub.GetServerInfo(vllm.GetServerInfoRequest())).max_running_requests == 4
        assert (await stub.GetModelInfo(vllm.GetModelInfoRequest())).served_model_name == "tiny"


async def test_a_model_that_several_ranks_compute_is_told_as_such(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    ranks = {"tensor_parallel": 2}
    plane = control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",), hosted=ranks, dialects=("vllm",))
    async with plane as control, grpc.aio.insecure_channel(control.addresses.data) as channel:
        stub: Any = ControlStub(channel)
        assert (await stub.GetServerInfo(vllm.GetServerInfoRequest())).parallelism.tensor_parallel_size == 2


# ---- engines behind gateways -----------------------------------------------------------------------------------------

TO_TINY = (("loraplex-adapter", "tiny"),)


def tokens(**changes: Any) -> engine.GenerateRequest:
    sampling: dict[str, Any] = {"max_tokens": 4, "temperature": 0} | changes.pop("sampling_params", {})
    fields: dict[str, Any] = {"tokenized": {"input_ids": [97, 98]}, "sampling_params": sampling} | changes
    return engine.GenerateRequest(**fields)


@pytest.fixture
def gateway(channel: Any) -> Any:
    return VllmEngineStub(channel)


async def test_a_gateway_gets_each_output_once_it_has_ended(gateway: Any) -> None:
    [found] = [each async for each in gateway.Generate(tokens(), metadata=TO_TINY)]
    assert list(found.complete.output_ids) == [97, 98, 97, 98]
    assert (found.complete.finish_reason, found.complete.prompt_tokens, found.complete.completion_tokens) == (
        "length",
        2,
        4,
    )


async def test_a_gateway_gets_tokens_as_they_are_made(gateway: Any) -> None:
    *chunks, last = [each async for each in gateway.Generate(tokens(stream=True), metadata=TO_TINY)]
    assert [token for each in chunks for token in each.chunk.token_ids] == list(last.complete.output_ids)


async def test_the_metadata_names_what_generates(gateway: Any) -> None:
    call = gateway.Generate(tokens(), metadata=(("loraplex-adapter", "pirate"),))
    assert [each async for each in call]
    assert "pirate@" in dict(await call.trailing_metadata())["loraplex-adapter-version"]
    wrong = await failure(gateway.Generate(tokens()).read())
    assert wrong.fields == ["loraplex-adapter"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
        ({"sampling_params": {"logprobs": -1}}, "sampling_params.logprobs"),
        ({"sampling_params": {"logit_bias": {-1: 1.0}}}, "sampling_params.logit_bias"),
        ({"mm_inputs": b"x"}, "mm_inputs"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        ({"tokenized": {"input_ids": []}}, "prompt"),
    ],
)
async def test_what_is_wrong_is_refused_to_a_gateway_by_name(gateway: Any, change: dict[str, Any], field: str) -> None:
    assert (await failure(gateway.Generate(tokens(**change), metadata=TO_TINY).read())).fields == [field]


async def test_a_gateway_learns_what_it_needs(gateway: Any) -> None:
    assert (await gateway.HealthCheck(engine.HealthCheckRequest())).healthy
    info = await gateway.GetModelInfo(engine.GetModelInfoRequest(), metadata=TO_TINY)
    assert (info.served_model_name, info.vocab_size, list(info.eos_token_ids)) == ("tiny", 258, [257])
    assert (await gateway.GetServerInfo(engine.GetServerInfoRequest(), metadata=TO_TINY)).max_num_seqs == 4
    [load] = (await gateway.GetLoads(engine.GetLoadsRequest(), metadata=TO_TINY)).loads
    assert load.max_running_requests == 4
    await gateway.Abort(engine.AbortRequest(request_ids=["nobody"]))
