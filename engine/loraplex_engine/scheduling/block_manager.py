"""Blocks of the paged cache: which request holds them, which can be shared, which can be taken back.

A block is used (a request holds it), cached (no request holds it, but its content may be asked for again) or free.
Content is named by a chain of hashes: a block's hash covers its tokens and everything before them, starting from a root
that names the salt. The adapter version enters at the first block that the adapter applies to, unless it leaves all
keys and values as the base model has them; and an embedded part of the prompt, by its digest, at the block in which it
begins. Two requests share a block only if all of that is equal.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from loraplex_engine.scheduling.host_blocks import HostBlocks
from loraplex_engine.scheduling.request import Request


def chain_root(request: Request, block_size: int) -> bytes:
    """The hash that a request's first block continues: its salt, and the adapter's digest if it applies there."""
    digest = request.adapter.digest if request.adapter and first_adapted_block(request, block_size) == 0 else ""
    salt = request.cache_salt.encode()
    return hashlib.blake2b(len(salt).to_bytes(8, "little") + salt + digest.encode(), digest_size=16).digest()


def first_adapted_block(request: Request, block_size: int) -> int:
    """The first block that is not the base model's; -1: there is none."""
    if request.adapter is None or request.adapter_start is None or request.leaves_cache:
        return -1
    return request.adapter_start // block_size


def chain_hash(parent: bytes, tokens: Sequence[int], embedded: bytes = b"") -> bytes:
    """The hash of a block whose tokens follow the content that `parent` names. `embedded`: names what is no token."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes() + embedded, digest_size=16).digest()


def embedded_content(request: Request, start: int, end: int) -> bytes:
    """The name of what begins at positions start … end and has no tokens. Where it lies, NO_TOKEN says already."""
    begins = [part for first, part in request.embedded if start <= first < end]
    return b"".join(array("q", [part.length, len(part.digest)]).tobytes() + part.digest.encode() for part in begins)


class BlockManager:
    """Hands out blocks, keeps reference counts, finds cached prefixes. Invariant: used + cached + free = total."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool, host: HostBlocks | None = None
    ) -> None:
        """`host`: takes copies of the blocks that are evicted; None: what they held is gone."""
        self.host = host
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced blocks with content, least recent first
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def start(self, request: Request) -> None:
        """Give a request that holds nothing the longest cached prefix of its tokens that it may reuse, and set its
        computed count to it.
        """
        assert not request.block_ids
        assert request.num_computed_tokens == 0
        reusable = self.reusable(request)
        if not reusable:
            return
        self.prefix_queries += request.num_tokens
        for block_hash in reusable:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            self.hold(block)
            request.block_ids.append(block)
        request.num_computed_tokens = len(request.block_ids) * self.block_size
        self.prefix_hits += request.num_computed_tokens

    def reusable(self, request: Request) -> list[bytes]:
        """The hashes of the blocks that a request may take from the cache."""
        if not self.enable_prefix_caching or request.bypass_prefix_cache:
            return []
        return self._hashes(request, request.num_reusable_tokens // self.block_size)

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content; None: there is none."""
        return self._block_of.get(block_hash)

    def hold(self, block: int) -> None:
        """Keep a block that is used or cached, until it is let go as often."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def take(self) -> int:
        """A block of the available ones, held, with no content."""
        block = self._free.popleft() if self._free else self._evict()
        self._references[block] = 1
        return block

    def name(self, block: int, block_hash: bytes) -> None:
        """Let requests find what a held block contains, or will before the next step, unless they find it already."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for the request's first `num_tokens` tokens. False, and nothing changed, if blocks are too few."""
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            request.block_ids.append(self.take())
        return True

    def fork(self, parent: Request, child: Request) -> None:
        """Give a request that holds nothing, and has the tokens of another, the other's blocks.

        It shares those that are full. What is in the last one it gets as a copy, or, if no block is left, computes.
        """
        full = parent.num_computed_tokens // self.block_size
        child.block_ids = parent.block_ids[:full]
        child.num_computed_tokens = full * self.block_size
        for block in child.block_ids:
            self._references[block] += 1
        if parent.num_computed_tokens > child.num_computed_tokens and self.grow(child, parent.num_computed_tokens):
            child.copied_block = parent.block_ids[full]
            child.num_computed_tokens = parent.num_computed_tokens

    def publish(self, request: Request, num_tokens: int) -> None:
        """Let others find the request's full blocks among its first `num_tokens` tokens, of those that are read.

        May be called before those tokens are computed, as long as they are computed in the same step: a layer stores
        all keys and values of a step before it reads any.
        """
        if not self.enable_prefix_caching or request.bypass_prefix_cache:
            return
        num_full = num_tokens // self.block_size
        first_new = request.num_computed_tokens // self.block_size
        if num_full == first_new:
            return
        num_full = min(num_tokens, request.num_read_tokens) // self.block_size
        hashes = self._hashes(request, num_full)
        for index in range(first_new, num_full):
            self.name(request.block_ids[index], hashes[index])

    def retract(self, request: Request, num_tokens: int) -> None:
        """Undo `publish` for the blocks behind the first `num_tokens` tokens, because their step failed."""
        self._distrust(request.block_ids[num_tokens // self.block_size :])

    def distrust(self, request: Request) -> None:
        """Let no other request find any of the request's blocks, or copies of them: they may hold NaN."""
        self._distrust(request.block_ids)

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """Let no request find these blocks any more, whoever holds them."""
        for block in blocks:
            self._forget_content(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def release(self, request: Request) -> None:
        """Take back everything a request holds. Its computed count falls to 0; blocks with content stay findable."""
        self.let_go(request.block_ids)
        request.block_ids = []
        request.copied_block = None
        request.num_computed_tokens = 0

    def let_go(self, blocks: Sequence[int]) -> None:
        """Take back the blocks of a sequence, in its order. Those with content stay findable."""
        for block in reversed(blocks):  # a sequence's tail is the first to be evicted
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        hashes = request.block_hashes
        first_adapted = first_adapted_block(request, self.block_size)
        while len(hashes) < count:
            parent = hashes[-1] if hashes else chain_root(request, self.block_size)
            if len(hashes) == first_adapted > 0:
                assert request.adapter is not None
                parent += request.adapter.digest.encode()
            start = len(hashes) * self.block_size
            end = start + self.block_size
            hashes.append(chain_hash(parent, request.token_ids[start:end], embedded_content(request, start, end)))
        return hashes[:count]

    def evict_all(self) -> None:
        """Forget the content of all blocks that nobody holds, which the host may keep."""
        while self._cached:
            self._free.append(self._evict())

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of[block]
        if self.host is not None and block_hash is not None:
            self.host.save(block_hash, block)
        self._forget_content(block)
        return block

    def _distrust(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            block_hash = self._hash_of[block]
            if self.host is not None and block_hash is not None:
                self.host.distrust(block_hash)
            self._forget_content(block)

    def _forget_content(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self._hash_of[block] = None
            del self._block_of[block_hash]

    def check(self) -> None:
        """Assert the invariants; for tests and idle debug builds."""
        used = {block for block, count in enumerate(self._references) if count > 0}
        assert all(count >= 0 for count in self._references)
        assert len(used) + len(self._cached) + len(self._free) == self.num_blocks
        assert used.isdisjoint(self._cached)
        assert used.isdisjoint(self._free)
        assert set(self._free).isdisjoint(self._cached)
        assert all(self._hash_of[block] is None for block in self._free)
        assert all(self._hash_of[block] is not None for block in self._cached)
        assert {h: b for b, h in enumerate(self._hash_of) if h is not None} == self._block_of
