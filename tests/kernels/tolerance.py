"""How far results of two kernels may be apart."""

from typing import TypedDict


class Tolerance(TypedDict):
    """As `torch.testing.assert_close` takes it."""

    rtol: float
    atol: float
