"""KServe's protocol on the data port."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex.v1.inference_pb2 import Finished, FinishReason, StreamGenerateResponse
from loraplex_service.dialect_stubs.kserve_v2_pb2 import (
    ModelConfigRequest,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelReadyRequest,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
    ServerLiveRequest,
    ServerMetadataRequest,
    ServerReadyRequest,
)
from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import GRPCInferenceServiceStub
from loraplex_service.dialects.kserve.answers import Answers
from loraplex_service.dialects.kserve.tensors import Asked
from tests.service.control_plane import ControlPlane, write_adapter
from tests.service.data_plane import failure
from tests.waits import MOST_SECONDS

MAX_4 = '{"max_tokens": 4, "temperature": 0}'


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)


def infer(text: str = "abc", sampling: str = MAX_4, model: str = "tiny", **flags: bool) -> ModelInferRequest:
    """A request, as tritonclient writes it: with raw contents."""
    request = ModelInferRequest(model_name=model, id="r1")
    for name, value in {"text_input": text, "sampling_parameters": sampling}.items():
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(value.encode())) + value.encode())
    for name, flag in flags.items():
        request.inputs.add(name=name, datatype="BOOL", shape=[1])
        request.raw_input_contents.append(bytes([flag]))
    return request


def values(response: ModelInferResponse) -> dict[str, Any]:
    """The first value of each output."""
    found: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        match tensor.datatype:
            case "BYTES":
                found[tensor.name] = raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode()
            case "FP32":
                [found[tensor.name]] = struct.unpack("<f", raw)
            case "UINT32":
                [found[tensor.name]] = struct.unpack("<I", raw)
    return found


async def streamed(stub: Any, *requests: ModelInferRequest) -> list[ModelStreamInferResponse]:
    async def all_requests() -> AsyncIterator[ModelInferRequest]:
        for request in requests:
            yield request

    return [response async for response in stub.ModelStreamInfer(all_requests())]


async def test_the_server_says_that_it_is_there_and_ready(stub: Any) -> None:
    assert (await stub.ServerLive(ServerLiveRequest())).live
    assert (await stub.ServerReady(ServerReadyRequest())).ready
    assert (await stub.ServerMetadata(ServerMetadataRequest())).name == "loraplex"


@pytest.mark.parametrize(
    ("name", "ready"), [("tiny", True), ("pirate", True), ("models/tiny", True), ("other", False), ("nobody", False)]
)
async def test_a_model_is_ready_where_its_requests_are_let_in(stub: Any, name: str, ready: bool) -> None:
    assert (await stub.ModelReady(ModelReadyRequest(name=name))).ready is ready


async def test_a_model_is_described_by_its_tensors(stub: Any) -> None:
    found = await stub.ModelMetadata(ModelMetadataRequest(name="pirate"))
    assert [tensor.name for tensor in found.inputs][:2] == ["text_input", "stream"]
    assert len(found.versions) == 1
    config = (await stub.ModelConfig(ModelConfigRequest(name="tiny"))).config
    assert config.model_transaction_policy.decoupled
    assert config.output[0].name == "text_output"


async def test_a_text_comes_back_behind_its_prompt(stub: Any) -> None:
    response = await stub.ModelInfer(infer())
    assert values(response) == {"text_output": "abcabca"}
    assert (response.id, response.model_name, response.model_version) == ("r1", "tiny", "")


async def test_the_prompt_is_left_out_where_the_caller_wants_that(stub: Any) -> None:
    whole = values(await stub.ModelInfer(infer()))["text_output"]
    assert "abc" + values(await stub.ModelInfer(infer(exclude_input_in_output=True)))["text_output"] == whole


async def test_all_outputs_come_that_are_asked_for(stub: Any) -> None:
    flags = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    wanted: dict[str, Any] = {f"return_{flag}": True for flag in flags}
    found = values(await stub.ModelInfer(infer(**wanted)))
    assert found.keys() == {"text_output", *flags}
    assert (found["finish_reason"], found["num_output_tokens"]) == ("length", 4)


async def test_contents_may_be_in_the_tensors(stub: Any) -> None:
    request = ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(b"abc")
    assert values(await stub.ModelInfer(request))["text_output"].startswith("abc")


async def test_an_adapter_and_its_version_are_models(stub: Any) -> None:
    version = (await stub.ModelInfer(infer(model="pirate"))).model_version
    request = infer(model="pirate")
    request.model_version = version
    assert (await stub.ModelInfer(request)).model_version == version
    chosen = infer(sampling='{"max_tokens": 1, "lora_name": "pirate"}')
    assert (await stub.ModelInfer(chosen)).model_version == version


@pytest.mark.parametrize("most", ['"4"', '" 4 "', '"4.0"', '"4e0"', "4"])
async def test_a_number_may_be_a_text(stub: Any, most: str) -> None:
    request = infer(sampling=f'{{"max_tokens": {most}, "temperature": "0", "top_p": "0.95"}}')
    assert values(await stub.ModelInfer(request)) == {"text_output": "abcabca"}


async def test_what_a_request_generates_may_be_said_in_its_parameters(stub: Any) -> None:
    request = infer(sampling='{"max_tokens": "4"}')
    request.parameters["max_tokens"].string_param = "4"  # as well, as the client of Triton's examples does
    request.parameters["temperature"].double_param = 0
    request.parameters["ignore_eos"].bool_param = True
    request.parameters["lora_name"].string_param = "pirate"
    response = await stub.ModelInfer(request)
    assert values(response) == {"text_output": "abcabca"}
    assert response.model_version


@pytest.mark.parametrize(
    "text", ["", "nan", "Infinity", "-inf", "1e999", "9" * 5000, "0x10", "1_0", "1,5", "true", "\ud800"]
)
async def test_a_text_that_is_no_number_is_refused(stub: Any, text: str) -> None:
    found = await failure(stub.ModelInfer(infer(sampling=json.dumps({"temperature": text}))))
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_has_what_is_new_alone(stub: Any) -> None:
    responses = await streamed(stub, infer(stream=True, return_num_output_tokens=True))
    found = [values(response.infer_response) for response in responses]
    whole = values(await stub.ModelInfer(infer(exclude_input_in_output=True)))["text_output"]
    assert "".join(each["text_output"] for each in found) == whole
    assert sum(each["num_output_tokens"] for each in found) == 4


async def test_a_stream_says_its_end_where_the_caller_wants_that(stub: Any) -> None:
    request = infer(stream=True)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    responses = [each.infer_response for each in await streamed(stub, request)]
    said = [response.parameters["triton_final_response"].bool_param for response in responses]
    assert said == [False] * (len(said) - 1) + [True]
    assert not responses[-1].outputs


async def test_a_request_of_a_stream_fails_alone(stub: Any) -> None:
    right, wrong = infer(), infer(sampling='{"temperature": -1}')
    wrong.id = "r2"
    found = {each.infer_response.id: each.error_message for each in await streamed(stub, wrong, right)}
    assert found["r1"] == ""
    assert found["r2"].startswith("[INVALID_PARAMETER] sampling_parameters.temperature: must be from 0 to 10")


def test_a_stream_without_a_token_has_a_response() -> None:
    answers = Answers(infer(), Asked(outputs=["text_output"]))
    finished = StreamGenerateResponse(finished=Finished(reason=FinishReason.FINISH_REASON_MAX_TOKENS))
    response = answers.part(finished)
    assert response is not None
    assert values(response) == {"text_output": ""}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": '{"temperature": -1}'}, "sampling_parameters.temperature"),
        ({"sampling": '{"best_off": 1}'}, "sampling_parameters.best_off"),
        ({"sampling": '{"prompt": "x"}'}, "sampling_parameters.prompt"),
        ({"sampling": "[1]"}, "sampling_parameters"),
        ({"sampling": "[" * 2000}, "sampling_parameters"),
        ({"sampling": '{"loraplex": ' + '{"a":' * 50 + "1" + "}" * 51}, "sampling_parameters"),
        ({"sampling": '{"temperature": "warm"}'}, "sampling_parameters.temperature"),
        ({"sampling": '{"ignore_eos": "true"}'}, "sampling_parameters.ignore_eos"),
        ({"sampling": '{"a": "' + "x" * (128 << 10) + '"}'}, "sampling_parameters"),
        ({"sampling": '{"lora_name": 1}'}, "sampling_parameters.lora_name"),
        ({"text": ""}, "text_input"),
        ({"image": True}, "inputs[2].name"),
        ({"stream": True}, "stream"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(stub: Any, change: dict[str, Any], field: str) -> None:
    assert (await failure(stub.ModelInfer(infer(**change)))).fields == [field]


def malformed() -> dict[str, ModelInferRequest]:
    """Requests that are messages, and make no sense."""
    twice, short, long, number, no_text, shape, parameter = (infer() for _ in range(7))
    twice.inputs[1].name = "text_input"
    short.raw_input_contents[0] = b"\1\0"
    long.raw_input_contents[0] = b"\xff\xff\xff\xffabc"
    number.inputs[0].datatype = "INT32"
    del no_text.inputs[0], no_text.raw_input_contents[0]
    shape.inputs[0].shape[:] = [1 << 40]
    parameter.parameters["priority"].uint64_param = 3
    uneven, no_utf8, both, kind = infer(), infer(), infer(), infer()
    kind.parameters["triton_enable_empty_final_response"].string_param = "true"
    unknown, different, warm, empty = (infer() for _ in range(4))
    unknown.parameters["best_off"].int64_param = 1
    different.parameters["max_tokens"].int64_param = 5
    warm.raw_input_contents[1] = b"\2\0\0\0{}"
    warm.parameters["temperature"].string_param = "warm"
    empty.parameters["top_k"].SetInParent()
    del uneven.raw_input_contents[0]
    no_utf8.raw_input_contents[0] = b"\1\0\0\0\xff"
    both.inputs[0].contents.bytes_contents.append(b"x")
    return {
        "inputs[1].name": twice,
        "text_input": short,
        "text_input ": long,
        "inputs[0].datatype": number,
        "inputs": no_text,
        "inputs[0].shape": shape,
        "parameters[priority]": parameter,
        "parameters[triton_enable_empty_final_response]": kind,
        "parameters[best_off]": unknown,
        "parameters[max_tokens]": different,
        "parameters[temperature]": warm,
        "parameters[top_k]": empty,
        "raw_input_contents": uneven,
        "text_input  ": no_utf8,
        "text_input   ": both,
    }


@pytest.mark.parametrize(("field", "request_"), malformed().items(), ids=list(malformed()))
async def test_tensors_that_make_no_sense_are_refused_by_name(
    stub: Any, field: str, request_: ModelInferRequest
) -> None:
    assert (await failure(stub.ModelInfer(request_))).fields == [field.strip()]


async def test_a_call_that_is_cancelled_frees_the_engine(stub: Any, control: ControlPlane) -> None:
    call = stub.ModelInfer(infer(sampling='{"max_tokens": 100000, "ignore_eos": true}'))
    async with asyncio.timeout(MOST_SECONDS):
        while not control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
            await asyncio.sleep(0.01)
        call.cancel()
        while control.core().requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_deadline_is_kept(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:  # by the server, or by its caller, who then has no details
        await stub.ModelInfer(infer(sampling='{"max_tokens": 100000, "ignore_eos": true}'), timeout=0.5)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_repository_has_models_and_adapters(stub: Any, tmp_path: Path) -> None:
    async def states() -> dict[str, str]:
        return {each.name: each.state for each in (await stub.RepositoryIndex(RepositoryIndexRequest())).models}

    assert await states() == {
        "models/tiny": "READY",
        "models/other": "UNAVAILABLE",
        "tenants/shared/adapters/pirate": "READY",
    }
    load = RepositoryModelLoadRequest(model_name="poet")
    load.parameters["source"].string_param = str(write_adapter(tmp_path / "poet", seed=1))
    load.parameters["base_model"].string_param = "tiny"
    await stub.RepositoryModelLoad(load)
    assert (await states())["tenants/shared/adapters/poet"] == "READY"
    await stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name="poet"))
    await stub.RepositoryModelUnload(RepositoryModelUnloadRequest(model_name="poet"))
    assert "tenants/shared/adapters/poet" not in await states()


async def test_a_base_model_is_loaded_and_unloaded(stub: Any) -> None:
    await stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name="other"))
    assert (await stub.ModelReady(ModelReadyRequest(name="other"))).ready
    await stub.RepositoryModelUnload(RepositoryModelUnloadRequest(model_name="other"))
    assert not (await stub.ModelReady(ModelReadyRequest(name="other"))).ready


async def test_files_that_come_with_a_load_are_refused(stub: Any) -> None:
    load = RepositoryModelLoadRequest(model_name="poet")
    load.parameters["file:1/model"].bytes_param = b"x"
    assert (await failure(stub.RepositoryModelLoad(load))).code is grpc.StatusCode.UNIMPLEMENTED
