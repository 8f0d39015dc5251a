"""UploadAdapter: files that callers send become adapters, or nothing at all."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.source import CONFIG_FILE, WEIGHTS_FILE, digest
from loraplex import InvalidArgument
from loraplex.operations.base import Upload
from loraplex.v1.adapters_pb2 import Adapter, CreateAdapterRequest, UploadAdapterRequest, UploadFile
from tests.service.control_plane import ControlPlane, write_adapter

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

    return await control.admin.upload(Upload(METHOD, requests(), Adapter, {}))


def kept(control: ControlPlane) -> list[Path]:
    """What is on the disk of the server, of whatever upload."""
    depot = control.app.library._depot
    return [*depot._versions.iterdir(), *depot._incoming.iterdir()]


async def test_an_uploaded_adapter_can_be_used_and_says_what_it_is(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine", seed=1)
    adapter = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=20.0)
    assert (adapter.state, adapter.source, adapter.current) == (Adapter.STATE_ACTIVE, "", True)
    assert adapter.digest == f"sha256:{digest(files)}"
    answer = await control.client.generate("mine", "abc", max_tokens=1)
    assert answer.target.adapter_version == adapter.version


async def test_the_same_content_again_is_the_same_version(control: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine", seed=1)
    first = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=20.0)
    again = await control.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=20.0)
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
        await control.admin.upload_adapter(name, base_model="tiny", directory=files, wait=20.0)
    await control.admin.delete_adapter("mine", wait=20.0)
    assert len(kept(control)) == 1
    await control.admin.delete_adapter("same", wait=20.0)
    async with asyncio.timeout(20):
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
