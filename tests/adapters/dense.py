"""A dense linear as adapters see one, in plain torch."""

from torch import Tensor
from torch.nn import functional as F


class Dense:
    """y = x Wᵀ."""

    bias: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        """weight: [N, C]."""
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def dequantize(self, start: int, end: int) -> Tensor:
        return self.weight[start:end].float()
