"""Whose sampling defaults count: the request's, its route's, the configuration's, the model's own, the contract's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraplex.v1.generation_pb2 import Sampling
from loraplex.v1.models_pb2 import Model
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_engine.link.sampling_params import SamplingParams
from tests.service.control_plane import ControlPlane, control_plane

OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture
def directory(byte_tokenizer_directory: Path, tmp_path: Path) -> Path:
    """A model with a generation_config.json."""
    directory = tmp_path / "model"
    shutil.copytree(byte_tokenizer_directory, directory)
    (directory / "generation_config.json").write_text(json.dumps(OWN))
    return directory


async def used(control: ControlPlane, model: str, **sampling: Any) -> SamplingParams:
    """What a request is sent to the engine with."""
    stream = control.client.stream_generate(model, "ab", max_tokens=1 << 18, **sampling)
    await anext(stream)
    [request] = control.core().requests.values()
    stream.cancel()
    return request.sampling


async def test_a_models_own_defaults_are_shown_and_used(directory: Path, tmp_path: Path) -> None:
    async with control_plane(directory, tmp_path) as control:
        shown = (await control.admin.get_model("tiny")).default_sampling
        sampling = await used(control, "tiny")
    assert shown == Sampling(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.6, 0.9, 20, 1.1)


async def test_request_then_route_then_configuration_then_the_models_own(directory: Path, tmp_path: Path) -> None:
    configured = {"temperature": 0.1, "top_p": 0.2, "top_k": 3}
    async with control_plane(directory, tmp_path, hosted={"default_sampling": configured}) as control:
        route = Route(name="tenants/default/routes/r", targets=[RouteTarget(model="tiny", weight=1)])
        route.default_sampling.MergeFrom(Sampling(temperature=0.4, top_p=0.5))
        await control.admin.update_route(route, allow_missing=True)
        sampling = await used(control, "r", temperature=0.7)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.7, 0.5, 3, 1.1)


async def test_the_configuration_turns_the_models_own_off(directory: Path, tmp_path: Path) -> None:
    async with control_plane(directory, tmp_path, hosted={"default_sampling": "none"}) as control:
        shown = (await control.admin.get_model("tiny")).default_sampling
        sampling = await used(control, "tiny")
    assert shown == Sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)


@pytest.mark.parametrize(("default_sampling", "state"), [(None, Model.STATE_FAILED), ("none", Model.STATE_ACTIVE)])
async def test_a_default_that_no_request_could_ask_for_fails_the_model_unless_it_is_turned_off(
    directory: Path, tmp_path: Path, default_sampling: Any, state: "Model.State"
) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    async with control_plane(directory, tmp_path, hosted={"default_sampling": default_sampling}) as control:
        model = await control.admin.get_model("tiny")
    assert model.state == state
    assert ("top_p" in model.error.message) == (state == Model.STATE_FAILED)
