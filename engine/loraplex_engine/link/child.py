"""Processes that live no longer than their parent, which writes their configuration to their stdin."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import MutableMapping
from typing import Final

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def child_command(module: str, *options: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The command that runs a module with this interpreter, and what its environment needs for our import path."""
    import_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # -P: the working directory must not come before it.
    return (sys.executable, "-P", "-m", module, *options), {"PYTHONPATH": import_path}


def begin_child() -> bytes:
    """Tie this process to its parent → the first line of its stdin.

    SIGINT, SIGHUP and SIGTERM are ignored from now on: a Ctrl-C, the end of a terminal, or a supervisor that stops a
    whole group reaches all processes there, and the parent decides what becomes of them.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    line = sys.stdin.buffer.readline()
    threading.Thread(target=exit_at_end, args=(sys.stdin.fileno(),), daemon=True, name="parent-watch").start()
    return line


def limit_threads(threads: int | None, environment: MutableMapping[str, str]) -> None:
    """Make OpenMP, and libraries built on it, use this many threads; None: their own choice, all cores."""
    if threads is not None:
        environment.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))


def die_with_parent() -> None:
    """Have the kernel end this process with its parent, even while it is stuck in native code. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_at_end(stdin: int) -> None:
    """Wait until the other end of stdin is closed, then end the process without further ado."""
    # Not through sys.stdin: its lock, held while waiting here, would make the interpreter abort at an ordinary end.
    while os.read(stdin, 4096):
        pass
    os._exit(1)
