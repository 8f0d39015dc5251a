"""The disk tier of the prefix cache: files of one block each, in a directory that is one engine's alone.

A file's name and its content are authenticated with a key that lies in the directory, and with what the blocks are of:
the model's files, the way they are computed and laid out. So a file that was damaged, cut, put there by others or left
by another model is never used. Threads read and write; everything else is done by the thread that steps.
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import os
import secrets
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from loraplex_adapters.runtime.loader_threads import give_way
from loraplex_engine.execution.cache_identity import cache_identity
from loraplex_engine.execution.host_cache import HostCache
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.scheduling.host_blocks import Disk, Finished

logger = logging.getLogger(__name__)

KEY_FILE, LOCK_FILE = "key", "lock"
KEY_BYTES = 32
SEAL_BYTES = 32
NAME_DIGITS = 64
UNFINISHED = ".unfinished"


def disk_cache(config: EngineConfig, path: Path, runner: ModelRunner, memory: HostCache) -> DiskCache | None:
    """The disk tier of a model that was loaded from `path`; None: it has none."""
    if config.disk_cache_directory is None:
        return None
    identity = cache_identity(config, path, runner)
    return DiskCache(
        Path(config.disk_cache_directory), config.disk_cache_bytes, identity, memory.slots.numpy(), memory.settle
    )


class DiskCache(Disk):
    """Blocks on disk, by the hashes that the device has for them. The least recently used leaves first."""

    def __init__(
        self,
        directory: Path,
        budget_bytes: int,
        identity: bytes,
        slots: np.ndarray,  # uint8 [slots, bytes of a block]
        settle: Callable[[], None] = lambda: None,
        executor: Callable[[str], Executor] = lambda name: ThreadPoolExecutor(1, name, initializer=give_way),
    ) -> None:
        """`identity`: what the blocks are of. `settle`: waits until copies from and to the slots are done.

        Raises ValueError if the directory cannot be used, or another engine uses it.
        """
        self._directory = directory
        self._slots = slots
        self._settle = settle
        self._file_bytes = int(slots.shape[1]) + SEAL_BYTES
        self._most_files = budget_bytes // self._file_bytes
        if not self._most_files:
            raise ValueError(f"disk_cache_bytes {budget_bytes} hold no block of {self._file_bytes} bytes: raise it")
        self._lock = _own(directory)
        self._key = blake2b(_read_key(directory / KEY_FILE) + identity, digest_size=KEY_BYTES).digest()
        self._files: OrderedDict[str, None] = OrderedDict.fromkeys(self._found())  # least recently used first
        self._num_writing = 0
        self._most_writes = -(-len(slots) // 2)  # at once: the rest stays free for other blocks
        self._reader, self._writer = executor("cache-reader"), executor("cache-writer")
        self._finished: SimpleQueue[Finished] = SimpleQueue()
        self._told = False  # of a file that could not be used, or not be written
        while len(self._files) > self._most_files:
            self._remove_oldest()

    @property
    def used_bytes(self) -> int:  # type: ignore[override]  # counted here
        return len(self._files) * self._file_bytes

    def __contains__(self, block_hash: bytes) -> bool:
        return self._name(block_hash) in self._files

    def write(self, block_hash: bytes, slot: int) -> bool:
        """Begin to write what is in a slot, which must stay until `finished` has it. False: it is not written."""
        name = self._name(block_hash)
        if name in self._files:
            self._files.move_to_end(name)
            return False
        if self._num_writing == self._most_writes:
            return False
        while len(self._files) >= self._most_files:
            self._remove_oldest()
        self._files[name] = None
        self._num_writing += 1
        self._writer.submit(self._write, block_hash, name, slot)
        return True

    def read(self, block_hash: bytes, slot: int) -> None:
        """Begin to read a block into a slot, which nobody else may use until `finished` has it."""
        name = self._name(block_hash)
        self._files.move_to_end(name)
        self._reader.submit(self._read, block_hash, name, slot)

    def forget(self, block_hash: bytes) -> None:
        """Drop a block that must not be used."""
        name = self._name(block_hash)
        if name in self._files:
            del self._files[name]
            self._writer.submit(_unlink, self._directory / name)

    def finished(self) -> Iterator[Finished]:
        """The reads and writes that have ended since the last call."""
        while not self._finished.empty():
            done = self._finished.get()
            self.num_read += done.was_read and not done.problem
            self.num_written += not done.was_read and not done.problem
            self.num_bad += done.was_read and bool(done.problem)
            self._num_writing -= not done.was_read
            if done.problem:
                self._tell(done)
                self.forget(done.block_hash)
            yield done

    def close(self) -> None:
        """Write what is to be written, end the threads, and let another engine have the directory."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        os.close(self._lock)

    # ---- in the threads --------------------------------------------------------------------------------------------

    def _write(self, block_hash: bytes, name: str, slot: int) -> None:
        problem, unfinished = "", self._directory / f"{name}{UNFINISHED}"
        try:
            self._settle()
            content = self._slots[slot].data
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.write(self._seal(name, content))
            unfinished.rename(self._directory / name)
        except Exception as error:
            problem = f"cannot be written: {error}"
            with suppress(OSError):  # what is half written counts in no budget
                unfinished.unlink()
        self._finished.put(Finished(block_hash, was_read=False, problem=problem))

    def _read(self, block_hash: bytes, name: str, slot: int) -> None:
        problem = ""
        try:
            self._settle()  # what was in the slot may still be on its way to the device
            problem = self._fill(self._directory / name, name, self._slots[slot].data)
        except Exception as error:
            problem = f"cannot be read: {error}"
        self._finished.put(Finished(block_hash, was_read=True, problem=problem))

    def _fill(self, path: Path, name: str, memory: memoryview) -> str:
        """Read a file's block into a slot. Returns why it must not be used; "": it may."""
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size != self._file_bytes:
                return f"is no file of {self._file_bytes} bytes"
            if file.readinto(memory) != len(memory) or not hmac.compare_digest(
                file.read(SEAL_BYTES), self._seal(name, memory)
            ):
                return "was damaged, or written by others"
            os.utime(file.fileno())  # for the order in which the next engine finds them
        return ""

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _name(self, block_hash: bytes) -> str:
        return blake2b(block_hash, key=self._key, digest_size=NAME_DIGITS // 2).hexdigest()

    def _seal(self, name: str, content: memoryview) -> bytes:
        seal = blake2b(name.encode(), key=self._key, digest_size=SEAL_BYTES)
        seal.update(content)
        return seal.digest()

    def _found(self) -> list[str]:
        """The names of the files that an engine before has left, oldest first. What is none of them is removed."""
        found: list[tuple[int, str]] = []
        for entry in os.scandir(self._directory):
            if entry.name in (KEY_FILE, LOCK_FILE) or entry.is_dir(follow_symlinks=False):
                continue
            stats = entry.stat(follow_symlinks=False)
            if _is_name(entry.name) and stat.S_ISREG(stats.st_mode) and stats.st_size == self._file_bytes:
                found.append((stats.st_mtime_ns, entry.name))
            elif _is_name(entry.name.removesuffix(UNFINISHED)):
                os.unlink(entry.path)
        return [name for _, name in sorted(found)]

    def _remove_oldest(self) -> None:
        name, _ = self._files.popitem(last=False)
        self._writer.submit(_unlink, self._directory / name)

    def _tell(self, done: Finished) -> None:
        """Log the first file that could not be used; the metrics count all."""
        if not self._told:
            self._told = True
            path = self._directory / self._name(done.block_hash)
            logger.warning("disk cache: %s %s; its tokens are computed. This is said once", path, done.problem)


def _own(directory: Path) -> int:
    """Make a directory this engine's alone. Returns its lock, held until it is closed. Raises ValueError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError(
                f"disk_cache_directory {directory} must be a directory of the server's user that no one else may "
                "enter: chmod 700 it, or name another"
            )
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ValueError(f"disk_cache_directory {directory} cannot be used: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ValueError(f"disk_cache_directory {directory} is used by another engine: name one for each") from error
    return lock


def _read_key(path: Path) -> bytes:
    """The directory's key. A new one makes all files that are there useless, as they should be."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            key = file.read(KEY_BYTES + 1)
        if len(key) == KEY_BYTES:
            return key
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"disk_cache_directory: {path} cannot be read: {error}") from error
    key = secrets.token_bytes(KEY_BYTES)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    return key


def _is_name(name: str) -> bool:
    return len(name) == NAME_DIGITS and all(digit in "0123456789abcdef" for digit in name)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
