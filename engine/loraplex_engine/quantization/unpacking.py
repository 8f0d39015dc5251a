"""Unpacks codes from words."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Codes of 2, 3, 4 or 8 bits that follow each other from the lowest bit on, along the last dimension.

    words: integers [..., W] of any size; a code may span two of them. → uint8 [..., W · word bits / bits]
    """
    stream = words.contiguous().view(torch.uint8)  # words are little-endian in the file: the bytes are one stream
    if bits == 8:
        return stream
    if bits == 3:
        # Three bytes hold eight codes.
        low, middle, high = stream.view(*stream.shape[:-1], -1, 3).int().unbind(-1)
        joined = low | middle << 8 | high << 16
        return torch.stack([(joined >> shift & 7).to(torch.uint8) for shift in range(0, 24, 3)], dim=-1).flatten(-2)
    mask = (1 << bits) - 1
    return torch.stack([stream >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
