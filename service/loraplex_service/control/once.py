"""Calls that are sent twice, and happen once."""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from loraplex_service.call import find_call
from loraplex_service.errors import InvalidRequest

M = TypeVar("M", bound=Message)

REMEMBERED_ANSWERS = 1024  # of each service
REMEMBERED_BYTES = 8 << 20  # of these answers, as they are sent

_Key = tuple[str, str, uuid.UUID]  # tenant, method, request id


class Once:
    """Runs each request id of a tenant once: a repeated id gets the first result, or waits for it.

    A caller that goes away does not stop the work that it began. The latest answers are remembered, as many as there is
    room for; failures are not. For one event loop.
    """

    def __init__(self, capacity: int = REMEMBERED_ANSWERS, max_bytes: int = REMEMBERED_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._running: dict[_Key, asyncio.Task[Any]] = {}
        self._answers: OrderedDict[_Key, Message] = OrderedDict()
        self._num_bytes = 0  # of the answers

    async def run(self, method: str, request_id: str, work: Callable[[], Coroutine[Any, Any, M]]) -> M:
        """Run `work` once. `request_id`: "": none, so always run.

        Raises InvalidRequest if it is no UUID, and what `work` raises.
        """
        if not request_id:
            return await work()
        call = find_call()
        try:
            key = (call.tenant if call else "", method, uuid.UUID(request_id))
        except ValueError:
            raise InvalidRequest.at("request_id", f"{request_id[:80]!r} is no UUID") from None
        if key in self._answers:
            return cast(M, self._answers[key])
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(work())
            task.add_done_callback(lambda ended: self._ended(key, ended))
        return cast(M, await asyncio.shield(self._running[key]))

    def _ended(self, key: _Key, task: "asyncio.Task[M]") -> None:
        del self._running[key]
        if not task.cancelled() and task.exception() is None:
            self._remember(key, task.result())  # not the task: it holds its call, and everything that hangs on that

    def _remember(self, key: _Key, answer: Message) -> None:
        self._answers[key] = answer
        self._num_bytes += answer.ByteSize()
        while len(self._answers) > self._capacity or self._num_bytes > self._max_bytes:
            _, forgotten = self._answers.popitem(last=False)
            self._num_bytes -= forgotten.ByteSize()
