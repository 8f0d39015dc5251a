"""What a sampler draws, read at once."""

from collections.abc import Sequence

from torch import Tensor

from loraplex_engine.execution.arrays import History
from loraplex_engine.execution.form_masks import TokenMask
from loraplex_engine.execution.sampler import Sampler
from loraplex_engine.scheduling.step import SampledToken
from loraplex_kernels.ops import Ops


def drawn(
    ops: Ops, logits: Tensor, histories: Sequence[History], mask: TokenMask | None = None
) -> list[SampledToken | None]:
    """The token of each row. The logits may be overwritten."""
    reading = Sampler(ops).sample(logits, histories, mask).reading
    return reading.finish(iter(reading.tensors))
