"""`loraplex bench` against a running service."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loraplex_service.cli import main
from tests.service.control_plane import ControlPlane

SMALL = ("--requests", "6", "--prompt-tokens", "3-9", "--output-tokens", "4")


async def run(control: ControlPlane, *arguments: str) -> Result:
    where = ["bench", "tiny", "--server", control.addresses.data]
    return await asyncio.to_thread(CliRunner().invoke, main, [*where, *SMALL, *arguments])


@pytest.mark.parametrize(
    ("load", "title"), [(["--streams", "2"], "2 streams"), (["--rate", "200"], "200 requests/s"), ([], "8 streams")]
)
async def test_a_load_is_reported(control: ControlPlane, load: list[str], title: str) -> None:
    result = await run(control, *load)
    assert result.exit_code == 0, result.output
    assert f"{title}: 6 requests, 0 failed" in result.output
    assert "first token" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


async def test_every_level_is_a_run_of_the_json(control: ControlPlane) -> None:
    result = await run(control, "--streams", "1", "--streams", "3", "--json")
    runs = json.loads(result.output)["runs"]
    assert [(each["level"], each["output_tokens"]) for each in runs] == [(1, 24), (3, 24)]


async def test_a_picture_is_drawn(control: ControlPlane, tmp_path: Path) -> None:
    await run(control, "--streams", "1", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


async def test_a_model_that_is_not_there_is_said(control: ControlPlane) -> None:
    result = await asyncio.to_thread(
        CliRunner().invoke, main, ["bench", "nope", "--server", control.addresses.data, *SMALL]
    )
    assert result.exit_code == 1
    assert "MODEL_NOT_FOUND" in result.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--streams", "1", "--rate", "2"], "give --streams or --rate"),
        (["--prompt-tokens", "9-3"], "is no length"),
        (["--http", "nowhere"], "HOST:PORT is expected"),
    ],
)
async def test_what_makes_no_sense_is_refused(control: ControlPlane, arguments: list[str], problem: str) -> None:
    result = await run(control, *arguments)
    assert result.exit_code != 0
    assert problem in result.output


async def test_requests_go_over_http(control: ControlPlane) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(asked["max_tokens"]):
            writer.write(b'data: {"choices": [{"token_ids": [7]}]}\n\n')
        writer.write(b"data: [DONE]\n\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run(control, "--streams", "2", "--http", address, "--json")
    [only] = json.loads(result.output)["runs"]
    assert (only["failed"], only["output_tokens"]) == (0, 24)


async def test_a_refusal_over_http_is_told(control: ControlPlane) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 401 Unauthorized\r\n\r\n{"error": {"message": "who are you?"}}')
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run(control, "--http", address)
    assert result.exit_code == 1
    assert "who are you?" in result.output
