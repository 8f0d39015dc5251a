"""The device of an engine: its selection, its free memory, and turns of engines to load onto it."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from loraplex_engine.link import host_memory
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import Device

logger = logging.getLogger(__name__)

LOOKING_SECONDS = 0.2  # between two looks whether the turn has come


def select_device(name: str) -> torch.device:
    """The device of this name; `auto`: CUDA if there is any, else the CPU. A CUDA device gets an index, which torch
    needs.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch sees no CUDA device: use device: cpu")
    device, count = torch.device("cuda", device.index or 0), torch.cuda.device_count()
    if device.index >= count:
        raise ValueError(f"device {name!r} asked for, but torch sees {count}: cuda:0 to cuda:{count - 1}")
    return device


def chosen(name: str) -> str:
    """The kind of device that `auto` is here; any other name as it is."""
    return select_device(name).type if name == "auto" else name


def described(device: torch.device) -> Device:
    """The device as callers are told of it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(str(device), properties.name, properties.total_memory)
    return Device(str(device), platform.processor() or platform.machine(), host_memory.total_bytes())


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: the device's, or the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory.free_bytes()


@contextmanager
def loading_turn(device: torch.device, report: LoadReport) -> Iterator[None]:
    """Keep other engines of this user from loading onto the same GPU, so that memory found free stays free.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    if device.type != "cuda":
        yield
        return
    gpu = torch.cuda.get_device_properties(device).uuid
    path = Path(tempfile.gettempdir(), f"loraplex-{os.getuid()}-{gpu}.lock")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
        is_ours = _taken(file)
        if not is_ours:
            logger.info("another engine loads onto %s: waiting for it", device)
        while not is_ours:
            report.waits(f"its turn to load onto {device}")
            time.sleep(LOOKING_SECONDS)
            is_ours = _taken(file)
        yield


def _taken(file: IO[Any]) -> bool:
    """Whether the lock on a file is this process's now."""
    import fcntl  # where there is CUDA there is Linux

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
