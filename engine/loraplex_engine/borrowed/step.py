"""What the modules inside a borrowed class read beside their inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import LayerKV, LoraSegments


class CurrentStep:
    """The step that is computed, for modules whose signatures leave no room for it. One for each model."""

    def __init__(self) -> None:
        self.batch: StepBatch | None = None
        self.kv: Sequence[LayerKV] = ()
        self.lora: LoraSegments | None = None  # of the rows that modules get now
        self.hidden: Tensor | None = None  # [L, C]: what the decoder returned, while its logits are computed
