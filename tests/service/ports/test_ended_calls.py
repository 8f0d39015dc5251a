"""What is left of calls that have ended: nothing that waits for the collector, which holds the loop."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc.aio

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.door import Door
from loraplex_service.auth.keys import KeyFile, write_keys
from loraplex_service.call import Call
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, make_spec

CALLS = 50
STILL_ENDING = 5


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def calls_left(plane: DataPlane, spec: GenerateSpec) -> int:
    """After many of these, one after the other."""
    with no_collector():
        for _ in range(CALLS):
            with suppress(grpc.aio.AioRpcError):
                await plane.generate(spec)
        return sum(isinstance(thing, Call) for thing in gc.get_objects())


async def test_nothing_is_left_of_a_call_without_credentials(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    write_keys(tmp_path / "keys.yaml", KeyFile())
    door = Door(AuthConfig(keys=str(tmp_path / "keys.yaml")))
    async with data_plane(byte_tokenizer, door=door) as plane:
        assert await calls_left(plane, make_spec()) <= STILL_ENDING


async def test_nothing_is_left_of_a_call_that_fails(plane: DataPlane) -> None:
    assert await calls_left(plane, make_spec(model="unknown")) <= STILL_ENDING


async def test_nothing_is_left_of_a_call_that_is_answered(plane: DataPlane) -> None:
    assert await calls_left(plane, make_spec()) <= STILL_ENDING
