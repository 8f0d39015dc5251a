"""How arrays travel to a device."""

import numpy as np
import pytest
import torch

from loraplex_kernels.transfers import pack, to_device, unpack

ARRAYS = [
    np.array([3, 1, 2**40]),
    np.array([7], dtype=np.int32),
    np.array([], dtype=np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.arange(12, dtype=np.int32).reshape(4, 3).T[1],  # every third
    np.array([-1]),
]


@pytest.mark.parametrize(
    "tensors", [unpack(pack(ARRAYS, pinned=False), ARRAYS), to_device(ARRAYS, torch.device("cpu"))]
)
def test_arrays_arrive_as_they_were(tensors):
    assert len(tensors) == len(ARRAYS)
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % array.itemsize == 0
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
