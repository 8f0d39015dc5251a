"""The server as a whole: health, reflection, draining, and what must never be loaded."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from loraplex.v1.inference_pb2 import GenerateRequest, StreamGenerateRequest
from loraplex_service.ports.interceptors import CallInterceptor
from loraplex_service.ports.listeners import MAX_METADATA_BYTES, build_server, drain
from loraplex_service.ports.receiving import ReceiveLimits
from tests.service.data_plane import DataPlane, failure, make_spec, next_of
from tests.service.health_calls import health_of, watch_health

ROOT = Path(__file__).resolve().parents[3]
BUF = ROOT / ".venv-stubs/bin/buf"
SERVICE = "loraplex.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
RECEIVE = ReceiveLimits()
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("name", ["", SERVICE, "models/demo"])
async def test_health_is_serving(plane: DataPlane, name: str) -> None:
    assert await health_of(plane.channel, name) == SERVING


async def test_the_port_serves_while_any_model_does(plane: DataPlane) -> None:
    await plane.health.set_model("other", True)
    await plane.health.set_model("demo", False)
    assert await health_of(plane.channel, "models/demo") == NOT_SERVING
    assert await health_of(plane.channel, "") == SERVING
    await plane.health.set_model("other", False)
    assert await health_of(plane.channel, "") == NOT_SERVING
    assert await health_of(plane.channel, SERVICE) == NOT_SERVING


async def test_health_watch_sends_every_change(plane: DataPlane) -> None:
    watch = watch_health(plane.channel, "models/demo")
    assert (await next_of(watch)).status == SERVING
    await plane.health.set_model("demo", False)
    assert (await next_of(watch)).status == NOT_SERVING
    await plane.health.set_model("demo", True)
    assert (await next_of(watch)).status == SERVING
    watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(plane: DataPlane, version: str) -> None:
    own = f"grpc.reflection.{version}.ServerReflection"
    reflect = plane.channel.stream_stream(
        f"/{own}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        yield reflection_pb2.ServerReflectionRequest(
            file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
        )

    services, file, itself = [response async for response in reflect(ask())]
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", own} <= names
    assert file.file_descriptor_response.file_descriptor_proto
    assert itself.file_descriptor_response.file_descriptor_proto


@pytest.mark.skipif(not BUF.exists(), reason="buf comes with proto/stubs.sh")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_buf_calls_methods_that_it_knows_by_reflection(plane: DataPlane, version: str) -> None:
    request = '{"specs": [{"model": "demo"}]}'
    url = f"http://{plane.address}/{SERVICE}/BatchGenerate"
    options = ("--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", f"grpc-{version}")
    buf = await asyncio.create_subprocess_exec(BUF, "curl", *options, "-d", request, url, stdout=subprocess.PIPE)
    answer, _ = await asyncio.wait_for(buf.communicate(), 60)
    assert b"requestIds" in answer
    assert buf.returncode == 0


async def test_a_prompt_of_megabytes_is_received_and_refused_in_peace(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec("x" * (RECEIVE.request_bytes - 1000))))
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_beyond_its_methods_limit_is_refused_with_the_limit(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec("x" * RECEIVE.request_bytes)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert failed.detail(ErrorInfo()).metadata["limit_bytes"] == str(RECEIVE.request_bytes)


@pytest.mark.parametrize(
    ("size", "metadata"), [(RECEIVE.batch_bytes + 1, ()), (1, (("x-flood", "x" * 3 * MAX_METADATA_BYTES),))]
)
async def test_floods_are_refused_before_they_are_looked_at(
    plane: DataPlane, size: int, metadata: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await plane.generate(make_spec("x" * size), metadata=metadata)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await plane.generate(make_spec())).outputs[0].text == "abcab"


async def test_unknown_method_is_unimplemented(plane: DataPlane) -> None:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = plane.channel.unary_unary(
        "/loraplex.v1.InferenceService/Nothing"
    )
    failed = await failure(call(b""))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FEATURE_UNSUPPORTED")


@pytest.mark.parametrize("key", ["authorization", "loraplex-tenant"])
async def test_credentials_that_are_there_twice_are_none(plane: DataPlane, key: str) -> None:
    failed = await failure(plane.generate(make_spec(), metadata=((key, "one"), (key, "two"))))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_a_name_of_health_that_nobody_knows_is_not_found_with_a_reason(plane: DataPlane) -> None:
    failed = await failure(health_of(plane.channel, "models/none"))
    assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_health_lists_its_names(plane: DataPlane) -> None:
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = plane.channel.unary_unary("/grpc.health.v1.Health/List")
    answer = health_pb2.HealthListResponse.FromString(await ask(b""))  # type: ignore[attr-defined]  # its types are older
    statuses = answer.statuses
    assert statuses["models/demo"].status == SERVING


async def test_two_servers_never_share_a_port_and_the_second_is_told_what_to_do(plane: DataPlane) -> None:
    with pytest.raises(RuntimeError, match=f"cannot listen on {plane.address}: it is taken.*--listen"):
        build_server([], plane.health, CallInterceptor(), plane.address)


# ---- draining --------------------------------------------------------------------------------------------------------


async def drained(plane: DataPlane, grace_seconds: float) -> None:
    await drain([plane.server], plane.health, plane.admission, plane.entrance, grace_seconds)


async def test_drain_lets_running_streams_finish(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 1
    stream = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec()))
    kinds = [(await next_of(stream)).WhichOneof("event")]
    draining = asyncio.ensure_future(drained(plane, grace_seconds=30))
    await plane.engine.until(lambda: plane.admission.draining)
    plane.engine.allow_steps(10)
    kinds += [event.WhichOneof("event") async for event in stream]
    assert kinds[-2:] == ["finished", "completed"]
    await draining


async def test_drain_says_not_serving_and_refuses_new_requests(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    running = asyncio.ensure_future(plane.generate(make_spec()))
    await plane.engine.until(lambda: bool(plane.engine.sequences))
    draining = asyncio.ensure_future(drained(plane, grace_seconds=30))
    await plane.engine.until(lambda: plane.admission.draining)
    assert await health_of(plane.channel, "") == NOT_SERVING
    failed = await failure(plane.generate(make_spec()))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    plane.engine.allow_steps(10)
    await running
    await draining


async def test_what_outlasts_the_grace_ends_as_draining_and_its_blocks_are_free(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 1
    running = asyncio.ensure_future(failure(plane.stream(make_spec())))
    await plane.engine.until(lambda: plane.engine.steps_allowed == 0)
    await drained(plane, grace_seconds=0.01)
    failed = await running
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert plane.engine.used_blocks == 0


async def test_lame_duck_still_takes_requests(plane: DataPlane) -> None:
    draining = asyncio.ensure_future(
        drain([plane.server], plane.health, plane.admission, plane.entrance, 1.0, lame_duck_seconds=60)
    )
    watch = watch_health(plane.channel)
    while (await next_of(watch)).status != NOT_SERVING:
        pass
    response = await plane.stub.Generate(GenerateRequest(spec=make_spec()))
    assert response.outputs[0].text == "abcab"
    draining.cancel()
    watch.cancel()


# ---- torch -----------------------------------------------------------------------------------------------------------

MODULES = sorted(
    ".".join(path.relative_to(ROOT / "service").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "service").rglob("*.py")
    if path.name != "template_worker.py"
)


def test_the_service_never_imports_torch() -> None:
    imports = "; ".join(f"import {module}" for module in MODULES)
    check = "import sys; print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", f"{imports}; {check}"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": ""},
    )
    assert result.stdout.strip() == "[]"
