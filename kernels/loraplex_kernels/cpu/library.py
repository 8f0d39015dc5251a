"""Finds, loads and declares the compiled kernels."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

# By the code that `loraplex_best_isa` returns. A processor that has one also has those before it.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
VERSION = 22  # of the C interface; kernels/loraplex_kernels/cpu/api.cpp has the same

# Result and arguments of each function of api.cpp, which a test compares with these.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "context_create": (c_void_p, (c_int,)),
    "context_destroy": (None, (c_void_p,)),
    "advise_huge_pages": (None, (c_void_p, c_int64)),
    "linear_create": (c_void_p, (c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "quantized_create": (
        c_void_p,
        (
            *(c_void_p, c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p),
        ),
    ),
    "integer_create": (
        c_void_p,
        (c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, c_float, c_float, c_void_p),
    ),
    "linear_destroy": (None, (c_void_p,)),
    "linear_bytes": (c_int64, (c_void_p,)),
    "linear_unpack": (None, (c_void_p, c_void_p, c_int64, c_int64)),
    "linear": (c_int, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64)),
    "grouped_linear": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "route": (
        c_int64,
        (
            *(c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_int, c_float, c_float),
            *(
                c_int64,
                c_int64,
                c_int64,
                c_void_p,
                c_void_p,
                c_void_p,
                c_void_p,
                c_void_p,
                c_void_p,
                c_void_p,
                c_void_p,
            ),
        ),
    ),
    "weighted_sums": (
        c_int,
        (c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
    ),
    "lora_create": (
        c_void_p,
        (c_void_p, c_int, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64),
    ),
    "lora_destroy": (None, (c_void_p,)),
    "lora_bytes": (c_int64, (c_void_p,)),
    "lora": (
        c_int,
        (
            *(c_void_p, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
            *(c_int64, c_void_p, c_void_p, c_void_p),
        ),
    ),
    "rms_norm": (c_int, (c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float)),
    "add_rms_norm": (c_int, (c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float)),
    "layer_norm": (
        c_int,
        (c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float),
    ),
    "gelu_tanh": (c_int, (c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64)),
    "xielu": (c_int, (c_void_p, c_int, c_float, c_float, c_float, c_float, c_void_p, c_void_p, c_int64, c_int64)),
    "gate": (c_int, (c_void_p, c_int, c_int, c_void_p, c_void_p, c_int64, c_int64)),
    "cache_head_size": (c_int64, (c_int, c_int64, c_int64)),
    "rotary_store_kv": (
        c_int,
        (
            *(c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_float),
            *(c_void_p, c_void_p, c_int64, c_int),
            *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
        ),
    ),
    "paged_attention": (
        c_int,
        (
            *(c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64),
            *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_float, c_float, c_int64, c_void_p),
        ),
    ),
    "mask_logits": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64)),
    "penalise": (
        c_int,
        (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "mark": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p)),
    "draw_tokens": (
        c_int,
        (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "likelihoods": (
        c_int,
        (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
}


class LibraryUnavailableError(Exception):
    """The compiled kernels are missing, or not for this processor."""


def library_path(isa: str) -> Path:
    """The library of an instruction set: beside this file, or in the folder that LORAPLEX_CPU_KERNELS names, so that
    the kernels can be run as `make sanitize` compiles them.
    """
    folder = os.environ.get("LORAPLEX_CPU_KERNELS") or Path(__file__).parent
    return Path(folder, f"libloraplex_{isa}.so")


def usable_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this processor has, the best last."""
    portable = library_path("portable")
    if not portable.exists():
        return ()
    best = int(ctypes.CDLL(str(portable)).loraplex_best_isa())
    return tuple(isa for isa in INSTRUCTION_SETS[: best + 1] if library_path(isa).exists())


class Library:
    """One compiled library with its own threads and memory. Its functions are attributes, without their prefix."""

    def __init__(self, threads: int | None, isa: str | None) -> None:
        """threads None: one for each core that the process may use. isa None: the best that works on this processor.

        Raises LibraryUnavailableError.
        """
        usable = usable_instruction_sets()
        if not usable:
            raise LibraryUnavailableError(
                f"no compiled kernels in {library_path('portable').parent}: "
                "install with a C++17 compiler at hand to have them"
            )
        self.isa = isa or usable[-1]
        if self.isa not in usable:
            raise LibraryUnavailableError(
                f"instruction set {self.isa!r} cannot be used here: choose one of {', '.join(usable)}"
            )
        self.threads = threads or available_cores()
        self._functions = ctypes.CDLL(str(library_path(self.isa)))
        if self._functions.loraplex_version() != VERSION:
            raise LibraryUnavailableError(f"{library_path(self.isa)} is of an older build: install again")
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self._functions, f"loraplex_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.context = owned(self, self.context_create(self.threads), self.context_destroy)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the compiled kernels have no function {name!r}")


def available_cores() -> int:
    """The number of cores that this process may use: those that it is bound to, or fewer by its control group's
    quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def owned(owner: object, handle: int | None, destroy: Callable[[int], None], *keep: object) -> int:
    """A handle that is freed with its owner, before the objects in `keep`. Raises MemoryError for a null handle."""
    if handle is None:
        raise MemoryError("the CPU kernels could not allocate memory")
    weakref.finalize(owner, _destroy, destroy, handle, keep)
    return handle


def succeed(status: int) -> None:
    """Raise MemoryError unless a compiled function returned 0."""
    if status:
        raise MemoryError("the CPU kernels could not allocate memory for intermediate results")


def _destroy(destroy: Callable[[int], None], handle: int, keep: tuple[object, ...]) -> None:
    destroy(handle)
