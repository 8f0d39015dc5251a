"""The choice of a backend for a device."""

from __future__ import annotations

import logging

import torch

from loraplex_kernels.cpu.library import LibraryUnavailableError
from loraplex_kernels.cpu.ops import CpuOps
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import ReferenceOps

logger = logging.getLogger(__name__)


def select_ops(
    device: torch.device, backend: str = "auto", *, threads: int | None = None, isa: str | None = None
) -> Ops:
    """The backend for a device. `auto` takes the fastest that works, and logs its choice in one line.

    threads: the number of threads of the CPU kernels; None: one for each core that the process may use.
    isa: the instruction set of the CPU kernels ("portable", "avx2", "avx512", "avx512bf16", "amx"); None: the best that
    the processor has. Raises ValueError for a backend that does not exist or cannot run on this device.
    """
    if backend == "reference":
        return ReferenceOps(device)
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        return _triton_ops(device, required=backend == "triton")
    if backend not in ("auto", "cpu"):
        raise ValueError(
            f"unknown kernel backend {backend!r} for device {device}: choose auto, cpu, triton or reference"
        )
    if device.type != "cpu":
        if backend == "auto":
            return ReferenceOps(device)
        raise ValueError(f"kernel backend 'cpu' cannot run on device {device}: choose auto or reference")
    try:
        ops = CpuOps(device, threads, isa)
    except LibraryUnavailableError as error:
        if backend == "cpu":
            raise ValueError(f"kernel backend 'cpu' cannot be used: {error}") from error
        logger.warning("kernels: reference (plain torch, several times slower): %s", error)
        return ReferenceOps(device)
    logger.info("kernels: cpu, %s, %d threads", ops.library.isa, ops.library.threads)
    return ops


def _triton_ops(device: torch.device, required: bool) -> Ops:
    try:
        from loraplex_kernels.triton import TritonOps
    except ImportError as error:
        if required:
            raise ValueError(f"kernel backend 'triton' cannot be used: {error}; install triton") from error
        logger.warning("kernels: reference (plain torch, several times slower): %s", error)
        return ReferenceOps(device)
    ops = TritonOps(device)
    logger.info("kernels: triton on %s", device)
    return ops
