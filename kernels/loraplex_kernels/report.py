"""What this machine computes with, as one line of JSON: `python -m loraplex_kernels.report`, for `loraplex doctor`.

A process of its own asks, so that whatever is broken here breaks nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import torch

from loraplex_kernels.cpu.library import Library, available_cores, usable_instruction_sets


def cpu() -> dict[str, Any]:
    """The kernels of the CPU, or why they do not load."""
    usable = usable_instruction_sets()
    if not usable:
        return {"error": "no compiled kernels are installed"}
    try:
        Library(threads=1, isa=usable[-1])
    except (OSError, RuntimeError, ValueError) as error:
        return {"error": str(error)}
    return {"instruction_set": usable[-1], "cores": available_cores()}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch can use, with their memory."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "memory_bytes": total, "free_bytes": free})
    return found


def triton() -> str | None:
    """The version of Triton; None: it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "cpu": cpu(), "gpus": gpus(), "triton": triton()}


if __name__ == "__main__":
    print(json.dumps(report()))
