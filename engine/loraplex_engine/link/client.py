"""One engine as the service sees it: its requests, its adapters, and whether it lives. Torch-free.

The client owns no socket. It sends through a function and is fed through `deliver`, so that it works the same over
ZeroMQ, in-process and with a fake engine. It lives as long as its engine process: a restarted engine gets a new client.
"""

import asyncio
import itertools
from collections.abc import Sequence

from loraplex_engine.link.adapters import EngineAdapters
from loraplex_engine.link.connection import Connection, Send, new_answer, reject, resolve
from loraplex_engine.link.messages import AdaptersChanged, EngineStats, Ping, Pong, SetVocabulary, StepOutput
from loraplex_engine.link.requests import MAX_PENDING_TOKENS, EngineRequests

# What an engine says once it runs. What it says while it loads belongs to whoever started it.
Running = StepOutput | AdaptersChanged | Pong


class EngineClient:
    """The requests and the adapters of one engine. For one event loop; not thread-safe."""

    def __init__(self, send: Send, *, max_pending_tokens: int = MAX_PENDING_TOKENS) -> None:
        self._connection = Connection(send)
        self.requests = EngineRequests(self._connection, max_pending_tokens)
        self.adapters = EngineAdapters(self._connection)
        self._has_vocabulary = False
        self.stats: EngineStats | None = None  # as of the last step or pong
        self._nonces = itertools.count(1)
        self._pings: dict[int, asyncio.Future[Pong]] = {}

    @property
    def error(self) -> Exception | None:
        """The error given to `fail`; None: the engine lives."""
        return self._connection.error

    def teach(self, token_bytes: Sequence[bytes]) -> None:
        """Give the engine its vocabulary, as `SetVocabulary` has it, unless it has it already."""
        if not self._has_vocabulary and self.error is None:
            self._has_vocabulary = True
            self._connection.send(SetVocabulary(list(token_bytes)))

    async def ping(self) -> Pong:
        """Wait for a sign of life from between two steps. The caller sets the timeout."""
        self._connection.check()
        nonce = next(self._nonces)
        self._pings[nonce] = new_answer()
        self._connection.send(Ping(nonce))
        try:
            return await self._pings[nonce]
        finally:
            self._pings.pop(nonce, None)

    def deliver(self, message: Running) -> None:
        """Take one message from the engine. Answers that nobody waits for any more are dropped."""
        match message:
            case StepOutput(outputs=outputs, stats=stats):
                self.stats = stats
                self.requests.deliver(outputs)
            case Pong(nonce=nonce, stats=stats):
                self.stats = stats
                resolve(self._pings.get(nonce), message)
            case AdaptersChanged(statuses=statuses):
                self.adapters.deliver(statuses)

    def fail(self, error: Exception) -> None:
        """Note that the engine is gone: every stream and call, waiting or later, ends with this error.

        Only the first error counts.
        """
        if self.error is not None:
            return
        self._connection.error = error
        self.requests.fail(error)
        self.adapters.fail(error)
        for answer in self._pings.values():
            reject(answer, error)
