"""Steps of an engine core in the test's own process, paced as the engine process paces them."""

import time

from loraplex_engine.core import EngineCore
from loraplex_engine.link.messages import FromEngine
from loraplex_engine.scheduling.step import STALLED_SECONDS


def step(core: EngineCore) -> list[FromEngine]:
    """One step. After one without events the loader threads get the interpreter, as they do in `process.serve`.

    They run at a lower priority than a loop of empty steps, which would keep them from loading for seconds.
    """
    events = core.step()
    if not events:
        time.sleep(STALLED_SECONDS)
    return events
