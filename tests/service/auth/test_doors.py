"""Every method of the contract, called on the real listeners by those who may not: all are refused."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2

from loraplex import AsyncAdminClient, AsyncClient, Unauthenticated
from loraplex.v1 import adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub
from loraplex_service import assembly
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.app import Addresses, running
from loraplex_service.auth.access import RULES
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig
from tests.service.auth.provider import Provider
from tests.service.control_plane import write_adapter
from tests.service.data_plane import next_of
from tests.service.health_calls import health_of
from tests.service.scripted_engine import ThreadedEngines

DATA = (inference_pb2, pooling_pb2, tokenizer_pb2)
ADMIN = (adapters_pb2, models_pb2, routes_pb2, server_pb2)
PIRATE = "tenants/acme/adapters/pirate"
SPEC: dict[str, Any] = {"model": PIRATE, "prompt": {"text": "x"}, "stopping": {"max_tokens": 1}}
UNSAID: dict[str, Any] = {"model": PIRATE, "prompt": {"text": "x"}}

# A request of each method about what belongs to acme.
REQUESTS: dict[str, dict[str, Any]] = {
    "/loraplex.v1.InferenceService/Generate": {"spec": SPEC},
    "/loraplex.v1.InferenceService/StreamGenerate": {"spec": SPEC},
    "/loraplex.v1.InferenceService/BatchGenerate": {"specs": [SPEC]},
    "/loraplex.v1.InferenceService/Score": {"spec": UNSAID, "candidates": [{"text": "y"}]},
    "/loraplex.v1.InferenceService/CancelGeneration": {"request_ids": ["a"]},
    "/loraplex.v1.PoolingService/Embed": {"model": PIRATE, "prompts": [{"text": "x"}]},
    "/loraplex.v1.PoolingService/Classify": {"model": PIRATE, "prompts": [{"text": "x"}]},
    "/loraplex.v1.PoolingService/Rerank": {"model": PIRATE, "query": "x", "documents": ["x"]},
    "/loraplex.v1.TokenizerService/Tokenize": {"model": PIRATE, "prompt": {"text": "x"}},
    "/loraplex.v1.TokenizerService/Detokenize": {"model": PIRATE, "token_ids": [65]},
    "/loraplex.v1.AdapterService/GetAdapter": {"name": PIRATE},
    "/loraplex.v1.AdapterService/ListAdapters": {"parent": "tenants/acme"},
    "/loraplex.v1.AdapterService/WatchAdapters": {"parent": "tenants/acme"},
    "/loraplex.v1.AdapterService/CreateAdapter": {"parent": "tenants/acme", "adapter_id": "x"},
    "/loraplex.v1.AdapterService/UploadAdapter": {"header": {"parent": "tenants/acme", "adapter_id": "x"}},
    "/loraplex.v1.AdapterService/UpdateAdapter": {"adapter": {"name": PIRATE}},
    "/loraplex.v1.AdapterService/DeleteAdapter": {"name": PIRATE},
    "/loraplex.v1.AdapterService/LoadAdapter": {"name": PIRATE},
    "/loraplex.v1.AdapterService/UnloadAdapter": {"name": PIRATE},
    "/loraplex.v1.RouteService/GetRoute": {"name": "tenants/acme/routes/r"},
    "/loraplex.v1.RouteService/ListRoutes": {"parent": "tenants/acme"},
    "/loraplex.v1.RouteService/ResolveTarget": {"parent": "tenants/acme", "model": "pirate"},
    "/loraplex.v1.RouteService/UpdateRoute": {"route": {"name": "tenants/acme/routes/r"}},
    "/loraplex.v1.RouteService/DeleteRoute": {"name": "tenants/acme/routes/r"},
    "/loraplex.v1.ModelService/GetModel": {"name": "models/tiny"},
    "/loraplex.v1.ModelService/ListModels": {},
    "/loraplex.v1.ModelService/WatchModels": {},
    "/loraplex.v1.ModelService/LoadModel": {"name": "models/tiny"},
    "/loraplex.v1.ModelService/UnloadModel": {"name": "models/tiny"},
    "/loraplex.v1.ServerService/GetServerInfo": {},
    "/loraplex.v1.ServerService/WatchLoad": {},
    "/loraplex.v1.ServerService/WatchUsage": {},
}
OF_HEADS = {"/loraplex.v1.PoolingService/Classify", "/loraplex.v1.PoolingService/Rerank"}  # the pirate has none
READS = {f"/{service}/{method}" for service, methods in assembly.READS.items() for method in methods}
WATCHED = {"/loraplex.v1.AdapterService/WatchAdapters"}  # may be looked at, on the admin port alone
# They answer another tenant too, and tell it nothing: of no request but its own, of each item by itself, of what all
# tenants have in common.
ANSWERED = {
    "/loraplex.v1.InferenceService/CancelGeneration",
    "/loraplex.v1.InferenceService/BatchGenerate",
    "/loraplex.v1.ModelService/GetModel",
    "/loraplex.v1.ModelService/ListModels",
    "/loraplex.v1.ServerService/GetServerInfo",
}


Reflection = grpc.aio.StreamStreamMultiCallable[
    reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
]


def reflection_of(channel: grpc.aio.Channel) -> "Reflection":
    return channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )


def methods(modules: tuple[Any, ...]) -> Iterator[tuple[str, MethodDescriptor]]:
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}", method


@dataclass
class Doors:
    """A service that asks for credentials, and tokens of all kinds."""

    addresses: Addresses
    keys: Path
    tokens: dict[str, str]

    async def call(self, path: str, method: MethodDescriptor, token: str | None, address: str = "") -> Message:
        """The first response; of a batch the second, as the first has ids alone. Raises grpc.aio.AioRpcError."""
        address = address or (self.addresses.data if (path, method) in methods(DATA) else self.addresses.admin)
        response_class = GetMessageClass(method.output_type)
        request = GetMessageClass(method.input_type)(**REQUESTS[path])
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        streams = (method.client_streaming, method.server_streaming)
        async with grpc.aio.insecure_channel(address) as channel:
            kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, False): channel.stream_unary,
            }
            start = kinds[streams](
                path,
                request_serializer=type(request).SerializeToString,
                response_deserializer=response_class.FromString,
            )
            call = start(iter([request]) if method.client_streaming else request, metadata=metadata)
            if method.name == "BatchGenerate":
                await call.read()
            return await call.read() if method.server_streaming else await call

    async def codes(self, token: str | None) -> dict[str, str]:
        """How each method answers a caller with this token."""
        found = {}
        for path, method in methods(DATA + ADMIN):
            try:
                await self.call(path, method, token)
                found[path] = "OK"
            except grpc.aio.AioRpcError as error:
                found[path] = error.code().name
        return found


@pytest.fixture
async def doors(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[Doors]:
    roots, keys = tmp_path / "adapters", tmp_path / "keys.yaml"
    write_adapter(roots / "pirate")
    over = datetime.now(UTC) - timedelta(seconds=1)
    made = {
        "acme": make_key("acme", [Role.INFERENCE, Role.ADAPTERS], None),
        "caller": make_key("acme", [Role.INFERENCE], None),
        "rival": make_key("rival", [Role.INFERENCE, Role.ADAPTERS], None),
        "admin": make_key("operator", [Role.ADMIN], None),
        "expired": make_key("acme", [Role.ADMIN], over),
    }
    write_keys(keys, KeyFile(keys=tuple(key for _, key in made.values())))
    tokens = {name: token for name, (token, _) in made.items()}
    tokens["forged"] = tokens["admin"][:-1] + ("A" if tokens["admin"][-1] != "A" else "B")
    tokens["unknown"] = make_key("acme", [Role.ADMIN], None)[0]
    tokens["garbage"] = "lpx_~~ ~"
    provider = Provider(tmp_path / "jwks.json")
    roles = [role.value for role in Role]
    tokens["expired token of the provider"] = provider.token(roles=roles, exp=1)
    stranger = ec.generate_private_key(ec.SECP256R1())
    tokens["token of another provider"] = provider.token(roles=roles, key=stranger)
    config = ServiceConfig(
        models=(HostedModelConfig(name="tiny", model=str(byte_tokenizer_directory)),),
        adapters=(AdapterConfig(name="acme/pirate", model="tiny", source=str(roots / "pirate")),),
        adapter_roots=(str(roots),),
        state_directory="",
        auth=AuthConfig(keys=str(keys), jwt=provider.config),
        health_listen="127.0.0.1:0",
    ).with_free_ports()
    async with running(config, lambda _: ThreadedEngines().launch) as (app, addresses):
        await app.host.get("tiny").wait_settled()
        yield Doors(addresses, keys, tokens)


def test_every_method_has_a_rule_and_a_case_here() -> None:
    paths = {path for path, _ in methods(DATA + ADMIN)}
    assert {path for path in RULES if path.startswith("/loraplex.")} == paths
    assert set(REQUESTS) == paths


@pytest.mark.parametrize(
    "who",
    [
        None,
        "expired",
        "forged",
        "unknown",
        "garbage",
        "expired token of the provider",
        "token of another provider",
    ],
)
async def test_without_good_credentials_every_method_is_closed(doors: Doors, who: str | None) -> None:
    codes = await doors.codes(None if who is None else doors.tokens[who])
    assert set(codes.values()) == {"UNAUTHENTICATED"}, codes


async def test_another_tenant_is_refused_by_every_method_whether_the_thing_exists_or_not(doors: Doors) -> None:
    codes = await doors.codes(doors.tokens["rival"])
    assert {path for path, code in codes.items() if code != "PERMISSION_DENIED"} == ANSWERED, codes


async def test_what_is_answered_to_another_tenant_tells_it_nothing(doors: Doors) -> None:
    paths = dict(methods(DATA))
    cancelled = await doors.call(*_named(paths, "CancelGeneration"), doors.tokens["rival"])
    assert not cancelled.cancelled_request_ids  # type: ignore[attr-defined]
    item = await doors.call(*_named(paths, "BatchGenerate"), doors.tokens["rival"])
    assert item.error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]  # type: ignore[attr-defined]


async def test_the_role_to_infer_opens_of_the_admin_port_what_may_be_looked_at(doors: Doors) -> None:
    codes = await doors.codes(doors.tokens["caller"])
    assert {path for path, _ in methods(ADMIN) if codes[path] != "PERMISSION_DENIED"} == READS | WATCHED
    assert {path: codes[path] for path, _ in methods(DATA)} == {
        path: "UNIMPLEMENTED" if path in OF_HEADS else "OK" for path, _ in methods(DATA)
    }


async def test_what_may_be_looked_at_is_on_the_data_port_too(doors: Doors) -> None:
    for path, method in methods(ADMIN):
        if path in READS - {"/loraplex.v1.RouteService/GetRoute"}:  # there is no route
            assert await doors.call(path, method, doors.tokens["caller"], doors.addresses.data)


async def test_a_tenant_manages_its_own_adapters_and_nothing_of_the_server(doors: Doors) -> None:
    codes = await doors.codes(doors.tokens["acme"])
    closed = {path for path, code in codes.items() if code == "PERMISSION_DENIED"}
    assert closed == {path for path, rule in RULES.items() if rule.role is Role.ADMIN and path.startswith("/loraplex.")}
    assert "UNAUTHENTICATED" not in codes.values()


async def test_other_methods_of_the_admin_port_do_not_exist_on_the_data_port(doors: Doors) -> None:
    for path, method in methods(ADMIN):
        if path in READS:
            continue
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await doors.call(path, method, doors.tokens["admin"], doors.addresses.data)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_health_port_tells_everybody_health_and_has_no_other_method(doors: Doors) -> None:
    assert doors.addresses.health is not None
    for path, method in methods(DATA + ADMIN):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await doors.call(path, method, doors.tokens["admin"], doors.addresses.health)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with grpc.aio.insecure_channel(doors.addresses.health) as channel:
        for service in ("startup", "liveness", "readiness"):
            await health_of(channel, service)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await next_of(reflection_of(channel)(iter(())))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_admin_acts_for_any_tenant_and_nobody_else_does(doors: Doors) -> None:
    for who, expected in (("admin", "OK"), ("rival", "PERMISSION_DENIED")):
        async with grpc.aio.insecure_channel(doors.addresses.data) as channel:
            metadata = (("authorization", f"Bearer {doors.tokens[who]}"), ("loraplex-tenant", "acme"))
            request = inference_pb2.GenerateRequest(spec=GenerateSpec(**SPEC))
            try:
                await InferenceServiceStub(channel).Generate(request, metadata=metadata)
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
        assert code == expected


async def test_a_key_that_is_taken_back_opens_nothing_from_then_on(doors: Doors) -> None:
    async with AsyncClient(doors.addresses.data, token=doors.tokens["caller"]) as client:
        await client.generate("tiny", "x", max_tokens=1)
        write_keys(doors.keys, KeyFile())
        with pytest.raises(Unauthenticated):
            await client.generate("tiny", "x", max_tokens=1)


async def test_a_broken_key_file_shuts_nobody_out(doors: Doors, caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncAdminClient(doors.addresses.admin, token=doors.tokens["admin"]) as admin:
        await admin.list_models()
        doors.keys.write_text("keys: [{id: half")
        await admin.list_models()
    assert "changed and cannot be used" in caplog.text


async def test_health_is_told_to_everybody_and_the_contract_to_callers_alone(doors: Doors) -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with grpc.aio.insecure_channel(doors.addresses.data) as channel:
        await health_of(channel)
        reflection = reflection_of(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await next_of(reflection(ask()))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {doors.tokens['caller']}"),)
        answer = await next_of(reflection(ask(), metadata=metadata))
        assert len(answer.list_services_response.service) >= 3


def _named(paths: dict[str, MethodDescriptor], name: str) -> tuple[str, MethodDescriptor]:
    [found] = [(path, method) for path, method in paths.items() if method.name == name]
    return found
