"""The host tier of the prefix cache: which blocks have a copy in host memory, and in which slot. Knows no tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """What is copied before a step: first blocks of the device into slots of the host, then slots into blocks."""

    saved: tuple[tuple[int, int], ...] = ()  # block, slot
    restored: tuple[tuple[int, int], ...] = ()  # slot, block
    names: tuple[bytes, ...] = ()  # of what is saved

    def __len__(self) -> int:
        return len(self.saved) + len(self.restored)


NO_MOVES: Final = BlockMoves()


class Finished(NamedTuple):
    """A block that was read from the disk, or written there."""

    block_hash: bytes
    was_read: bool
    problem: str = ""  # why it was not


class Disk(Protocol):
    """The disk tier, which reads and writes the host's slots in threads."""

    outlives: bool = True  # whether what it has is there after the engine was killed
    used_bytes: int = 0
    num_written: int = 0  # blocks, cumulative, as are the next two
    num_read: int = 0
    num_bad: int = 0  # files that could not be used

    def __contains__(self, block_hash: bytes) -> bool: ...

    def write(self, block_hash: bytes, slot: int) -> bool: ...

    def read(self, block_hash: bytes, slot: int) -> None: ...

    def forget(self, block_hash: bytes) -> None: ...

    def finished(self) -> Iterable[Finished]: ...

    def close(self) -> None: ...


class NoDisk(Disk):
    """There is none."""

    outlives = False

    def __contains__(self, block_hash: bytes) -> bool:
        return False

    def write(self, block_hash: bytes, slot: int) -> bool:
        return False

    def read(self, block_hash: bytes, slot: int) -> None:
        raise NotImplementedError

    def forget(self, block_hash: bytes) -> None:
        pass

    def finished(self) -> Iterable[Finished]:
        return ()

    def close(self) -> None:
        pass


class HostBlocks:
    """Copies of blocks that the device has evicted, by the same hashes as there. The least recently used leaves first,
    but none that is on its way back. A copy stays when its block returns, so that evicting that again costs nothing.
    """

    def __init__(self, num_slots: int, disk: Disk | None = None) -> None:
        """`disk`: the tier below, of whose copies this one keeps those that are being read or written."""
        self.num_slots = num_slots
        self.disk: Disk = disk or NoDisk()
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest is taken first
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._locks: Counter[bytes] = Counter()  # of copies that are read or written
        self._forgotten: set[bytes] = set()  # of these, that nobody else may use
        self._saved: dict[bytes, tuple[int, int]] = {}  # block and slot, since the last `take_saved`
        self.num_saved = 0  # cumulative

    @property
    def num_used(self) -> int:
        return len(self._slot_of)

    def slot(self, block_hash: bytes) -> int | None:
        """The slot of a copy; None: there is none. Does not count as use."""
        return None if block_hash in self._forgotten else self._slot_of.get(block_hash)

    def kept(self, moves: BlockMoves) -> list[tuple[bytes, int]]:
        """What these have saved and is still there, with its slot."""
        saved = zip(moves.names, moves.saved, strict=True)
        return [(name, slot) for name, (_, slot) in saved if self._slot_of.get(name) == slot]

    def save(self, block_hash: bytes, block: int) -> None:
        """Have a block's content copied, ahead of what the next step writes there. Nothing if all slots are locked."""
        if block_hash in self._slot_of:
            self._slot_of.move_to_end(block_hash)
            return
        slot = self.reserve(block_hash)
        if slot is not None:
            self._saved[block_hash] = block, slot

    def reserve(self, block_hash: bytes) -> int | None:
        """A slot for a new copy, in place of the least recently used one; None: all are locked."""
        if block_hash in self._slot_of:
            return None
        slot = self._free.pop() if self._free else self._lose()
        if slot is not None:
            self._slot_of[block_hash] = slot
        return slot

    def lock(self, block_hash: bytes) -> int:
        """Keep a copy until it is unlocked as often. Counts as use. → its slot"""
        self._slot_of.move_to_end(block_hash)
        self._locks[block_hash] += 1
        return self._slot_of[block_hash]

    def unlock(self, block_hash: bytes) -> None:
        self._locks[block_hash] -= 1
        if not self._locks[block_hash]:
            del self._locks[block_hash]
            if block_hash in self._forgotten:
                self._forgotten.remove(block_hash)
                self.forget(block_hash)

    def forget(self, block_hash: bytes) -> None:
        """Let no one use a copy any more."""
        if block_hash in self._locks:
            self._forgotten.add(block_hash)
        elif block_hash in self._slot_of:
            self._free.append(self._vacate(block_hash))

    def distrust(self, block_hash: bytes) -> None:
        """Let no one use a copy any more, nor what the disk has of it."""
        self.forget(block_hash)
        self.disk.forget(block_hash)

    def take_saved(self) -> dict[bytes, tuple[int, int]]:
        """What is to be copied before the next step: block and slot. It counts as done from now on."""
        saved, self._saved = self._saved, {}
        self.num_saved += len(saved)
        return saved

    def _lose(self) -> int | None:
        """The slot of the least recently used copy that is not locked, which is gone."""
        oldest = next((each for each in self._slot_of if each not in self._locks), None)
        return None if oldest is None else self._vacate(oldest)

    def _vacate(self, block_hash: bytes) -> int:
        """The slot of a copy, which is gone, or is not made any more: somebody else may fill the slot at once."""
        self._saved.pop(block_hash, None)
        return self._slot_of.pop(block_hash)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        slots = [*self._free, *self._slot_of.values()]
        assert sorted(slots) == list(range(self.num_slots))
        assert self._forgotten <= self._locks.keys() <= self._slot_of.keys()
        assert all(self._slot_of[name] == slot for name, (_, slot) in self._saved.items())
