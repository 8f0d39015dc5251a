"""Prefixes as something that requests need before they can run: brought back from host memory, while others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice

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
    missing: deque[tuple[bytes, int, int]] = field(default_factory=deque)  # without content yet: hash, slot, block


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
        self._reading: set[bytes] = set()  # from the disk, into locked slots
        self._kept: list[bytes] = []  # of the same prefix, locked meanwhile
        self._reused: dict[bytes, None] = {}  # blocks of the device that were found, and may not be on the disk yet
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
        if self._host.disk.outlives:
            self._reused |= dict.fromkeys(self._blocks.reusable(request)[: len(present)])
        if not wanted:
            return True
        if self._return is None and not self._reading and not self._read(wanted):
            self._return = self._begin(request, present, wanted)
        return self._return is None and not self._reading

    def take_back(self, request: Request) -> None:
        """Nothing is held: what came back is cached like any other block."""

    def forget(self, key: Hashable) -> None:
        if self._return is not None and self._return.key == key:
            self._end(self._return)

    def poll(self) -> None:
        """Take in what the disk's threads have done. Called before a step is planned."""
        if self._return is None and not self._reading:  # else room in the host is for what is on its way back
            self._save_reused()
        for block_hash, was_read, problem in self._host.disk.finished():
            self._host.unlock(block_hash)
            if not was_read:
                continue
            self._reading.remove(block_hash)
            if problem:
                self._host.forget(block_hash)
            if not self._reading:
                self._unlock_kept()
                self._changes += 1

    def moves(self, idle: bool) -> BlockMoves:
        """What is to be copied before the step that was planned. It counts as done from now on.

        idle: whether nothing else is done in that step.
        """
        restored = self._restored(self._return, idle) if self._return is not None else ()
        saved = self._host.take_saved()
        return BlockMoves(tuple(saved.values()), restored, tuple(saved)) if saved or restored else NO_MOVES

    def write(self, moves: BlockMoves) -> None:
        """Have what was copied to the host written to the disk, too, which may take a part of it only: a prefix's
        first blocks come first, and they are evicted last.
        """
        for block_hash, slot in reversed(self._host.kept(moves)):
            if self._host.disk.write(block_hash, slot):
                self._host.lock(block_hash)

    def fail(self, moves: BlockMoves) -> None:
        """Forget what was to be copied before a step that failed."""
        self._blocks.forget_blocks(block for _, block in moves.restored)
        for block_hash, _ in self._host.kept(moves):
            self._host.forget(block_hash)

    def _save_reused(self) -> None:
        """Have some blocks copied that are used again and again, and so may never be evicted before the engine is
        killed. All of them are computed: none is of the step that is to be planned.
        """
        names = list(islice(self._reused, self._most_restored))
        for block_hash in names:
            del self._reused[block_hash]
        for block_hash in reversed(names):
            block = self._blocks.find(block_hash)
            if block is not None and block_hash not in self._host.disk:
                self._host.save(block_hash, block)

    def _found(self, request: Request) -> tuple[list[int], list[bytes]]:
        """The blocks of the request's prefix that are on the device, and then what the host has of it."""
        present: list[int] = []
        wanted: list[bytes] = []
        for block_hash in self._blocks.reusable(request.sequences[0]):
            block = self._blocks.find(block_hash)
            if block is not None and not wanted:
                present.append(block)
            elif block is not None or self._host.slot(block_hash) is not None or block_hash in self._host.disk:
                wanted.append(block_hash)
            else:
                break
        return present, wanted

    def _read(self, wanted: Sequence[bytes]) -> bool:
        """Begin to read what only the disk has, as far as the host has room. False: there is nothing to read."""
        absent = [each for each in wanted if self._blocks.find(each) is None]
        if all(self._host.slot(each) is not None for each in absent):
            return False
        for block_hash in absent:
            if self._host.slot(block_hash) is not None:
                self._kept.append(block_hash)
            elif block_hash not in self._host.disk:
                break  # room for those before has cost the host its only copy
            else:
                slot = self._host.reserve(block_hash)
                if slot is None:
                    break
                self._host.disk.read(block_hash, slot)
                self._reading.add(block_hash)
            self._host.lock(block_hash)
        if not self._reading:
            self._unlock_kept()
        return bool(self._reading)

    def _unlock_kept(self) -> None:
        for block_hash in self._kept:
            self._host.unlock(block_hash)
        self._kept.clear()

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
                slot = self._host.lock(block_hash)
                found = self._blocks.take()
                back.missing.append((block_hash, slot, found))
            back.blocks.append(found)
        if back.missing:
            return back
        self._blocks.let_go(back.blocks)
        return None

    def _restored(self, back: _Return, idle: bool) -> tuple[tuple[int, int], ...]:
        restored = []
        count = min(len(back.missing), self._most_restored * (IDLE_SHARE if idle else 1))
        for block_hash, slot, block in [back.missing.popleft() for _ in range(count)]:
            if self._host.slot(block_hash) is not None:  # else it was found to be bad meanwhile
                self._blocks.name(block, block_hash)
            self._host.unlock(block_hash)
            restored.append((slot, block))
        self.num_restored += count
        if not back.missing:
            self._end(back)
        return tuple(restored)

    def _end(self, back: _Return) -> None:
        for block_hash, _, _ in back.missing:
            self._host.unlock(block_hash)
        self._blocks.let_go(back.blocks)
        self._return = None
        self._changes += 1
