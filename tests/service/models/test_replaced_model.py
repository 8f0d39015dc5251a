"""A model whose files are replaced while it serves: nothing goes on in the middle of a text with other weights."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraplex import Unavailable
from loraplex.v1.models_pb2 import Model
from tests.service.control_plane import ControlPlane, control_plane

WITHOUT_TEMPLATE = '{"bos_token": "<bos>", "eos_token": "<eos>"}'


@pytest.fixture
def model(byte_tokenizer_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(byte_tokenizer_directory, tmp_path / "model")


@pytest.fixture
async def control(model: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(model, tmp_path) as control:
        yield control


def touch(model: Path) -> None:
    os.utime(model / "tokenizer.json", (0, 0))


async def come_back(control: ControlPlane, revision: str) -> Model:
    """Kill the engine, and return the model once another revision serves."""
    control.engines["tiny"].started[-1].kill()
    async for event in control.admin.watch_models("tiny"):
        if event.model.state == Model.STATE_ACTIVE and event.model.revision != revision:
            return event.model
    raise AssertionError("the watch has ended")


async def test_what_had_begun_does_not_go_on_with_other_files(control: ControlPlane, model: Path) -> None:
    before = await control.admin.get_model("tiny")
    stream = control.client.stream_generate("tiny", "abc", max_tokens=1 << 18)
    await anext(stream)
    touch(model)
    after = await come_back(control, before.revision)
    with pytest.raises(Unavailable, match=f"its revision was {before.revision}, and is {after.revision} now"):
        await stream.collect()


async def test_what_comes_then_is_said_to_be_of_the_new_revision(control: ControlPlane, model: Path) -> None:
    before = await control.admin.get_model("tiny")
    touch(model)
    after = await come_back(control, before.revision)
    answer = await control.client.generate("tiny", "abc", max_tokens=3)
    assert (answer.outputs[0].text, answer.target.model_revision) == ("abc", after.revision)


async def test_a_replaced_model_has_its_own_tokenizer_and_template(control: ControlPlane, model: Path) -> None:
    before = await control.admin.get_model("tiny")
    (model / "tokenizer_config.json").write_text(WITHOUT_TEMPLATE)
    after = await come_back(control, before.revision)
    assert set(before.capabilities) - set(after.capabilities)


async def test_a_replaced_model_whose_text_files_are_broken_is_failed(control: ControlPlane, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    control.engines["tiny"].started[-1].kill()
    async for event in control.admin.watch_models("tiny"):
        if event.model.state == Model.STATE_FAILED:
            break
    assert "tokenizer" in event.model.error.message


async def test_that_a_model_was_replaced_is_logged(
    control: ControlPlane, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = await control.admin.get_model("tiny")
    touch(model)
    after = await come_back(control, before.revision)
    assert f"its revision is {after.revision} now, was {before.revision}" in caplog.text
