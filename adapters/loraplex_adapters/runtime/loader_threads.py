"""Threads that read adapters beside a step that needs the same cores."""

from __future__ import annotations

import os
import sys
import threading

import torch

LOADER_NICENESS = 5  # a quarter of a core beside a busy thread, all of an idle one


def compute_alone(default: int) -> None:
    """Make torch use no other threads for the work of this thread. New threads still get `default` threads.

    Many small operations that each wait for a team of threads, beside a step that keeps all cores busy, took 46 s
    where one thread alone took 0.6 s (84 MB adapter, 2 cores, both busy). Torch keeps the number per thread, but a
    thread that is new to it starts with the number that was last set in any thread: hence the second thread.
    """
    torch.get_num_threads()  # from now on this thread has a number of its own
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()


def give_way() -> None:
    """Lower this thread's priority below the step's threads, on Linux, where each thread has its own niceness.

    A step waits for the slowest of its threads: one that shares its core with a loader holds up all requests. Beside
    loads without a pause the median step took 42 % longer at niceness 0 and 11 % at 10, at half of the loads
    (llama-160m, 2 cores, one run). The pace holds loads to less. At 15, a few per cent of a busy core, they did not
    get what it allows, and took twice as long. Elsewhere niceness is the whole process's, and the loaders keep it.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(LOADER_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def begin_loader(default_threads: int) -> None:
    """Make this thread one that reads adapters."""
    compute_alone(default_threads)
    give_way()
