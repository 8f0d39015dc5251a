"""A client of one engine, and what it sent."""

import pytest

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import (
    Abort,
    AdapterLoaded,
    AddRequest,
    EngineStats,
    RequestOutput,
    StepOutput,
    ToEngine,
)
from loraplex_engine.link.sampling_params import SamplingParams

KEY = AdapterKey("shared/pirate", "ab" * 32)
LOADED = AdapterLoaded(KEY, 8, 1024, ["q_proj"], [])
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
    def aborted(self) -> list[list[int]]:
        return [message.request_ids for message in self.sent if isinstance(message, Abort)]


@pytest.fixture
async def wire() -> Wire:
    return Wire()
