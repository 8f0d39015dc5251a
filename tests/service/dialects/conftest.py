"""A service that speaks all dialects, with a scripted engine that gives each prompt back."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.ports.config import DIALECTS
from tests.service.control_plane import ControlPlane, control_plane, write_adapter


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    write_adapter(tmp_path / "pirate")
    pirate = AdapterConfig(name="pirate", model="tiny", source=str(tmp_path / "pirate"))
    async with control_plane(byte_tokenizer_directory, tmp_path, adapters=(pirate,), dialects=DIALECTS) as control:
        yield control


@pytest.fixture
async def channel(control: ControlPlane) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(control.addresses.data) as channel:
        yield channel
