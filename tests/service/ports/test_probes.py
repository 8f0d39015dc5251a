"""What an orchestrator's probes are told, at every stage of a server's life."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from loraplex_service.app import running
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.supervisor import EngineState
from loraplex_service.ports.probes import LIVENESS, READINESS, STARTUP, Probes
from tests.service.data_plane import next_of
from tests.service.health_calls import watch_health
from tests.service.scripted_engine import ThreadedEngines
from tests.waits import MOST_SECONDS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIST_MODELS = "/loraplex.v1.ModelService/ListModels"


async def answers(probes: Probes) -> dict[str, bool]:
    found = {}
    for name in (STARTUP, LIVENESS, READINESS):
        request = health_pb2.HealthCheckRequest(service=name)
        response = await probes.servicer.Check(request, None)  # type: ignore[arg-type]  # it never looks at the call
        found[name] = response.status == SERVING
    return found


async def test_a_server_has_started_once_every_model_that_it_loads_has_been_active() -> None:
    probes = Probes(["a", "b"])
    await probes.start()
    assert await answers(probes) == {STARTUP: False, LIVENESS: True, READINESS: False}
    await probes.set_state("a", EngineState.ACTIVE)
    assert await answers(probes) == {STARTUP: False, LIVENESS: True, READINESS: True}
    await probes.set_state("b", EngineState.ACTIVE)
    await probes.set_state("a", EngineState.RESTARTING)
    assert await answers(probes) == {STARTUP: True, LIVENESS: True, READINESS: True}


async def test_a_server_is_alive_until_every_model_is_given_up() -> None:
    probes = Probes(["a", "b"])
    await probes.set_state("a", EngineState.FAILED)
    await probes.set_state("b", EngineState.RESTARTING)
    assert (await answers(probes))[LIVENESS]
    await probes.set_state("b", EngineState.FAILED)
    assert not (await answers(probes))[LIVENESS]


async def test_a_model_that_nobody_wants_loaded_does_not_keep_a_server_alive() -> None:
    probes = Probes(["a"])
    await probes.set_state("a", EngineState.FAILED)
    await probes.set_state("b", EngineState.UNLOADED)
    assert not (await answers(probes))[LIVENESS]
    await probes.set_state("a", EngineState.UNLOADED)
    assert (await answers(probes))[LIVENESS]


async def test_a_draining_server_is_alive_but_not_ready_whatever_its_models_do() -> None:
    probes = Probes(["a"])
    await probes.set_state("a", EngineState.ACTIVE)
    await probes.drain()
    await probes.set_state("a", EngineState.ACTIVE)
    assert await answers(probes) == {STARTUP: True, LIVENESS: True, READINESS: False}


async def test_the_port_says_health_and_nothing_else(byte_tokenizer_directory: Path) -> None:
    model = HostedModelConfig(name="tiny", model=str(byte_tokenizer_directory))
    config = ServiceConfig(models=(model,), health_listen="127.0.0.1:0").with_free_ports()
    async with running(config, lambda _: ThreadedEngines().launch) as (app, addresses):
        assert addresses.health is not None
        async with grpc.aio.insecure_channel(addresses.health) as channel:
            watch = watch_health(channel, READINESS)
            async with asyncio.timeout(MOST_SECONDS):
                while (await next_of(watch)).status != SERVING:
                    pass
            list_models: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(LIST_MODELS)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await list_models(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            # As the server shuts down, its balancers are told before anything ends.
            await app.probes.drain()
            async with asyncio.timeout(MOST_SECONDS):
                assert (await next_of(watch)).status == NOT_SERVING
            watch.cancel()
