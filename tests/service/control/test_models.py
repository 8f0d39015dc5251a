"""ModelService on a running service: models come and go, and say what they are."""

import uuid

import msgspec
import pytest

from loraplex import FailedPrecondition, InvalidArgument, NotFound
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_ADAPTERS, MODEL_CAPABILITY_CHAT, MODEL_CAPABILITY_EMBED, Model
from loraplex.v1.watch_pb2 import (
    WATCH_EVENT_TYPE_CHANGED,
    WATCH_EVENT_TYPE_EXISTING,
    WATCH_EVENT_TYPE_SNAPSHOT_END,
)
from tests.service.control_plane import ControlPlane
from tests.service.scripted_engine import ScriptedCore
from tests.waits import MOST_SECONDS


async def test_a_loaded_model_says_what_it_is(control: ControlPlane) -> None:
    model = await control.admin.get_model("tiny")
    assert model.name == "models/tiny"
    assert model.state == Model.STATE_ACTIVE
    assert model.architecture == "ScriptedForCausalLM"
    assert model.limits.max_context_tokens == 1 << 20
    assert model.limits.max_adapter_rank == 8
    assert {MODEL_CAPABILITY_CHAT, MODEL_CAPABILITY_ADAPTERS, MODEL_CAPABILITY_EMBED} <= set(model.capabilities)
    assert (model.device, model.memory_bytes) == ("cpu", 3000)
    assert model.revision.startswith("local-")
    assert dict(model.labels) == {"team": "a"}
    assert model.HasField("load_time")


async def test_a_model_that_is_not_loaded_is_listed(control: ControlPlane) -> None:
    states = {model.name: model.state for model in await control.admin.list_models()}
    assert states == {"models/other": Model.STATE_UNLOADED, "models/tiny": Model.STATE_ACTIVE}


async def test_a_model_that_nobody_configured_is_not_found(control: ControlPlane) -> None:
    with pytest.raises(NotFound, match="there is no model 'nope'; there are: other, tiny") as raised:
        await control.admin.get_model("nope")
    assert raised.value.reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("name", ["models/", "models/A B", "tenants/x/adapters/y", "models/../x"])
async def test_what_is_no_name_is_refused(control: ControlPlane, name: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await control.admin.get_model(name)
    assert raised.value.violations[0].field == "name"


async def test_a_model_is_loaded_while_another_serves(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "abc", ignore_eos=True)
    await anext(stream)
    model = await control.admin.load_model("other", wait=MOST_SECONDS)
    assert model.state == Model.STATE_ACTIVE
    answer = await control.client.generate("other", "xy", max_tokens=4)
    assert len(answer.outputs[0].finished.ListFields()) > 0
    assert answer.usage.completion_tokens == 4
    stream.cancel()


async def test_without_wait_a_model_is_returned_while_it_loads(control: ControlPlane) -> None:
    model = await control.admin.load_model("other")
    assert model.state == Model.STATE_LOADING
    await control.app.host.get("other").wait_settled()


async def test_loading_what_is_loaded_changes_nothing(control: ControlPlane) -> None:
    model = await control.admin.load_model("tiny", wait=MOST_SECONDS)
    assert model.state == Model.STATE_ACTIVE
    assert len(control.engines["tiny"].started) == 1


async def test_a_request_for_an_unloaded_model_says_what_to_do(control: ControlPlane) -> None:
    with pytest.raises(FailedPrecondition, match="load it first") as raised:
        await control.client.generate("other", "x")
    assert raised.value.reason == "MODEL_UNLOADED"


async def test_unloading_lets_running_requests_finish(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=200)
    await anext(stream)
    unloading = await control.admin.unload_model("tiny")
    assert unloading.state == Model.STATE_UNLOADING
    with pytest.raises(FailedPrecondition, match="is being unloaded"):
        await control.client.generate("tiny", "x")
    answer = await stream.collect()
    assert answer.usage.completion_tokens == 200
    await control.app.host.get("tiny").wait_settled()
    assert (await control.admin.get_model("tiny")).state == Model.STATE_UNLOADED


async def test_requests_that_outlive_the_grace_end_with_model_unloaded(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1 << 19)
    await anext(stream)
    model = await control.admin.unload_model("tiny", grace=0.0, wait=MOST_SECONDS)
    assert model.state == Model.STATE_UNLOADED
    with pytest.raises(FailedPrecondition, match="was unloaded") as raised:
        await stream.collect()
    assert raised.value.reason == "MODEL_UNLOADED"


async def test_a_model_that_is_being_unloaded_cannot_be_loaded(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1 << 19)
    await anext(stream)
    await control.admin.unload_model("tiny")
    with pytest.raises(FailedPrecondition, match="load it again once it is gone"):
        await control.admin.load_model("tiny")
    stream.cancel()


async def test_a_model_may_come_back(control: ControlPlane) -> None:
    await control.admin.unload_model("tiny", wait=MOST_SECONDS)
    await control.admin.load_model("tiny", wait=MOST_SECONDS)
    answer = await control.client.generate("tiny", "ab", max_tokens=3)
    assert answer.usage.completion_tokens == 3


async def test_the_same_request_id_gets_the_first_result(control: ControlPlane) -> None:
    request_id = str(uuid.uuid4())
    first = await control.admin.load_model("other", wait=MOST_SECONDS, request_id=request_id)
    await control.admin.unload_model("other", wait=MOST_SECONDS)
    again = await control.admin.load_model("other", wait=MOST_SECONDS, request_id=request_id)
    assert again == first
    assert (await control.admin.get_model("other")).state == Model.STATE_UNLOADED


async def test_a_request_id_that_is_no_uuid_is_refused(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="is no UUID"):
        await control.admin.load_model("other", request_id="again")


async def test_a_model_whose_engine_cannot_load_is_failed_and_says_why(control: ControlPlane) -> None:
    def fail(core: object) -> None:
        raise OSError("no memory is left")

    control.engines["other"].prepare = fail
    model = await control.admin.load_model("other", wait=MOST_SECONDS)
    assert model.state == Model.STATE_FAILED
    assert "no memory is left" in model.error.message


async def test_a_model_without_the_end_of_sequence_of_its_tokenizer_is_failed_and_says_why(
    control: ControlPlane,
) -> None:
    def cut(core: ScriptedCore) -> None:
        core.limits = msgspec.structs.replace(core.limits, vocab_size=257)

    control.engines["other"].prepare = cut
    model = await control.admin.load_model("other", wait=MOST_SECONDS)
    assert model.state == Model.STATE_FAILED
    assert "eos_token" in model.error.message
    assert "257 is none of the model's 257 token ids" in model.error.message


async def test_an_engine_that_dies_is_replaced_and_its_streams_go_on(control: ControlPlane) -> None:
    assert await control.client.is_serving("models/tiny")
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1000)
    await anext(stream)
    control.engines["tiny"].started[0].kill()
    assert (await stream.collect()).outputs[0].text == "ab" * 500
    assert len(control.engines["tiny"].started) == 2
    await control.client.wait_until_serving("models/tiny", timeout=MOST_SECONDS)
    assert (await control.client.generate("tiny", "ab", max_tokens=2)).usage.completion_tokens == 2


async def test_a_watch_tells_what_exists_and_then_what_changes(control: ControlPlane) -> None:
    stream = control.admin.watch_models()
    first = [await anext(stream) for _ in range(3)]
    assert [message.type for message in first] == [
        WATCH_EVENT_TYPE_EXISTING,
        WATCH_EVENT_TYPE_EXISTING,
        WATCH_EVENT_TYPE_SNAPSHOT_END,
    ]
    await control.admin.load_model("other", wait=MOST_SECONDS)
    async for message in stream:
        assert message.type == WATCH_EVENT_TYPE_CHANGED
        if message.model.name == "models/other" and message.model.state == Model.STATE_ACTIVE:
            break


async def test_a_grace_below_zero_is_refused(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="grace: must be at least 0 s"):
        await control.admin.unload_model("tiny", grace=-1.0)
