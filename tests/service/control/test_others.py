"""TokenizerService, RouteService and ServerService on a running service."""

import pytest

from loraplex import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from loraplex.v1.prompt_pb2 import Prompt, TokenIds
from loraplex_service.validation.checks import UNSUPPORTED_FIELDS
from tests.service.control_plane import ControlPlane, write_adapter
from tests.waits import MOST_SECONDS

# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_text_becomes_tokens_with_offsets_in_characters(control: ControlPlane) -> None:
    response = await control.client.tokenize("tiny", "aé", include_offsets=True, include_text=True)
    assert list(response.token_ids) == [97, 0xC3, 0xA9]
    assert (list(response.token_starts), list(response.token_ends)) == ([0, 1, 1], [1, 2, 2])
    assert response.text == "aé"
    assert response.max_context_tokens == 1 << 20


async def test_a_conversation_is_rendered_first(control: ControlPlane) -> None:
    response = await control.client.tokenize("tiny", [{"role": "user", "content": "hi"}], include_text=True)
    assert response.text == "[user]hi[assistant]"
    assert bytes(response.token_ids).decode() == response.text


async def test_tokenizing_is_what_generating_does(control: ControlPlane) -> None:
    tokens = await control.client.tokenize("tiny", "Once upon")
    answer = await control.client.generate("tiny", "Once upon", max_tokens=1)
    assert len(tokens.token_ids) == answer.usage.prompt_tokens


async def test_a_prompt_may_be_cut(control: ControlPlane) -> None:
    request = Prompt(text="abcdef", truncate_to_tokens=2)
    response = await control.client.tokenize("tiny", request, include_offsets=True)
    assert list(response.token_ids) == [101, 102]
    assert list(response.token_starts) == [4, 5]


async def test_an_adapter_has_the_tokenizer_of_its_model(control: ControlPlane) -> None:
    source = write_adapter(control.roots / "pirate").name
    await control.admin.create_adapter("pirate", base_model="tiny", source=source, wait=MOST_SECONDS)
    assert list((await control.client.tokenize("pirate", "a")).token_ids) == [97]


async def test_tokens_are_tokens_already(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="are tokens already"):
        await control.client.tokenize("tiny", Prompt(token_ids=TokenIds(ids=[1])))


async def test_a_prompt_is_required(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await control.client.tokenize("tiny", Prompt())
    assert raised.value.violations[0].field == "prompt"


async def test_tokens_become_text(control: ControlPlane) -> None:
    response = await control.client.detokenize("tiny", [97, 0xC3, 0xA9, 257])
    assert response.text == "aé"
    response = await control.client.detokenize("tiny", [97, 257], skip_special_tokens=False)
    assert response.text == "a<eos>"


async def test_tokens_outside_the_vocabulary_are_refused(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="holds 258, and the vocabulary has 258 tokens"):
        await control.client.detokenize("tiny", [258])


async def test_a_model_that_is_not_loaded_has_no_tokenizer(control: ControlPlane) -> None:
    with pytest.raises(FailedPrecondition, match="is not loaded"):
        await control.client.tokenize("other", "a")


# ---- routes ----------------------------------------------------------------------------------------------------------


async def test_a_name_is_resolved_on_behalf_of_a_tenant(control: ControlPlane) -> None:
    source = write_adapter(control.roots / "pirate").name
    adapter = await control.admin.create_adapter(
        "pirate", base_model="tiny", source=source, tenant="acme", wait=MOST_SECONDS
    )
    response = await control.admin.resolve_target("pirate", tenant="acme")
    assert response.target.adapter_version == adapter.version
    assert response.target.model == "models/tiny"
    with pytest.raises(NotFound):
        await control.admin.resolve_target("pirate", tenant="other")
    with pytest.raises(PermissionDenied):
        await control.admin.resolve_target(adapter.name, tenant="other")


# ---- the server ------------------------------------------------------------------------------------------------------


async def test_the_server_says_what_it_is(control: ControlPlane) -> None:
    info = await control.admin.get_server_info()
    assert info.version
    assert not info.draining
    assert [(device.name, device.memory_bytes) for device in info.devices] == [("cpu", 1 << 30)]
    assert (info.max_receive_bytes, info.max_batch_receive_bytes) == (4 << 20, 8 << 20)
    assert tuple(info.unsupported_features) == UNSUPPORTED_FIELDS


async def test_the_load_is_told_again_and_again(control: ControlPlane) -> None:
    running = control.client.stream_generate("tiny", "abc", max_tokens=1 << 19)
    await anext(running)
    loads = control.admin.watch_load(interval=0.1)
    async for message in loads:
        load = message.models[0]
        assert load.model == "models/tiny"  # "other" is not loaded
        if load.running_requests == 1:
            break
    running.cancel()
    async for message in control.admin.watch_load(interval=0.1):
        if message.models[0].running_requests == 0:
            break


async def test_the_interval_has_limits(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="interval"):
        await anext(control.admin.watch_load(interval=0.01))
