"""The runners of a model that several ranks compute: the first one plans and draws, the others follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex_engine.execution.arrays import StepArrays
from loraplex_engine.execution.batch import narrowed, step_batch
from loraplex_engine.execution.model_runner import NO_FORMS, ModelRunner
from loraplex_engine.execution.orders import Allocate, Compute, encode
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.model import Model
from loraplex_engine.ranks.group import Group, RanksLostError
from loraplex_engine.scheduling.form import Form
from loraplex_engine.scheduling.step import PendingResult
from loraplex_kernels.ops import Ops


class LeadingRunner(ModelRunner):
    """That of the first rank: the others do what it does."""

    def __init__(self, model: Model, ops: Ops, config: EngineConfig, group: Group, free_bytes: int) -> None:
        """`free_bytes`: the least that another rank has, for its cache and adapters."""
        super().__init__(model, ops, config)
        self.group = group
        self.most_cache_bytes = max(free_bytes - config.adapter_device_bytes, 0)

    @property
    def block_bytes(self) -> int:
        of_layer = super().block_bytes // self.model.num_layers
        return of_layer * self.group.shard.most_layers(self.model.config.num_layers)

    def allocate(self, num_blocks: int, config: EngineConfig) -> None:
        self.group.order(encode(Allocate(num_blocks)))
        super().allocate(num_blocks, config)

    def start(self, step: StepArrays, forms: Mapping[int, Form] = NO_FORMS) -> PendingResult:
        """As of one rank. Raises RanksLostError for whatever goes wrong: the others wait in the middle of the step."""
        self.group.order(encode(Compute.of(step)))
        try:
            return super().start(step, forms)
        except Exception as error:
            raise RanksLostError(f"a step failed that the other ranks have begun: {error}") from error

    def _fill_unread(self, token_ids: torch.Tensor, step: StepArrays) -> None:
        super()._fill_unread(token_ids, step)
        self.group.share_first(token_ids)


class FollowingRunner(ModelRunner):
    """That of another rank."""

    def __init__(self, model: Model, ops: Ops, config: EngineConfig, group: Group) -> None:
        super().__init__(model, ops, config)
        self._group = group

    @torch.inference_mode()
    def follow(self, order: Compute) -> None:
        """Compute this rank's share of a step."""
        step = order.step()
        batch = step_batch(step, self.ops.device)
        hidden, lora = self._hidden(step, batch), batch.logits_lora
        for start, end in order.head_rows if self._group.shard.is_first else ():
            self.model.logits(hidden[start:end], narrowed(lora, start, end, self.ops.device))

    def _fill_unread(self, token_ids: torch.Tensor, step: StepArrays) -> None:
        self._group.share_first(token_ids)
