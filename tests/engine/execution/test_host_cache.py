"""Blocks in host memory: whole, whatever their layout, and between the device and the host unharmed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from loraplex_engine.execution.host_cache import _StreamCopier, host_cache
from loraplex_engine.scheduling.host_blocks import BlockMoves
from loraplex_kernels.ops import HeadShape, LayerKV
from loraplex_kernels.selection import select_ops

CPU = torch.device("cpu")
SHAPE = HeadShape(num_heads=4, num_kv_heads=2, head_dim=16)


def layers(kernels: str, dtype: torch.dtype) -> list[LayerKV]:
    """Two layers of eight blocks, all of whose bytes are random."""
    ops = select_ops(CPU, kernels)
    found = [ops.allocate_kv(8, 4, SHAPE, dtype) for _ in range(2)]
    for number, tensor in enumerate(tensor for layer in found for tensor in layer.tensors()):
        content = tensor.view(torch.uint8)
        content.copy_(torch.randint(0, 256, content.shape, generator=torch.Generator().manual_seed(number)))
    return found


def contents(found: list[LayerKV], block: int) -> list[bytes]:
    tensors = [tensor for layer in found for tensor in layer.tensors()]
    return [tensor[block].contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_block_comes_back_bit_for_bit(kernels: str, dtype: torch.dtype) -> None:
    found = layers(kernels, dtype)
    cache = host_cache(found, 1 << 16, CPU)
    before = [contents(found, block) for block in range(8)]
    cache.move(BlockMoves(saved=((3, 0), (5, 2))))
    cache.move(BlockMoves(saved=((6, 1),), restored=((2, 6), (0, 1))))
    after = [contents(found, block) for block in range(8)]
    assert after == [before[0], before[3], *before[2:6], before[5], before[7]]


def test_the_memory_is_within_the_budget() -> None:
    found = layers("reference", torch.float32)
    block_bytes = sum(each.nbytes for each in found) // 8
    cache = host_cache(found, 5 * block_bytes + 1, CPU)
    assert (cache.block_bytes, cache.num_slots, cache.slots.nbytes) == (block_bytes, 5, 5 * block_bytes)


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host_cache_bytes 100 hold no block of 2048 bytes: raise it"):
        host_cache(layers("reference", torch.float32), 100, CPU)


class FakeStream:
    """What is given to it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.waits: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append(other)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Streams of a GPU that is not there. → the one of the steps"""
    compute = FakeStream(CPU)
    success = SimpleNamespace(success=0)
    runtime = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: 0, cudaError=success)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return compute


def test_streams_move_as_many_blocks_as_the_staging_memory_holds_at_once(
    streams: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = layers("reference", torch.int8)
    cache = host_cache(found, 1 << 16, CPU)
    monkeypatch.setattr("loraplex_engine.execution.host_cache.STAGED_BYTES", 2 * cache.block_bytes)
    copier = _StreamCopier(cache, CPU)
    before = [contents(found, block) for block in range(8)]
    copier.move(BlockMoves(saved=((1, 4), (2, 3), (3, 2), (4, 1), (5, 0))))
    copier.move(BlockMoves(restored=((4, 5), (3, 4), (2, 3))))
    assert [contents(found, block) for block in range(8)] == [before[n] for n in (0, 1, 2, 3, 2, 1, 6, 7)]
    assert len(streams.waits) == 1 + 2 + 1, "for what came back before, and for the staging memory between its fills"
