"""What takes the place of torch's linears and embeddings inside a borrowed class: ours, with adapters beside them."""

from __future__ import annotations

from torch import Tensor, nn

from loraplex_adapters.runtime.layer import LoRAEmbedding, LoRALinear
from loraplex_engine.borrowed.step import CurrentStep


class AdaptedLinear(nn.Module):
    """A linear of the current step's rows."""

    def __init__(self, linear: LoRALinear, step: CurrentStep) -> None:
        super().__init__()
        self.linear = linear
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """x: […, C] → […, N], the step's rows in order"""
        y = self.linear(x.reshape(-1, self.in_features).contiguous(), self._step.lora)
        return y.view(*x.shape[:-1], self.out_features)


class AdaptedEmbedding(nn.Module):
    """The embedding of the current step's tokens."""

    def __init__(self, embedding: LoRAEmbedding, step: CurrentStep) -> None:
        super().__init__()
        self.embedding = embedding
        self._step = step

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [1, T] → [1, T, C]"""
        return self.embedding(token_ids.flatten(), self._step.lora).view(*token_ids.shape, -1)
