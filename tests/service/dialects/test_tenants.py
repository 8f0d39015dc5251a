"""What one tenant has, no other sees or ends, in whatever words it asks."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.dialect_stubs import openengine_pb2, vllm_engine_pb2, vllm_pb2
from loraplex_service.dialect_stubs.kserve_v2_pb2 import (
    RepositoryIndexRequest,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
)
from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import GRPCInferenceServiceStub
from loraplex_service.dialect_stubs.openengine_pb2_grpc import ControlStub as OpenEngineControlStub
from loraplex_service.dialect_stubs.vllm_engine_pb2_grpc import VllmEngineStub
from loraplex_service.dialect_stubs.vllm_pb2_grpc import ControlStub as VllmControlStub
from loraplex_service.ports.config import DIALECTS
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import failure
from tests.service.dialects.test_kserve import infer
from tests.waits import MOST_SECONDS

ROLES = {"acme": Role.INFERENCE, "bolt": Role.INFERENCE, "ops": Role.ADMIN}
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture
def callers(tmp_path: Path) -> dict[str, Metadata]:
    """The metadata of each tenant's calls."""
    made = {tenant: make_key(tenant, [role], None) for tenant, role in ROLES.items()}
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(key for _, key in made.values())))
    return {tenant: (("authorization", f"Bearer {token}"),) for tenant, (token, _) in made.items()}


@pytest.fixture
async def control(
    byte_tokenizer_directory: Path, tmp_path: Path, callers: dict[str, Metadata]
) -> AsyncIterator[ControlPlane]:
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    async with control_plane(byte_tokenizer_directory, tmp_path, dialects=DIALECTS, auth=auth) as control:
        yield control


async def test_no_tenant_aborts_anothers_generation(
    channel: Any, control: ControlPlane, callers: dict[str, Metadata]
) -> None:
    stub: Any = GRPCInferenceServiceStub(channel)
    endless = infer(sampling='{"max_tokens": 100000, "ignore_eos": true}')
    call = stub.ModelInfer(endless, metadata=callers["acme"])
    async with asyncio.timeout(MOST_SECONDS):
        while not control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
            await asyncio.sleep(0.01)
    engine: Any = VllmEngineStub(channel)
    front: Any = VllmControlStub(channel)
    control_stub: Any = OpenEngineControlStub(channel)
    await engine.Abort(vllm_engine_pb2.AbortRequest(request_ids=["r1"]), metadata=callers["bolt"])
    await front.Abort(vllm_pb2.AbortRequest(request_ids=["r1"]), metadata=callers["bolt"])
    abort = openengine_pb2.AbortRequest(request_id="r1")
    others = await control_stub.Abort(abort, metadata=callers["bolt"])
    own = await control_stub.Abort(abort, metadata=callers["acme"])
    assert others.status == openengine_pb2.ABORT_STATUS_ALREADY_FINISHED
    assert own.status == openengine_pb2.ABORT_STATUS_ABORTED
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() is grpc.StatusCode.CANCELLED


async def test_the_repository_shows_no_tenant_anothers_adapters(
    channel: Any, tmp_path: Path, callers: dict[str, Metadata]
) -> None:
    stub: Any = GRPCInferenceServiceStub(channel)
    load = RepositoryModelLoadRequest(model_name="poet")
    load.parameters["source"].string_param = str(write_adapter(tmp_path / "poet"))
    load.parameters["base_model"].string_param = "tiny"
    await stub.RepositoryModelLoad(load, metadata=(*callers["ops"], ("loraplex-tenant", "acme")))
    seen = {}
    for tenant in ("acme", "bolt"):
        index = await stub.RepositoryIndex(RepositoryIndexRequest(), metadata=callers[tenant])
        seen[tenant] = {model.name for model in index.models}
    assert seen["acme"] - seen["bolt"] == {"tenants/acme/adapters/poet"}


async def test_an_admins_bare_name_is_loaded_and_unloaded_of_the_same_tenant(
    channel: Any, tmp_path: Path, callers: dict[str, Metadata]
) -> None:
    stub: Any = GRPCInferenceServiceStub(channel)
    load = RepositoryModelLoadRequest(model_name="poet")
    load.parameters["source"].string_param = str(write_adapter(tmp_path / "poet"))
    load.parameters["base_model"].string_param = "tiny"
    own = (*callers["ops"], ("loraplex-tenant", "ops"))
    await stub.RepositoryModelLoad(load, metadata=own)
    again, unload = RepositoryModelLoadRequest(model_name="poet"), RepositoryModelUnloadRequest(model_name="poet")
    for call in (
        stub.RepositoryModelLoad(again, metadata=callers["ops"]),
        stub.RepositoryModelUnload(unload, metadata=callers["ops"]),
    ):
        assert (await failure(call)).code is grpc.StatusCode.NOT_FOUND  # no adapter of `shared` has this name
    await stub.RepositoryModelLoad(again, metadata=own)
    await stub.RepositoryModelUnload(unload, metadata=own)
