"""Threads that leave the cores to the step."""

import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from loraplex_adapters.runtime.loader_threads import LOADER_NICENESS, compute_alone, give_way


def test_a_loader_thread_computes_alone_and_leaves_others_as_they_were() -> None:
    def in_thread(call: Callable[[], object]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    default, seen = torch.get_num_threads(), []

    def loader() -> None:
        compute_alone(3)
        torch.ones(1 << 16).sum()
        seen.append(torch.get_num_threads())

    in_thread(loader)
    in_thread(lambda: seen.append(torch.get_num_threads()))
    in_thread(lambda: torch.set_num_threads(default))
    assert seen == [1, 3]
    assert torch.get_num_threads() == default


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux only")
def test_a_loader_leaves_the_cores_to_the_step_and_nobody_else_does() -> None:
    before, seen = os.getpriority(os.PRIO_PROCESS, 0), []

    def loader() -> None:
        give_way()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=loader)
    thread.start()
    thread.join()
    assert seen == [max(LOADER_NICENESS, before)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
