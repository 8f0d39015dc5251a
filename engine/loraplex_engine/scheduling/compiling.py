"""Work in a few threads, by turns of the tenants who wait for it."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


NICER = 10  # niceness of the threads above that of the steps: a tenth of a core that both want


class TurnQueue(Generic[Key, Result]):
    """Makes things that have names, each once. What nobody waits for any more is not begun."""

    def __init__(self, make: Callable[[Key], Result], num_threads: int, thread_name: str) -> None:
        self._make = make
        self._threads = ThreadPoolExecutor(num_threads, thread_name, initializer=_give_way)
        self._lines: OrderedDict[str, dict[Key, Future[Result]]] = OrderedDict()  # by tenant, the next one first
        self._lock = threading.Lock()

    def add(self, tenant: str, key: Key, future: Future[Result]) -> None:
        """Have this made for the tenant, unless that was asked for already.

        A tenant's things are made first come first; of several tenants, in turn.
        """
        with self._lock:
            if future.running() or key in self._lines.get(tenant, {}):
                return
            self._lines.setdefault(tenant, {})[key] = future
        self._threads.submit(self._make_next)

    def remove(self, tenant: str, key: Key) -> bool:
        """Let go of what the tenant no longer waits for. Returns whether it will not be made, for nobody waits."""
        with self._lock:
            line = self._lines.get(tenant, {})
            future = line.pop(key, None)
            if not line:
                self._lines.pop(tenant, None)
            is_wanted = any(key in other for other in self._lines.values())
            return future is not None and not is_wanted and future.cancel()

    def close(self) -> None:
        """Begin nothing more, and wait for what is being made."""
        self._threads.shutdown(cancel_futures=True)

    def _make_next(self) -> None:
        taken = self._take()
        if taken is None:
            return
        key, future = taken
        try:
            result = self._make(key)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _take(self) -> tuple[Key, Future[Result]] | None:
        with self._lock:
            while self._lines:
                tenant, line = self._lines.popitem(last=False)
                key = next(iter(line))
                future = line.pop(key)
                if line:
                    self._lines[tenant] = line
                if not future.running() and not future.done():  # else it was another tenant's turn to have it made
                    future.set_running_or_notify_cancel()
                    return key, future
        return None


def _give_way() -> None:
    """Let the steps go before this thread, on Linux, where each thread has its own niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
