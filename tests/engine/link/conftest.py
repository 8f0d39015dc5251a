"""A client of one engine, and what it sent."""

from typing import Any

import msgspec
import pytest

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import (
    Abort,
    AdapterFacts,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    EngineStats,
    RequestOutput,
    StepOutput,
    ToEngine,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import SamplingParams

KEY = AdapterKey("shared/pirate", "ab" * 32)
FACTS = AdapterFacts(8, 1024, ["q_proj"], [])
STATS = EngineStats(0, 0, 0, 8, 8, 0, 16, 1, 0, 0, 0, 0, 0, 0, 0)


class Wire:
    """A client, and what it sent."""

    def __init__(self, max_pending_tokens: int = 100) -> None:
        self.sent: list[ToEngine] = []
        self.client = EngineClient(self.sent.append, max_pending_tokens=max_pending_tokens)

    def request(self) -> AddRequest:
        return AddRequest(self.client.requests.new_id(), [1, 2], SamplingParams(seed=0, max_tokens=10))

    def step(self, *outputs: RequestOutput) -> None:
        self.client.deliver(StepOutput(list(outputs), STATS))

    @property
    def wishes(self) -> list[WantAdapter]:
        return [message for message in self.sent if isinstance(message, WantAdapter)]

    def say(self, order: int, tier: Residency = Residency.HOST, key: AdapterKey = KEY, **fields: Any) -> None:
        """Say that an adapter is registered with the engine, and in this tier."""
        status = AdapterStatus(key, order, tier, facts=None if key.parts else FACTS)
        self.client.deliver(AdaptersChanged([msgspec.structs.replace(status, **fields)]))

    def say_gone(self, order: int) -> None:
        self.client.deliver(AdaptersChanged([AdapterStatus(KEY, order, Residency.DISK)]))

    @property
    def aborted(self) -> list[list[int]]:
        return [message.request_ids for message in self.sent if isinstance(message, Abort)]


@pytest.fixture
async def wire() -> Wire:
    return Wire()
