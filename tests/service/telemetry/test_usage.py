"""Usage records: what is in one, and that none is missing or doubled, whatever happened to the service."""

import asyncio
import errno
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loraplex import AsyncAdminClient, AsyncClient, LoraplexError, NotFound, Unavailable, Unsupported, generate_spec
from loraplex_service.call import Call
from loraplex_service.errors import NotFound as RecordNotFound
from loraplex_service.telemetry.config import UsageConfig
from loraplex_service.telemetry.records import GenerationRecord
from loraplex_service.telemetry.usage import UsageLog
from loraplex_service.telemetry.usage_files import UsageFiles
from loraplex_service.telemetry.usage_reader import usage_records
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.telemetry import usage_life
from tests.waits import MOST_SECONDS

RECORD = GenerationRecord(
    id="1",
    trace_id="",
    operation="chat",
    tenant="default",
    model="models/tiny",
    model_revision="r1",
    adapter="",
    adapter_digest="",
    status="OK",
    finish_reasons=["EOS"],
    prompt_tokens=3,
    cached_prompt_tokens=0,
    completion_tokens=5,
    started=0.0,
    seconds=1.0,
    queue_seconds=0.0,
    adapter_load_seconds=0.0,
    first_token_seconds=0.5,
)


def records(file: Path) -> list[dict[str, Any]]:
    """Of all that were set aside, and of the file."""
    files = sorted(file.parent.glob(f"{file.name}*"), key=lambda path: (path == file, path))
    return [json.loads(line) for one in files for line in one.read_text().splitlines()]


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    usage = UsageConfig(file=str(tmp_path / "usage.jsonl"))
    async with control_plane(byte_tokenizer_directory, tmp_path, usage=usage) as control:
        yield control


async def test_a_call_that_embeds_has_one_record_of_all_its_prompts(control: ControlPlane) -> None:
    response = await control.client.embed("tiny", ["abc", "de"], client_request_id="mine")
    [record] = records(control.roots / "usage.jsonl")
    assert (record["id"], record["client_request_id"]) == (response.report.request_id, "mine")
    assert (record["operation"], record["status"], record["finish_reasons"]) == ("embeddings", "OK", [])
    assert (record["prompt_tokens"], record["completion_tokens"], record["first_token_seconds"]) == (5, 0, None)
    assert record["queue_seconds"] is not None


async def test_a_record_says_who_used_how_much_of_what(control: ControlPlane) -> None:
    source = write_adapter(control.roots / "pirate")
    adapter = await control.admin.create_adapter("pirate", base_model="tiny", source=str(source), tenant="default")
    response = await control.client.generate("pirate", "abc", max_tokens=5)
    [record] = records(control.roots / "usage.jsonl")
    assert record["id"] == response.request_id
    assert (record["tenant"], record["model"], record["status"]) == ("default", "models/tiny", "OK")
    assert record["adapter"] == "tenants/default/adapters/pirate"
    assert record["adapter_digest"].startswith(adapter.version.partition("@")[2])
    assert record["adapters"] == [{"name": record["adapter"], "digest": record["adapter_digest"], "weight": 1.0}]
    assert record["finish_reasons"] == ["MAX_TOKENS"]
    assert (record["prompt_tokens"], record["cached_prompt_tokens"], record["completion_tokens"]) == (3, 0, 5)
    assert 0 <= record["queue_seconds"] <= record["first_token_seconds"] <= record["seconds"]


async def test_a_record_has_what_the_caller_calls_the_request(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=5, client_request_id="mine", labels={"team": "x"})
    [record] = records(control.roots / "usage.jsonl")
    assert (record["client_request_id"], record["labels"]) == ("mine", {"team": "x"})
    [sent] = (await anext(control.admin.watch_usage(existing_only=True))).records
    assert (sent.client_request_id, dict(sent.labels)) == ("mine", {"team": "x"})


async def test_a_record_says_what_form_the_outputs_had(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=5, regex="[abc]+")
    [record] = records(control.roots / "usage.jsonl")
    [sent] = (await anext(control.admin.watch_usage(existing_only=True))).records
    assert (record["constraint"], sent.constraint) == ("regex", "regex")


async def test_records_of_a_version_that_did_not_keep_callers_names_are_read() -> None:
    earlier = json.loads(msgspec.json.encode(RECORD))
    del earlier["client_request_id"], earlier["labels"]
    assert msgspec.json.encode(msgspec.convert(earlier, GenerationRecord)) == msgspec.json.encode(RECORD)


async def test_the_record_of_a_weighted_sum_names_every_adapter_with_its_version_and_weight(
    control: ControlPlane,
) -> None:
    weights, expected = {"pirate": 0.7, "poet": -0.123456789}, set()
    for seed, (adapter_id, weight) in enumerate(weights.items()):
        source = str(write_adapter(control.roots / adapter_id, seed=seed))
        adapter = await control.admin.create_adapter(adapter_id, base_model="tiny", source=source, tenant="default")
        expected.add((adapter.name, adapter.digest.removeprefix("sha256:"), weight))
    response = await control.client.generate("pirate*0.7 + poet*-0.123456789", "abc", max_tokens=5)
    [record] = records(control.roots / "usage.jsonl")
    assert {(used["name"], used["digest"], used["weight"]) for used in record["adapters"]} == expected
    assert record["adapter"] == response.target.adapter_version
    assert record["adapter_digest"] not in {digest for _, digest, _ in expected}
    [sent] = (await anext(control.admin.watch_usage(existing_only=True))).records
    assert {(used.adapter, used.digest, used.weight) for used in sent.adapters} == expected


async def test_the_record_is_there_when_the_caller_sees_the_end(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "abc", max_tokens=5)
    while stream.completed is None:
        await anext(stream)
    assert [record["completion_tokens"] for record in records(control.roots / "usage.jsonl")] == [5]


async def test_a_cancelled_generation_has_its_tokens_until_then(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "abc", max_tokens=100_000)
    while not (await anext(stream)).HasField("delta"):
        pass
    stream.cancel()
    async with asyncio.timeout(MOST_SECONDS):
        while not records(control.roots / "usage.jsonl"):  # noqa: ASYNC110 - a file says nothing
            await asyncio.sleep(0)
    [record] = records(control.roots / "usage.jsonl")
    assert record["status"] == "CANCELLED"
    assert record["finish_reasons"] == []
    assert record["completion_tokens"] >= 1


async def test_each_item_of_a_batch_has_a_record(control: ControlPlane) -> None:
    specs = [generate_spec("tiny", "abc", max_tokens=count) for count in (1, 2, 3)]
    items = [item async for item in control.client.batch_generate(specs)]
    found = records(control.roots / "usage.jsonl")
    assert sorted(record["completion_tokens"] for record in found) == [1, 2, 3]
    assert {record["id"] for record in found} == set(items[0].started.request_ids)


async def test_records_hold_no_text(control: ControlPlane) -> None:
    await control.client.generate("tiny", "secret", max_tokens=6)
    assert "secret" not in (control.roots / "usage.jsonl").read_text()


@asynccontextmanager
async def life(model: Path, file: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GRPC_ENABLE_FORK_SUPPORT": "0"}
    command = (sys.executable, usage_life.__file__, str(model), str(file))
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=environment)
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().split()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_after_kill_no_generation_that_a_caller_saw_end_is_missing_or_doubled(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    file, seen = tmp_path / "usage.jsonl", set[str]()

    async def caller(client: AsyncClient, enough: asyncio.Event) -> None:
        try:
            while True:
                stream = client.stream_generate("tiny", "abc", max_tokens=1 + len(seen) % 7)
                async for message in stream:
                    if message.HasField("completed"):
                        assert stream.started is not None
                        seen.add(stream.started.request_id)
                        if len(seen) % 100 == 0:
                            enough.set()
        except LoraplexError:
            return  # it was killed

    for _ in range(2):
        async with life(byte_tokenizer_directory, file) as (process, [data, _]), AsyncClient(data) as client:
            enough = asyncio.Event()
            callers = [asyncio.create_task(caller(client, enough)) for _ in range(8)]
            async with asyncio.timeout(60):
                await enough.wait()
                process.kill()
                await asyncio.gather(*callers)
    counted = Counter(record["id"] for record in records(file))
    assert seen <= counted.keys()
    assert set(counted.values()) == {1}
    assert len(os.listdir(tmp_path)) > 2  # it was set aside meanwhile


async def test_a_consumer_that_resumes_misses_no_record_though_the_service_was_killed(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    file, got = tmp_path / "usage.jsonl", list[str]()

    async def caller(client: AsyncClient) -> None:
        try:
            while True:
                await client.generate("tiny", "abc", max_tokens=3)
        except LoraplexError:
            return  # it was killed

    async def consume(admin: AsyncAdminClient, until: int) -> None:
        async for response in admin.watch_usage(after_id=got[-1] if got else ""):
            got.extend(record.id for record in response.records)
            if len(got) >= until:
                return

    for until in (150, 300):
        async with (
            life(byte_tokenizer_directory, file) as (process, [data, admin_address]),
            AsyncClient(data) as client,
            AsyncAdminClient(admin_address) as admin,
        ):
            callers = [asyncio.create_task(caller(client)) for _ in range(8)]
            async with asyncio.timeout(60):
                await consume(admin, until)
                process.kill()
                await asyncio.gather(*callers)
    async with (
        life(byte_tokenizer_directory, file) as (_, [_, admin_address]),
        AsyncAdminClient(admin_address) as admin,
    ):
        async for response in admin.watch_usage(after_id=got[-1], existing_only=True):
            got.extend(record.id for record in response.records)
    assert got == [record["id"] for record in records(file)]
    assert len(os.listdir(tmp_path)) > 2  # it was set aside meanwhile


async def test_who_watches_gets_each_record_as_it_is_written(control: ControlPlane) -> None:
    watch = control.admin.watch_usage()
    for _ in range(3):
        response = await control.client.generate("tiny", "abc", max_tokens=5)
        [record] = (await anext(watch)).records
        assert record.id == response.request_id
        assert (record.tenant, record.model, record.completion_tokens) == ("tenants/default", "models/tiny", 5)
        assert record.time_to_first_token.ToTimedelta() <= record.total_duration.ToTimedelta()
    watch.cancel()


async def test_a_record_that_no_file_has_cannot_be_resumed_after(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=1)
    with pytest.raises(NotFound) as raised:
        await anext(control.admin.watch_usage(after_id="another"))
    assert raised.value.reason == "USAGE_RECORD_NOT_FOUND"


async def test_a_server_without_records_says_so(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    async with control_plane(byte_tokenizer_directory, tmp_path) as control:
        with pytest.raises(Unsupported, match=r"usage\.file"):
            await anext(control.admin.watch_usage())


async def test_a_reader_passes_over_cut_lines_and_waits_for_whole_ones(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    line = msgspec.json.encode(RECORD)
    file.write_bytes(b'{"id": "cut\n' + line + b"\n" + line[:20])
    log = UsageLog(file, 1 << 20)
    found = [record.id async for batch in usage_records(log, "", existing_only=True) for record in batch]
    await log.close()
    assert found == ["1"]


def set_aside(file: Path) -> list[Path]:
    return list(file.parent.glob(f"{file.name}.*"))


def fill(pipe: int) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 65536)


async def noted(log: UsageLog, *ids: str) -> None:
    """Generations with these ids have ended."""
    for name in ids:
        log.generation_ended(Call("default", arrival=0.0), msgspec.structs.replace(RECORD, id=name))
    await log.written()


async def read_back(log: UsageLog, after_id: str = "") -> list[str]:
    return [record.id async for batch in usage_records(log, after_id, existing_only=True) for record in batch]


async def test_a_consumer_of_a_file_that_is_taken_away_is_told(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    log = UsageLog(file, 1)  # each record has a file
    await noted(log, "1")
    batches = usage_records(log, "", existing_only=True)
    await anext(batches)
    for aside in set_aside(file):
        aside.unlink()
    with pytest.raises(RecordNotFound, match="taken away"):
        await anext(batches)
    await log.close()


async def test_who_watches_where_no_files_are_left_is_told_to_come_again(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=1)
    folder = control.roots / "aside"
    folder.mkdir()
    log = control.app.telemetry.usage
    assert log is not None
    log._write_soon = lambda: None  # type: ignore[method-assign]  # nothing makes the file again meanwhile
    (control.roots / "usage.jsonl").rename(folder / "usage.jsonl")
    with pytest.raises(Unavailable) as raised:
        await anext(control.admin.watch_usage())
    assert raised.value.reason == "USAGE_UNREADABLE"


async def test_a_file_that_was_taken_away_is_made_again_with_the_next_record(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    log = UsageLog(file, 1 << 20)
    await noted(log, "1")
    file.unlink()
    await noted(log, "2")
    assert [record["id"] for record in records(file)] == ["2"]
    await log.close()


async def test_records_are_in_order_though_the_clock_was_set_back(tmp_path: Path) -> None:
    file, times = tmp_path / "usage.jsonl", [3 * 10**18, 2 * 10**18, 10**18]
    for time in times:  # each in a life of its own
        log = UsageLog(file, 1)
        log.files._clock = lambda time=time: time  # type: ignore[misc]
        await noted(log, str(time))
        await log.close()
    log = UsageLog(file, 1)
    assert await read_back(log) == [str(time) for time in times]
    assert await read_back(log, after_id=str(times[0])) == [str(time) for time in times[1:]]
    await log.close()


async def test_a_file_that_takes_no_bytes_and_gives_no_error_stops_nobody(
    byte_tokenizer_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tmp_path / "usage.jsonl"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    fill(held)
    usage = UsageConfig(file=str(pipe), max_waiting_records=3)
    async with control_plane(byte_tokenizer_directory, tmp_path, usage=usage) as control:
        async with asyncio.timeout(MOST_SECONDS):
            for _ in range(3):
                await control.client.generate("tiny", "abc", max_tokens=1)
            with pytest.raises(Unavailable) as raised:
                await control.client.generate("tiny", "abc", max_tokens=1)
        assert raised.value.reason == "USAGE_UNWRITABLE"
        assert "it has taken longer than" in caplog.text
        with pytest.raises(Unavailable) as raised:  # and who reads it back does not wait for it, nor takes of it
            await anext(control.admin.watch_usage())
        assert raised.value.reason == "USAGE_UNREADABLE"
    os.close(held)


async def test_while_no_more_records_may_wait_generations_are_refused(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    file = tmp_path / "usage.jsonl"
    file.symlink_to("/dev/full")
    usage = UsageConfig(file=str(file), max_waiting_records=2)
    async with control_plane(byte_tokenizer_directory, tmp_path, usage=usage, health_listen="127.0.0.1:0") as control:
        log = control.app.telemetry.usage
        assert log is not None
        for _ in range(2):
            await control.client.generate("tiny", "abc", max_tokens=1)
        with pytest.raises(Unavailable) as raised:
            await control.client.generate("tiny", "abc", max_tokens=1)
        assert raised.value.reason == "USAGE_UNWRITABLE"
        assert log.num_waiting == 2
        assert control.addresses.health is not None
        async with AsyncClient(control.addresses.health) as probes:
            await until(probes, "readiness", serving=False)
            assert await probes.is_serving("liveness")
            await until(control.client, "models/tiny", serving=False)
            file.unlink()
            file.symlink_to(tmp_path / "mended.jsonl")  # there is room on the disk again
            await until(probes, "readiness", serving=True)
        await until(control.client, "models/tiny", serving=True)
        await control.client.generate("tiny", "abc", max_tokens=1)
    assert len(records(tmp_path / "mended.jsonl")) == 3


async def until(client: AsyncClient, service: str, serving: bool) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        while await client.is_serving(service) is not serving:  # noqa: ASYNC110 - Check is what is tested
            await asyncio.sleep(0)


async def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    file.write_text('{"id": "cut')
    log = UsageLog(file, 1 << 20)
    await noted(log, "1")
    await log.close()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()[1:]] == ["1"]


async def test_a_full_file_is_set_aside_whole(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    log = UsageLog(file, 500)
    await noted(log, "0", "1", "2", "3", "4")
    await log.close()
    assert [record["id"] for record in records(file)] == ["0", "1", "2", "3", "4"]
    assert len(set_aside(file)) == 2


async def test_what_cannot_be_written_waits_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    log = UsageLog(Path("/dev/full"), 1 << 20)
    await noted(log, "1")
    await log.close()
    assert "No space left on device" in caplog.text
    assert "wait in memory" in caplog.text


def test_a_line_that_is_half_in_a_file_that_is_taken_away_is_whole_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "usage.jsonl"
    files = UsageFiles(file, 1 << 20)
    write = os.write

    def write_half(descriptor: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    monkeypatch.setattr("os.write", write_half)
    with pytest.raises(OSError, match="No space"):
        files.append([b"12345678\n"])
    monkeypatch.undo()
    file.unlink()
    files.append([b"next\n"])
    files.close()
    assert file.read_text() == "12345678\nnext\n"
