"""The prefix cache beyond the device: what is copied between steps, and what is to be said of it."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from loraplex_engine.execution.host_cache import HostCache
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.host_blocks import HostBlocks
from loraplex_engine.scheduling.prefixes import PrefixPreparer

logger = logging.getLogger(__name__)


class CacheTiers:
    """Carries out what the preparer of prefixes wants. Where that fails, what the blocks held is computed anew."""

    def __init__(self, memory: HostCache, host: HostBlocks, blocks: BlockManager) -> None:
        self._memory = memory
        self._host = host
        self._blocks = blocks
        self._move_seconds = 0.0
        self.prefixes = PrefixPreparer(blocks, host, memory.most_restored)

    def move(self, idle: bool) -> None:
        """Copy blocks between device and host, ahead of a step that was planned. idle: nothing else is done in it."""
        moves, began = self.prefixes.moves(idle), time.monotonic()
        try:
            self._memory.move(moves)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("%d blocks of the cache could not be copied; they are forgotten", len(moves))
            self.prefixes.fail(moves)
            return
        self.prefixes.write(moves)
        self._move_seconds += time.monotonic() - began if moves else 0.0

    def close(self, keep: bool) -> None:
        """Stop the threads that read and write files. `keep`: have what is cached written to files before."""
        try:
            if keep:
                self._blocks.evict_all()
                self.prefixes.poll()
                self.move(idle=True)
        finally:
            self._host.disk.close()

    def stats(self) -> dict[str, Any]:
        """Fields of `EngineStats`."""
        host, disk = self._host, self._host.disk
        return {
            "host_blocks": host.num_used,
            "host_cache_bytes": host.num_used * self._memory.block_bytes,
            "num_saved_blocks": host.num_saved,
            "num_restored_blocks": self.prefixes.num_restored,
            "move_seconds": self._move_seconds,
            "disk_cache_bytes": disk.used_bytes,
            "num_blocks_written": disk.num_written,
            "num_blocks_read": disk.num_read,
            "num_bad_files": disk.num_bad,
        }
