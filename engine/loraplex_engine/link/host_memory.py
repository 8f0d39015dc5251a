"""The host's memory, as far as this process may use it: the machine's, and what its control groups allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def total_bytes(root: Path = ROOT) -> int:
    """The whole memory: the machine's, or the least limit of a control group. root: where /proc and /sys are."""
    machine = _meminfo(root, "MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _limits(root))])


def free_bytes(root: Path = ROOT) -> int:
    """What could be allocated now: what the system calls available, within the limits of all control groups."""
    available = _meminfo(root, "MemAvailable") or total_bytes(root) // 2
    return max(0, min([available, *(limit - used for limit, used in _limits(root))]))


def resident_bytes(root: Path = ROOT) -> int:
    """What this process has in RAM, shared pages included; 0: the system does not say."""
    fields = _text(root / "proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _meminfo(root: Path, name: str) -> int | None:
    """A line of /proc/meminfo, in bytes; None: the system has no such line."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group that this process is in, and what of it is used beside files that may go."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version_2 = not controllers
        if not version_2 and "memory" not in controllers.split(","):
            continue
        base = mount if version_2 else mount / "memory"
        limit_file, usage_file, prefix = ("memory.max", "memory.current", "") if version_2 else _VERSION_1
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = base / str(group).lstrip("/")
            limit = _text(folder / limit_file).strip()
            if limit.isdecimal():
                used = int(_text(folder / usage_file).strip() or 0)
                yield int(limit), max(0, used - _pages_of_files(folder, prefix))


_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"


def _pages_of_files(group: Path, prefix: str) -> int:
    """The page cache. What was read twice, such as weights that were loaded again, is active, and may go as well."""
    fields = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines())
    return sum(int(fields.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or a group that is not visible from inside a container
        return ""
