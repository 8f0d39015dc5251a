"""The processes of a server and what each takes of the machine: the service, its engines, and what they started."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
USER_TICKS, SYSTEM_TICKS, RESIDENT_PAGES = 11, 12, 21  # fields of /proc/PID/stat behind the name: see proc(5)


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What one process takes, or several of one kind together."""

    labels: tuple[str, str]  # "service", "engine", "http" or "other", and the model of an engine
    resident_bytes: int
    cpu_seconds: float
    open_files: int


def processes(engines: Mapping[int, str], proc: Path = PROC) -> Sequence[ProcessFigures]:
    """Of this process and of all below it; none where the system has no /proc. engines: the model of each, by pid."""
    totals: dict[tuple[str, str], ProcessFigures] = {}
    for pid, labels in _tree(os.getpid(), ("service", ""), engines, proc):
        found = _figures(pid, labels, proc)
        before = totals.get(labels, ProcessFigures(labels, 0, 0.0, 0))
        if found is not None:
            totals[labels] = ProcessFigures(
                labels,
                before.resident_bytes + found.resident_bytes,
                before.cpu_seconds + found.cpu_seconds,
                before.open_files + found.open_files,
            )
    return list(totals.values())


def _tree(
    pid: int, labels: tuple[str, str], engines: Mapping[int, str], proc: Path
) -> Iterator[tuple[int, tuple[str, str]]]:
    """A process and those below it, with their labels: what an engine started counts as that engine."""
    yield pid, labels
    for child in _children(pid, proc):
        own = labels if labels[0] == "engine" else _labels(child, engines, proc)
        yield from _tree(child, own, engines, proc)


def _labels(pid: int, engines: Mapping[int, str], proc: Path) -> tuple[str, str]:
    if pid in engines:
        return "engine", engines[pid]
    return ("http" if "loraplex_service.http" in _text(proc / str(pid) / "cmdline") else "other"), ""


def _children(pid: int, proc: Path) -> Iterator[int]:
    """Those that any of its threads has started."""
    for thread in _listed(proc / str(pid) / "task"):
        yield from map(int, _text(proc / str(pid) / "task" / thread / "children").split())


def _figures(pid: int, labels: tuple[str, str], proc: Path) -> ProcessFigures | None:
    """None: it has ended."""
    fields = _text(proc / str(pid) / "stat").rpartition(")")[2].split()
    if len(fields) <= RESIDENT_PAGES:
        return None
    seconds = (int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])) / TICKS_PER_SECOND
    files = len(_listed(proc / str(pid) / "fd"))
    return ProcessFigures(labels, int(fields[RESIDENT_PAGES]) * PAGE_BYTES, seconds, files)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the process has ended, or the system has no such folder
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # as above
        return ""
