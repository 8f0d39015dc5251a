"""Eight-bit numbers in Triton against torch's own conversions."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  (after the skip)

from loraplex_kernels.triton.codes import as_codes, coding_of, decode, encode  # noqa: E402  (imports triton)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 1024


@triton.jit
def there_and_back(x, codes, y, CODING: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803  (as everywhere in Triton)
    at = tl.arange(0, SIZE)
    tl.store(codes + at, encode(tl.load(x + at), CODING))
    tl.store(y + at, decode(tl.load(codes + at), CODING))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_are_those_of_torch(dtype):
    """Every code, every number half-way between two, and numbers close to zero."""
    codes = torch.arange(-127, 128).to(torch.int8)
    exact = codes.float() if dtype is torch.int8 else codes.view(dtype).float()
    exact = exact[exact.isfinite()].unique()
    some = torch.randn(SIZE - 2 * len(exact) + 1, generator=torch.Generator().manual_seed(1)) * 0.01
    x = torch.cat((exact, (exact[1:] + exact[:-1]) / 2, some)).to(DEVICE)
    assert len(x) == SIZE
    expected = (x.round() if dtype is torch.int8 else x).to(dtype)
    stored, y = torch.zeros_like(expected), torch.zeros_like(x)
    there_and_back[(1,)](x, as_codes(stored), y, CODING=coding_of(dtype), SIZE=SIZE)
    assert torch.equal(stored.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(y, expected.float())
