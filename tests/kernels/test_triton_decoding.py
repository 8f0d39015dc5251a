"""How decoding shares out the keys: each key of each sequence once, and a sequence's bits are its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.ops import AttentionMetadata, LayerKV
from loraplex_kernels.reference import ReferenceOps
from tests.kernels.tolerance import Tolerance

pytest.importorskip("triton")

from loraplex_kernels.triton import TritonOps
from loraplex_kernels.triton.decoding import MAX_CHUNKS, MIN_CHUNK
from loraplex_kernels.triton.primitives import RANGES_AT_ONCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS, REFERENCE = TritonOps(DEVICE), ReferenceOps(DEVICE)
BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM = 16, 48, 16
HEADS = (2, 1)
SEQUENCES = st.lists(
    st.tuples(
        st.integers(1, NUM_BLOCKS * BLOCK_SIZE) | st.sampled_from([1, 255, 256, 257, 512, 513]),  # keys
        st.just(1) | st.integers(1, 3),  # new tokens
    ),
    min_size=1,
    max_size=4,
)
# Weights and results are rounded to float16, 2^-11 of each.
TOLERANCE: Tolerance = {"rtol": 2e-3, "atol": 5e-4}


class Step:
    """Sequences that read one cache. Their tables begin at the same blocks: they share prefixes."""

    def __init__(self, sequences, num_blocks=NUM_BLOCKS, padding=0):
        generator = torch.Generator().manual_seed(5)
        self.new = [min(new, length) for length, new in sequences] + [1] * padding
        lengths = [length for length, _ in sequences] + [0] * padding
        shape = (num_blocks, HEADS[1], BLOCK_SIZE, HEAD_DIM)
        k, v = (torch.randn(shape, generator=generator).half().to(DEVICE) for _ in range(2))
        self.cache = LayerKV(k, v, num_blocks, BLOCK_SIZE)
        self.expected_cache = LayerKV(k.transpose(1, 2), v.transpose(1, 2), num_blocks, BLOCK_SIZE)
        order = torch.randperm(num_blocks, generator=generator).int().to(DEVICE)
        self.q = torch.randn(sum(self.new), HEADS[0], HEAD_DIM, generator=generator).half().to(DEVICE)
        starts = torch.tensor([0, *torch.tensor(self.new).cumsum(0)], dtype=torch.int32, device=DEVICE)
        self.metadata = AttentionMetadata(
            query_starts=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            block_tables=order.repeat(len(lengths), 1),
            slot_mapping=torch.zeros(sum(self.new), dtype=torch.long, device=DEVICE),
            max_query_len=max(self.new),
            max_seq_len=max(lengths),
        )

    def attended(self, window):
        return OPS.paged_attention(self.q, self.cache, self.metadata, 0.2, window, None)

    def expected(self, window):
        return REFERENCE.paged_attention(self.q, self.expected_cache, self.metadata, 0.2, window, None)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)  # the interpreter takes its time
@given(SEQUENCES, st.none() | st.integers(1, 600))
def test_every_key_of_every_sequence_counts_once(sequences, window):
    """One key too few or too many changes a sum of some hundred by more than float16 rounds."""
    step = Step(sequences)
    torch.testing.assert_close(step.attended(window), step.expected(window), **TOLERANCE)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 768), min_size=1, max_size=4), st.none() | st.integers(1, 600))
def test_a_sequence_has_the_same_bits_alone_and_beside_others(lengths, window):
    together = Step([(length, 1) for length in lengths], padding=2)
    attended = together.attended(window)
    assert not attended[len(lengths) :].any()
    for place, length in enumerate(lengths):
        alone = Step([(length, 1)])
        alone.q = together.q[place : place + 1].contiguous()
        assert torch.equal(alone.attended(window)[0], attended[place])


@pytest.mark.long
def test_a_long_sequence_has_longer_chunks_and_no_more_of_them():
    keys = MIN_CHUNK.value * MAX_CHUNKS.value + 100
    step = Step([(keys, 1), (30, 1)], -(-keys // BLOCK_SIZE))
    torch.testing.assert_close(step.attended(None), step.expected(None), **TOLERANCE)


@pytest.mark.slow
def test_more_sequences_than_are_counted_at_once():
    """Two among the last have several chunks, and one between them is no decoding one."""
    some = [(3, 1)] * (RANGES_AT_ONCE.value - 1)
    step = Step([*some, (300, 1), (9, 3), (5, 1), (600, 1)])
    torch.testing.assert_close(step.attended(None), step.expected(None), **TOLERANCE)
