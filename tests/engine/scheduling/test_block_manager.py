"""Blocks: counted, shared by content, evicted oldest first."""

import pytest

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request

P = 4


def make_request(request_id: int, tokens: list[int], **fields: object) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=8)
    message = AddRequest(request_id=request_id, prompt_token_ids=tokens, sampling=sampling, **fields)  # type: ignore[arg-type]
    return Request(message, request_id, now=0.0)


def run(blocks: BlockManager, request: Request) -> None:
    """Compute the whole request in one step."""
    blocks.start(request)
    assert blocks.grow(request, request.num_tokens)
    blocks.publish(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens


def test_second_request_takes_the_full_blocks_of_the_first():
    blocks = BlockManager(16, P, enable_prefix_caching=True)
    first, second = make_request(1, list(range(10))), make_request(2, [*range(8), 99, 98])
    run(blocks, first)
    blocks.start(second)
    assert second.num_computed_tokens == 8
    assert second.block_ids == first.block_ids[:2]
    blocks.check()


def test_last_token_is_never_taken_from_the_cache():
    blocks = BlockManager(16, P, enable_prefix_caching=True)
    first, second = make_request(1, list(range(8))), make_request(2, list(range(8)))
    run(blocks, first)
    blocks.start(second)
    assert second.num_computed_tokens == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "tenant-b"},
        {"adapter": AdapterKey("shared/a", "d" * 64)},
        {"bypass_prefix_cache": True},
    ],
)
def test_no_hit_crosses_salt_adapter_or_bypass(fields):
    blocks = BlockManager(16, P, enable_prefix_caching=True)
    run(blocks, make_request(1, list(range(12))))
    other = make_request(2, list(range(12)), **fields)
    blocks.start(other)
    assert other.block_ids == []


def test_same_name_with_another_digest_is_another_adapter():
    blocks = BlockManager(16, P, enable_prefix_caching=True)
    run(blocks, make_request(1, list(range(12)), adapter=AdapterKey("shared/a", "1" * 64)))
    other = make_request(2, list(range(12)), adapter=AdapterKey("shared/a", "2" * 64))
    blocks.start(other)
    assert other.block_ids == []


def test_a_block_matches_only_after_the_same_beginning():
    blocks = BlockManager(16, P, enable_prefix_caching=True)
    run(blocks, make_request(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    other = make_request(2, [0, 2, 3, 4, 5, 6, 7, 8, 9])
    blocks.start(other)
    assert other.block_ids == []


def test_released_blocks_stay_findable_until_they_are_needed():
    blocks = BlockManager(4, P, enable_prefix_caching=True)
    first = make_request(1, list(range(8)))
    run(blocks, first)
    blocks.release(first)
    assert (blocks.num_used, blocks.num_cached, blocks.num_free) == (0, 2, 2)

    third = make_request(3, list(range(100, 112)))
    run(blocks, third)  # needs 3: both free ones and the cached tail of the first
    again = make_request(4, list(range(8)))
    blocks.start(again)
    assert again.num_computed_tokens == 4  # the head was evicted last
    blocks.check()


def test_grow_changes_nothing_when_it_fails():
    blocks = BlockManager(2, P, enable_prefix_caching=True)
    request = make_request(1, list(range(12)))
    assert not blocks.grow(request, 12)
    assert request.block_ids == []
    assert blocks.num_free == 2


def test_a_failed_step_leaves_nothing_findable():
    blocks = BlockManager(8, P, enable_prefix_caching=True)
    request = make_request(1, list(range(8)))
    blocks.start(request)
    assert blocks.grow(request, 8)
    blocks.publish(request, 8)
    blocks.retract(request)
    blocks.release(request)
    assert (blocks.num_cached, blocks.num_free) == (0, 8)
    blocks.check()
