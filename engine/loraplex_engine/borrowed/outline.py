"""The outline of a borrowed class: the tensors that it asks for, and what each of its modules is to us."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraplex_engine.borrowed.classes import LINEARS, TRANSPOSED
from loraplex_engine.borrowed.own_attention import own_table_bytes
from loraplex_engine.borrowed.probe import probe
from loraplex_engine.checkpoint.model_config import ModelError, NotBorrowedError
from loraplex_engine.checkpoint.weights import Checkpoint
from loraplex_engine.quantization import LinearShape, QuantizedReader, QuantSpec

MOST_TABLE_BYTES = 1 << 30  # of what a class computes from its configuration alone


class Outline:
    """A model without memory, taken apart. Raises NotBorrowedError for what cannot be."""

    def __init__(self, model: Any, where: str) -> None:
        self.model = model
        self._where = where
        found = probe(model, where)
        self.layers, self.norms = found.layers, found.norms
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        paths = {module: path for path, module in model.named_modules()}
        self.embedding = paths[model.get_input_embeddings()]
        self.embedding_weight = f"{self.embedding}.weight"
        self.head = paths[model.get_output_embeddings()]
        self.linears = {path: _shape(path, each) for each, path in paths.items() if type(each).__name__ in LINEARS}
        self.transposed = {path for each, path in paths.items() if type(each).__name__ == TRANSPOSED}
        if self.head not in self.linears:
            raise NotBorrowedError(f"{where}: {self.head} is no plain linear")
        rows, needed = self.shapes[self.embedding_weight][0], self.linears[self.head].out_features
        if rows < needed:
            raise NotBorrowedError(f"{where}: {self.head} has {needed} tokens, and {self.embedding} {rows}")
        self.float32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        self.tied = self._is_tied()
        of_linears = {f"{path}.{leaf}" for path in self.linears for leaf in ("weight", "bias")}
        self.others = [name for name in self.shapes if name not in of_linears and name != self.embedding_weight]
        self._check_tables()

    @property
    def turns(self) -> bool:
        """Whether the class turns queries and keys by a rotary embedding that its configuration describes."""
        return hasattr(type(self.model.config), "rope_parameters") and not self.layers[0].shape.alibi

    def check(self, checkpoint: Checkpoint, spec: QuantSpec | None) -> QuantizedReader | None:
        """The reader of quantised linears; None: there are none. Raises ModelError unless all tensors are there."""
        expected, head = dict(self.shapes), f"{self.head}.weight"
        if self.tied and head not in checkpoint:
            del expected[head]
        quantised = None
        if spec is not None:
            left_out = {*self.transposed, *([self.head] if self.tied else [])}
            linears = [each for path, each in self.linears.items() if path not in left_out]
            quantised = QuantizedReader(checkpoint, spec, linears)
            for name in quantised.replaced:
                expected.pop(name, None)
        checkpoint.check(expected, None if quantised is None else quantised.expected)
        return quantised

    def _is_tied(self) -> bool:
        ties = self.model._tied_weights_keys or {}
        if not ties or not self.model.config.tie_word_embeddings:
            return False
        if ties != {f"{self.head}.weight": self.embedding_weight}:
            raise NotBorrowedError(
                f"{self._where}: {type(self.model).__name__} ties {ties}, and only a head may be tied"
            )
        return True

    def _check_tables(self) -> None:
        nbytes = sum(buffer.nbytes for buffer in self.model.buffers()) + own_table_bytes(self.model)
        if nbytes > MOST_TABLE_BYTES:
            raise ModelError(
                f"{self._where}: {type(self.model).__name__} would compute {nbytes} bytes of tables from it: is "
                "max_position_embeddings (or max_seq_len) right?"
            )


def _shape(path: str, linear: nn.Module) -> LinearShape:
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    if type(linear).__name__ == TRANSPOSED:
        rows, columns = columns, rows
    return LinearShape(path, rows, columns, bias is not None)
