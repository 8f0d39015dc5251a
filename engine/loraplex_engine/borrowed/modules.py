"""What takes the place of torch's linears and embeddings inside a borrowed class: ours, with adapters beside them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from loraplex_adapters.runtime.layer import LoRAEmbedding, LoRALinear
from loraplex_adapters.runtime.replaced import NORM_WEIGHT, ReplacedRows
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


class ReplaceableNorm(nn.Module):
    """A norm of the current step's rows, in the class's own way, whose parameters adapters may replace."""

    def __init__(self, norm: nn.Module, replaced: Mapping[int, tuple[ReplacedRows, ...]], step: CurrentStep) -> None:
        super().__init__()
        self.norm = norm
        self._replaced = replaced  # by slot; others change it
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, …, C] → [1, T, …, C]"""
        y: Tensor = self.norm(x)
        if self._replaced and self._step.lora is not None:
            for slot, start, end in self._step.lora.ranges:
                own = {
                    "weight" if part.rows == NORM_WEIGHT else "bias": part.weight.to(x.dtype)
                    for part in self._replaced.get(slot, ())
                }
                if own:
                    y[:, start:end] = functional_call(self.norm, own, (x[:, start:end],))
        return y


class NormParameters:
    """The parameters of a norm, for adapters that replace some of them."""

    def __init__(self, norm: nn.Module) -> None:
        self._weight = norm.get_parameter("weight")
        self.bias = norm._parameters.get("bias")

    def dequantize(self, start: int, end: int) -> Tensor:
        """Part of the weight, float32"""
        return self._weight[start:end].float()
