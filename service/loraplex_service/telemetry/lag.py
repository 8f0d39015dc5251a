"""Measures how long the event loop is blocked: meanwhile no caller is served."""

import asyncio

from loraplex_service.telemetry.series import Distribution

PROBE_SECONDS = 0.05
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


async def observe_lag(lags: Distribution) -> None:
    """Observe, again and again, how late the loop runs a task that is due. Never returns."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PROBE_SECONDS
        await asyncio.sleep(PROBE_SECONDS)
        lags.observe(max(loop.time() - due, 0.0))
