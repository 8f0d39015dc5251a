"""Attention within chunks: each query has the keys of its own chunk, up to itself, where they lie in the cache."""

from __future__ import annotations

import pytest
import torch

from loraplex_engine.layers.chunks import within_chunks
from loraplex_kernels.ops import AttentionMetadata

BLOCK = 4


def metadata(*sequences: tuple[int, int]) -> AttentionMetadata:
    """sequences: how many queries each has, and how long it is then."""
    starts = torch.tensor([0, *(count for count, _ in sequences)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
    longest = int(lengths.max())
    tables = torch.randperm(len(sequences) * longest, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = tables.view(len(sequences), longest)[:, : -(-longest // BLOCK)]
    most = max(count for count, _ in sequences)
    return AttentionMetadata(starts, lengths, tables.contiguous(), torch.arange(int(starts[-1])), most, longest)


def keys_of_queries(of: AttentionMetadata, size: int | None = None) -> list[list[int]]:
    """The slots that each row sees, in order; size: of chunks beyond which it sees nothing."""
    found = []
    for number, length in enumerate(of.seq_lens.tolist()):
        first, end = of.query_starts[number : number + 2].tolist()
        slots = [int(block) * BLOCK + place for block in of.block_tables[number] for place in range(BLOCK)]
        positions = range(length - (end - first), length)
        found += [slots[position // size * size if size else 0 : position + 1] for position in positions]
    return found


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize(
    "sequences",
    [
        [(23, 23)],
        [(1, 16), (1, 17), (1, 1)],
        [(5, 9), (1, 40), (17, 33), (8, 16)],
        [(1, 4), (0, 8), (3, 3)],
    ],
)
def test_each_query_sees_its_own_chunk(sequences: list[tuple[int, int]], size: int) -> None:
    whole = metadata(*sequences)
    found = within_chunks(whole, size, BLOCK)
    assert keys_of_queries(found) == keys_of_queries(whole, size)
    assert found.max_seq_len == max(found.seq_lens.tolist())
    assert found.max_query_len == max(found.query_starts.diff().tolist())
    assert torch.equal(found.slot_mapping, whole.slot_mapping)


def test_nothing_is_changed_where_every_sequence_is_within_its_first_chunk() -> None:
    whole = metadata((3, 8), (1, 5))
    assert within_chunks(whole, 8, BLOCK) is whole
