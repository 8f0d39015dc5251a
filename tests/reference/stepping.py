"""Steps of an engine core in the test's own process, paced as the engine process paces them."""

import time

from engine.core import EngineCore
from engine.messages import FromEngine
from engine.step import STALLED_SECONDS


def step(core: EngineCore) -> list[FromEngine]:
    """One step. After one without events the loader threads get the interpreter, as they do in `engine.process.serve`.

    They run at a lower priority than a loop of empty steps, which would keep them from loading for seconds.
    """
    events = core.step()
    if not events:
        time.sleep(STALLED_SECONDS)
    return events
