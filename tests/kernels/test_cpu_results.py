"""Memory of results: used again, but by nobody while somebody else still looks at it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex_kernels.cpu.library import Library
from loraplex_kernels.cpu.results import SMALLEST, ResultMemory

LIKE = torch.zeros(1, dtype=torch.bfloat16)
LARGE = SMALLEST // LIKE.element_size()  # elements


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(1, None)


def test_memory_is_used_again_by_what_fits_into_it(library: Library) -> None:
    results = ResultMemory(library)
    first = results.empty(LIKE, 3, LARGE)
    assert (first.shape, first.dtype) == ((3, LARGE), torch.bfloat16)
    address = first.data_ptr()
    del first
    assert results.empty(LIKE, 2 * LARGE).data_ptr() == address
    assert results.empty(LIKE, 5 * LARGE).data_ptr() != address


def test_a_view_keeps_its_memory(library: Library) -> None:
    results = ResultMemory(library)
    whole = results.empty(LIKE, 4, LARGE)
    view = whole[2, 5:9].fill_(7)
    del whole
    results.empty(LIKE, 4, LARGE).fill_(1)
    assert view.tolist() == [7, 7, 7, 7]


def test_results_outlive_what_made_them(library: Library) -> None:
    result = ResultMemory(library).empty(LIKE, LARGE).fill_(3)
    assert result.sum(dtype=torch.float32) == 3 * LARGE


@given(data=st.data())
def test_no_two_results_share_memory_and_no_more_is_kept_than_was_used(library: Library, data: st.DataObject) -> None:
    results, held, most = ResultMemory(library), list[torch.Tensor](), 0
    for number in range(data.draw(st.integers(1, 20))):
        ends: bool = bool(held) and data.draw(st.booleans())
        if ends:
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        held.append(results.empty(LIKE, data.draw(st.integers(1, 9)), LARGE // 2).fill_(number))
        most = max(most, len(held))
    assert all((result == result[0, 0]).all() for result in held)
    assert len({float(result[0, 0]) for result in held}) == len(held)
    held.clear()
    assert len(results._free) <= most
