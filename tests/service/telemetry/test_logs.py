"""Log lines of JSON, what they say of their call, and the access log."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import NotFound
from loraplex_engine.link.logs import JsonFormatter
from loraplex_service.call import Call
from loraplex_service.telemetry.logs import CallFields, access, call_fields
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Lines(logging.Handler):
    """What a machine that reads the log gets."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter("service"))
        self.addFilter(CallFields())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Any:
    handler = Lines()
    root = logging.getLogger()
    root.addHandler(handler)
    access.setLevel(logging.INFO)
    yield handler.lines
    access.setLevel(logging.NOTSET)
    root.removeHandler(handler)


@pytest.fixture
async def control(
    byte_tokenizer_directory: Path, tmp_path: Path, lines: list[dict[str, Any]]
) -> AsyncIterator[ControlPlane]:
    async with control_plane(byte_tokenizer_directory, tmp_path, access_log=True) as control:
        yield control


async def accesses(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Lines of the access log, once there are so many: a caller may have its answer before its line is written."""
    async with asyncio.timeout(MOST_SECONDS):
        while len(found := [line for line in lines if line["logger"] == "loraplex.access"]) < count:  # noqa: ASYNC110 - nothing tells of a line
            await asyncio.sleep(0)
    return found


async def test_a_generation_and_its_call_have_a_line_each(control: ControlPlane, lines: list[dict[str, Any]]) -> None:
    source = str(write_adapter(control.roots / "pirate"))
    adapter = await control.admin.create_adapter("pirate", base_model="tiny", source=source, tenant="default")
    lines.clear()
    metadata = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    response = await control.client.generate("pirate", "abc", max_tokens=5, metadata=metadata)
    generation, call = await accesses(lines, 2)
    for line in (generation, call):
        assert line["request_id"] == response.request_id
        assert line["trace_id"] == TRACE
        assert line["tenant"] == "default"
        assert line["adapter"] == adapter.version
        assert line["status"] == "OK"
    assert (generation["prompt_tokens"], generation["completion_tokens"]) == (3, 5)
    assert generation["adapter_digest"].startswith(adapter.version.partition("@")[2])
    assert call["method"] == "loraplex.v1.InferenceService/Generate"


async def test_lines_have_what_the_caller_calls_the_request(control: ControlPlane, lines: list[dict[str, Any]]) -> None:
    await control.client.generate("tiny", "abc", max_tokens=5, client_request_id="mine\n", labels={"team": "x"})
    for line in await accesses(lines, 2):
        assert (line["client_request_id"], line["labels"]) == ("mine\n", {"team": "x"})
        assert "client_request_id='mine\\n' labels={'team': 'x'}" in line["message"]  # quoted: a line stays one line


async def test_a_call_of_any_method_has_the_name_that_its_metadata_gives_it(
    control: ControlPlane, lines: list[dict[str, Any]]
) -> None:
    await control.admin.get_server_info(metadata={"x-request-id": "theirs"})
    [line] = await accesses(lines, 1)
    assert line["client_request_id"] == "theirs"


async def test_a_refused_call_has_its_status(control: ControlPlane, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(NotFound):
        await control.client.generate("nobody", "abc", max_tokens=5)
    [line] = await accesses(lines, 1)
    assert line["status"] == "NOT_FOUND"


async def test_lines_hold_no_text(control: ControlPlane, lines: list[dict[str, Any]]) -> None:
    await control.client.generate("tiny", "secret", max_tokens=6)
    await accesses(lines, 2)
    assert "secret" not in json.dumps(lines)


def test_a_line_says_what_happened_and_where(lines: list[dict[str, Any]]) -> None:
    try:
        raise ValueError("reason")
    except ValueError:
        logging.getLogger("some.room").exception("it failed: %d", 7)
    [line] = lines
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "some.room", "it failed: 7")
    assert "ValueError: reason" in line["exception"]
    assert line["process"] == "service"


def test_what_is_not_known_of_a_call_is_left_out() -> None:
    assert call_fields(Call("", request_id="1", arrival=0.0)) == {"request_id": "1"}
