"""Prefixes as something that requests need before they can run: brought back from host memory, while others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.host_blocks import NO_MOVES, BlockMoves, HostBlocks
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.resources import Preparer

IDLE_SHARE = 8  # times as many blocks come back before a step that has nothing else to do


@dataclass(slots=True)
class _Return:
    """A prefix on its way back. Its blocks are held, in order, until all of them have their content."""

    key: Hashable  # of the request that it was begun for
    blocks: list[int]
    missing: deque[tuple[bytes, int]] = field(default_factory=deque)  # hash, block: those that have none yet


class PrefixPreparer(Preparer):
    """Gives requests what the host has of their prefixes, as cached blocks of the device.

    One prefix returns at a time, some blocks of it before each step. It holds as many blocks as the request itself
    would, and takes only what running requests leave.
    """

    outlasts_blocks = False

    def __init__(self, blocks: BlockManager, host: HostBlocks, most_restored: int) -> None:
        """`most_restored`: the blocks that come back before one step."""
        self._blocks = blocks
        self._host = host
        self._most_restored = most_restored
        self._return: _Return | None = None
        self._changes = 0
        self.num_restored = 0  # blocks, cumulative

    @property
    def changes(self) -> int:
        return self._changes

    def key(self, request: Request) -> Hashable:
        return request.request_id

    def give(self, request: Request) -> bool:
        present, wanted = self._found(request)
        if not wanted:
            return True
        if self._return is None:
            self._return = self._begin(request, present, wanted)
        return self._return is None

    def take_back(self, request: Request) -> None:
        """Nothing is held: what came back is cached like any other block."""

    def forget(self, key: Hashable) -> None:
        if self._return is not None and self._return.key == key:
            self._end(self._return)

    def moves(self, idle: bool) -> BlockMoves:
        """What is to be copied before the step that was planned. It counts as done from now on.

        idle: whether nothing else is done in that step.
        """
        restored = self._restored(self._return, idle) if self._return is not None else ()
        saved = self._host.take_saved()
        return BlockMoves(saved, restored) if saved or restored else NO_MOVES

    def fail(self, moves: BlockMoves) -> None:
        """Forget what was to be copied before a step that failed."""
        self._blocks.forget_blocks(block for _, block in moves.restored)
        self._host.forget_slots({slot for _, slot in moves.saved})

    def _found(self, request: Request) -> tuple[list[int], list[bytes]]:
        """The blocks of the request's prefix that are on the device, and then what the host has of it."""
        present: list[int] = []
        wanted: list[bytes] = []
        for block_hash in self._blocks.reusable(request.sequences[0]):
            block = self._blocks.find(block_hash)
            if block is not None and not wanted:
                present.append(block)
            elif block is not None or self._host.slot(block_hash) is not None:
                wanted.append(block_hash)
            else:
                break
        return present, wanted

    def _begin(self, request: Request, present: list[int], wanted: list[bytes]) -> _Return | None:
        """Begin to bring blocks back; None: running requests leave no room for any."""
        back = _Return(self.key(request), [])
        for block in present:
            self._blocks.hold(block)
            back.blocks.append(block)
        for block_hash in wanted:
            found = self._blocks.find(block_hash)
            if found is not None:
                self._blocks.hold(found)
            elif self._host.slot(block_hash) is None or not self._blocks.num_available:
                break  # evicting for those before has cost its copy, or room is short
            else:
                self._host.lock(block_hash)
                found = self._blocks.take()
                back.missing.append((block_hash, found))
            back.blocks.append(found)
        if back.missing:
            return back
        self._blocks.let_go(back.blocks)
        return None

    def _restored(self, back: _Return, idle: bool) -> tuple[tuple[int, int], ...]:
        restored = []
        count = min(len(back.missing), self._most_restored * (IDLE_SHARE if idle else 1))
        for block_hash, block in [back.missing.popleft() for _ in range(count)]:
            slot = self._host.slot(block_hash)
            assert slot is not None, "a locked copy has left"
            self._host.unlock(block_hash)
            self._blocks.name(block, block_hash)
            restored.append((slot, block))
        self.num_restored += count
        if not back.missing:
            self._end(back)
        return tuple(restored)

    def _end(self, back: _Return) -> None:
        for block_hash, _ in back.missing:
            self._host.unlock(block_hash)
        self._blocks.let_go(back.blocks)
        self._return = None
        self._changes += 1
