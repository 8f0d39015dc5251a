"""The operations that end a step, computed by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.library import Library, succeed
from loraplex_kernels.draws import Draws, Likelihoods, Penalties, Watermarks
from loraplex_kernels.sampling import TorchSampling


class CpuSampling(TorchSampling):
    """Masks, penalties, draws and likelihoods in C++, each row by one thread."""

    library: Library

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        row_ids, bits = np.array(rows, dtype=np.int64), bits.contiguous()
        where = address(logits), logits.shape[1], len(row_ids), row_ids.ctypes.data
        succeed(self.library.mask_logits(self.library.context, *where, bits.data_ptr(), bits.shape[1]))

    def penalise(self, logits: Tensor, penalties: Penalties) -> None:
        tokens = penalties.tokens
        arrays = (
            *(tokens.rows, tokens.starts, tokens.token_ids, penalties.counts),
            *(penalties.repetition, penalties.presence, penalties.frequency),
        )
        where = address(logits), logits.shape[1], len(tokens.rows)
        succeed(self.library.penalise(self.library.context, *where, *(each.ctypes.data for each in arrays)))

    def mark(self, logits: Tensor, marks: Watermarks) -> None:
        columns = marks.rows, marks.seeds, marks.limits, marks.deltas
        where = address(logits), logits.shape[1], len(marks.rows)
        succeed(self.library.mark(self.library.context, *where, *(each.ctypes.data for each in columns)))

    def draw_tokens(self, logits: Tensor, draws: Draws) -> Tensor:
        tokens = torch.empty(len(logits), dtype=torch.int64)
        where = address(logits), *logits.shape, *draws.addresses
        succeed(self.library.draw_tokens(self.library.context, *where, tokens.data_ptr()))
        return tokens

    def likelihoods(self, logits: Tensor, token_ids: Tensor, num_top: int) -> Likelihoods:
        (rows, vocab_size), token_ids = logits.shape, token_ids.contiguous()
        num_top = min(num_top, vocab_size)
        found = Likelihoods(
            torch.empty(token_ids.shape),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, num_top, dtype=torch.int64),
            torch.empty(rows, num_top),
        )
        logprobs, ranks, top_ids, top_logprobs = (column.data_ptr() for column in found)
        asked = address(logits), rows, vocab_size, token_ids.shape[1], token_ids.data_ptr(), logprobs, ranks
        succeed(self.library.likelihoods(self.library.context, *asked, num_top, top_ids, top_logprobs))
        return found


def address(logits: Tensor) -> int:
    """Where the kernels find these logits."""
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    return logits.data_ptr()
