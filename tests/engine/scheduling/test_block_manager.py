"""Blocks: counted, shared by content, evicted oldest first."""

import struct
from hashlib import blake2b

import msgspec
import pytest

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest, Embedded, Parts
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request

P = 4


def make_request(request_id: int, prompt: list[int] | Parts, **fields: object) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=8)
    message = AddRequest(request_id=request_id, prompt=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]
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
    blocks.retract(request, 0)
    blocks.release(request)
    assert (blocks.num_cached, blocks.num_free) == (0, 8)
    blocks.check()


CAT, DOG = Embedded("c" * 64, 6), Embedded("d" * 64, 6)


def run_in_chunks(blocks: BlockManager, request: Request, chunk: int) -> None:
    blocks.start(request)
    while request.num_computed_tokens < request.num_tokens:
        end = min(request.num_computed_tokens + chunk, request.num_tokens)
        assert blocks.grow(request, end)
        blocks.publish(request, end)
        request.num_computed_tokens = end


def shared_blocks(first: Parts, second: Parts, chunk: int) -> int:
    """The number of blocks that the second prompt takes from the first, each computed in chunks."""
    blocks = BlockManager(32, P, enable_prefix_caching=True)
    requests = [make_request(number, prompt) for number, prompt in enumerate((first, second))]
    for request in requests:
        run_in_chunks(blocks, request, chunk)
    blocks.check()
    return len(set(requests[0].block_ids) & set(requests[1].block_ids))


CHUNKS = pytest.mark.parametrize("chunk", [1, 3, P, 7, 100])


@CHUNKS
def test_equal_embedded_parts_share_blocks(chunk):
    prompt = Parts([[1, 2, 3], CAT, [4, 5, 6, 7]])  # 13 positions: three full blocks before the last token
    assert shared_blocks(prompt, prompt, chunk) == 3


@CHUNKS
@pytest.mark.parametrize(
    "other",
    [
        [[1, 2, 3], DOG, [4, 5, 6, 7]],
        [[1, 2, 3], Embedded(CAT.digest, 7), [4, 5, 6, 7]],
        [[1, 2], CAT, [3, 4, 5, 6, 7]],
        [[1, 2, 3, 0, 0, 0, 0, 0, 0, 4, 5, 6, 7]],
        [[1, 2, 3], Embedded(CAT.digest, 3), Embedded(CAT.digest, 3), [4, 5, 6, 7]],
    ],
    ids=["another digest", "another length", "another place", "tokens", "two halves"],
)
def test_what_differs_in_an_embedded_part_shares_no_block_that_it_reaches_into(other, chunk):
    assert shared_blocks(Parts([[1, 2, 3], CAT, [4, 5, 6, 7]]), Parts(other), chunk) == 0


@CHUNKS
@pytest.mark.parametrize("num_before", [0, 3, P, P + 1, 2 * P - 1])
def test_blocks_before_an_embedded_part_are_shared_and_those_behind_it_are_not(num_before, chunk):
    head, tail = list(range(num_before)), list(range(50, 60))
    assert shared_blocks(Parts([head, CAT, tail]), Parts([head, DOG, tail]), chunk) == num_before // P


def test_an_embedded_part_takes_the_positions_that_it_says():
    request = make_request(1, Parts([[1], CAT, DOG, [2]]))
    assert (request.num_prompt_tokens, request.embedded) == (14, [(1, CAT), (7, DOG)])


def test_the_hashes_of_tokens_alone_are_of_salt_adapter_and_tokens():
    blocks = BlockManager(8, P, enable_prefix_caching=True)
    request = make_request(1, list(range(9)), cache_salt="tenant-b", adapter=AdapterKey("shared/a", "1" * 64))
    run(blocks, request)
    root = blake2b((8).to_bytes(8, "little") + b"tenant-b" + b"1" * 64, digest_size=16).digest()
    first = blake2b(root + struct.pack("<4q", 0, 1, 2, 3), digest_size=16).digest()
    assert request.block_hashes == [first, blake2b(first + struct.pack("<4q", 4, 5, 6, 7), digest_size=16).digest()]
    assert first.hex() == "d90a100da8c7b34af13015eaecf84403"


def test_a_prompt_of_tokens_alone_is_sent_as_its_tokens():
    sent = msgspec.msgpack.encode(AddRequest(1, [5, 600], SamplingParams(seed=0, max_tokens=8)))
    assert msgspec.msgpack.decode(sent)[2] == [5, 600]


def test_an_embedded_part_arrives_in_its_place():
    message = AddRequest(1, Parts([[5], CAT, [600]]), SamplingParams(seed=0, max_tokens=8))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=AddRequest) == message
