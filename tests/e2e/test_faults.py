"""What dies, and what goes on. Each test may leave its server in ruins, so each has its own."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from loraplex import AsyncAdminClient, AsyncClient, LoraplexError, Unavailable
from loraplex.v1.models_pb2 import Model
from tests.e2e.conftest import END_SECONDS, LORAPLEX, MODELS, START_SECONDS, Server, running_server

LONG = 1500  # tokens: long enough to be running still when something happens, with n=16 in any case


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_gone(pids: set[int]) -> None:
    async with asyncio.timeout(END_SECONDS):
        while any(map(is_alive, pids)):  # noqa: ASYNC110  (processes of others send no events)
            await asyncio.sleep(0.01)


async def until_serving(client: AsyncClient) -> None:
    for name in MODELS:
        await client.wait_until_serving(f"models/{name}", timeout=START_SECONDS)


async def test_a_killed_engine_is_missed_by_nobody_else_and_comes_back(server: Server, client: AsyncClient) -> None:
    """The others go on without a gap, and the new engine has its adapters."""
    expected = await client.generate("pirate", "Once", max_tokens=20, temperature=0)
    pids = {}
    async with AsyncAdminClient(server.admin) as admin:
        before = server.engine_pids()
        await admin.unload_model("storyteller", wait=END_SECONDS)
        [pids["quizzer"]] = server.engine_pids()
        await admin.load_model("storyteller", wait=START_SECONDS)
        [pids["storyteller"]] = server.engine_pids() - {pids["quizzer"]}
        assert pids["storyteller"] not in before

        doomed = client.stream_generate("pirate", "Once", max_tokens=LONG, n=16, ignore_eos=True)
        others = client.stream_generate("json", "What is two plus three?", max_tokens=400, ignore_eos=True)
        await anext(doomed)
        await anext(others)
        os.kill(pids["storyteller"], signal.SIGKILL)
        assert (await others.collect()).usage.completion_tokens == 400
        doomed.cancel()
        assert pids["quizzer"] in server.engine_pids()

        async for message in admin.watch_models("storyteller"):
            if message.model.state == Model.STATE_ACTIVE:
                break
    answer = await client.generate("pirate", "Once", max_tokens=20, temperature=0)
    assert answer.outputs[0].text == expected.outputs[0].text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_running_streams_finish_and_refuses_new_ones(
    tmp_path: Path, number: signal.Signals
) -> None:
    with running_server(tmp_path) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            await until_serving(client)
            engines = server.engine_pids()
            streams = [client.stream_generate(name, "Once", max_tokens=LONG, ignore_eos=True) for name in MODELS]
            for stream in streams:
                await anext(stream)
            for pid in (server.process.pid, *engines):  # who stops a group tells all
                os.kill(pid, number)
            if number is signal.SIGHUP:  # a terminal that is closed does so perhaps twice
                os.kill(server.process.pid, number)
            refused = None
            while refused is None:
                try:
                    await client.generate("storyteller", "Once", max_tokens=1, timeout=END_SECONDS)
                except LoraplexError as error:
                    refused = error
            assert isinstance(refused, Unavailable)
            answers = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [answer.usage.completion_tokens for answer in answers] == [LONG, LONG]
        assert await asyncio.to_thread(server.process.wait, END_SECONDS) == 0
        await until_gone(engines)


async def test_streams_that_outlive_the_grace_are_told_and_the_server_still_exits_with_0(tmp_path: Path) -> None:
    with running_server(tmp_path, drain_grace_seconds=0) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            await until_serving(client)
            stream = client.stream_generate("storyteller", "Once", max_tokens=LONG, n=16, ignore_eos=True)
            await anext(stream)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable) as raised:
                await stream.collect()
        assert raised.value.reason == "DRAINING"
        assert await asyncio.to_thread(server.process.wait, END_SECONDS) == 0


async def test_engines_end_with_a_service_that_is_killed(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with AsyncClient(server.data) as client:
            await until_serving(client)
        engines = server.engine_pids()
        assert len(engines) == len(MODELS)
        server.process.kill()
        server.process.wait(END_SECONDS)
        await until_gone(engines)


def test_a_configuration_with_mistakes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "loraplex.yaml"
    file.write_text("models: [{name: tiny, model: ./nowhere}]\nlisten: 0.0.0.0:1")
    result = subprocess.run(
        [LORAPLEX, "serve", "--config", file], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert result.returncode == 1
    assert "there is no directory" in result.stderr
    assert "can be reached from other machines" in result.stderr


def test_an_address_that_is_taken_is_named(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "loraplex.yaml"
    file.write_text(f"models: [{{name: tiny, model: owner/name, load: false}}]\nlisten: {server.data}")
    result = subprocess.run(
        [LORAPLEX, "serve", "--config", file], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert result.returncode == 1
    assert server.data in result.stderr
