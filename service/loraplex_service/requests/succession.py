"""The engines that compute one request: each that dies is followed by the next."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import RequestOutput
from loraplex_service.errors import EngineError, LoraplexError, Unavailable, unusable_adapter

logger = logging.getLogger(__name__)

MAX_RESUMPTIONS = 2  # engine deaths of one request: it may be their cause


class Succession:
    """The engine that has a request now, and those that follow it."""

    def __init__(
        self,
        request_id: str,
        client: EngineClient,
        successor: Callable[[], Awaitable[EngineClient]],
        adapter: AdapterKey | None,
    ) -> None:
        """`successor`: waits for the next engine after one has died, until it holds the adapter; raises what the
        caller is told if none comes.
        """
        self.client = client
        self._request_id = request_id
        self._successor = successor
        self._adapter = adapter
        self._num_resumptions = 0
        self._waiting: asyncio.Future[EngineClient] | None = None  # for the successor
        self._error: Exception | None = None  # given to `end`

    def outlives(self, lost: Unavailable) -> bool:
        """Whether the request goes on after this error, since its engine died, and not too many did."""
        return lost is not self._error and self.client.error is not None and self._num_resumptions < MAX_RESUMPTIONS

    async def next(self) -> EngineClient:
        """Wait for the next engine. Raises what ended the last one that the request may lose, and what `end` got."""
        self._num_resumptions += 1
        client = await self._next()
        while not client.adapters.holds(self._adapter):  # the engine died, or the adapter left it
            if client.error is not None:
                if self._num_resumptions == MAX_RESUMPTIONS:
                    raise client.error
                self._num_resumptions += 1
            client = await self._next()
        self.client = client
        logger.info("request %s goes on with another engine", self._request_id)
        return client

    def end(self, error: Exception) -> None:
        """Wait for no engine any more: `next` raises this error."""
        self._error = error
        if self._waiting is not None:
            self._waiting.cancel()

    async def _next(self) -> EngineClient:
        self._check_goes_on()
        self._waiting = asyncio.ensure_future(self._successor())
        try:
            client = await self._waiting
        except asyncio.CancelledError:
            self._check_goes_on()
            raise
        finally:
            self._waiting = None
        self._check_goes_on()  # `end` may come between the successor's end and here
        return client

    def _check_goes_on(self) -> None:
        """Raise the error given to `end`."""
        if self._error is not None:
            raise self._error from None


def engine_failure(request_id: str, target: ResolvedTarget, output: RequestOutput) -> LoraplexError:
    """What the caller is told of a request that its engine could not compute."""
    if output.error_reason:
        return unusable_adapter(target.adapter_version, output.error, output.error_reason)
    with_adapter = f" with {target.adapter_version}" if target.adapter_version else ""
    return EngineError(
        f"the engine could not go on with request {request_id} to {target.model}{with_adapter}: {output.error}"
    )
