"""What a call of a dialect leaves behind: a usage record, metrics and its place in the caller's trace, as any other."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.dialect_stubs import openengine_pb2, vllm_engine_pb2, vllm_pb2
from loraplex_service.dialect_stubs.kserve_v2_pb2 import ModelInferRequest
from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import GRPCInferenceServiceStub
from loraplex_service.dialect_stubs.openengine_pb2_grpc import InferenceStub as OpenEngineStub
from loraplex_service.dialect_stubs.vllm_engine_pb2_grpc import VllmEngineStub
from loraplex_service.dialect_stubs.vllm_pb2_grpc import InferenceStub as VllmStub
from loraplex_service.ports.config import DIALECTS
from loraplex_service.telemetry.config import UsageConfig
from tests.service.control_plane import control_plane, write_adapter
from tests.service.dialects.test_kserve import MAX_4, infer
from tests.service.telemetry.test_otlp import TRACE, TRACEPARENT
from tests.service.telemetry.test_usage import records

PIRATE = "tenants/acme/adapters/pirate"
Metadata = tuple[tuple[str, str], ...]
Ask = Callable[[Any, Metadata], Awaitable[None]]


async def model_infer(channel: Any, metadata: Metadata) -> None:
    stub: Any = GRPCInferenceServiceStub(channel)
    await stub.ModelInfer(infer("abc", MAX_4, "pirate"), metadata=metadata)


async def model_stream_infer(channel: Any, metadata: Metadata) -> None:
    async def requests() -> AsyncIterator[ModelInferRequest]:
        yield infer("abc", MAX_4, "pirate", stream=True)

    stub: Any = GRPCInferenceServiceStub(channel)
    assert [each.error_message for each in [_ async for _ in stub.ModelStreamInfer(requests(), metadata=metadata)]]


async def vllm_generate(channel: Any, metadata: Metadata) -> None:
    stub: Any = VllmStub(channel)
    stopping = vllm_pb2.StoppingCriteria(max_new_tokens=4)
    request = vllm_pb2.GenerateRequest(request_id="r1", model="tiny", lora_name="pirate", text="abc", stopping=stopping)
    await stub.Generate(request, metadata=metadata)


async def engine_generate(channel: Any, metadata: Metadata) -> None:
    stub: Any = VllmEngineStub(channel)
    sampling = vllm_engine_pb2.SamplingParams(max_tokens=4)
    request = vllm_engine_pb2.GenerateRequest(request_id="r1", text="abc", sampling_params=sampling)
    assert [_ async for _ in stub.Generate(request, metadata=(*metadata, ("loraplex-adapter", "pirate")))]


async def openengine_generate(channel: Any, metadata: Metadata) -> None:
    stub: Any = OpenEngineStub(channel)
    stopping = openengine_pb2.StoppingOptions(max_tokens=4)
    request = openengine_pb2.GenerateRequest(request_id="r1", model="pirate", prompt="abc", stopping=stopping)
    assert [_ async for _ in stub.Generate(request, metadata=metadata)]


ASKED: dict[str, Ask] = {
    "inference.GRPCInferenceService/ModelInfer": model_infer,
    "inference.GRPCInferenceService/ModelStreamInfer": model_stream_infer,
    "vllm.Inference/Generate": vllm_generate,
    "vllm.grpc.engine.VllmEngine/Generate": engine_generate,
    "openengine.v1.Inference/Generate": openengine_generate,
}


@pytest.mark.parametrize("method", ASKED)
async def test_a_dialects_generation_is_the_callers_of_its_adapter_and_in_its_trace(
    method: str, byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key,)))
    pirate = AdapterConfig(name="acme/pirate", model="tiny", source=str(write_adapter(tmp_path / "pirate")))
    file = tmp_path / "usage.jsonl"
    async with (
        control_plane(
            byte_tokenizer_directory,
            tmp_path,
            adapters=(pirate,),
            dialects=DIALECTS,
            auth=AuthConfig(keys=str(tmp_path / "keys.yaml")),
            usage=UsageConfig(file=str(file)),
        ) as control,
        grpc.aio.insecure_channel(control.addresses.data) as channel,
    ):
        metadata = (("authorization", f"Bearer {token}"), ("traceparent", TRACEPARENT))
        await ASKED[method](channel, metadata)
    [record] = records(file)
    assert (record["tenant"], record["model"], record["adapter"]) == ("acme", "models/tiny", PIRATE)
    assert (record["status"], record["prompt_tokens"], record["completion_tokens"]) == ("OK", 3, 4)
    assert (record["trace_id"], record["client_request_id"]) == (TRACE, "r1")
    metrics = control.app.telemetry.metrics
    assert [labels for labels in metrics.calls.values if labels[0] == method] == [(method, "OK")]
    assert list(metrics.adapters.requests.values) == [("acme", "tiny", PIRATE, "OK")]
