"""OpenEngine on the data port."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex_service.dialect_stubs import openengine_pb2 as oe
from loraplex_service.dialect_stubs.openengine_pb2_grpc import ControlStub, InferenceStub
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import failure
from tests.service.http.clients.environments import until_idle
from tests.waits import MOST_SECONDS

GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "abc", "sampling": {"temperature": 0}, "request_id": "a"}
FOUR: dict[str, Any] = GREEDY | {"stopping": {"max_tokens": 4}}


@pytest.fixture
def inference(channel: Any) -> Any:
    return InferenceStub(channel)


@pytest.fixture
def oe_control(channel: Any) -> Any:
    return ControlStub(channel)


def asked(**changes: Any) -> oe.GenerateRequest:
    return oe.GenerateRequest(**(FOUR | changes))


async def test_a_stream_has_what_is_new_and_its_usage_at_the_end(inference: Any) -> None:
    *parts, last = [each async for each in inference.Generate(asked())]
    assert "".join(part.token.text for part in parts) == "abca"
    assert [token.token_id for part in parts for token in part.token.tokens] == [97, 98, 99, 97]
    assert (last.finished.reason, last.usage.prompt_tokens, last.usage.total_tokens) == (oe.FINISH_REASON_LENGTH, 3, 7)
    assert {part.request_id for part in [*parts, last]} == {"a"}


async def test_each_output_ends_once(inference: Any) -> None:
    sampling = {"num_sequences": 2, "temperature": 0}
    found = [each async for each in inference.Generate(asked(sampling=sampling))]
    ended = [each.finished.output_index for each in found if each.HasField("finished")]
    assert sorted(ended) == [0, 1]
    assert [each.HasField("usage") for each in found] == [False] * (len(found) - 1) + [True]


async def test_an_adapter_is_a_model_or_belongs_to_one(inference: Any) -> None:
    for names in ({"model": "pirate"}, {"lora_name": "pirate"}):
        call = inference.Generate(asked(**names))
        assert [each async for each in call]
        assert "pirate@" in dict(await call.trailing_metadata())["loraplex-adapter-version"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"num_sequences": 1 << 31}}, "sampling.num_sequences"),
        ({"stopping": {"conditions": [{}]}}, "stopping.conditions"),
        ({"response": {"output_candidates": {"all": b""}}}, "response.output_candidates.all"),
        ({"response": {"prompt_logprob_start": 3}}, "response.prompt_logprob_start"),
        ({"kv": {"session": b""}}, "kv"),
        ({"guided": {"backend": "xgrammar"}}, "guided.backend"),
        ({"extra": b"x"}, "extra"),
        ({"prompt": ""}, "prompt"),
        ({"model": ""}, "model"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(inference: Any, change: dict[str, Any], field: str) -> None:
    if field == "kv":
        change, field = {"kv": {"session": b"x"}}, "kv.session"
    assert (await failure(inference.Generate(asked(**change)).read())).fields == [field]


@pytest.mark.parametrize(
    ("key", "value"),
    [("openengine-priority", "high"), ("openengine-priority", "1000"), ("openengine-target-dp-rank", "1")],
)
async def test_the_metadata_of_a_call_counts(inference: Any, key: str, value: str) -> None:
    assert (await failure(inference.Generate(asked(), metadata=((key, value),)).read())).fields == [key]
    assert [each async for each in inference.Generate(asked(), metadata=(("openengine-priority", "5"),))]


async def test_an_aborted_request_ends_with_an_error_in_its_stream(
    inference: Any, oe_control: Any, control: ControlPlane
) -> None:
    endless = asked(stopping={"max_tokens": 100000, "ignore_eos": True})
    call = inference.Generate(endless)
    async with asyncio.timeout(MOST_SECONDS):
        responses = aiter(call)
        await anext(responses)
        assert (await oe_control.Abort(oe.AbortRequest(request_id="a"))).status == oe.ABORT_STATUS_ABORTED
        *_, last = [each async for each in responses]
    assert (last.error.code, last.error.retryable) == (oe.ERROR_CODE_CANCELLED, False)
    assert await call.code() is grpc.StatusCode.OK
    await until_idle(control)
    again = await oe_control.Abort(oe.AbortRequest(request_id="a"))
    assert again.status == oe.ABORT_STATUS_ALREADY_FINISHED


async def test_the_server_its_models_and_its_load_are_told(oe_control: Any) -> None:
    server = await oe_control.GetServerInfo(oe.GetServerInfoRequest())
    assert (server.engine_name, list(server.supported_models)) == ("loraplex", ["models/other", "models/tiny"])
    model = await oe_control.GetModelInfo(oe.GetModelInfoRequest(model="pirate"))
    assert (model.served_model_name, model.generation.max_num_sequences) == ("tiny", 16)
    assert (await oe_control.GetLoad(oe.GetLoadRequest())).running_requests == 0
    assert (await oe_control.Health(oe.HealthRequest())).state == oe.HEALTH_STATE_READY
    assert not (await oe_control.GetKvEventSources(oe.GetKvEventSourcesRequest())).ListFields()


async def test_adapters_are_loaded_listed_and_unloaded(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    plane = control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",), dialects=("openengine",))
    async with plane as control, grpc.aio.insecure_channel(control.addresses.data) as channel:
        stub: Any = ControlStub(channel)
        adapter = oe.LoraAdapter(lora_name="poet", source_path=str(write_adapter(tmp_path / "poet")))
        load = oe.LoadLoraRequest(adapter=adapter)
        assert not (await stub.LoadLora(load)).already_loaded
        assert (await stub.LoadLora(load)).already_loaded
        [listed] = (await stub.ListLoras(oe.ListLorasRequest())).adapters
        assert listed.lora_name == "tenants/shared/adapters/poet"
        await stub.UnloadLora(oe.UnloadLoraRequest(lora_name="poet"))
        assert not (await stub.ListLoras(oe.ListLorasRequest())).adapters
