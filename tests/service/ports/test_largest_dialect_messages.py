"""The largest messages of the dialects: what comes of them, they hold nobody up."""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from loraplex_service.dialect_stubs import kserve_v2_pb2, openengine_pb2, vllm_engine_pb2, vllm_pb2
from loraplex_service.dialect_stubs.kserve_v2_pb2 import ModelInferRequest, ModelRepositoryParameter
from loraplex_service.text import MAX_TOKENS
from tests.service.ports.test_largest_messages import MOST_BYTES, check_held
from tests.service.watched import Watched, watched_server

KSERVE = "/inference.GRPCInferenceService"
MOST_FIELDS = 32_000  # of a message in all
MOST_NUMBERS = 500_000
NAME = "x" * (3 << 20)  # far longer than any name may be
JSON = '{"max_tokens": 1, "logit_bias": {%s}}' % ",".join(f'"{number}": 1' for number in range(10_000))  # noqa: UP031
TOKENS = [100] * MAX_TOKENS
Vllm: Any = vllm_pb2.GenerateRequest  # to mypy dicts are no messages
Engine: Any = vllm_engine_pb2.GenerateRequest
Embed: Any = vllm_engine_pb2.EmbedRequest
Open: Any = openengine_pb2.GenerateRequest
LENGTHS = {"max_tokens": 1, "truncate_prompt_tokens": 1}


def infer(
    text: str = "a", parameters: str = '{"max_tokens": 1, "truncate_prompt_tokens": 1}', **others: Any
) -> ModelInferRequest:
    request = ModelInferRequest(model_name="tiny", **others)
    for name, value in {"text_input": text.encode(), "sampling_parameters": parameters.encode()}.items():
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(value)) + value)
    return request


def with_contents(**contents: Any) -> ModelInferRequest:
    request = ModelInferRequest(model_name="tiny")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    return request


def with_parameters(count: int) -> ModelInferRequest:
    request = infer()
    for number in range(count):
        request.parameters[f"p{number}"].int64_param = 1
    return request


INFER: Mapping[str, ModelInferRequest] = {
    "text": infer("x" * MOST_BYTES),
    "parameters": infer(parameters=JSON),
    "parameters of the request": with_parameters(6_000),
    "nested parameters": infer(parameters='{"x": ' + "[" * 60_000 + "]" * 60_000 + "}"),
    "outputs": infer(outputs=[ModelInferRequest.InferRequestedOutputTensor(name="text_output")] * 10_000),
    "inputs": ModelInferRequest(inputs=[ModelInferRequest.InferInputTensor(name="stream")] * 10_000),
    "shape": ModelInferRequest(
        model_name="tiny",
        inputs=[ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1] * MOST_NUMBERS)],
    ),
    "name": ModelInferRequest(model_name=NAME, inputs=infer().inputs, raw_input_contents=infer().raw_input_contents),
    "name of an input": ModelInferRequest(inputs=[ModelInferRequest.InferInputTensor(name=NAME)]),
    "id": infer(id=NAME),
    "texts": with_contents(bytes_contents=[b"a"] * MOST_FIELDS),
    "bools": with_contents(bytes_contents=[b"a"], bool_contents=[True] * MOST_NUMBERS),
}
VLLM = {
    "text": Vllm(text="x" * MOST_BYTES, model="tiny", truncate_prompt_tokens=1),
    "tokens": Vllm(token_ids={"ids": TOKENS}, model="tiny", truncate_prompt_tokens=1),
    "too many tokens": Vllm(token_ids={"ids": [100] * MOST_NUMBERS}, model="tiny"),
    "biases": Vllm(text="a", model="tiny", decoding={"logit_bias": dict.fromkeys(range(10_000), 1.0)}),
    "allowed": Vllm(text="a", model="tiny", decoding={"allowed_token_ids": range(MOST_NUMBERS)}),
    "choices": Vllm(text="a", model="tiny", decoding={"choice": {"choices": ["a"] * (MOST_FIELDS - 10)}}),
    "session": Vllm(text="a", model="tiny", session_id=NAME),
    "name": Vllm(text="a", model=NAME),
    "adapter": Vllm(text="a", model="tiny", lora_name=NAME),
}
ENGINE = {
    "text": Engine(text="x" * MOST_BYTES, sampling_params=LENGTHS),
    "tokens": Engine(tokenized={"input_ids": TOKENS}, sampling_params=LENGTHS),
    "biases": Engine(text="a", sampling_params={"logit_bias": dict.fromkeys(range(10_000), 1.0)}),
    "stop": Engine(text="a", sampling_params={"stop": ["a"] * MOST_FIELDS}),
}
OPEN = {
    "prompt": Open(prompt="x" * MOST_BYTES, model="tiny", stopping={"max_tokens": 1}),
    "tokens": Open(token_ids={"ids": TOKENS}, model="tiny", stopping={"max_tokens": 1}),
    "conditions": Open(
        prompt="a", model="tiny", stopping={"conditions": [{"stop_token_id": 1}] * (MOST_FIELDS // 2 - 10)}
    ),
    "choices": Open(prompt="a", model="tiny", guided={"choice": {"choices": ["a"] * (MOST_FIELDS - 10)}}),
    "id": Open(prompt="a", model="tiny", request_id=NAME),
}
MANY_IDS = ["x" * 100] * 2_000
MESSAGES: dict[str, tuple[str, Message]] = {
    **{f"ModelInfer {name}": (f"{KSERVE}/ModelInfer", message) for name, message in INFER.items()},
    **{f"ModelStreamInfer {name}": (f"{KSERVE}/ModelStreamInfer", message) for name, message in INFER.items()},
    **{f"vllm.Inference {name}": ("/vllm.Inference/Generate", message) for name, message in VLLM.items()},
    **{f"VllmEngine {name}": ("/vllm.grpc.engine.VllmEngine/Generate", message) for name, message in ENGINE.items()},
    **{f"openengine.v1 {name}": ("/openengine.v1.Inference/Generate", message) for name, message in OPEN.items()},
    "VllmEngine embed": (
        "/vllm.grpc.engine.VllmEngine/Embed",
        Embed(tokenized={"input_ids": TOKENS}),
    ),
    "VllmEngine abort": ("/vllm.grpc.engine.VllmEngine/Abort", vllm_engine_pb2.AbortRequest(request_ids=MANY_IDS)),
    "RepositoryModelLoad": (
        f"{KSERVE}/RepositoryModelLoad",
        kserve_v2_pb2.RepositoryModelLoadRequest(
            model_name="x" * (200 << 10), parameters={"source": ModelRepositoryParameter(string_param="file://x")}
        ),
    ),
    "ModelReady": (f"{KSERVE}/ModelReady", kserve_v2_pb2.ModelReadyRequest(name="x+" * (100 << 10))),
    "ModelMetadata": (f"{KSERVE}/ModelMetadata", kserve_v2_pb2.ModelMetadataRequest(name="x+" * (100 << 10))),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_directory: Path) -> Iterator[Watched]:
    with watched_server(byte_tokenizer_directory, tmp_path_factory.mktemp("roots")) as watched:
        assert watched.call(infer(), f"{KSERVE}/ModelInfer") == (grpc.StatusCode.OK, "")  # warm
        yield watched


@pytest.mark.parametrize("name", MESSAGES)
def test_the_largest_messages_of_dialects_do_not_hold_the_event_loop(watched: Watched, name: str) -> None:
    check_held(watched, *MESSAGES[name])
