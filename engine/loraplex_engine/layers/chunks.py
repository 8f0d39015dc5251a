"""Attention that sees its own chunk of a sequence alone."""

from __future__ import annotations

import numpy as np
import torch

from loraplex_kernels.ops import AttentionMetadata


def within_chunks(metadata: AttentionMetadata, size: int, block_size: int) -> AttentionMetadata:
    """The metadata for queries that see the keys of their own chunk of `size` tokens, up to themselves.

    To the kernels each chunk that has queries is a sequence of its own, whose blocks begin where the chunk does.
    size: a multiple of block_size.
    """
    if metadata.max_seq_len <= size:
        return metadata
    starts, lengths = metadata.query_starts.cpu().numpy().astype(np.int64), metadata.seq_lens.cpu().numpy()
    first = (lengths - np.diff(starts)) // size  # the chunk of each sequence's first query
    counts = np.maximum((lengths - 1) // size, first) - first + 1
    sequence = np.repeat(np.arange(len(counts)), counts)
    chunk = first[sequence] + np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The end of each chunk, in tokens of its sequence, and in rows of the step.
    ends = np.minimum((chunk + 1) * size, lengths[sequence])
    rows = starts[sequence + 1] - (lengths[sequence] - ends)
    query_starts, seq_lens = np.concatenate((starts[:1], rows)), ends - chunk * size
    width = -(-int(seq_lens.max()) // block_size)
    columns = (chunk * (size // block_size))[:, None] + np.arange(width)
    columns = np.where(np.arange(width) * block_size < seq_lens[:, None], columns, 0)
    device = metadata.block_tables.device
    return AttentionMetadata(
        query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_tables=metadata.block_tables[
            torch.tensor(sequence, device=device)[:, None], torch.tensor(columns, device=device)
        ].contiguous(),
        slot_mapping=metadata.slot_mapping,
        max_query_len=int(np.diff(query_starts).max()),
        max_seq_len=int(seq_lens.max()),
    )
