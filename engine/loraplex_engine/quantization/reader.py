"""Reads a checkpoint's quantised linears, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import FLOATS, Checkpoint, ExpectedTensor
from loraplex_engine.quantization.cutting import cut
from loraplex_engine.quantization.spec import LinearShape, QuantSpec
from loraplex_kernels.quantized import QuantizedWeight

logger = logging.getLogger(__name__)


class QuantizedReader:
    """The linears of a model that its checkpoint holds quantised, by the tensors that are there.

    Formats state lists of skipped modules, and defaults beside them. A linear that is stored as a float .weight,
    without the format's tensors, is dense whatever the lists say: it can be nothing else.
    """

    def __init__(self, checkpoint: Checkpoint, spec: QuantSpec, linears: Iterable[LinearShape]) -> None:
        """Find the quantised linears. Raises ModelError for a shape that the format cannot have."""
        self.label = spec.label
        self._checkpoint = checkpoint
        self._spec = spec
        self._markers = spec.markers
        self._linears: dict[str, LinearShape] = {}
        self._suffixes: dict[str, tuple[str, ...]] = {}  # of their tensors
        self.expected: dict[str, ExpectedTensor] = {}  # what the checkpoint must hold for them
        dense = []
        for linear in linears:
            if self._is_dense(linear):
                dense.append(linear.path)
                continue
            tensors = spec.tensors(linear)
            self._linears[linear.path] = linear
            self._suffixes[linear.path] = tuple(tensors)
            self.expected |= {linear.path + suffix: tensor for suffix, tensor in tensors.items()}
        logger.info("%s: %d linears quantised", spec.label, len(self._linears))
        if dense:
            logger.info("%d linears are stored unquantised and stay so: %s …", len(dense), ", ".join(dense[:3]))

    @property
    def replaced(self) -> list[str]:
        """The float tensors that the checkpoint would hold for these linears, were they dense."""
        return [linear.weight for linear in self._linears.values()]

    def __contains__(self, path: str) -> bool:
        return path in self._linears

    def read(
        self, path: str, device: torch.device, part: tuple[slice, slice] | None = None, expert: int | None = None
    ) -> QuantizedWeight:
        """Read a linear's record, or the one of some of its rows and columns.

        expert: which, where the linear is that of several.

        Raises ModelError naming a tensor with impossible values, or a linear that cannot be cut so.
        """
        linear, checkpoint = self._linears[path], self._checkpoint
        names = {suffix: path + suffix for suffix in self._suffixes[path]}
        stored = {
            suffix: checkpoint.tensor(name, device) if expert is None else checkpoint.entry(name, expert, device)
            for suffix, name in names.items()
            if name in checkpoint
        }
        try:
            record = self._spec.read(linear, stored)
        except ModelError as error:
            raise ModelError(f"{checkpoint.directory}: {error}") from None
        try:
            return record if part is None else cut(record, *part)
        except ModelError as error:
            raise ModelError(f"{checkpoint.directory}: {path}: {error}") from None

    def _is_dense(self, linear: LinearShape) -> bool:
        checkpoint, weight, path = self._checkpoint, linear.weight, linear.path
        marked = any(path + suffix in checkpoint for suffix in self._markers)
        return not marked and weight in checkpoint and checkpoint.stored_dtype(weight) in FLOATS
