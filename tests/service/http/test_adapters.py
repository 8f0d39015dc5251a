"""Adapters come and go at run time, by the calls that vLLM has for it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import NotFound
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.http.trainers import ALIASES
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.http.caller import Answer, Caller, caller_of
from tests.service.http.test_process import ask, needs_uvicorn, request_of
from tests.service.scripted_engine import REJECTED

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
async def alone(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """Serves one model."""
    async with control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",)) as control:
        yield control


@pytest.fixture
async def manager(alone: ControlPlane) -> AsyncIterator[Caller]:
    async with caller_of(alone.addresses.data, admin=alone.addresses.admin) as caller:
        yield caller


async def load(caller: Caller, path: Path, name: str = "pirate", **given: Any) -> Answer:
    return await caller.post(LOAD, {"lora_name": name, "lora_path": str(path)} | given)


@pytest.mark.parametrize("path", [LOAD, *(alias for alias, path in ALIASES.items() if path == LOAD)])
async def test_an_adapter_that_was_loaded_is_served_at_once(alone: ControlPlane, manager: Caller, path: str) -> None:
    directory = write_adapter(alone.roots / "pirate")
    answer = await manager.post(path, {"lora_name": "pirate", "lora_path": str(directory)})
    assert (answer.status, answer.json["name"]) == (200, "tenants/shared/adapters/pirate")
    said = await manager.chat(model="pirate")
    assert (said.status, said.headers["loraplex-adapter-version"]) == (200, answer.json["version"])


@pytest.mark.parametrize("in_place", [False, True])
async def test_a_name_that_is_loaded_again_means_the_new_version(
    alone: ControlPlane, manager: Caller, in_place: bool
) -> None:
    first = (await load(manager, write_adapter(alone.roots / "a", seed=1))).json["version"]
    second = (await load(manager, write_adapter(alone.roots / "b", seed=2), load_inplace=in_place)).json["version"]
    assert first != second
    assert (await manager.chat(model="pirate")).headers["loraplex-adapter-version"] == second
    assert (await manager.chat(model=first)).status == 200


async def test_an_adapter_that_was_unloaded_is_gone(alone: ControlPlane, manager: Caller) -> None:
    await load(manager, write_adapter(alone.roots / "pirate"))
    assert (await manager.post(UNLOAD, {"lora_name": "pirate"})).json == {"name": "tenants/shared/adapters/pirate"}
    assert (await manager.chat(model="pirate")).status == 404
    with pytest.raises(NotFound):
        await alone.admin.get_adapter("pirate")


async def test_a_full_name_says_whose_an_adapter_is_and_the_header_does(alone: ControlPlane, manager: Caller) -> None:
    directory = write_adapter(alone.roots / "pirate")
    named = await load(manager, directory, "tenants/acme/adapters/one")
    assert named.json["name"] == "tenants/acme/adapters/one"
    body = {"lora_name": "two", "lora_path": str(directory)}
    told = await manager.post(LOAD, body, {"loraplex-tenant": "acme"})
    assert told.json["name"] == "tenants/acme/adapters/two"


async def test_several_models_want_one_to_be_named(control: ControlPlane) -> None:
    directory = write_adapter(control.roots / "pirate")
    async with caller_of(control.addresses.data, admin=control.addresses.admin) as caller:
        answer = await load(caller, directory)
        assert (answer.status, answer.error["param"]) == (400, "base_model_name")
        assert "models/tiny" in answer.error["message"]
        assert (await load(caller, directory, base_model_name="tiny")).status == 200
        answer = await load(caller, directory, base_model_name="nobody")
        assert (answer.status, answer.error["param"]) == (404, "base_model_name")


@pytest.mark.parametrize(
    ("path", "given", "status", "param"),
    [
        (LOAD, {"lora_name": None}, 400, "lora_name"),
        (LOAD, {"lora_name": "Pirate/One"}, 400, "lora_name"),
        (LOAD, {"lora_path": None}, 400, "lora_path"),
        (LOAD, {"lora_path": "/etc"}, 403, None),
        (LOAD, {"is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        (UNLOAD, {"lora_name": None}, 400, "lora_name"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "lora_name"),
        (UNLOAD, {"lora_int_id": 1}, 400, "lora_int_id"),
    ],
)
async def test_the_parameter_at_fault_is_named(
    alone: ControlPlane, manager: Caller, path: str, given: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"lora_name": "pirate"}
    if path == LOAD:
        body["lora_path"] = str(write_adapter(alone.roots / "pirate"))
    answer = await manager.post(path, body | given)
    assert (answer.status, answer.error["param"]) == (status, param)


async def test_files_that_fit_no_model_are_refused_with_the_reason(alone: ControlPlane, manager: Caller) -> None:
    answer = await load(manager, write_adapter(alone.roots / REJECTED))
    assert (answer.status, answer.error["reason"]) == (400, "ADAPTER_INVALID")
    assert answer.error["message"]


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_a_server_that_does_not_allow_it_says_what_would(caller: Caller, path: str) -> None:
    answer = await caller.post(path, {"lora_name": "pirate"})
    assert answer.status == 404
    assert "http_admin" in answer.error["message"]


@needs_uvicorn
async def test_who_may_manage_adapters_is_decided_as_over_grpc(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    made = {role: make_key("acme", [role], None) for role in (Role.INFERENCE, Role.ADMIN)}
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(key for _, key in made.values())))
    settings: dict[str, Any] = {"http_listen": "127.0.0.1:0", "http_admin": True, "models": ("tiny",)}
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    body = {"lora_name": "pirate", "lora_path": str(write_adapter(tmp_path / "pirate"))}
    async with control_plane(byte_tokenizer_directory, tmp_path, auth=auth, **settings) as control:
        http, statuses = control.addresses.http, []
        for role in (None, Role.INFERENCE, Role.ADMIN):
            headers = {} if role is None else {"authorization": f"Bearer {made[role][0]}"}
            statuses.append((await ask(http, request_of(LOAD, body, **headers)))[0])
    assert statuses == [401, 403, 200]
