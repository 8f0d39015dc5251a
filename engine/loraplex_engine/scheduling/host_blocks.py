"""The host tier of the prefix cache: which blocks have a copy in host memory, and in which slot. Knows no tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """What is copied before a step: first blocks of the device into slots of the host, then slots into blocks."""

    saved: tuple[tuple[int, int], ...] = ()  # block, slot
    restored: tuple[tuple[int, int], ...] = ()  # slot, block

    def __len__(self) -> int:
        return len(self.saved) + len(self.restored)


NO_MOVES: Final = BlockMoves()


class HostBlocks:
    """Copies of blocks that the device has evicted, by the same hashes as there. The least recently used leaves first,
    but none that is on its way back. A copy stays when its block returns, so that evicting that again costs nothing.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest is taken first
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._locks: Counter[bytes] = Counter()  # of copies that are about to be read
        self._saved: list[tuple[int, int]] = []  # since the last `take_saved`
        self.num_saved = 0  # cumulative, as is the next
        self.num_lost = 0  # that left

    @property
    def num_used(self) -> int:
        return len(self._slot_of)

    def slot(self, block_hash: bytes) -> int | None:
        """The slot of a copy; None: there is none. Does not count as use."""
        return self._slot_of.get(block_hash)

    def save(self, block_hash: bytes, block: int) -> None:
        """Have a block's content copied, ahead of what the next step writes there. Nothing if all slots are locked."""
        if block_hash in self._slot_of:
            self._slot_of.move_to_end(block_hash)
            return
        slot = self.reserve(block_hash)
        if slot is not None:
            self._saved.append((block, slot))
            self.num_saved += 1

    def reserve(self, block_hash: bytes) -> int | None:
        """A slot for a copy that there is none of; None: all are locked."""
        slot = self._free.pop() if self._free else self._lose()
        if slot is not None:
            self._slot_of[block_hash] = slot
        return slot

    def lock(self, block_hash: bytes) -> None:
        """Keep a copy until it is unlocked as often, and count that as use."""
        self._slot_of.move_to_end(block_hash)
        self._locks[block_hash] += 1

    def unlock(self, block_hash: bytes) -> None:
        self._locks[block_hash] -= 1
        if not self._locks[block_hash]:
            del self._locks[block_hash]

    def forget(self, block_hash: bytes) -> None:
        """Drop a copy. One that is about to be read stays: who meets what is wrong with it has it dropped then."""
        if block_hash in self._slot_of and not self._locks[block_hash]:
            self._free.append(self._slot_of.pop(block_hash))

    def forget_slots(self, slots: set[int]) -> None:
        """Drop the copies in these slots: the step before which they were made has failed."""
        for block_hash in [each for each, slot in self._slot_of.items() if slot in slots]:
            self.forget(block_hash)

    def take_saved(self) -> tuple[tuple[int, int], ...]:
        """What is to be copied before the next step; it counts as done from now on."""
        saved, self._saved = tuple(self._saved), []
        return saved

    def _lose(self) -> int | None:
        """The slot of the least recently used copy that is not locked, which is gone."""
        oldest = next((each for each in self._slot_of if each not in self._locks), None)
        if oldest is None:
            return None
        self.num_lost += 1
        return self._slot_of.pop(oldest)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        slots = [*self._free, *self._slot_of.values()]
        assert sorted(slots) == list(range(self.num_slots))
        assert self._locks.keys() <= self._slot_of.keys()
