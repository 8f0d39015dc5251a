"""UploadAdapter: files that callers send become adapters, or nothing at all."""

import asyncio
import errno
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc.aio
import pytest

from loraplex import AsyncAdminClient, InvalidArgument, ResourceExhausted, Unavailable
from loraplex.operations.base import Upload
from loraplex.v1.adapters_pb2 import Adapter, CreateAdapterRequest, UploadAdapterRequest, UploadFile
from loraplex.v1.adapters_pb2_grpc import AdapterServiceStub
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE, digest
from loraplex_engine.link.messages import UploadEnded, UploadGrew
from loraplex_service.admission.tenants import TenantConfig
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

METHOD = "/loraplex.v1.AdapterService/UploadAdapter"
HEADER = UploadAdapterRequest(
    header=CreateAdapterRequest(parent="tenants/shared", adapter_id="mine", adapter=Adapter(base_model="models/tiny"))
)


def begin(name: str, size: int) -> UploadAdapterRequest:
    return UploadAdapterRequest(file=UploadFile(name=name, size_bytes=size))


def chunk(content: bytes) -> UploadAdapterRequest:
    return UploadAdapterRequest(chunk=content)


async def send(control: ControlPlane, *messages: UploadAdapterRequest) -> Adapter:
    def requests() -> Iterator[UploadAdapterRequest]:
        yield from messages

    return await control.admin._upload(Upload(METHOD, requests(), Adapter, {}))


def kept(control: ControlPlane) -> list[Path]:
    """What is on the disk of the server, of whatever upload."""
    depot = control.app.library._depot
    return [*depot._versions.iterdir(), *depot._incoming.iterdir()]


async def test_an_uploaded_adapter_can_be_used_and_says_what_it_is(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine", seed=1)
    adapter = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=MOST_SECONDS)
    assert (adapter.state, adapter.source, adapter.current) == (Adapter.STATE_ACTIVE, "", True)
    assert adapter.digest == f"sha256:{digest(files)}"
    answer = await control.client.generate("mine", "abc", max_tokens=1)
    assert answer.target.adapter_version == adapter.version


async def test_what_was_hashed_while_it_came_is_not_hashed_again(control: ControlPlane, tmp_path: Path) -> None:
    uploaded = await control.admin.upload_adapter(
        "mine", base_model="tiny", directory=write_adapter(tmp_path / "mine", seed=1), wait=MOST_SECONDS
    )
    source = str(write_adapter(control.roots / "found", seed=2))
    found = await control.admin.create_adapter("found", base_model="tiny", source=source, wait=MOST_SECONDS)
    hashed = {wish.key.digest: wish.is_hashed for wish in control.core().wishes if wish.path}
    assert hashed == {uploaded.digest.removeprefix("sha256:"): True, found.digest.removeprefix("sha256:"): False}


async def test_the_config_may_come_behind_the_weights(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine", seed=1)
    contents = [(name, (files / name).read_bytes()) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    messages = [message for name, content in contents for message in (begin(name, len(content)), chunk(content))]
    adapter = await send(control, HEADER, *messages)
    assert adapter.digest == f"sha256:{digest(files)}"


async def test_the_same_content_again_is_the_same_version(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine", seed=1)
    first = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=MOST_SECONDS)
    again = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=MOST_SECONDS)
    assert again.version == first.version
    assert len(kept(control)) == 1


async def test_content_of_another_digest_is_refused_and_removed(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    with pytest.raises(InvalidArgument, match="the files have another one"):
        await control.admin.upload_adapter("mine", base_model="tiny", directory=files, digest="sha256:" + "0" * 64)
    assert kept(control) == []


async def test_validating_an_upload_keeps_nothing(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    adapter = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, validate_only=True)
    assert adapter.rank == 4
    assert kept(control) == []
    assert await control.admin.list_adapters() == []


async def test_a_deleted_upload_leaves_no_files(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    for name in ("mine", "same"):  # two names, one content
        await control.admin.upload_adapter(name, base_model="tiny", directory=files, wait=MOST_SECONDS)
    await control.admin.delete_adapter("mine", wait=MOST_SECONDS)
    assert len(kept(control)) == 1
    await control.admin.delete_adapter("same", wait=MOST_SECONDS)
    async with asyncio.timeout(MOST_SECONDS):
        while kept(control):  # noqa: ASYNC110 - the depot has no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ((), "must be its header"),
        ((chunk(b"x"),), "must be its header"),
        ((HEADER, chunk(b"x")), "has 1 bytes; 0 are missing"),
        ((HEADER, begin("evil.bin", 1)), "is expected"),
        ((HEADER, begin(f"../{CONFIG_FILE}", 1)), "is expected"),
        ((HEADER, begin(CONFIG_FILE, 0)), "must be from 1 to"),
        ((HEADER, begin(CONFIG_FILE, 1 << 40)), "must be from 1 to"),
        ((HEADER, begin(WEIGHTS_FILE, 1 << 40)), "must be from 1 to"),
        ((HEADER, begin(CONFIG_FILE, 2), chunk(b"x")), f"1 bytes of {CONFIG_FILE} are missing"),
        ((HEADER, begin(CONFIG_FILE, 2), chunk(b"xyz")), "has 3 bytes; 2 of"),
        ((HEADER, begin(CONFIG_FILE, 1), chunk(b"x"), begin(CONFIG_FILE, 1)), "is expected"),
        ((HEADER, begin(CONFIG_FILE, 2), chunk(b"x"), begin(WEIGHTS_FILE, 1)), "are missing"),
        ((HEADER, begin(CONFIG_FILE, 1), chunk(b"x")), f"missing: {WEIGHTS_FILE}"),
        ((HEADER, HEADER), "after the header"),
    ],
)
async def test_a_stream_that_is_no_upload_is_refused_and_leaves_nothing(
    control: ControlPlane, messages: tuple[UploadAdapterRequest, ...], problem: str
) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        await send(control, *messages)
    assert kept(control) == []


# ---- uploads that an engine reads while they come --------------------------------------------------------------------


def named(control: ControlPlane) -> list[int]:
    """The uploads by which the engine was told to read adapters."""
    return [wish.upload for wish in control.core().wishes if wish.path]


def ended(control: ControlPlane) -> list[int]:
    """The uploads of which the engine was told that they have ended."""
    return [news.upload for news in control.core().uploads if isinstance(news, UploadEnded)]


async def test_an_engine_follows_an_upload_and_is_told_which_adapter_it_has_brought(
    control: ControlPlane, tmp_path: Path
) -> None:
    files = write_adapter(tmp_path / "mine")
    await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=20.0)
    await until(lambda: ended(control) == [1])
    *grown, _ = control.core().uploads
    size = (files / WEIGHTS_FILE).stat().st_size
    assert [(news.upload, news.size_bytes, news.num_bytes) for news in grown if isinstance(news, UploadGrew)] == [
        (1, size, size)
    ]
    assert named(control) == [1]


async def test_what_is_validated_alone_is_read_while_it_comes(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    await control.admin.upload_adapter("mine", base_model="tiny", directory=files, validate_only=True)
    assert named(control) == [1]


async def test_weights_that_come_before_their_config_are_read_when_they_are_whole(
    control: ControlPlane, tmp_path: Path
) -> None:
    files = write_adapter(tmp_path / "mine")
    contents = [(name, (files / name).read_bytes()) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    await send(
        control, HEADER, *(each for name, content in contents for each in (begin(name, len(content)), chunk(content)))
    )
    assert (named(control), control.core().uploads) == ([0], [])


async def test_an_engine_forgets_an_upload_that_is_not_what_was_said(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    with pytest.raises(InvalidArgument, match="the files have another one"):
        await control.admin.upload_adapter("mine", base_model="tiny", directory=files, digest="sha256:" + "0" * 64)
    await until(lambda: ended(control) == [1])
    assert named(control) == []


async def test_an_engine_forgets_an_upload_that_is_cancelled(control: ControlPlane) -> None:
    async with grpc.aio.insecure_channel(control.addresses.admin) as channel:
        upload = Begun(channel, *BEGUN)
        await until(lambda: len(control.core().uploads) == 1)
        upload.call.cancel()
        await until(lambda: ended(control) == [1])


async def test_an_upload_outlives_the_engine_that_followed_it(control: ControlPlane, tmp_path: Path) -> None:
    files, engines, go_on = write_adapter(tmp_path / "mine"), control.engines["tiny"], asyncio.Event()
    config, weights = ((files / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))

    async def requests() -> AsyncIterator[UploadAdapterRequest]:
        for message in (HEADER, begin(CONFIG_FILE, len(config)), chunk(config), begin(WEIGHTS_FILE, len(weights))):
            yield message
        yield chunk(weights[:10])
        await go_on.wait()
        yield chunk(weights[10:])

    async with grpc.aio.insecure_channel(control.addresses.admin) as channel:
        call = AdapterServiceStub(channel).UploadAdapter(requests())
        await until(lambda: len(control.core().uploads) == 1)
        engines.started[0].kill()
        await until(lambda: len(engines.started) == 2)
        await control.app.host.get("tiny").wait_settled()
        go_on.set()
        uploaded = await call
    await until(lambda: named(control) == [0])
    assert control.core().uploads == []
    answer = await control.client.generate("mine", "abc", max_tokens=1)
    assert answer.target.adapter_version == uploaded.version


async def test_no_engine_reads_what_is_not_known_to_be_trusted(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    tenants = {"shared": TenantConfig(adapter_digests=(digest(files),))}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=20.0)
        assert (named(control), control.core().uploads) == ([0], [])


# ---- uploads that do not end -----------------------------------------------------------------------------------------

BEGUN = (HEADER, begin(CONFIG_FILE, 1), chunk(b"x"), begin(WEIGHTS_FILE, 1 << 20), chunk(bytes(1000)))


class Begun:
    """An upload that has sent something, and waits."""

    def __init__(self, channel: grpc.aio.Channel, *messages: UploadAdapterRequest) -> None:
        self.sent = asyncio.Event()

        async def requests() -> AsyncIterator[UploadAdapterRequest]:
            for message in messages:
                yield message
            self.sent.set()
            await asyncio.Event().wait()

        self.call = AdapterServiceStub(channel).UploadAdapter(requests())


async def begin_many(control: ControlPlane, channel: grpc.aio.Channel, count: int) -> list[Begun]:
    uploads = [Begun(channel, *BEGUN) for _ in range(count)]
    for upload in uploads:
        await upload.sent.wait()
    await until(lambda: len(kept(control)) == count)
    return uploads


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        while not condition():  # noqa: ASYNC110 - the depot has no event
            await asyncio.sleep(0.001)


@pytest.fixture
async def open_control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """Where the tenant shared may upload as much as it likes at once."""
    tenants = {"shared": TenantConfig(max_uploads=None)}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        yield control


async def test_uploads_that_are_cancelled_together_leave_nothing(open_control: ControlPlane) -> None:
    async with grpc.aio.insecure_channel(open_control.addresses.admin) as channel:
        for upload in await begin_many(open_control, channel, 40):
            upload.call.cancel()
        await until(lambda: not kept(open_control))


async def test_uploads_whose_connection_ends_leave_nothing(open_control: ControlPlane) -> None:
    channel = grpc.aio.insecure_channel(open_control.addresses.admin)
    await begin_many(open_control, channel, 10)
    await channel.close()
    await until(lambda: not kept(open_control))


async def test_an_upload_with_an_id_leaves_nothing_when_it_is_cancelled(open_control: ControlPlane) -> None:
    header = UploadAdapterRequest(header=HEADER.header)
    header.header.request_id = str(uuid.uuid4())
    async with grpc.aio.insecure_channel(open_control.addresses.admin) as channel:
        upload = Begun(channel, header, *BEGUN[1:])
        await until(lambda: len(kept(open_control)) == 1)
        upload.call.cancel()
        await until(lambda: not kept(open_control))


async def send_once_there_is_room(control: ControlPlane) -> None:
    """Send until the server knows that another upload has ended."""
    async with asyncio.timeout(MOST_SECONDS):
        while True:
            with suppress(ResourceExhausted):
                await send(control, *BEGUN)


async def test_uploads_in_progress_are_limited(control: ControlPlane) -> None:
    async with grpc.aio.insecure_channel(control.addresses.admin) as channel:
        uploads = await begin_many(control, channel, 4)
        with pytest.raises(ResourceExhausted, match="5 uploads in progress"):
            await send(control, *BEGUN)
        uploads[0].call.cancel()
        with pytest.raises(InvalidArgument, match="bytes of"):
            await send_once_there_is_room(control)


@pytest.mark.parametrize("limit", [{"max_adapters": 2}, {"max_adapter_bytes": 1 << 20}])
async def test_what_is_being_uploaded_counts_in_the_quota(
    byte_tokenizer_directory: Path, tmp_path: Path, limit: dict[str, int]
) -> None:
    tenants = {"shared": TenantConfig(**limit)}  # type: ignore[arg-type]
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        count = limit.get("max_adapters", 1)
        files = write_adapter(tmp_path / "one", seed=1)
        async with grpc.aio.insecure_channel(control.addresses.admin) as channel:
            uploads = [Begun(channel, HEADER, begin(WEIGHTS_FILE, 1 << 20)) for _ in range(count)]
            await until(lambda: [one.size_bytes for one in control.app.quota._incoming] == [1 << 20] * count)
            with pytest.raises(ResourceExhausted):
                await control.admin.upload_adapter("one", base_model="tiny", directory=files)
            for upload in uploads:
                upload.call.cancel()
            await until(lambda: not control.app.quota._incoming)
            await control.admin.upload_adapter("one", base_model="tiny", directory=files)


@pytest.mark.parametrize(
    "step",
    [
        "loraplex_adapters.files.depot.Depot.begin",
        "loraplex_service.adapters.library._append",
        "loraplex_adapters.files.depot._sync",
    ],
)
async def test_an_upload_that_the_disk_does_not_take_is_refused_for_now_and_leaves_nothing(
    control: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = write_adapter(tmp_path / "files")
    with monkeypatch.context() as full:
        full.setattr(step, fail)
        async with AsyncAdminClient(control.addresses.admin, options={"grpc.enable_retries": 0}) as admin:
            with pytest.raises(Unavailable, match="No space left") as raised:
                await admin.upload_adapter("pirate", base_model="tiny", directory=files)
    assert raised.value.reason == "STATE_UNWRITABLE"
    assert (await control.admin.list_adapters(), kept(control)) == ([], [])
    await control.admin.upload_adapter("pirate", base_model="tiny", directory=files, wait=MOST_SECONDS)
